"""Documents that are written by commands say what those commands say now."""

import dataclasses

from quantkit.cli.reference import pages
from quantkit.core.constants import VERSION
from quantkit.core.registry import names, resolve
from quantkit.evals.benchmarks.results import problems

from .conftest import ROOT


def test_the_command_lines_reference_is_the_command_lines():
    written = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert written == "\n".join(pages()) + "\n", "python -m quantkit.cli.reference docs/reference/cli.md"


def test_tables_and_sentences_say_what_was_recorded():
    assert "\n".join(problems()) == "", "python -m quantkit.evals.benchmarks.results"


def test_the_formats_page_has_every_format_and_field():
    page = (ROOT / "docs" / "format.md").read_text()
    assert f"\nVersion {VERSION}." in page
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    stored = set(names("quantkit.formats")) - {"int_group_arranged"}
    assert set(rows) == stored
    for name in stored:
        for field in dataclasses.fields(resolve("quantkit.formats", name)):
            assert f"`{field.name}`" in rows[name], f"{name}: {field.name}"
