"""Tables of recorded runs as they are printed and stand in documents, and the picture of the one that decides."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.evals.rate_distortion import figure_class

DONE, FAILED, MISSING = "done", "failed", "missing"
"""States of a row."""
HEAD = (
    "bits", "method", "bits/weight", "whole model", "KL x 1000", "perplexity", "top-1, %", "flips, %", "seconds",
    "peak, GiB",
)  # fmt: skip


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of all rows that are done, in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD)]
    lines += [_cells(row) for row in rows if row["state"] == DONE]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    dense = row["dense_layers"]
    return (
        f"{row['bits']:g}",
        row["label"] + (f" ({dense:.0f} layers left dense)" if dense else ""),
        f"{row['bits_per_weight']:.3f}",
        f"{row['bits_model']:.3f}",
        f"{1000 * row['kl']:.1f} +- {1000 * row['kl_se']:.1f}",
        f"{row['perplexity']:.2f}",
        f"{100 * row['top1_agreement']:.1f}",
        f"{100 * row['flip_rate']:.1f}",
        f"{row['seconds']:.0f}",
        f"{row['peak_bytes'] / 2**30:.2f}",
    )


def table_of(content: Mapping[str, Any]) -> str:
    """The table of a file that `Records` has written, for a document."""
    return markdown(row for row in content["rows"] if row["current"])


def predictions_of(content: Mapping[str, Any]) -> str:
    """The table of a file that `quantkit.evals.predicted` has written, for a document."""
    head = ("model", "method", "bits/weight", "KL x 1000, measured", "predicted", "predicted / measured")
    lines = [head, ("---",) * len(head)]
    for row in sorted(content["rows"], key=lambda row: (row["model"] != "reference", row["bits"])):
        measured = f"{1000 * row['kl']:.1f} +- {1000 * row['kl_se']:.1f}"
        figures = f"{row['bits_per_weight']:.3f}", measured, f"{1000 * row['predicted']:.1f}", f"{row['ratio']:.2f}"
        lines.append((row["model"], row["label"], *figures))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shrinkage_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of a file that `quantkit.evals.experts` has written, for a document: KL x 1000 by strength."""
    rows = list(rows)
    strengths = sorted({row["strength"] for row in rows})
    found: dict[tuple[Any, ...], dict[float, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["rare"], row["samples"], row["way"]), {})[row["strength"]] = row
    head = ("rare experts a block", "sequences", "method", *(f"strength {strength:g}" for strength in strengths))
    lines = [head, ("---",) * len(head)]
    for (rare, samples, way), own in sorted(found.items()):
        cells = (
            f"{1000 * own[at]['kl']:.1f} +- {1000 * own[at]['kl_se']:.1f}" if at in own else "" for at in strengths
        )
        lines.append((f"{rare:.0f}", f"{samples:.0f}", f"`{way}`", *cells))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def architectures_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table of a file that `quantkit.evals.architectures` has written, for a document."""
    by_state: dict[str, list[str]] = {}
    for row in rows:
        by_state.setdefault(row["state"], []).append(row["kind"])
    lines = ["| | kinds of models |", "| --- | --- |"]
    lines += [
        f"| {state} | {', '.join(sorted(by_state[state]))} |"
        for state in ("ok", "refused", "wrong", "not made")
        if state in by_state
    ]
    return "\n".join(lines)


def draw(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """KL over bits, a line for each method: of the packed layers, and of the whole model.

    Args:
        rows: records; those that are done and `drawn` are shown.
        path: of the PNG.
    """
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == DONE and row["drawn"]:
            lines.setdefault(row["label"], []).append(row)
    figure = figure_class()(figsize=(13, 6.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    whats = {"bits_per_weight": "bits per weight in packed layers", "bits_model": "bits per weight of the whole model"}
    for axes, (field, what) in zip(panels, whats.items(), strict=True):
        for index, (label, points) in enumerate(lines.items()):
            at = sorted((point[field], 1000 * point["kl"], 1000 * point["kl_se"]) for point in points)
            bits, kl, error = zip(*at, strict=True)
            style = {"marker": "osD^vPX"[index // 10 % 7], "color": f"C{index % 10}"}
            axes.errorbar(bits, kl, yerr=error, markersize=4, linewidth=1.2, capsize=2, label=label, **style)
        axes.set(yscale="log", xlabel=f"{what}, all that is stored")
        axes.grid(alpha=0.3, which="both", linewidth=0.6)
    panels[0].set_ylabel("held-out KL x 1000")
    if lines:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, format="png")
