"""Documents that are written by commands say what those commands say now."""

from quantkit.cli.reference import pages

from .conftest import ROOT


def test_the_command_lines_reference_is_the_command_lines():
    written = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert written == "\n".join(pages()) + "\n", "python -m quantkit.cli.reference docs/reference/cli.md"
