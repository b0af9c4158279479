"""Quantizers in words: one text for each, read and written everywhere.

    gptq(3)     gptq(2, group_size=64)     hadamard(vptq(2, outliers=0.01))     low_rank(rtn(3), 4)

A name of the registry and the fields of its dataclass, as a call in Python: the first and the required ones by their
place, others by name where they differ from their defaults. `read(write(quantizer)) == quantizer` for every registered
quantizer, third parties' too. Such texts stand on the command line, in plans, in databases of candidates, in reports.
"""

import ast
import dataclasses
import difflib
from typing import Any

from quantkit.core.errors import QuantkitError, UnknownName
from quantkit.core.protocols import Quantizer
from quantkit.core.registry import names, resolve

GROUP = "quantkit.quantizers"
_LIKE = "write a method and its settings, such as gptq(3), hadamard(vptq(2)) or gptq(4, group_size=64)"


def write(quantizer: Any) -> str:
    """A quantizer's text; what Python prints of it where its class is in no registry, which `read` refuses."""
    name = _name_of(type(quantizer))
    if name is None:
        return repr(quantizer)
    words: list[str] = []
    left_out = False
    for index, entry in enumerate(entry for entry in dataclasses.fields(quantizer) if entry.init):
        value = getattr(quantizer, entry.name)
        if index and _has_default(entry) and value == _default(entry):
            left_out = True
            continue
        by_name = left_out or (index and _has_default(entry))
        words.append(f"{entry.name}={_written(value)}" if by_name else _written(value))
    return f"{name}({', '.join(words)})"


def read(text: str) -> Any:
    """The quantizer that a text stands for.

    Raises:
        QuantkitError: no such method or setting, a value that the method refuses, or no text of this form.
    """
    node = _parsed(text)
    if isinstance(node, ast.Tuple):
        raise QuantkitError(f"{text!r} are several quantizers, and one is wanted")
    return _made(node, text)


def read_several(text: str) -> list[Any]:
    """The quantizers of a text with commas between them, each once, in order.

    Raises:
        QuantkitError: see `read`.
    """
    node = _parsed(text)
    made = [_made(part, text) for part in (node.elts if isinstance(node, ast.Tuple) else [node])]
    return list(dict.fromkeys(made))


def make(name: str, *values: Any, **settings: Any) -> Any:
    """A quantizer by its registered name.

    Args:
        name: of the method.
        values, settings: of its dataclass, by place and by name. A whole number of bits may be a float.

    Raises:
        UnknownName: no such method.
        QuantkitError: a setting that the method does not have or lacks, or a value that it refuses.
    """
    kind = resolve(GROUP, name)
    entries = [entry for entry in dataclasses.fields(kind) if entry.init]
    known, placed = [entry.name for entry in entries], [entry.name for entry in entries if not entry.kw_only]
    if len(values) > len(placed):
        raise QuantkitError(f"{name} has {len(placed)} settings ({', '.join(placed)}), and {len(values)} are given")
    given = dict(zip(placed, values, strict=False))
    for key, value in settings.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise QuantkitError(f"{name} has no setting {key!r}; it has {', '.join(sorted(known))}{hint}")
        if key in given:
            raise QuantkitError(f"{name} is given {key} twice")
        given[key] = value
    if isinstance(bits := given.get("bits"), float) and bits.is_integer():
        given["bits"] = int(bits)
    for entry in entries:
        value = given.get(entry.name)
        if entry.type in (Quantizer, "Quantizer") and entry.name in given and not isinstance(value, Quantizer):
            raise QuantkitError(f"{name} wraps a method, and {value!r} is none; {_LIKE}")
    missing = [entry.name for entry in entries if not _has_default(entry) and entry.name not in given]
    if missing:
        raise QuantkitError(f"{name} needs {missing[0]}")
    try:
        return kind(**given)
    except (TypeError, ValueError) as error:
        raise QuantkitError(f"{name}: {error}") from error


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise QuantkitError(f"{text!r} is no quantizer; {_LIKE}") from error


def _made(node: ast.expr, text: str) -> Any:
    """The quantizer of a call, or of a name alone."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    starred = any(isinstance(value, ast.Starred) for value in call.args) or any(k.arg is None for k in call.keywords)
    if not isinstance(call.func, ast.Name) or starred:
        raise QuantkitError(f"{text!r} is no quantizer; {_LIKE}")
    repeated = [k.arg for i, k in enumerate(call.keywords) if k.arg in [other.arg for other in call.keywords[:i]]]
    if repeated:
        raise QuantkitError(f"{call.func.id} is given {repeated[0]} twice")
    values = [_value(value, text) for value in call.args]
    return make(call.func.id, *values, **{str(k.arg): _value(k.value, text) for k in call.keywords})


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in names(GROUP)):
        return _made(node, text)
    if isinstance(node, ast.Name):
        return node.id  # a word, such as order=group
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise QuantkitError(f"{text!r}: {ast.unparse(node)!r} is no value; {_LIKE}") from error


def _written(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return write(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


def _name_of(kind: type) -> str | None:
    """The name under which a class is registered, or None."""
    for name in names(GROUP):
        try:
            if resolve(GROUP, name) is kind:
                return name
        except (ImportError, AttributeError, UnknownName):  # another package's entry that does not load
            continue
    return None


def _has_default(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    assert entry.default_factory is not dataclasses.MISSING
    return entry.default_factory()
