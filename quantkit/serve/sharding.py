"""Which part of a packed layer a rank holds where several share it, and what cannot be shared.

A column-parallel layer is divided by its outputs, a row-parallel one by its inputs. A format says where it can be cut
(`QuantizedWeight.cut`): between groups, vectors or rings, and not through one. As cutting needs the layout alone, what
cannot be shared is refused before anything is read: the weight may be on the meta device.
"""

from quantkit.core.errors import QuantkitError
from quantkit.core.weight import SIDES, QuantizedWeight

LARGEST = 16
"""Numbers of ranks that are tried out for an error's advice."""


def part(name: str, weight: QuantizedWeight, shape: tuple[int, int], rank: int, ranks: int) -> QuantizedWeight:
    """What one of several ranks holds of a layer.

    Args:
        name: of the layer, for errors.
        weight: all of it.
        shape: (out_features, in_features) of a rank's part. Where fewer parts than ranks fill the weight, as with few
            key-value heads, neighbouring ranks hold the same one.
        rank, ranks: the index of this rank, and how many there are.

    Returns:
        A weight of `shape`, views where they can be.

    Raises:
        QuantkitError: parts of that size do not fill the weight, or its format keeps together what they would divide.
    """
    for dim, own in enumerate(shape):
        size = weight.shape[dim]
        parts = size // own
        if size % own or ranks % parts:
            raise QuantkitError(
                f"{name} is {list(weight.shape)} in the checkpoint, and the model has {list(shape)} for each of "
                f"{ranks} ranks; the checkpoint is damaged, or of another model"
            )
        start = rank * parts // ranks * own
        try:
            weight = weight.cut(dim, start, start + own)
        except ValueError as error:
            able = [str(count) for count in range(1, LARGEST + 1) if divides(weight, dim, count)]
            advice = " or ".join(filter(None, [", ".join(able[:-1]), able[-1]]))
            raise QuantkitError(
                f"{name}: {size} {SIDES[dim]} cannot be shared by {parts} ranks: {error}; "
                f"a tensor_parallel_size of {advice} would do for this layer"
            ) from error
    return weight


def divides(weight: QuantizedWeight, dim: int, count: int) -> bool:
    """Whether a weight can be cut into so many equal parts of its outputs (dim 0) or inputs (dim 1)."""
    own, rest = divmod(weight.shape[dim], count)
    try:
        for index in range(count if own and not rest else 0):
            weight.cut(dim, index * own, (index + 1) * own)
    except ValueError:
        return False
    return bool(own) and not rest
