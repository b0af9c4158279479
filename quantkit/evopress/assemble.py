"""Makes a checkpoint of candidates that a search has chosen."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from quantkit.core import spec
from quantkit.core.result import LayerResult
from quantkit.evopress.store import Database
from quantkit.io import shim
from quantkit.io.checkpoint import CheckpointWriter
from quantkit.io.run_folder import Output
from quantkit.run.record import Run, begin, count_weights, files_of, model_notes
from quantkit.run.report import Report


def assemble(
    database: Database,
    chosen: Mapping[str, str],
    output: Output,
    *,
    name: str,
    settings: Mapping[str, Any],
    files: Callable[[Report], dict[str, bytes]],
    device: torch.device,
    start: float,
) -> Report:
    """Makes a checkpoint of candidates.

    Args:
        database: of the candidates.
        chosen: each layer's candidate, by key.
        output: the folder to make, begun.
        name: of the model, for reports.
        settings: what the report says of the search.
        files: further files by name, given the report.
        device: where the search ran.
        start: time.monotonic() when it began.
    """
    where, _ = begin(device)
    source, store = database.source, database.store
    plan = {layer: database.quantizers[key] for layer, key in chosen.items()} | database.fixed
    dense_bytes = source.nbytes() - source.packed_nbytes(plan)
    described = {**database.settings, **settings, "quantizers": {layer: spec.write(plan[layer]) for layer in plan}}
    notes = model_notes(source.model, plan, source.untied, rotated=False)
    run = Run(start, where, database.bytes_before, count_weights(source.model, plan), described, notes)
    output.empty()  # of other candidates, where the search went on after it had come this far
    writer = CheckpointWriter(output, len(source.blocks), source.dense)
    for index in (*range(len(source.blocks)), -1):
        layers = {layer: key for layer, key in chosen.items() if database.blocks[layer] == index}
        results = database.ends() if index < 0 else {}
        for layer, key in layers.items():
            candidate = store.candidates(index, key)[layer]
            weight = store.load_one(index, key, layer)
            results[layer] = LayerResult(weight, candidate.relative_error, candidate.damping)
        writer.write(index, f"{source.prefix}.{index}" if index >= 0 else "", results)
    report = run.report(name, plan, writer.results(), dense_bytes)
    config = source.config | ({"tie_word_embeddings": False} if source.untied else {}) | shim.entries(source.model)
    beside = shim.files(source.model)
    writer.finish(
        config, lambda: source.files() | beside | files_of(report, source.config, source.readme()) | files(report)
    )
    return report
