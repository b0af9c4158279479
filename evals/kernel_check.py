"""Deep check of the kernels on a GPU: every regime, odd shapes, biases and low-rank corrections, against fp64.

    python -m quantkit.evals.kernel_check --out FOLDER [--minutes 20] [--only FAMILY ...]

Some 650 kernels, compiled side by side first. A family is a process, and each launch is told as it is checked; one
that is wrong, or of which the process dies, is named and the check goes on. Ends with exit code 1 where anything was
wrong or did not finish. Nothing is timed.
"""

import argparse
import sys
from pathlib import Path

from quantkit.evals import gpu_suite
from quantkit.evals.suite_deep import FAMILIES


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=20, help="nothing outlives them")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    names = [f"deep {name}" for name in FAMILIES if name in arguments.only]
    sys.exit(gpu_suite.measure(gpu_suite.parts(names, arguments.out), arguments.out, arguments.minutes, echo=True))


if __name__ == "__main__":
    main()
