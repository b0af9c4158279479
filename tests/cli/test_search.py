"""`quantkit search` as a user meets it."""

import json
import signal
import subprocess
import time

import pytest
import torch

import quantkit

from .conftest import COMMAND, run

SHORT = ["--num-samples", 4, "--seqlen", 64, "--search-samples", 12, "--held-out", 4]
SHORT += ["--candidates", "gptq(2), gptq(3), gptq(4)", "--generations", 2, "--offspring", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def short(text_file):
    return ["--calibration", text_file, *SHORT]


@pytest.fixture(scope="module")
def searched(short, model_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("search")
    arguments = [*short, "--database", place / "candidates", "--output", place / "found"]
    result = run("search", model_folder("llama_even"), "--avg-bits", 3.2, *arguments)
    assert result.returncode == 0, result.stderr
    return place, result


def test_a_checkpoint_a_plan_and_a_picture(searched, short, model_folder):
    place, result = searched
    for word in ("uniform", "knapsack", "search", "budget", "quantkit.load"):
        assert word in result.stdout
    assert "2/2" in result.stderr, "a bar of generations"
    names = {path.name for path in (place / "found").iterdir()}
    assert {
        "quantkit_plan.json",
        "quantkit_search.json",
        "quantkit_search.png",
        "quantkit_report.json",
        "quantkit_remote.py",
    } <= names
    assert (place / "found" / "quantkit_report.html").read_text().count("<svg") == 1
    assert not list(place.glob("found.*"))
    report = json.loads((place / "found" / "quantkit_report.json").read_text())
    assert 3.0 < report["bits_per_weight"] <= 3.2
    record = json.loads((place / "found" / "quantkit_search.json").read_text())
    assert len(record["history"]) == 2 and record["spent"] <= record["budget"]
    model = quantkit.load(place / "found", dtype=torch.float32)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)
    inspected = run("inspect", place / "found")
    assert inspected.returncode == 0 and "int_group" in inspected.stdout
    plan = place / "found" / "quantkit_plan.json"
    again = run("quantize", model_folder("llama_even"), "--plan", plan, *short[:6], "--output", place / "again")
    assert again.returncode == 0, again.stderr
    bits = json.loads((place / "again" / "quantkit_report.json").read_text())["bits_per_weight"]
    assert bits == pytest.approx(report["bits_per_weight"])


def test_one_json_object_is_all_of_standard_output(searched, short, model_folder, tmp_path):
    place, _ = searched
    arguments = [*short, "--database", place / "candidates", "--generations", 1, "--output", tmp_path / "found"]
    told = json.loads(
        run("search", model_folder("llama_even"), "--avg-bits", 9, *arguments, "--dry-run", "--json").stdout
    )
    assert not list(tmp_path.iterdir())
    done = run("search", model_folder("llama_even"), "--avg-bits", 9, *arguments, "--json")
    found = json.loads(done.stdout)
    assert "generations  1/1" in done.stderr, "progress stays there"
    assert found["plan"] == str(tmp_path / "found" / "quantkit_plan.json")
    assert found["layers"] == json.loads((tmp_path / "found" / "quantkit_plan.json").read_text())["layers"]
    record = json.loads((tmp_path / "found" / "quantkit_search.json").read_text())
    assert {name: found[name] for name in ("held_out", "seen", "budget", "spent", "measure")} == {
        name: record[name] for name in ("held_out", "seen", "budget", "spent", "measure")
    }
    assert found["fitness"] == record["history"][-1]["fitness"] and found["generations"] == 1
    assert found["report"] == json.loads((tmp_path / "found" / "quantkit_report.json").read_text())
    assert 0 < found["report"]["seconds"] <= found["seconds"]
    assert (tmp_path / "found" / "quantkit_search.png").samefile(found["picture"])
    assert found["notes"] == told["notes"] and "nothing to search" in found["notes"][0]
    assert told["budget"] == found["budget"] and told["least"] < found["spent"] <= told["most"]
    assert told["evaluations"] >= found["evaluations"] >= 1 + 14 + 5 + 6, "sensitivities, starts, the comparison"
    assert told["tokens"] >= found["tokens"] > 0


def test_a_dry_run_tells_what_the_search_makes_and_makes_nothing(searched, short, model_folder, tmp_path):
    place, _ = searched
    arguments = [
        "search",
        model_folder("llama_even"),
        "--avg-bits",
        3.2,
        *short,
        "--output",
        tmp_path / "out",
        "--dry-run",
    ]
    new = json.loads(run(*arguments, "--database", tmp_path / "candidates", "--json").stdout)
    assert not list(tmp_path.iterdir())
    assert (new["items"], new["levels"], new["candidates"], new["missing"]) == (14, 3, 42, 42)
    sidecars = [json.loads(path.read_text()) for path in (place / "candidates").glob("block-*/gptq*.json")]
    made = sum(layer["nbytes"] for sidecar in sidecars for layer in sidecar["layers"].values())
    assert new["candidate_bytes"] == new["missing_bytes"] == made
    (kept,) = (place / "candidates").glob("teacher-*")
    predictions = sum(path.stat().st_size for path in kept.glob("*.safetensors"))
    assert new["prediction_bytes"] == pytest.approx(predictions, rel=0.01)
    assert new["candidate_seconds"] > 0
    assert new["search_seconds"] is new["memory_bytes"] is None
    assert new["least"] < new["budget"] < new["most"]
    there = run(*arguments, "--database", place / "candidates")
    lines = {" ".join(line[:19].split()): line[19:] for line in there.stdout.splitlines()}
    assert lines["candidates"] == "42, 0 to make and 42 there"
    assert lines["time of candidates"].startswith("about 0:00:00")
    assert lines["time of the search"].startswith("not estimated")
    more = run(*arguments, "--database", place / "candidates", "--candidates", "gptq(2), gptq(3), gptq(4), rtn(4)")
    assert "56, 14 to make and 42 there" in more.stdout
    blocks = [word for word in arguments if word not in ("--avg-bits", 3.2)]
    pruned = json.loads(run(*blocks, "--drop-blocks", 1, "--json").stdout)
    assert (pruned["items"], pruned["budget"], pruned["unit"], pruned["database"]) == (2, 1, "blocks", None)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_the_search_would(searched, short, model_folder, tmp_path, complaint):
    place, _ = searched
    arguments = ["search", model_folder("llama_even"), *short, "--dry-run", "--database", place / "candidates"]
    for more, message in (
        (["--avg-bits", 1.5, "--output", tmp_path / "out"], "1.5 bits per weight is impossible with these candidates"),
        (["--avg-bits", 3, "--output", place / "found"], "already exists; give another --output, or --overwrite"),
        (["--avg-bits", 3, "--num-samples", 5, "--output", tmp_path / "out"], "holds candidates of another run"),
        (["--avg-bits", 3, "--held-out", 12, "--output", tmp_path / "out"], "12 of them held out"),
        (["--avg-bits", 3, "--calibration", tmp_path / "no.txt", "--output", tmp_path / "out"], "no file"),
        (["--avg-bits", 3, "--candidates", "gptq(3, group_size=1000)", "--output", tmp_path / "out"], "exceeds"),
    ):
        code, said = complaint(*arguments, *more)
        assert code == 2 and message in said, said
    assert not list(tmp_path.iterdir())


def test_a_killed_search_goes_on(searched, short, model_folder, complaint):
    place, _ = searched
    arguments = ["search", model_folder("llama_even"), "--size", "530KB", *short, "--database", place / "candidates"]
    arguments = [*map(str, [*arguments, "--output", place / "second", "--generations", 12])]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    state, deadline = place / "second.partial" / "search.json", time.monotonic() + 240
    while not state.exists() or len(json.loads(state.read_text())["state"]["history"]) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    former = json.loads(state.read_text())["state"]["history"]
    code, said = complaint(*arguments)
    assert code == 2 and "--resume continues it" in said
    done = run(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert 500_000 < sum(path.stat().st_size for path in (place / "second").glob("*.safetensors")) <= 530_000
    report = json.loads((place / "second" / "quantkit_report.json").read_text())
    bits = {layer["name"]: layer["bits_per_weight"] for layer in report["layers"]}
    assert bits["lm_head"] == bits["model.embed_tokens"] == 6.125, "a budget of all weights is theirs too"
    plan = json.loads((place / "second" / "quantkit_plan.json").read_text())["layers"]
    assert plan["lm_head"] == "gptq(6)" and plan["model.embed_tokens"] == "rtn(6)"
    history = json.loads((place / "second" / "quantkit_search.json").read_text())["history"]
    assert [[*line.values()] for line in history[: len(former)]] == former and len(history) == 12


def test_a_model_that_is_to_fit_has_its_head_and_embedding_packed(searched, short, model_folder, tmp_path):
    place, _ = searched
    arguments = [*short, "--database", place / "candidates", "--generations", 1, "--fit", "130MB", "--context", 64]
    done = run("search", model_folder("llama_even"), *arguments, "--output", tmp_path / "found")
    assert done.returncode == 0, done.stderr
    packed = quantkit.load(tmp_path / "found")
    assert packed.get_input_embeddings().packed.bits == packed.lm_head.packed.bits == 6


def test_a_plan_leaves_nothing_to_say(searched, short, model_folder, tmp_path, complaint):
    place, _ = searched
    arguments = ["--plan", place / "found" / "quantkit_plan.json", "--bits", 3, "--output", tmp_path / "o"]
    code, said = complaint("quantize", model_folder("llama_even"), *arguments)
    assert code == 2 and "--bits is not read beside it" in said


def test_pruning(short, model_folder, tmp_path):
    folder = model_folder("llama_even")
    common = [*short[:10], "--generations", 1, "--offspring", 2, "--device", "cpu", "--database", tmp_path / "c"]
    result = run("search", folder, "--drop-blocks", 1, *common, "--output", tmp_path / "shallow")
    assert result.returncode == 0, result.stderr
    assert quantkit.load(tmp_path / "shallow").config.num_hidden_layers == 1
    again = run("search", folder, "--drop-blocks", 1, *common, "--output", tmp_path / "shallow", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.glob("shallow.*"))
    sparse = ["--candidates", "sparse(0.4), sparse(0.5), sparse(0.6)"]
    result = run("search", folder, "--sparsity", 0.5, *sparse, *common, "--output", tmp_path / "sparse")
    assert result.returncode == 0, result.stderr
    linears = [m for m in quantkit.load(tmp_path / "sparse").modules() if hasattr(m, "packed")]
    zeros = sum(int((linear.weight == 0).sum()) for linear in linears)
    assert 0.5 <= zeros / sum(linear.weight.numel() for linear in linears) < 0.53


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none is given"),
        (["--avg-bits", 3, "--size", "4GB"], "--avg-bits and --size are given"),
        (["--avg-bits", 0], "give bits per weight"),
        (["--avg-bits", 3, "--candidates", "low_rank(gptq(2), 2.5)"], "whole rank"),
        (["--size", "four"], "is no size"),
        (["--fit", "12GB"], "--fit needs --context"),
        (["--fit", "1MB", "--context", 32768], "are needed beside the weights"),
        (["--fit", "1MB", "--context", 32768, "--kv-bits", 2], "are needed beside the weights"),
        (["--avg-bits", 3, "--context", 99], "--context is given without --fit"),
        (["--avg-bits", 3, "--top", 100], "top=100"),
        (["--sparsity", 1], "between 0 and 1"),
        (["--drop-blocks", 0], "give at least 1"),
        (["--avg-bits", 3, "--head-bits", 9], "give 1 to 8, or 0 (or 16) to leave head and embedding dense"),
        (["--drop-blocks", 1, "--head-bits", 6], "which makes a dense model"),
        (["--drop-blocks", 2], "the model has 2 blocks, and one must stay"),
        (["--fit", "1GB", "--context", 99, "--kv-bits", -100], "a cache has 2, 3, 4 or 8 bits"),
        (["--avg-bits", 3, "--kv-bits", 4], "--kv-bits is given without --fit"),
        (["--avg-bits", 3, "--search-samples", 8, "--held-out", 8], "8 sequences of text, 8 of them held out"),
        (["--latency-ms", 3], "--timings"),
        (["--avg-bits", 3, "--candidates", "gptk(3)"], "did you mean 'gptq'"),
        (["--avg-bits", 3, "--candidates", "gptq:3"], "'gptq:3' is no quantizer; write a method and its settings"),
        (["--avg-bits", 3, "--candidates", ","], "is no quantizer"),
        (["--avg-bits", 3, "--candidates", "trellis(2.5)"], "offer trellis(2) and trellis(3)"),
        (["--avg-bits", 3, "--held-out", 0], "held_out=0"),
        (["--avg-bits", 3, "--generations", -1], "generations=-1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, model_folder, tmp_path, complaint):
    code, said = complaint("search", model_folder("llama_even"), *arguments, "--output", tmp_path / "out")
    assert code == 2
    assert message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_an_impossible_budget_and_a_strange_database(searched, short, model_folder, tmp_path, complaint):
    place, _ = searched
    arguments = ["search", model_folder("llama_even"), *short, "--output", tmp_path / "out", "--database"]
    code, said = complaint(*arguments, place / "candidates", "--avg-bits", 1.5)
    assert code == 2 and "1.5 bits per weight is impossible with these candidates: from 2.1" in said
    code, said = complaint(*arguments, place / "candidates", "--avg-bits", 3, "--num-samples", 5)
    assert code == 2 and "holds candidates of another run (calibration.num_samples is 5, and was" in said
    (tmp_path / "timings.json").write_text(json.dumps([{"format": "int_group 2", "rows": 1, "columns": 2, "us": 3}]))
    timings = ["--latency-ms", 3, "--timings", tmp_path / "timings.json"]
    code, said = complaint(*arguments, place / "candidates", *timings)
    assert code == 2 and "the timings lack 'int_group 2'" in said


def test_predictions_choose_without_measuring(model_folder, text_file, tmp_path):
    folder, place = model_folder("llama_even"), tmp_path / "candidates"
    words = ["--avg-bits", 3.2, "--calibration", text_file, *SHORT, "--generations", 0, "--start", "predicted"]
    words += ["--database", place, "--json", "--output"]
    made = run("search", folder, *words, tmp_path / "found")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert set(found["held_out"]) == {"knapsack, predicted", "uniform", "search"} and found["spent"] <= found["budget"]
    assert found["evaluations"] == 5  # two starts, and three in the comparison
    assert len(set(found["layers"].values())) > 1
    best = run("search", folder, *words, tmp_path / "best", "--start", "best", "--fisher")
    assert "knapsack, predicted" in json.loads(best.stdout)["held_out"]
    without = run("search", folder, *words, tmp_path / "without", "--no-fisher", "--database", tmp_path / "other")
    assert without.returncode == 2 and "nothing is predicted" in without.stderr
