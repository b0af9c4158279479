"""Documents whose tables or sentences differ from the recorded figures are seen."""

import json
import re
import shutil

import pytest
from safetensors import safe_open

from quantkit.evals.benchmarks.claims import CLAIMS, Less, More, Ratio, Value
from quantkit.evals.benchmarks.results import PLACE, Number, documents, figure, filled, problems, record, render
from quantkit.evals.benchmarks.table import Table
from quantkit.evals.benchmarks.tables import TABLES

from ..conftest import REFERENCE, ROOT

HAND_WRITTEN = {
    "docs/guide/quantize.md": ["preset", "source"],
    "docs/guide/export.md": ["packed"],
    "docs/guide/serve.md": ["part of a model", "format"],
    "README.md": ["you want"],
    "docs/format.md": ["format"],
    "docs/gpu.md": ["cell"],
    "docs/kernels.md": ["rows of x (K a multiple of 128, 16-bit x)"],
}
"""Tables without measured figures: pages and what their heads begin with."""


@pytest.fixture
def copy(tmp_path):
    """The documents and the data, to be spoilt."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "evals" / "results", tmp_path / "evals" / "results", ignore=shutil.ignore_patterns("*.png"))
    for model in ("model", "experts"):
        (tmp_path / "evals" / "reference" / model).mkdir(parents=True)
        shutil.copy(REFERENCE.parent / model / "held_out.json", tmp_path / "evals" / "reference" / model)
    return tmp_path


def test_a_copy_is_right(copy):
    assert list(problems(copy)) == []


def test_a_figure_changed_in_the_data_is_seen_and_written(copy):
    path = copy / "evals" / "results" / "2026-11-22-cpu-quality.json"
    rows = json.loads(path.read_text())
    next(row for row in rows if row["label"] == "Hadamard(Trellis(bits 2))")["kl"] = 0.2
    path.write_text(json.dumps(rows))
    table, *sentences = problems(copy)
    assert "+| **trellis** | 2.030 | 200.0 +- 1.4 |" in table
    assert any("more KL at 2 bits" in sentence for sentence in sentences)
    page = copy / "docs" / "results" / "trellis.md"
    page.write_text(filled(page.read_text(), copy))
    assert list(problems(copy)) == sentences


def test_a_cell_changed_by_hand_is_seen_and_mended(copy):
    page = copy / "docs" / "results" / "integers.md"
    right = page.read_text()
    page.write_text(right.replace("734.86", "634.86"))
    (difference,) = problems(copy)
    assert "-| RTN, 2 bits | 2.125 | 26.526 | 634.86" in difference
    assert filled(page.read_text(), copy) == right


@pytest.mark.parametrize("number", range(len(CLAIMS)))
def test_a_sentence_with_another_figure_is_seen(copy, number):
    page = copy / CLAIMS[number].page
    marked = PLACE.sub(lambda found: found[0].translate({ord(digit): "~" for digit in "0123456789"}), page.read_text())
    page.write_text(re.sub(r"\d", "5", marked))
    assert any(problem.startswith(f"{CLAIMS[number].page} should say") for problem in problems(copy))


def test_a_missing_table_is_seen(copy):
    page = copy / "docs" / "guide" / "search.md"
    page.write_text(PLACE.sub("", page.read_text()))
    assert list(problems(copy)) == ["search: a table that stands in no document"]


def test_no_table_is_written_by_hand_but_those_without_figures():
    for page in documents():
        name = str(page.relative_to(ROOT))
        if name != "docs/reference/cli.md":  # generated and tested elsewhere
            heads = re.findall(r"^\| ?(.*?) \|.*\n\| ?-", PLACE.sub("", page.read_text()), re.M)
            assert heads == HAND_WRITTEN.get(name, []), name


def test_all_that_was_recorded_is_used():
    def files(asked):
        return [asked.file] if hasattr(asked, "file") else [f for inner in vars(asked).values() for f in files(inner)]

    used = {table.file for table in TABLES.values()} | {
        f for claim in CLAIMS for each in claim.figures for f in files(each)
    }
    assert {path.name for path in (ROOT / "evals" / "results").glob("*.json")} <= used


def test_the_reference_models_size():
    with safe_open(REFERENCE / "model.safetensors", "pt") as stored:
        count = sum(stored.get_tensor(name).numel() for name in stored.keys())
    for page in ("README.md", "docs/results/reference-model.md"):
        assert f"{count / 1e6:.1f} M parameters" in (ROOT / page).read_text()


def test_formats():
    assert (
        f"{Number(0.0123):k.1f} {Number(0.5):c.0f} {Number(2048):K.1f} {Number(3 << 19):M.1f} {Number(2):.2f}"
        == "12.3 50 2.0 1.5 2.00"
    )


def test_figures(tmp_path):
    (tmp_path / "evals" / "results").mkdir(parents=True)
    (tmp_path / "evals" / "results" / "some.json").write_text('[{"n": "a(1)", "x": [4, 2]}, {"n": "b", "x": [5, 0]}]')
    a, b = (Value("some.json", "x[0]", where={"n": name}) for name in ("a*", "b"))
    assert figure(Ratio(a, b), tmp_path) == 0.8
    assert figure(Less(a, b), tmp_path) == pytest.approx(0.2)
    assert figure(More(b, a), tmp_path) == 0.25
    with pytest.raises(ValueError, match="2 records"):
        record({"n": "*"}, "some.json", "", tmp_path)
    with pytest.raises(ValueError, match="0 records"):
        record({"n": "c"}, "some.json", "", tmp_path)
    table = Table("some.json", "name | x", ("{x[1]:.1f}",), {"first": [{"n": "a*"}], "second": [""]})
    assert render(table, tmp_path).splitlines()[2:] == ["| first | 2.0 |", "| second | |"]
    with pytest.raises(ValueError, match="2 columns"):
        render(Table("some.json", "name | x", ("{x[1]:.1f}",), {"first": []}), tmp_path)
