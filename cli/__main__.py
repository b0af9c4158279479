"""The program: `quantkit`, and `python -m quantkit.cli`."""

import os
import signal
import sys
from typing import Any, NoReturn


def _stop(_signal: int, _frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """Imports the command line and runs it; Ctrl-C and SIGTERM end it in one line, during the imports too."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        from quantkit.cli.main import main as run

        run()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several that are stopped together
            print("error: stopped; nothing is kept", file=sys.stderr)
        sys.exit(130)
    finally:
        for stopping in (signal.SIGINT, signal.SIGTERM):  # nothing is left to stop but the interpreter's own end
            signal.signal(stopping, signal.SIG_IGN)


if __name__ == "__main__":
    main()
