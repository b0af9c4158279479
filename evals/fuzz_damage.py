"""Damage to files, as disks, transfers, editors and other programs do it: what `quantkit.evals.fuzz` tries.

Each damage is drawn by a `random.Random`, so that a number repeats it, and says in words what it did. JSON is changed
as a tree (values replaced by what does not belong there, left out, doubled, renamed, nested), safetensors files by
their header, tables of text row by row, and all of them as bytes and as entries of their folder.
"""

import copy
import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tree = Any
"""Parsed JSON."""
ODD_TEXT = ["", " ", "\x00", "\u202e\x00", "\U0001f4a5" * 3, "a\nb", "\ud800", "x" * 5000, "../../etc", "[red]"]
NUMBERS = [0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 10**30, -(2**63), 0.0, 0.5, -1.5, 1e308]
NUMBERS += [float("nan"), float("inf")]
OTHERS: list[Any] = [None, True, False, [], {}, [0], [[]], {"": None}, ["x"], [None], {"format": "dense"}]
DTYPES = ["BOOL", "U8", "I8", "I16", "I32", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "C64", "U64", "Q4", ""]
MOST_PLACES = 4
"""Values of a tree that are changed together."""


@dataclass(frozen=True)
class Damage:
    """What was done.

    Attributes:
        words: which file, and what to it.
        payload: whether bytes of tensors changed, which only a checksum can tell.
    """

    words: str
    payload: bool = False


def damage(folder: Path, names: list[str], draw: random.Random) -> Damage:
    """Damages one file of a folder.

    Args:
        folder: with the files.
        names: relative to it, of those that may be damaged; a missing one is passed over.
        draw: decides.
    """
    name = draw.choice(names)
    path = folder / name
    if not path.is_file() or path.is_symlink():
        return Damage(f"{name}: no file any more")
    ways = _WAYS.get(path.suffix, [])
    way = draw.choice(ways) if ways and draw.random() < 0.75 else draw.choice(_OF_ANY_FILE)
    try:
        words, payload = way(path, draw)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error):
        words, payload = _cut(path, draw)  # it was damaged before, and is no JSON, or has no header, any more
    return Damage(f"{name}: {words}", payload)


