"""Names -> classes. Built-ins stand in one lazy table; third parties add entry points with the same strings."""

from importlib import import_module
from importlib.metadata import entry_points

from quantkit.errors import UnknownName

_BUILT_IN = {
    "quantkit.formats": {
        "dense": "quantkit.formats.dense:DenseWeight",
        "int_group": "quantkit.formats.int_group:IntGroupWeight",
        "int_group_arranged": "quantkit.formats.int_group:ArrangedIntGroupWeight",
        "codebook": "quantkit.formats.codebook:CodebookWeight",
        "low_rank": "quantkit.formats.low_rank:LowRankWeight",
        "pyramid": "quantkit.formats.pyramid:PyramidWeight",
        "rotated": "quantkit.formats.rotated:RotatedWeight",
        "tied": "quantkit.formats.tied:TiedWeight",
        "trellis": "quantkit.formats.trellis:TrellisWeight",
    },
    "quantkit.quantizers": {
        "gptq": "quantkit.quantizers.gptq:GPTQ",
        "pyramid": "quantkit.quantizers.pyramid:Pyramid",
        "vptq": "quantkit.quantizers.vptq:VPTQ",
        "rtn": "quantkit.quantizers.rtn:RTN",
        "sparse": "quantkit.quantizers.sparse:Sparse",
        "trellis": "quantkit.quantizers.trellis:Trellis",
    },
}


def names(group: str) -> list[str]:
    """All names of a group ("quantkit.formats" or "quantkit.quantizers"), sorted."""
    return sorted(_table(group))


def resolve(group: str, name: str) -> type:
    """The class that `name` stands for.

    Raises:
        UnknownName: no built-in and no installed package offers it.
    """
    table = _table(group)
    name = name if name in table else name.lower()
    if name not in table:
        raise UnknownName(group.rsplit(".", 1)[1].removesuffix("s"), name, table)
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)


def _table(group: str) -> dict[str, str]:
    table = dict(_BUILT_IN[group])
    for entry in entry_points(group=group):
        if table.setdefault(entry.name, entry.value) != entry.value:
            raise ValueError(f"{group}: {entry.value} and {table[entry.name]} both claim the name {entry.name!r}")
    return table
