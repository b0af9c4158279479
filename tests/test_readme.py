"""The documents' Python works as it stands, their commands name options that exist, and their links lead somewhere."""

import re

import pytest
import typer

from quantkit.cli.main import app

from .conftest import ROOT
from .helpers.forks import server

pytestmark = pytest.mark.slow

TEXT = (ROOT / "README.md").read_text()
PAGES = {
    page: (ROOT / page).read_text()
    for page in ("README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))))
    if page not in ("docs/reference/cli.md", "docs/extending.md")  # the one is generated, the other a test of its own
}
PYTHON = [(page, code) for page, text in PAGES.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_snippets_run(number, tmp_path):
    (tmp_path / "evals").symlink_to(ROOT / "evals")
    (tmp_path / "snippet.py").write_text(PYTHON[number][1])
    result = server().run("snippet", cwd=tmp_path, path=[tmp_path])
    assert result.returncode == 0, result.stderr


def test_there_are_snippets():
    assert PYTHON
    assert "<!-- tests -->" in TEXT
    assert "<!-- main job -->" in TEXT


def test_every_option_exists():
    program = typer.main.get_command(app)
    parameters = [parameter for command in (program, *program.commands.values()) for parameter in command.params]
    known = {option for parameter in parameters for option in _names(parameter)}
    text = "\n".join(PAGES.values())
    blocks = re.findall(r"```(?:text|bash)\n(.*?)```", text, re.S)
    used = {
        option
        for block in blocks
        for line in block.splitlines()
        if "quantkit" in line or line.startswith("    --")
        for option in re.findall(
            r"(?<![\w-])--[a-z][a-z-]*", line.split("pip install")[0] + line.partition("quantkit ")[2]
        )
    }
    assert used
    assert used <= known, used - known


def _names(parameter):
    return [*parameter.opts, *parameter.secondary_opts]


def test_readme_is_a_landing_page():
    assert len(TEXT.encode()) <= 8000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", PAGES[page]):
        assert "://" in target or (folder / target).exists(), f"{page}: {target}"
