"""Names -> classes. Built-ins stand in one lazy table; third parties add entry points with the same strings.

Entry points are looked for once a process, for that reads the metadata of every installed package, and once more for a
name that is not known: a package that was installed meanwhile is found. `rescan` forgets one that was removed.
"""

from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points

from quantkit.core.errors import UnknownName

_BUILT_IN = {
    "quantkit.formats": {
        "dense": "quantkit.formats.dense:DenseWeight",
        "int_group": "quantkit.formats.int_group:IntGroupWeight",
        "int_group_arranged": "quantkit.formats.int_group:ArrangedIntGroupWeight",
        "codebook": "quantkit.formats.codebook:CodebookWeight",
        "low_rank": "quantkit.formats.low_rank:LowRankWeight",
        "ordered": "quantkit.formats.ordered:OrderedWeight",
        "pyramid": "quantkit.formats.pyramid:PyramidWeight",
        "rotated": "quantkit.formats.rotated:RotatedWeight",
        "scaled": "quantkit.formats.scaled:ScaledWeight",
        "tied": "quantkit.formats.tied:TiedWeight",
        "trellis": "quantkit.formats.trellis:TrellisWeight",
    },
    "quantkit.quantizers": {
        "gptq": "quantkit.quantizers.gptq:GPTQ",
        "hadamard": "quantkit.quantizers.hadamard:Hadamard",
        "low_rank": "quantkit.quantizers.low_rank:LowRank",
        "pyramid": "quantkit.quantizers.pyramid:Pyramid",
        "vptq": "quantkit.quantizers.vptq:VPTQ",
        "rtn": "quantkit.quantizers.rtn:RTN",
        "sparse": "quantkit.quantizers.sparse:Sparse",
        "target_shift": "quantkit.quantizers.target_shift:TargetShift",
        "trellis": "quantkit.quantizers.trellis:Trellis",
    },
    "quantkit.tunables": {
        "codebook": "quantkit.tuning.parts.codebook:TunableCodebook",
        "int_group": "quantkit.tuning.parts.int_group:TunableIntegers",
        "pyramid": "quantkit.tuning.parts.pyramid:TunablePyramid",
        "trellis": "quantkit.tuning.parts.trellis:TunableTrellis",
    },
}


def names(group: str) -> list[str]:
    """All names of a group ("quantkit.formats", "quantkit.quantizers" or "quantkit.tunables"), sorted.

    Raises:
        ValueError: two packages claim one.
    """
    return sorted(_table(group))


def resolve(group: str, name: str) -> type:
    """The class that `name` stands for.

    Raises:
        UnknownName: no built-in and no installed package offers it.
        ValueError: two packages claim it.
    """
    table = _table(group)
    if name not in table and name.lower() not in table:
        rescan()
        table = _table(group)
    name = name if name in table else name.lower()
    if name not in table:
        raise UnknownName(group.rsplit(".", 1)[1].removesuffix("s"), name, table)
    module, attribute = table[name].split(":")
    found: type = getattr(import_module(module), attribute)
    return found


def rescan() -> None:
    """Looks for installed packages anew at the next question."""
    _installed.cache_clear()


def _table(group: str) -> dict[str, str]:
    table = dict(_BUILT_IN[group])
    for name, value in _installed(group):
        if table.setdefault(name, value) != value:
            raise ValueError(f"{group}: {value} and {table[name]} both claim the name {name!r}")
    return table


@lru_cache
def _installed(group: str) -> tuple[tuple[str, str], ...]:
    return tuple((entry.name, entry.value) for entry in entry_points(group=group))
