"""Predictions held against runs: what `quantkit.run.prediction` expects of ways whose packed models are measured.

    python -m quantkit.evals.predicted smollm2 --data WIKITEXT --table evals/results/DATE-cpu-smollm2.json --output FILE
    python -m quantkit.evals.predicted reference --calibration stdlib --test stdlib --table FILE --output FILE

The table is one that `quantkit.evals.deciding` has written, of the same model and texts. Of its rows those are
predicted that pack all layers in one way and do nothing else; `--samples` sequences are read for it, as by
`quantkit advise --measure`, however many the runs had. Other models' rows in `--output` stay.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.core.errors import QuantkitError
from quantkit.evals.deciding_records import Records, setting_of
from quantkit.evals.deciding_rows import ROWS, Protocol, Quantized, Row, protocol_of
from quantkit.evals.deciding_table import DONE
from quantkit.evals.real import model_folder
from quantkit.io.files import parse_json
from quantkit.run.prediction import predict
from quantkit.run.recipe import make_quantizer

COPIED = ("name", "label", "bits", "bits_per_weight", "kl", "kl_se")
"""Fields of a measured row that stand beside what was predicted of it."""


def is_plain(row: Row) -> bool:
    """Whether predictions are of what the row does: all layers in one way, no corrections, no tuning."""
    if not isinstance(row.way, Quantized):
        return False
    bare = Quantized(row.way.method, row.way.target_shift, fisher=row.way.fisher)
    shifted = row.way.target_shift > 0 or row.way.method.startswith("rtn")
    return row.way == bare and shifted and "low_rank" not in row.way.method


def held_against(folder: Path, protocol: Protocol, records: Records, samples: int) -> list[dict[str, Any]]:
    """The measured rows beside what is predicted of them.

    Args:
        folder: of the full-precision model.
        protocol: of the runs.
        records: of the runs.
        samples: sequences to predict from.

    Raises:
        QuantkitError: no row of this model and these texts is measured.
    """
    done = [row for row in ROWS if is_plain(row) and records.get(row)["state"] == DONE]
    if not done:
        raise QuantkitError(
            f"{records.path} has no row of this model and these texts; `quantkit.evals.deciding` makes it"
        )
    text = replace(protocol.text, num_samples=samples)
    found = []
    for fisher in (None, True, False):
        rows = [row for row in done if isinstance(row.way, Quantized) and row.way.fisher is fisher]
        if not rows:
            continue
        ways = [make_quantizer(row.way.method) for row in rows if isinstance(row.way, Quantized)]
        start = time.monotonic()
        prediction = predict(folder, ways, text, num_samples=protocol.num_samples, fisher=fisher, device="cpu")
        seconds = time.monotonic() - start
        for row, way in zip(rows, ways, strict=True):
            record, kl = records.get(row), prediction.kl(way)
            measured = {field: record[field] for field in COPIED}
            found.append(measured | {"predicted": kl, "ratio": kl / record["kl"], "seconds": seconds})
    return found


def main() -> None:
    """Parses the command line, predicts, and writes what was predicted beside what was measured."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--data", type=Path, metavar="FOLDER", help="with valid.txt and test.txt")
    made.add_argument("--calibration", help="text to calibrate on, instead of valid.txt; `stdlib` needs no file")
    made.add_argument("--test", help="text that was measured on, instead of test.txt")
    made.add_argument("--table", type=Path, required=True, metavar="JSON", help="the measured rows")
    made.add_argument("--samples", type=int, default=32, help="sequences to predict from")
    made.add_argument("--output", type=Path, required=True, metavar="JSON")
    arguments = made.parse_args()
    try:
        kept = parse_json(arguments.table)["setting"] if arguments.table.exists() else {}
        for name in ("num_samples", "seqlen", "seed", "test_sequences", "test_seqlen"):
            setattr(arguments, name, kept.get(name, getattr(Protocol, name)))
        protocol = protocol_of(arguments)
        name, folder = model_folder(arguments.model)
        records = Records(arguments.table, setting_of(name, folder, protocol), ROWS)
        rows = [{"model": name} | row for row in held_against(folder, protocol, records, arguments.samples)]
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    for row in rows:
        print(f"{row['name']:24s} measured {row['kl']:.4f} +- {row['kl_se']:.4f}  predicted {row['predicted']:.4f}")
    others = parse_json(arguments.output)["rows"] if arguments.output.exists() else []
    others = [row for row in others if row["model"] != name]
    arguments.output.write_text(json.dumps({"samples": arguments.samples, "rows": [*others, *rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
