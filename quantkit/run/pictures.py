"""Pictures of a report: bits and error of each layer over depth, by kind of layer, and what tuning gained.

They need matplotlib.
"""

import re
from collections.abc import Callable
from io import StringIO
from typing import Any

from quantkit.models.experts import of_all
from quantkit.run.report import LayerReport, Report, Tuning

PLACE = re.compile(r"\.(\d+)\.")
"""The index of a block in a layer's name."""
_INK = "#010203"
"""Stands for the colour of the page's text, whichever that is."""
_COLOURS = (
    "#4c8bf5",
    "#e08a00",
    "#2ca25f",
    "#d1495b",
    "#8e6bbf",
    "#8c6d46",
    "#d46fb4",
    "#7f7f7f",
    "#a3a322",
    "#17a2b8",
)
"""Legible on white and on black."""
_MARKS = "osD^v<>PX*"


def by_kind(report: Report) -> dict[str, list[LayerReport]]:
    """Layers by what follows the block's index in their names, such as self_attn.q_proj; those outside by name.

    Of experts all at the same place are of one kind.
    """
    kinds: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        found = PLACE.search(layer.name)
        kinds.setdefault(of_all(layer.name[found.end() :] if found else layer.name), []).append(layer)
    return kinds


def picture(report: Report) -> str | None:
    """An SVG element with the two pictures, the same for the same report; None without matplotlib."""

    def paint(figure: Any) -> None:
        """Bits above errors, over depth."""
        upper, lower = figure.subplots(2, 1, sharex=True)
        last = max((_depth(layer) or 0 for layer in report.layers), default=0)
        for number, (kind, layers) in enumerate(by_kind(report).items()):
            places = [last + 1 if (depth := _depth(layer)) is None else depth for layer in layers]
            style: dict[str, Any] = {
                "color": _COLOURS[number % 10],
                "marker": _MARKS[number // 10 % 10],
                "ms": 4,
                "lw": 1,
            }
            upper.plot(places, [layer.bits_per_weight for layer in layers], label=kind.replace("$", r"\$"), **style)
            errors = [max(layer.relative_error, 1e-12) for layer in layers]
            lower.plot(places, errors, **style)
        upper.set_title("bits per weight")
        lower.set_title("relative error")
        lower.set_yscale("log")
        outside = any(_depth(layer) is None for layer in report.layers)
        lower.set_xlabel("block; layers outside the blocks stand at the right end" if outside else "block")
        figure.subplots_adjust(left=0.09, right=0.76, top=0.94, bottom=0.08)
        figure.legend(loc="upper left", bbox_to_anchor=(0.77, 0.95), frameon=False, fontsize=8)

    return _drawn("layers", (9, 7), paint)


def learning_curve(tuning: Tuning) -> str | None:
    """An SVG element with the held-out KL over the steps of tuning; None without matplotlib."""

    def paint(figure: Any) -> None:
        """The curve, and where it is lowest."""
        axes = figure.subplots()
        axes.plot(tuning.steps, tuning.kl, color=_COLOURS[0], marker="o", ms=4, lw=1)
        axes.axhline(min(tuning.kl), color=_INK, alpha=0.4, lw=0.8, ls="--")
        axes.set_title("held-out KL to the full model, nats a token")
        axes.set_xlabel("step")
        figure.subplots_adjust(left=0.11, right=0.97, top=0.9, bottom=0.15)

    return _drawn("tuning", (7, 3.6), paint)


def _drawn(name: str, inches: tuple[float, float], paint: Callable[[Any], None]) -> str | None:
    """An SVG element with what is painted on a figure, its parts named after it; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "quantkit",
        "font.family": "sans-serif",
        "text.usetex": False,
    }
    settings |= {
        name: _INK for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    with matplotlib.rc_context(settings):
        figure: Any = Figure(figsize=inches)
        figure.patch.set_alpha(0)
        paint(figure)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
            axes.grid(alpha=0.2, color=_INK)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(drawn.getvalue(), name)


def _depth(layer: LayerReport) -> int | None:
    found = PLACE.search(layer.name)
    return None if found is None else int(found[1])


def _inline(svg: str, name: str) -> str:
    """A file's picture as an element of a page, in the colour of the page's text; no other has its ids."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return element.replace(_INK, "currentColor").strip()
