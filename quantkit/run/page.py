"""The report as one page: quantkit_report.html, which opens from disk, needs nothing else, and says the same each time.

All text comes from elsewhere (names, settings, documents), and none of it is markup: every value goes through `_safe`.
Times and memory of the run are in the JSON alone, so that equal runs give equal pages.
"""

import html
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from quantkit.core.units import size
from quantkit.run.pictures import by_kind, learning_curve, picture
from quantkit.run.report import Check, LayerReport, Piece, Report, Samples, Tuning

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --mark: #f5b04155; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .figures div { background: var(--soft); border-radius: .5rem;
  padding: .6rem 1rem; } .figures b { display: block; font-size: 1.25rem; } .figures span { font-size: .85rem; }
pre { background: var(--soft); padding: .7rem; border-radius: .5rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; unicode-bidi: isolate; }
mark { background: var(--mark); color: inherit; border-bottom: 2px solid #e08a00; } code { unicode-bidi: isolate; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; } .note { font-size: .9rem; opacity: .85; }
"""
_TURNS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_DIFFERENCES = 12
"""Places of a text whose choices stand in a table below it; the others say theirs on the spot."""


def report_page(report: Report) -> str:
    """The page of a run.

    Args:
        report: with samples of text or without.

    Returns:
        HTML of one self-contained document.
    """
    title = f"{report.model}, {report.bits_per_weight:.2f} bits per weight"
    parts = [
        f"<h1>{_safe(title)}</h1>",
        _figures(report),
        *(f'<p class="note">{_safe(note)}</p>' for note in report.notes),
        "<h2>Bits and error by layer</h2>",
        _figure(picture(report)),
        _kinds(report),
        _layers(report.layers),
        "<h2>Sizes</h2>",
        _sizes(report),
        "" if report.check is None else _check(report.check),
        "" if report.tuning is None else _tuning(report.tuning),
        "" if report.samples is None else _samples(report.samples),
        "<h2>Settings</h2>",
        _block(_safe(json.dumps(_settings(report), indent=2, ensure_ascii=False, default=str))),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_safe(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(part for part in parts if part)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def _safe(value: object) -> str:
    """Text as HTML shows it: no markup, and no characters that HTML does not allow or that no eye would see."""
    shown = (f"\\u{ord(c):04x}" if _is_unseen(c) else c for c in str(value))
    return html.escape("".join(shown), quote=True)


def _is_unseen(letter: str) -> bool:
    """Whether a character is a control, half a pair, none at all, or turns the direction of those behind it."""
    return letter in _TURNS or (letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cs", "Cn"))


def _block(text: object) -> str:
    """Text as it is, lines and all; HTML drops the first line end of such a block."""
    return f"<pre>\n{text}</pre>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    first = "".join(f"<th>{_safe(heading)}</th>" for heading in headings)
    lines = ("".join(f"<td>{_safe(cell)}</td>" for cell in row) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _figures(report: Report) -> str:
    ratio = report.bytes_before / max(report.bytes_after, 1)
    shown = [
        (f"{report.bits_per_weight:.3f}", "bits per weight, measured, of packed layers"),
        (f"{report.bits_model:.3f}", "of the whole model"),
        (f"{size(report.bytes_before)} → {size(report.bytes_after)}", f"{ratio:.2f}x smaller"),
    ]
    if (check := report.check) is not None:
        shown += [
            (check.kl_text(4), "KL to the full model, nats a token"),
            (f"{100 * check.top1_agreement:.1f}%", "same first choice"),
            (f"{check.baseline_perplexity:.3f} → {check.perplexity:.3f}", "perplexity"),
        ]
    if report.tuning is not None:
        shown.append((report.tuning.kl_text, "held-out KL to the full model, before and after tuning"))
    cells = (f"<div><b>{_safe(value)}</b><span>{_safe(what)}</span></div>" for value, what in shown)
    return f'<div class="figures">{"".join(cells)}</div>'


def _figure(svg: str | None) -> str:
    if svg is not None:
        return f"<figure>{svg}</figure>"
    return "<p class=\"note\">Pictures need matplotlib: <code>pip install 'quantkit-llm[plots]'</code></p>"


def _kinds(report: Report) -> str:
    rows = []
    for kind, layers in by_kind(report).items():
        worst = max(layers, key=lambda layer: layer.relative_error)
        bits, errors = ([getattr(layer, name) for layer in layers] for name in ("bits_per_weight", "relative_error"))
        means = f"{sum(bits) / len(bits):.3f}", f"{sum(errors) / len(errors):.2e}"
        rows.append((kind, len(layers), *means, f"{worst.relative_error:.2e}", worst.name))
    return _table(("kind", "layers", "mean bits", "mean error", "largest error", "in"), rows)


def _layers(layers: Sequence[LayerReport]) -> str:
    columns: dict[str, Callable[[LayerReport], str]] = {
        "layer": lambda layer: layer.name,
        "method": lambda layer: layer.quantizer,
        "format": lambda layer: layer.format,
        "bits": lambda layer: f"{layer.bits_per_weight:.3f}",
        "error": lambda layer: f"{layer.relative_error:.2e}",
        "damping": lambda layer: "" if layer.damping is None else f"{layer.damping:g}",
    }
    text = "Error is what the layer's output lost on calibration text, relative to its size."
    if any(layer.predicted_kl is not None for layer in layers):
        columns["predicted KL"] = lambda layer: "" if layer.predicted_kl is None else f"{layer.predicted_kl:.2e}"
        text += " Predicted KL is what the layer alone is expected to cost, in nats a token."
    if any(layer.tokens is not None for layer in layers):
        columns["tokens"] = lambda layer: "" if layer.tokens is None else f"{layer.tokens:,}"
        text += " Tokens are those of the calibration text that chose an expert."
    if any(layer.tuned for layer in layers):
        columns["block tuned"] = lambda layer: "{:.2e} → {:.2e}".format(*layer.tuned) if layer.tuned else ""
    table = _table(list(columns), ([shown(layer) for shown in columns.values()] for layer in layers))
    return f'<details><summary>All {len(layers)} layers</summary>\n{table}</details><p class="note">{text}</p>'


def _sizes(report: Report) -> str:
    fraction = 100 * report.packed_weights / max(report.all_weights, 1)
    packed = round(report.bits_per_weight * report.packed_weights / 8)
    rows = [
        ("all tensors", f"{report.bytes_before:,} B", f"{report.bytes_after:,} B"),
        ("packed layers", "", f"{packed:,} B"),
        ("dense tensors", "", f"{report.bytes_after - packed:,} B"),
        ("weights, all", f"{report.all_weights:,}", ""),
        ("weights in packed layers", f"{report.packed_weights:,} ({fraction:.1f}%)", ""),
    ]
    return _table(("", "before", "after"), rows)


def _check(check: Check) -> str:
    rows = [
        ("KL(full || packed), nats a token", check.kl_text()),
        ("top-1 agreement", f"{100 * check.top1_agreement:.2f}%"),
        ("flip rate", f"{100 * check.flip_rate:.2f}%"),
        ("perplexity of the full model", f"{check.baseline_perplexity:.4f}"),
        ("perplexity of the packed model", f"{check.perplexity:.4f}"),
    ]
    text = f"{check.where} of {check.source}, {check.tokens:,} tokens scored; no text that calibrated. "
    text += "The error is one over sequences."
    return f'<h2>Check on held-out text</h2>\n{_table(("", "measured"), rows)}<p class="note">{_safe(text)}</p>'


def _tuning(tuning: Tuning) -> str:
    rows = [(f"{step:,}", f"{kl:.5f}") for step, kl in zip(tuning.steps, tuning.kl, strict=True)]
    text = (
        f"{tuning.sequences:,} held-out sequences of {tuning.seqlen:,} tokens, beside {tuning.teacher}. The model is "
    )
    text += "that of the least. Errors and predictions of layers are from before."
    table = _table(("step", "KL, nats a token"), rows)
    every = f"<details><summary>All {len(rows)} measurements</summary>\n{table}</details>"
    return f'<h2>Tuning</h2>\n{_figure(learning_curve(tuning))}\n{every}<p class="note">{_safe(text)}</p>'


def _samples(samples: Samples) -> str:
    parts = ["<h2>Text before and after</h2>"]
    if samples.texts:
        note = "Held-out text. Marked tokens are those for which the two models' first choices differ."
        parts.append(f'<p class="note">{note}</p>')
    for pieces in samples.texts:
        parts.append(_block("".join(map(_piece, pieces))))
        rows = [(_short(piece.text), *map(_short, piece.choices)) for piece in pieces if piece.choices is not None]
        if rows:
            more = f" (the first {_DIFFERENCES} of {len(rows)})" if len(rows) > _DIFFERENCES else ""
            table = _table(("the text has", "the full model says", "the packed model says"), rows[:_DIFFERENCES])
            parts.append(f"<details><summary>Differing choices{more}</summary>\n{table}</details>")
    if samples.continuations:
        parts.append("<h2>Continuations before and after</h2>")
        parts.append('<p class="note">Each model goes on from the prompt with its first choices.</p>')
    for one in samples.continuations:
        same = "the same, to the last token" if one.before == one.after else one.after
        parts.append(f'{_block(_safe(one.prompt))}\n<div class="wide"><table><tbody>')
        for what, text in (("full model", one.before), ("packed model", same)):
            parts.append(f"<tr><th>{what}</th><td>{_block(_safe(text))}</td></tr>")
        parts.append("</tbody></table></div>")
    if samples.left_out:
        parts.append(f'<p class="note">No continuations: {_safe(samples.left_out)}.</p>')
    return "\n".join(parts)


def _piece(piece: Piece) -> str:
    if piece.choices is None:
        return _safe(piece.text)
    before, after = map(_short, piece.choices)
    return f'<mark title="{_safe(f"full: {before}   packed: {after}")}">{_safe(piece.text)}</mark>'


def _short(text: str) -> str:
    """A token as one sees it, spaces and line ends too."""
    return json.dumps(text, ensure_ascii=False)


def _settings(report: Report) -> dict[str, object]:
    """All settings but the layers' own, which stand in their table."""
    return {name: value for name, value in report.settings.items() if name != "quantizers"}
