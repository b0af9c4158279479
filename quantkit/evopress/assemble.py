"""Makes a checkpoint of candidates that a search has chosen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.core import spec
from quantkit.core.result import LayerResult
from quantkit.evopress.store import Database
from quantkit.io.checkpoint import CheckpointWriter
from quantkit.run.record import Run, begin, count_weights, model_notes, publish
from quantkit.run.report import Report


def assemble(
    folder: Path,
    database: Database,
    chosen: Mapping[str, str],
    output: Path,
    *,
    name: str = "",
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    device: torch.device,
    start: float | None = None,
    overwrite: bool = False,
) -> Report:
    """Makes a checkpoint of candidates.

    Args:
        folder: the full-precision model.
        database: of the candidates.
        chosen: each layer's candidate, by key.
        output: the folder to make.
        name: of the model, for reports.
        settings: what the report says of the search.
        files: further text files by name.
        device: where the search ran.
        start: time.monotonic() when it began; None for now.
        overwrite: replace `output`.
    """
    where, now = begin(device)
    source, store = database.source, database.store
    plan = {layer: database.quantizers[key] for layer, key in chosen.items()} | database.fixed
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    described = {**database.settings, **settings, "quantizers": {layer: spec.write(plan[layer]) for layer in plan}}
    notes = model_notes(source.model, plan, source.untied, rotated=False)
    weights = count_weights(source.model, plan)
    run = Run(now if start is None else start, where, database.bytes_before, weights, described, notes)
    identity = {**settings, "chosen": dict(chosen), "database": database.store.identity}
    identity["fixed"] = {layer: spec.write(quantizer) for layer, quantizer in database.fixed.items()}
    writer = CheckpointWriter(
        output, len(source.blocks), source.dense, identity, resume=not overwrite, overwrite=overwrite
    )
    for index in (*range(len(source.blocks)), -1):
        layers = {layer: key for layer, key in chosen.items() if database.blocks[layer] == index}
        results = database.ends() if index < 0 else {}
        for layer, key in layers.items():
            candidate = store.candidates(index, key)[layer]
            weight = store.load_one(index, key, layer)
            results[layer] = LayerResult(weight, candidate.relative_error, candidate.damping)
        writer.write(index, f"{source.prefix}.{index}" if index >= 0 else "", results)
    return publish(writer, source, plan, run, name or folder.name, dense_bytes, files)
