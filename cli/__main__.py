"""The program: `quantkit`, and `python -m quantkit.cli`."""

import sys


def main() -> None:
    """Imports the command line and runs it; Ctrl-C ends in one line during the imports too."""
    try:
        from quantkit.cli.main import main as run

        run()
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
