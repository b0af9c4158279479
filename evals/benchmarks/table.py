"""What a document's table is: which records of which file of evals/results make which row.

A cell is a format of Python's over one record; a number's format may begin with k (x 1000), c (x 100), K (/ 2^10),
M (/ 2^20) or G (/ 2^30). Texts of a `where` are patterns as a shell's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Where = Mapping[str, Any]


@dataclass(frozen=True)
class Pick:
    """A record that is shown otherwise than a table's others.

    Attributes:
        where: field -> value of the one record.
        cells: formats; None for the table's.
        at: of the records; None for the table's.
    """

    where: Where
    cells: tuple[str, ...] | None = None
    at: str | None = None


@dataclass(frozen=True)
class Table:
    """A table of a document.

    Attributes:
        file: in evals/results.
        head: of the columns, with | between them.
        cells: formats of the cells that a record gives.
        rows: label (with | between the cells of several columns) -> records side by side; a text is a cell as it is.
        at: key of the list of records in the file; "" where the file is the list.
        where: what all its records have in common.
    """

    file: str
    head: str
    cells: tuple[str, ...]
    rows: Mapping[str, Sequence[Where | Pick | str]]
    at: str = ""
    where: Where = field(default_factory=dict)


@dataclass(frozen=True)
class Printed:
    """A table that the command which measures it prints in the same way.

    Attributes:
        file: in evals/results.
        make: gives the table in Markdown, of what the file holds.
    """

    file: str
    make: Callable[[Any], str]
