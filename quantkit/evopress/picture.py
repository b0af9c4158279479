"""The picture of a search: bits per weight of each layer over depth, and fitness over generations. Needs matplotlib."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from quantkit.evopress.evolve import Outcome
from quantkit.run.pictures import PLACE


def draw(outcome: Outcome, bits: Mapping[str, float], measure: str) -> bytes:
    """Draws a finished search.

    Args:
        outcome: of the search.
        bits: per weight, by layer.
        measure: what fitness is.

    Returns:
        The picture, a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows: dict[str, list[tuple[int, float]]] = {}
    depths = [int(found[1]) for name in bits if (found := PLACE.search(name))]
    for name, value in bits.items():
        found = PLACE.search(name)
        depth = int(found[1]) if found else max(depths, default=0) + 1
        kind = name[found.end() :] if found else name
        rows.setdefault(kind, []).append((depth, value))
    last = max(depth for points in rows.values() for depth, _ in points)
    table = [[float("nan")] * (last + 1) for _ in rows]
    for line, points in zip(table, rows.values(), strict=True):
        for depth, value in points:
            line[depth] = value
    image = left.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    left.set_yticks(range(len(rows)), list(rows))
    left.set_xlabel("block")
    left.set_title("bits per weight")
    if len(rows) * (last + 1) <= 400:
        light = 0.3 * min(bits.values()) + 0.7 * max(bits.values())  # where the colours are pale
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if value == value:
                    left.text(
                        x,
                        y,
                        f"{value:.1f}",
                        ha="center",
                        va="center",
                        color="black" if value > light else "white",
                        fontsize=8,
                    )
    figure.colorbar(image, ax=left)
    right.plot([line.fitness for line in outcome.history], lw=0.8, color="tab:blue", alpha=0.5, label="fresh text")
    steps = [generation for generation, line in enumerate(outcome.history) if line.switched]
    right.plot(steps, [outcome.history[generation].fitness for generation in steps], "o", ms=4, label="new parent")
    right.axhline(outcome.held_out["search"], color="tab:blue", label="found, held-out text")
    right.axhline(outcome.held_out["uniform"], color="tab:gray", ls="--", label="uniform, held-out text")
    right.set_xlabel("generation")
    right.set_title("KL to the full model, nats a token" if measure == "kl" else "negative log-likelihood")
    right.legend()
    picture = BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    return picture.getvalue()
