"""A search that several processes share: shared_search.py CASE MODEL OUTPUT."""

import json
import os
import sys
from pathlib import Path

import quantkit
from quantkit import QuantkitError
from quantkit.evopress.settings import Evolution

RANK = int(os.environ.get("RANK", "0"))


def main(case, model, output):
    more = ", gptq(5)" if case == "differing" and RANK == 1 else ""
    try:
        found = quantkit.search(
            model, Path(output, "model"), avg_bits=3, candidates=f"gptq(2), gptq(3), hadamard(gptq(4)){more}",
            head_bits=6, fisher=True, calibration="stdlib", num_samples=8, seqlen=128, search_samples=12, held_out=4,
            top=512, evolution=Evolution(2, 5, ((2, 256), (1, 512))), database=Path(output, "candidates"), device="cpu",
        )  # fmt: skip
        said = "found" if found is not None else "nothing"
    except QuantkitError as error:
        said = str(error)
    Path(output, f"{RANK}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