def places(tree: Tree, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the root, branches before what is in them."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed_tree(tree: Tree, draw: random.Random) -> tuple[Tree, str]:
    """A tree with one to four values changed, and which."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(min(draw.randint(1, MOST_PLACES), draw.randint(1, MOST_PLACES))):
        known = list(places(tree))
        if not known:
            break
        depth = draw.randint(1, max(map(len, known)))
        path = draw.choice([place for place in known if len(place) <= depth])
        said.append(f"{'.'.join(map(str, path))[:80]} {_change(tree, path, draw)}")
    return tree, "; ".join(said) or "nothing to change"


def _change(tree: Tree, path: tuple[Any, ...], draw: random.Random) -> str:
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    key, old = path[-1], inside[path[-1]]
    what = draw.choice(["replaced", "replaced", "replaced", "nudged", "left out", "renamed", "exchanged", "nested"])
    if what == "left out":
        del inside[key]
        return what
    if what == "renamed" and isinstance(inside, dict):
        new = draw.choice([*ODD_TEXT, f"{key} ", str(key).upper(), *map(str, inside)])
        inside[new] = inside.pop(key)
        return f"renamed {new[:20]!r}"
    if what == "exchanged":
        keys: list[Any] = [*inside] if isinstance(inside, dict) else [*range(len(inside))]
        other = draw.choice(keys)
        inside[key], inside[other] = inside[other], inside[key]
        return f"exchanged with {str(other)[:40]}"
    new = _nested(old, draw) if what == "nested" else _nudged(old, draw) if what == "nudged" else _other(draw)
    inside[key] = new
    return f"= {json.dumps(new)[:40]}"


def _other(draw: random.Random) -> Tree:
    kinds: list[list[Any]] = [ODD_TEXT, NUMBERS, OTHERS, DTYPES]
    return copy.deepcopy(draw.choice(draw.choice(kinds)))


def _nested(old: Tree, draw: random.Random) -> Tree:
    """The same value deep in lists or objects."""
    for _ in range(draw.choice([1, 2, 12, 60])):
        old = [old] if draw.random() < 0.5 else {"base": old, "format": "rotated"}
    return old


def _nudged(old: Tree, draw: random.Random) -> Tree:
    """A value of the same type."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return draw.choice([old + 1, old - 1, 2 * old, -old, old // 2, 16 * old, float(old), str(old)])
    if isinstance(old, float):
        return draw.choice([-old, 2 * old, old / 2, 0.0])
    if isinstance(old, str):
        number = re.sub(r"\d+", lambda _: str(draw.choice(NUMBERS)), old, count=draw.randint(0, 2))
        return draw.choice([old[:-1], f"{old}x", old.upper(), old[::-1], [old], number, number])
    if isinstance(old, list):
        return draw.choice([old[::-1], old[:-1], old * 2, [*old, 1], dict(enumerate(map(str, old)))])
    return draw.choice([[*old], [*old.values()], {str(key).upper(): value for key, value in old.items()}]) if old else 1


def _json_tree(path: Path, draw: random.Random) -> tuple[str, bool]:
    tree, said = changed_tree(json.loads(path.read_text("utf-8")), draw)
    path.write_text(json.dumps(tree, indent=draw.choice([None, 2])), encoding="utf-8")
    return said, False


def _json_text(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Changes that a tree does not show: doubled keys, deep nesting, another root, other encodings."""
    text = path.read_text("utf-8")
    tree = json.loads(text)
    key = draw.choice(list(tree)) if isinstance(tree, dict) and tree else "key"
    name = json.dumps(key)
    again = text.rstrip()[:-1] + f", {name}: {json.dumps(_other(draw))}}}"
    ways: dict[str, bytes] = {
        f"{name} twice": again.encode(),
        "its value alone": json.dumps(tree[key] if isinstance(tree, dict) and tree else 1).encode(),
        "another root": json.dumps(_other(draw)).encode(),
        "in a list": f"[{text}]".encode(),
        "100,000 brackets": b"[" * 100_000,
        "100,000 objects": b'{"a":' * 100_000,
        "a number of 10,000 digits": text.rstrip()[:-1].encode() + b', "n": ' + b"9" * 10_000 + b"}",
        "UTF-16": text.encode("utf-16"),
        "with a byte order mark": text.encode("utf-8-sig"),
        "Latin-1 in it": text.encode()[:-2] + b"\xe9\xff" + text.encode()[-2:],
        "twice": (text + text).encode(),
    }
    said = draw.choice(list(ways))
    path.write_bytes(ways[said])
    return said, False


def header_of(content: bytes) -> tuple[dict[str, Any], int]:
    """(the parsed header of a safetensors file, where its payload begins)."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), 8 + length


def with_header(header: bytes, payload: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(header)) + header + payload


def _header_tree(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Any value of the header."""
    content = path.read_bytes()
    header, start = header_of(content)
    tree, said = changed_tree(header, draw)
    path.write_bytes(with_header(json.dumps(tree).encode("utf-8", "surrogatepass"), content[start:]))
    return f"header, {said}", False


def _header_entries(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Entries that stay well formed: other types, shapes of as many numbers, exchanged places and names."""
    content = path.read_bytes()
    header, start = header_of(content)
    names = [name for name in header if name != "__metadata__"]
    if len(names) < 2:
        return "too few tensors to exchange", False
    one, other = draw.sample(names, 2)
    alike = [name for name in names if header[name]["shape"] == header[one]["shape"] and name != one]
    what = draw.choice(["dtype", "shape", "exchange", "exchange alike", "rename", "drop", "double"])
    if what == "dtype":
        same = {"I32": "F32", "F32": "I32", "F16": "BF16", "BF16": "F16", "U8": "I8", "I8": "U8"}
        header[one]["dtype"] = draw.choice([same.get(header[one]["dtype"], "F16"), *DTYPES])
    elif what == "shape":
        shape = header[one]["shape"]
        header[one]["shape"] = draw.choice([shape[::-1], [*shape, 1], [1, *shape], [2**40, *shape[1:]], [], [-1]])
    elif what.startswith("exchange"):
        other = draw.choice(alike) if alike and what.endswith("alike") else other
        header[one], header[other] = header[other], header[one]
    elif what == "rename":
        header[draw.choice(["x", f"{one}.more", one.upper(), f"{other}.zeros"])] = header.pop(one)
    elif what == "drop":
        del header[one]
    text = json.dumps(header)
    if what == "double":
        text = text[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}}}"
    path.write_bytes(with_header(text.encode(), content[start:]))
    return f"header, {what} {one} ({other})", False


def _header_length(path: Path, draw: random.Random) -> tuple[str, bool]:
    content = path.read_bytes()
    length = draw.choice([0, 1, 2**63, 2**64 - 1, 2**31, len(content), len(content) - 8, draw.randrange(len(content))])
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    return f"header of {length} bytes", False


def _payload_bit(path: Path, draw: random.Random) -> tuple[str, bool]:
    content = bytearray(path.read_bytes())
    _, start = header_of(bytes(content))
    if start == len(content):
        return "no payload", False
    flips = draw.choice([1, 1, 1, 8, 200])
    for _ in range(flips):
        content[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{flips} bits of the payload flipped", True


def _rows(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Lines of a text, a table or JSON lines: damaged, left out, repeated, of another kind."""
    lines = path.read_bytes().split(b"\n")
    at = draw.randrange(len(lines))
    odd = json.dumps({draw.choice(["text", "messages", "input_ids", "x", ""]): _other(draw)}).encode()
    ways = {
        "damaged": lines[at][: draw.randrange(1 + len(lines[at]))],
        "a row of something else": odd,
        "a value": json.dumps(_other(draw)).encode(),
        "quotes": lines[at].replace(b'"', draw.choice([b'""', b"'", b""])),
        "separators": lines[at].replace(b",", draw.choice([b";", b",,", b"\t", b"\r"])),
        "NUL": lines[at] + b"\0",
        "deep": b"[" * 50_000,
        "no UTF-8": lines[at] + b"\xff",
        "long": lines[at] * 2000,
    }
    said = draw.choice(list(ways))
    lines[at] = ways[said]
    path.write_bytes(b"\n".join(lines))
    return f"line {at + 1}: {said}", False


def _cut(path: Path, draw: random.Random) -> tuple[str, bool]:
    content = path.read_bytes()
    kept = draw.choice([0, 1, 7, 8, 9, len(content) // 2, len(content) - 1, draw.randrange(1 + len(content))])
    path.write_bytes(content[:kept])
    return f"cut to {kept} of {len(content)} bytes", False


def _bits(path: Path, draw: random.Random) -> tuple[str, bool]:
    """Bits anywhere: of a safetensors file mostly payload, so that some go to its first bytes."""
    content = bytearray(path.read_bytes())
    if not content:
        return "empty as it is", False
    limit = draw.choice([len(content), min(len(content), 600)])
    payload = False
    for _ in range(draw.choice([1, 1, 4, 64])):
        at = draw.randrange(limit)
        payload |= _is_payload(path, bytes(content), at)
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"bits flipped in the first {limit} bytes", payload


def _is_payload(path: Path, content: bytes, at: int) -> bool:
    if path.suffix in (".pt", ".parquet"):
        return True
    return path.suffix == ".safetensors" and at >= 8 + struct.unpack("<Q", content[:8])[0]


def _more(path: Path, draw: random.Random) -> tuple[str, bool]:
    tail = draw.choice([b"\0", b"}", b"\n\n{}", bytes(draw.randrange(256) for _ in range(64)), path.read_bytes()])
    path.write_bytes(path.read_bytes() + tail)
    return f"{len(tail)} bytes behind it", False


def _noise(path: Path, draw: random.Random) -> tuple[str, bool]:
    path.write_bytes(draw.randbytes(draw.choice([1, 100, 5000])))
    return "noise", False


def _gone(path: Path, _draw: random.Random) -> tuple[str, bool]:
    path.unlink()
    return "gone", False


def _folder(path: Path, _draw: random.Random) -> tuple[str, bool]:
    path.unlink()
    path.mkdir()
    return "a folder", False


def _link(path: Path, draw: random.Random) -> tuple[str, bool]:
    target = draw.choice(["nowhere", path.name, "/proc/self/mem", "/dev/null", "."])
    path.unlink()
    path.symlink_to(target)
    return f"a link to {target}", False


def _another(path: Path, draw: random.Random) -> tuple[str, bool]:
    """The content of another file of its folder, or its own beside it under a name that means something."""
    others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
    if others and draw.random() < 0.5:
        other = draw.choice(others)
        shutil.copyfile(other, path)
        return f"what {other.name} holds", False
    names = ["model.safetensors", "adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json"]
    name = draw.choice([*names, "generation_config.json", "quantkit_files.json", "tokenizer.json", "custom.py"])
    if (path.parent / name).exists():
        return f"{name} is there", False
    shutil.copyfile(path, path.parent / name)
    return f"also as {name}", False


Way = Callable[[Path, random.Random], tuple[str, bool]]
"""Damages a file; gives words, and whether it is payload that changed."""
_OF_ANY_FILE: list[Way] = [_cut, _bits, _more, _noise, _gone, _folder, _link, _another]
_WAYS: dict[str, list[Way]] = {
    ".json": [_json_tree, _json_tree, _json_tree, _json_text],
    ".safetensors": [_header_tree, _header_entries, _header_entries, _header_length, _payload_bit, _payload_bit],
    ".jsonl": [_rows],
    ".csv": [_rows],
    ".txt": [_rows],
    ".files": [_rows],
    ".lock": [_rows],
}
"""By suffix."""
