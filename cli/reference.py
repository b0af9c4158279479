"""The command line's reference, written from the command line itself.

python -m quantkit.cli.reference docs/reference/cli.md
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from quantkit.cli.main import app


def pages() -> Iterator[str]:
    """The page, line by line."""
    program: Any = typer.main.get_command(app)
    yield "# The command line"
    yield ""
    yield "<!-- Written by `python -m quantkit.cli.reference docs/reference/cli.md`; change the commands instead. -->"
    yield ""
    yield "`quantkit VERB --help` shows the same. " + " ".join(str(program.help).split())
    hints = {entry.name: get_type_hints(entry.callback) for entry in app.registered_commands if entry.callback}
    for name, command in program.commands.items():
        yield ""
        yield f"## quantkit {name}"
        yield ""
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        called = " ".join(str(argument.name).upper() for argument in arguments)
        yield f"    quantkit {name} {called} [OPTIONS]".replace("  [", " [")
        yield ""
        yield "\n\n".join(" ".join(part.split()) for part in str(command.help).split("\n\n"))
        yield ""
        yield "| | | default |"
        yield "|---|---|---|"
        for parameter in command.params:
            yield _row(parameter, hints[name].get(parameter.name, str))


def _row(parameter: Any, hint: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{str(parameter.name).upper()}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or _kind(hint)}"
        names = " / ".join(f"`{option}{value}`" for option in (*parameter.opts, *parameter.secondary_opts))
    text = " ".join(str(parameter.help or "").split()).replace("|", "\\|")
    return f"| {names} | {text} | {_default(parameter)} |"


def _kind(hint: Any) -> str:
    """What a value is: its choices, a number, a word, a path."""
    if get_origin(hint) in (Union, UnionType, list):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
        return _kind(hint)
    if get_origin(hint) is Literal:
        return "\\|".join(map(str, get_args(hint)))
    return {int: "N", float: "X", Path: "PATH"}.get(hint, "TEXT")


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if value is None or value is False or parameter.required or "unset" in str(value).lower():
        return ""
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m quantkit.cli.reference FILE")
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(pages()) + "\n")


if __name__ == "__main__":
    main()
