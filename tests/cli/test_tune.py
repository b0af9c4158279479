"""`quantkit tune` as a user meets it."""

import json
import shutil

import pytest

from .conftest import run


@pytest.fixture(scope="module")
def arguments(model_folder, text_file, tmp_path_factory):
    """Of a short run on a packed model, but for its output."""
    packed = tmp_path_factory.mktemp("tune") / "packed"
    made = run("quantize", model_folder("llama_small"), "--method", "rtn", "--group-size", 32, "--output", packed)
    assert made.returncode == 0, made.stderr
    text = ["--calibration", text_file, "--num-samples", 8, "--seqlen", 32, "--held-out", 2, "--device", "cpu"]
    steps = ["--steps", 3, "--batch", 2, "--evaluate-every", 2, "--lr", "2e-3"]
    return [packed, "--teacher", model_folder("llama_small"), *text, *steps]


def test_one_json_object_is_all_of_standard_output(arguments, tmp_path):
    done = run("tune", *arguments, "--cache", tmp_path / "cache", "--output", tmp_path / "out", "--json")
    found = json.loads(done.stdout)
    assert "steps  3/3" in done.stderr, "progress stays there"
    record = json.loads((tmp_path / "out" / "quantkit_tuning.json").read_text())
    assert {name: found[name] for name in record} == record
    figures = [entry["kl"] for entry in found["history"]]
    assert len(figures) == 3 and (found["kl_before"], found["kl_after"]) == (figures[0], min(figures))
    assert found["output"] == str(tmp_path / "out")
    assert found["seconds"] > 0 and found["peak_memory_bytes"] > 2**26 and found["peak_device_bytes"] == 0
    assert (tmp_path / "out" / "quantkit_remote.py").is_file()
    listing = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["bytes_after"] == listing["bytes"]
    report = json.loads((tmp_path / "out" / "quantkit_report.json").read_text())
    assert report["tuning"]["kl"] == figures and report["tuning"]["steps"] == [0, 2, 3]
    assert report["check"] is None, "that was of the model before"
    assert report["bytes_after"] == listing["bytes"]
    assert f"{figures[0]:.5f} → {min(figures):.5f}" in (tmp_path / "out" / "quantkit_report.html").read_text()
    assert f"{figures[0]:.5f} → {min(figures):.5f}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("damage", ["{", '{"layers": [{"name": 3}], "notes": []}', {"packed_weights": 0}])
def test_a_report_that_is_none_is_left_behind(damage, arguments, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(arguments[0], packed)
    report = packed / "quantkit_report.json"
    report.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(report.read_text()) | damage))
    done = run("tune", packed, *arguments[1:], "--output", tmp_path / "out")
    assert done.returncode == 0 and "quantkit_report.json is no report" in done.stderr
    assert (tmp_path / "out" / "quantkit_tuning.json").is_file()
    assert not (tmp_path / "out" / "quantkit_report.json").exists()


def test_a_dry_run_tells_what_a_run_does_and_makes_nothing(arguments, tmp_path):
    more = ["--output", tmp_path / "out", "--cache", tmp_path / "cache", "--dry-run"]
    told = json.loads(run("tune", *arguments, *more, "--json").stdout)
    assert not list(tmp_path.iterdir())
    assert (told["steps"], told["step_tokens"], told["tokens"], told["measurements"]) == (3, 64, 192, 3)
    assert (told["layers"], told["sequences"], told["held_out"]) == (14, 8, 2)
    assert set(told["trainable"]) == {"scales", "codes", "norms"} and told["trainable"]["norms"] == 5 * 64
    assert told["memory_bytes"] == sum(told["memory"].values())
    assert told["seconds"] is told["activation_bytes"] is None
    text = run("tune", *arguments, *more, "--embeddings").stdout
    assert f"{2 * 2048 * 64:,} in embedding and head" in text
    lines = {" ".join(line[:19].split()): line[19:] for line in text.splitlines()}
    assert lines["steps"].startswith("3, on 192 tokens, 64 in each; measured 3 times")
    assert lines["time of the run"] == "not estimated"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_a_run_would(arguments, tmp_path, complaint):
    packed, _, teacher, *settings = arguments
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    output = ["--output", tmp_path / "out"]
    for words, message in (
        ([packed, "--teacher", packed, *settings, *output], "is a packed model"),
        ([teacher, "--teacher", teacher, *settings, *output], "is not a quantkit checkpoint"),
        ([*arguments, "--output", packed], "would replace"),
        ([*arguments, "--output", tmp_path / "mine"], "already exists"),
        ([*arguments, *output, "--held-out", 8], "8 of them held out"),
        ([*arguments, *output, "--corrections"], "have no low-rank corrections"),
        ([*arguments, *output, "--dtype", "float8"], "unknown dtype"),
        ([*arguments, *output, "--cache", tmp_path / "mine"], "is not a teacher's predictions"),
    ):
        code, said = complaint("tune", *words, "--dry-run")
        assert code == 2 and message in said, said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
