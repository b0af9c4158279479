"""transformers' own server: `python -m quantkit.serve.by_transformers serve MODEL ...`.

Being in quantkit it tells transformers of packed layers, which its own command line knows nothing of.
"""

import sys

from quantkit.core.errors import QuantkitError


def main() -> None:
    """Its command line; what quantkit refuses is said in a line."""
    from transformers.cli.transformers import main as theirs

    try:
        theirs()
    except QuantkitError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
