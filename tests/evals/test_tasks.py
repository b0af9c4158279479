"""Scores on tasks of lm-evaluation-harness, where it is installed; its absence is one line."""

import json
import sys

import pytest

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.evals.tasks import Score, TaskResults, evaluate_tasks

from ..cli.conftest import complaint, run  # noqa: F401  (a fixture)

TASK = """
task: qk_endings
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DOCUMENTS = [
    {"question": "import", "choices": [" os", " the"], "answer": 0},
    {"question": "def f(", "choices": ["self", "!!"], "answer": 0},
    {"question": "return", "choices": [" None", " import"], "answer": 1},
    {"question": "class", "choices": [" A", " =="], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a task with four questions."""
    made = tmp_path_factory.mktemp("tasks")
    lines = made / "documents.jsonl"
    lines.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (made / "endings.yaml").write_text(TASK.format(file=lines))
    (made / "broken.yaml").write_text(TASK.format(file=made / "gone.jsonl").replace("qk_endings", "qk_broken"))
    return made


@pytest.fixture(scope="module")
def packed(reference, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed") / "packed"
    quantkit.quantize(reference, method="rtn", bits=4, output=output)
    return output


class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("lm_eval")

    def test_a_packed_model_beside_its_original(self, folder, packed, reference):
        found = evaluate_tasks(packed, ["qk_endings"], include_path=folder, baseline=reference)
        (score,) = found.scores
        assert (score.task, score.metric, score.samples, score.shots) == ("qk_endings", "acc", 4, 0)
        assert score.value == score.baseline == 0.5, "of these four, any model of Python has the first two right"
        assert score.stderr == pytest.approx(score.baseline_stderr) and score.stderr > 0
        told = json.loads(json.dumps(found.to_json()))
        assert told["baseline"] == str(reference) and told["harness"].startswith("lm_eval 0.")
        tokenizer, model = quantkit.evals.evaluate.load_tokenizer(packed), quantkit.load(packed)
        some = evaluate_tasks(model, ["qk_end*"], tokenizer=tokenizer, include_path=folder, limit=2, num_fewshot=1)
        assert (some.scores[0].samples, some.scores[0].shots, some.scores[0].value) == (2, 1, 1.0)

    def test_what_is_wrong_is_one_line(self, folder, packed):
        with pytest.raises(QuantkitError, match=r"the tasks qk_broken cannot be set up \(FileNotFoundError: .*gone"):
            evaluate_tasks(packed, ["qk_broken"], include_path=folder)
        with pytest.raises(QuantkitError, match="`include_path` nowhere is not a folder"):
            evaluate_tasks(packed, ["qk_endings"], include_path="nowhere")

    def test_the_command_prints_a_table_or_json(self, folder, packed, reference):
        arguments = ["eval", packed, "--tasks", "qk_endings", "--include-path", folder, "--baseline", reference]
        told = run(*arguments, "--batch-size", 2)
        assert told.returncode == 0, told.stderr
        row = next(line for line in told.stdout.splitlines() if line.strip().startswith("qk_endings"))
        assert row.split()[:5] == ["qk_endings", "acc", "0", "4", "0.5000"] and "+0.0000" in row
        found = json.loads(run(*arguments, "--limit", 1, "--json").stdout)
        assert [(score["value"], score["samples"]) for score in found["scores"]] == [(1.0, 1)]


class Manager:
    """Stands for the harness's table of tasks."""

    all_tasks = ("arc_easy", "arc_challenge", "hellaswag")

    def __init__(self, include_path=None, include_defaults=True):
        self.include_path = include_path

    def match_tasks(self, names):
        return [task for task in self.all_tasks if task in names]

    def load(self, names):
        raise ConnectionError("no route to the hub\nand more")


@pytest.fixture
def stand_in(monkeypatch):
    """A harness that knows three tasks and reaches no hub."""
    module = type(sys)("lm_eval.tasks")
    module.TaskManager = Manager
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)


def test_unknown_tasks_and_data_out_of_reach(stand_in, packed, complaint):  # noqa: F811
    for task, message in (
        ("arc_esy", "unknown task 'arc_esy'; did you mean 'arc_easy'"),
        ("zzz", "unknown task 'zzz'; `lm_eval ls tasks` lists them; A folder of your own tasks is an --include-path"),
        ("hellaswag", "the tasks hellaswag cannot be set up (ConnectionError: no route to the hub)"),
    ):
        code, said = complaint("eval", packed, "--tasks", task)
        assert code == 2 and message in said and len(said.splitlines()) == 1, said


def test_without_the_harness_the_way_to_it_is_said(packed, complaint, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, said = complaint("eval", packed, "--tasks", "arc_easy")
    assert code == 2 and "pip install 'quantkit-llm[tasks]'" in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_easy", "--stride", 4], "--stride is not read beside --tasks"),
        (["--limit", 4], "--limit says nothing without --tasks"),
        (["--tasks", "arc_easy", "--limit", 0], "--limit 0: give at least 1"),
        (["--tasks", " , "], "no tasks are named"),
        (["--tasks", "arc_easy", "--num-fewshot", -1], "--num-fewshot -1: give at least 0"),
    ],
)
def test_senseless_requests(arguments, message, packed, complaint):  # noqa: F811
    code, said = complaint("eval", packed, *arguments)
    assert code == 2 and message in said, said


def test_the_table_has_both_models(capsys):
    from quantkit.cli.tasks import _print

    settings = {"model": "[packed]", "baseline": "full", "harness": "lm_eval 1"}
    _print(TaskResults((Score("a[b]", "acc", 0.5, 0.1, 0.75, None, 8, 0), Score("group", "acc", 0.5, None)), settings))
    told = capsys.readouterr().out
    assert "a[b]" in told and "0.5000 +- 0.1000" in told and "0.7500" in told and "-0.2500" in told
