"""The documents' tables of measured figures, made from `evals/results/*.json`, and the sentences that state such.

    python -m quantkit.evals.benchmarks.results             writes the tables into the documents
    python -m quantkit.evals.benchmarks.results --check     fails, with a diff, where a document says something else

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `quantkit.evals.benchmarks.tables` describes each as
data: which records of which file make a row, and how its cells are formatted. Sentences are written by hand. Those with
figures are described there too, word by word with gaps for the figures, and have to stand in their document like that,
line breaks aside.
"""

import argparse
import difflib
import json
import re
import string
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from quantkit.evals.benchmarks.claims import CLAIMS, Claim, Count, Figure, Less, Median, More, Ratio, Value
from quantkit.evals.benchmarks.table import Pick, Printed, Table
from quantkit.evals.benchmarks.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)
"""A table's place in a document: its opening mark, its name, what it holds, its closing mark."""


class Number(float):
    """A recorded number whose format may begin with a scale: k for x 1000, c for x 100, K, M and G for
    / 2^10, 2^20 and 2^30."""

    def __format__(self, spec: str) -> str:
        scale = {"k": 1000.0, "c": 100.0, "K": 2**-10, "M": 2**-20, "G": 2**-30}.get(spec[:1])
        return format(float(self), spec) if scale is None else format(float(self) * scale, spec[1:])


@cache
def recorded(file: str, root: Path) -> Any:
    """What a file of evals/results holds, all its numbers as `Number`."""
    text = (root / "evals" / "results" / file).read_text()
    return json.loads(text, parse_float=Number, parse_int=Number)


def record(where: Mapping[str, Any], file: str, at: str, root: Path) -> Mapping[str, Any]:
    """The one record of a file that has these values.

    Args:
        where: field -> value; of texts a pattern as a shell's.
        file: in evals/results.
        at: key of the list of records; "" where the file is the list. What it leads to may be the record itself.
        root: of the source tree.

    Raises:
        ValueError: no record or several.
    """
    fits = records(where, file, at, root)
    if len(fits) != 1:
        raise ValueError(f"{file}: {len(fits)} records of {at or 'the file'} have {dict(where)}, and one is wanted")
    return fits[0]


def records(where: Mapping[str, Any], file: str, at: str, root: Path) -> list[Mapping[str, Any]]:
    """All records of a file that have these values; the arguments are `record`'s."""
    found = recorded(file, root)
    for key in filter(None, at.split(".")):
        found = found[key]
    rows = [found] if isinstance(found, dict) else found
    return [row for row in rows if all(_is(row.get(field), value) for field, value in where.items())]


def _is(found: Any, wanted: Any) -> bool:
    return fnmatchcase(str(found), wanted) if isinstance(wanted, str) else bool(found == wanted)


def render(table: Table | Printed, root: Path = ROOT) -> str:
    """A table in Markdown.

    Raises:
        ValueError: a row does not have as many cells as the head, or picks no record or several.
    """
    if isinstance(table, Printed):
        return table.make(recorded(table.file, root))
    head = [cell.strip() for cell in table.head.split("|")]
    lines = [head, ["---"] * len(head)]
    for label, parts in table.rows.items():
        cells = [cell.strip() for cell in label.split("|")]
        for part in parts:
            cells += _cells(part, table, root)
        if len(cells) != len(head):
            raise ValueError(f"{label}: {len(cells)} cells, and the table has {len(head)} columns")
        lines.append(cells)
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)


def _cells(part: Mapping[str, Any] | Pick | str, table: Table, root: Path) -> list[str]:
    if isinstance(part, str):
        return [part]
    pick = part if isinstance(part, Pick) else Pick(part)
    found = record({**table.where, **pick.where}, table.file, pick.at or table.at, root)
    return [cell.format_map(found) for cell in pick.cells or table.cells]


def figure(asked: Figure, root: Path = ROOT) -> Any:
    """A figure that a sentence states; a list of them where a `Value` is of one.

    Raises:
        ValueError: it picks no record or several.
    """
    match asked:
        case Value():
            found = record(asked.where, asked.file, asked.at, root)
            return string.Formatter().get_field(asked.name, (), found)[0]
        case Median():
            return Number(median(figure(asked.of, root)))
        case Count():
            return Number(len(records(asked.where, asked.file, asked.at, root)))
        case Ratio():
            return Number(figure(asked.of, root) / figure(asked.to, root))
        case Less():
            return Number(1 - figure(asked.of, root) / figure(asked.than, root))
        case More():
            return Number(figure(asked.of, root) / figure(asked.than, root) - 1)


def sentence(claim: Claim, root: Path = ROOT) -> str:
    """A sentence with its figures."""
    return claim.text.format(*(figure(each, root) for each in claim.figures))


def filled(text: str, root: Path = ROOT) -> str:
    """A document with all its tables made anew.

    Raises:
        KeyError: a mark names a table that there is not.
    """
    return PLACE.sub(lambda found: f"{found[1]}\n{render(TABLES[found[2]], root)}\n\n{found[3]}", text)


def documents(root: Path = ROOT) -> list[Path]:
    """All documents that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def problems(root: Path = ROOT) -> Iterator[str]:
    """What differs between the documents of a source tree and its data, each in words or as a diff."""
    placed = []
    for page in documents(root):
        text, name = page.read_text(), str(page.relative_to(root))
        placed += [found[2] for found in PLACE.finditer(text)]
        lines = difflib.unified_diff(text.splitlines(), filled(text, root).splitlines(), name, "from data", lineterm="")
        difference = "\n".join(lines)
        if difference:
            yield difference
    for name in sorted(set(TABLES) ^ set(placed)):
        yield f"{name}: a table that stands in no document"
    for claim in CLAIMS:
        wanted = sentence(claim, root)
        if wanted not in " ".join((root / claim.page).read_text().split()):
            yield f"{claim.page} should say: {wanted}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where documents and data differ")
    arguments = parser.parse_args()
    if not (ROOT / "docs").is_dir():
        sys.exit(f"{ROOT} holds no documents; this command needs the source tree")
    if not arguments.check:
        for page in documents():
            text = page.read_text()
            if filled(text) != text:
                page.write_text(filled(text))
                print(f"written: {page.relative_to(ROOT)}")
    found = list(problems())
    print("\n".join(found) or f"{len(TABLES)} tables and {len(CLAIMS)} sentences say what the data say")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
