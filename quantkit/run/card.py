"""The model card, the README.md that goes beside a checkpoint, as huggingface_hub writes it."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from quantkit.core.units import size
from quantkit.run.documents import HUB_NAMES
from quantkit.run.report import Check, Report

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAKEN_OVER = ("license", "license_name", "license_link", "language")
"""Of the original model's card."""


def model_card(report: Report, config: dict[str, Any], original: str) -> str:
    """The card of a packed model: how to load it comes first.

    Args:
        report: of the run.
        config: JSON of the original model's config.json.
        original: its card, or "". Of a model that was tuned both are the packed one's, whose card knows the original.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name, results = title(report.model), None if report.check is None else _results(report.check)
    known = _metadata_of(original)
    base = base_model(report.model, config) if report.tuning is None else known.get("base_model")
    data = ModelCardData(
        base_model=base if _is_plain(base) else None,
        library_name="quantkit",
        pipeline_tag="image-text-to-text" if "vision_config" in config else "text-generation",
        tags=["quantkit", "quantized", "compressed"],
        model_name=results and f"{name}, {report.bits_per_weight:.2f} bits per weight",
        eval_results=results,
        **{key: known[key] for key in _TAKEN_OVER if _is_plain(known.get(key))},
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n{_text(report, name)}", ignore_metadata_errors=True)
    return str(card).rstrip() + "\n"


def title(model: str) -> str:
    """A model's name for readers: of a folder or file here its own name alone, on one line, as harmless Markdown."""
    name = Path(model).expanduser().resolve().name if _is_here(model) else model
    return re.sub(r"([\\`\[\]])", r"\\\1", html.escape(" ".join(name.split()), quote=False))


def base_model(model: str, config: dict[str, Any]) -> str | None:
    """The hub id of what was quantized; None where nobody knows it.

    Args:
        model: as it was given: a hub id, `owner/name/file.gguf` there, or a folder or file here.
        config: JSON of its config.json, which may know where it came from.
    """
    if not _is_here(model):
        return model if _is_hub_id(model) else _gguf_repository(model)
    origin = config.get("_name_or_path")
    return origin if isinstance(origin, str) and not _is_here(origin) and _is_hub_id(origin) else None


def _is_here(model: str) -> bool:
    try:
        return model == "reference" or Path(model).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # names that no file can have
        return False


def _is_hub_id(name: str) -> bool:
    return len(name) <= 96 and _HUB_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def _gguf_repository(model: str) -> str | None:
    repository = "/".join(model.split("/", 2)[:2])
    return repository if model.lower().endswith(".gguf") and _is_hub_id(repository) else None


def _metadata_of(original: str) -> dict[str, Any]:
    """What a card says in the form that cards have."""
    from huggingface_hub import ModelCard

    if not original:
        return {}
    try:
        found: dict[str, Any] = ModelCard(original, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a YAML parser meets in a file from elsewhere
        return {}
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value is a short text, or a list of such."""
    if isinstance(value, list):
        return 0 < len(value) <= 200 and all(isinstance(item, str) and _is_plain(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _results(check: Check) -> Any:
    """Figures for the card's model index, where others could measure on the same text; else None."""
    from huggingface_hub import EvalResult

    hub = HUB_NAMES.get(check.source)
    if check.source != "stdlib" and hub is None:
        return None
    kind = "python-standard-library" if hub is None else hub[0]["path"]
    figures = (
        ("perplexity", "Perplexity", check.perplexity),
        ("kl_divergence", "KL to the full model, nats a token", check.kl),
        ("top1_agreement", "Top-1 agreement with the full model", check.top1_agreement),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=check.source,
            dataset_split="train",
            dataset_args={"held_out_sequences": check.sequences, "seqlen": check.seqlen},
            metric_type=metric,
            metric_value=float(f"{value:.6g}"),
            metric_name=told,
        )
        for metric, told, value in figures
    ]


def _text(report: Report, name: str) -> str:
    percent = 100 * report.packed_weights / max(report.all_weights, 1)
    lines = [
        f"measured bits per weight: {report.bits_per_weight:.3f} in packed layers, "
        f"which hold {percent:.1f}% of the weights",
        f"size: {size(report.bytes_after)}, from {size(report.bytes_before)}",
    ]
    if (check := report.check) is not None:
        lines += [
            f"KL to the full model: {check.kl_text()} nats a token, on {check.where} of the calibration text",
            f"top-1 agreement with it: {100 * check.top1_agreement:.2f}%",
            f"perplexity: {check.perplexity:.4f}, from {check.baseline_perplexity:.4f}",
        ]
    if (tuning := report.tuning) is not None:
        lines.append(f"tuned end to end: held-out KL to the full model {tuning.kl_text} nats a token")
    shown = "pictures, samples of text, layers" if report.samples is not None else "pictures, layers"
    lines.append(f"{shown}: [`quantkit_report.html`](quantkit_report.html)")
    lines.append("per-layer errors and all settings: `quantkit_report.json`")
    listed = "\n".join(f"- {line}" for line in lines)
    return f"""# {name}, {report.bits_per_weight:.2f} bits per weight

**Load this checkpoint with quantkit** (`pip install quantkit-llm`):

```python
import quantkit
model = quantkit.load("path/to/this/folder")
```

`AutoModelForCausalLM.from_pretrained` works too, after `import quantkit`, or with `trust_remote_code=True`.

{listed}
"""
