"""A search that several processes share: shared_search.py MODEL OUTPUT."""

import json
import os
import sys
from pathlib import Path

import quantkit
from quantkit.evopress.settings import Evolution

RANK = int(os.environ.get("RANK", "0"))


def main(model, output):
    found = quantkit.search(
        model, Path(output, "model"), avg_bits=3, candidates="gptq(2), gptq(3), hadamard(gptq(4))", head_bits=6,
        fisher=True, calibration="stdlib", num_samples=8, seqlen=128, search_samples=12, held_out=4, top=512,
        evolution=Evolution(2, 5, ((2, 256), (1, 512))), database=Path(output, "candidates"), device="cpu",
    )  # fmt: skip
    Path(output, f"{RANK}.json").write_text(json.dumps(found is not None))


if __name__ == "__main__":
    main(*sys.argv[1:])
