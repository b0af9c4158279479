"""`python -m quantkit.cli` is the same as `quantkit`."""

from quantkit.cli.main import main

if __name__ == "__main__":
    main()
