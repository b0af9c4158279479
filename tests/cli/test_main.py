"""The command line as a user meets it: whole processes, exit codes, one-line errors."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..conftest import ROOT
from .conftest import COMMAND, run


@pytest.fixture(scope="module")
def packed(model_folder, text_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("cli") / "packed"
    result = run(
        "quantize", model_folder("llama_small"), "--bits", 3, "--group-size", 32, "--calibration", text_file,
        "--num-samples", 4, "--seqlen", 128, "--output", output,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return output, result


def test_quantize_prints_and_writes_a_report(packed):
    output, result = packed
    headings = "layer of model.layers", "bits per weight", "size", "peak memory", "time"
    for word in (*headings, "1.mlp.down_proj", "quantkit.load"):
        assert word in result.stdout
    assert "blocks  2/2" in result.stderr, "a line a block"
    report = json.loads((output / "quantkit_report.json").read_text())
    assert len(report["layers"]) == 14
    assert all(0 < layer["relative_error"] < 1 for layer in report["layers"])
    assert report["bytes_after"] < report["bytes_before"]
    card = (output / "README.md").read_text()
    assert card.index("Load this checkpoint with quantkit") < card.index("measured bits")
    assert (output / "quantkit_report.html").read_text().startswith("<!DOCTYPE html>")


def test_quantize_ends_with_a_check_and_the_command_that_measures_more(packed, model_folder, text_file, tmp_path):
    """The command is one that runs, and the figures are the report's."""
    output, result = packed
    check = json.loads((output / "quantkit_report.json").read_text())["check"]
    assert check["sequences"] == 8 and check["seqlen"] == 128
    assert f"{check['kl']:.5f} +- {check['kl_se']:.5f} nats a token" in result.stdout
    assert f"{check['baseline_perplexity']:.4f} -> {check['perplexity']:.4f}" in result.stdout
    told = re.search(r"measure more +quantkit (.*)", result.stdout)[1]
    assert told == f"eval {output} --baseline {model_folder('llama_small')} --data {text_file}"
    more = run(*told.split(), "--seqlen", 128, "--num-samples", 2)
    assert more.returncode == 0 and "KL to baseline" in more.stdout, more.stderr
    settings = ["--method", "rtn", "--group-size", 32, "--calibration", text_file, "--num-samples", 2, "--seqlen", 64]
    arguments = ["quantize", model_folder("llama_small"), *settings]
    found = json.loads(run(*arguments, "--json", "--check", 3, "--output", tmp_path / "it's").stdout)
    assert found["check"]["sequences"] == 3 and found["hub"] is None
    assert found["eval_command"].startswith("quantkit eval '")
    plain = run(*arguments, "--no-check", "--output", tmp_path / "plain")
    assert (
        plain.returncode == 0
        and "held-out sequences" not in plain.stdout
        and "the check was left out" not in plain.stdout
    )
    names = {path.name for path in (tmp_path / "plain").glob("*.safetensors")}
    assert names and all((tmp_path / "plain" / n).read_bytes() == (tmp_path / "it's" / n).read_bytes() for n in names)


def test_bench_measures_beside_the_original(packed, model_folder, complaint):
    output, _ = packed
    arguments = ["bench", output, "--prompt-tokens", 8, "--new-tokens", 4, "--device", "cpu"]
    result = run(*arguments, "--baseline", model_folder("llama_small"))
    assert result.returncode == 0, result.stderr
    for line in ("first token", "tokens a second", "ideal for a token", "speed-up"):
        assert line in result.stdout
    found = json.loads(run(*arguments, "--json", "--no-fuse").stdout)
    assert found["device"] == "CPU"
    assert found["model"]["new_tokens"] == 4
    for more, message in (
        (["--baseline", output], "the model itself"),
        (["--autotune"], "there is no GPU here"),
        (["--dtype", "float8"], "unknown dtype"),
    ):
        code, said = complaint(*arguments, *more)
        assert code == 2 and message in said, said


def test_inspect_and_eval(packed, model_folder, text_file):
    output, _ = packed
    listing = json.loads(run("inspect", output, "--json").stdout)
    assert len(listing["layers"]) == 14
    assert listing["bits_per_weight"] == pytest.approx(
        json.loads((output / "quantkit_report.json").read_text())["bits_per_weight"]
    )
    assert "int_group" in run("inspect", output).stdout
    result = run(
        "eval",
        output,
        "--data",
        text_file,
        "--seqlen",
        128,
        "--num-samples",
        3,
        "--baseline",
        model_folder("llama_small"),
        "--json",
    )
    figures = json.loads(result.stdout)
    assert figures["windows"] == 3
    assert figures["available"] > 3
    assert figures["kl"] > 0
    assert 0 <= figures["flip_rate"] <= 1
    arguments = ["--data", text_file, "--seqlen", 128, "--num-samples", 3, "--json"]
    same = json.loads(run("eval", model_folder("llama_small"), *arguments).stdout)
    assert same["perplexity"] == pytest.approx(figures["baseline_perplexity"])
    told = run("eval", output, "--data", text_file, "--seqlen", 128, "--stride", 64, "--num-samples", 2).stdout
    assert f"{text_file.name}, sequences of 128 tokens every 64" in "".join(told.splitlines())
    assert re.search(r"over +2 of \d\d+ sequences, 191 tokens scored", told)


def test_dry_run_predicts_the_sizes_and_touches_nothing(packed, model_folder, text_file, tmp_path):
    output, _ = packed
    report = json.loads((output / "quantkit_report.json").read_text())
    folder = tmp_path / "headers-only"
    folder.mkdir()
    for path in model_folder("llama_small").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    result = run(
        "quantize",
        folder,
        "--bits",
        3,
        "--group-size",
        32,
        "--calibration",
        text_file,
        "--output",
        tmp_path / "no",
        "--dry-run",
    )
    assert result.returncode == 0, result.stderr
    assert f"{report['bits_per_weight']:.3f}" in result.stdout
    assert f"{report['bytes_after'] / 2**10:.2f} KiB" in result.stdout
    assert "memory of the run" in result.stdout
    assert not list(tmp_path.glob("no*"))
    refused = run("quantize", folder, "--bits", 3, "--method", "rtn", "--output", output, "--dry-run")
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr


@pytest.mark.parametrize("architecture", ["llama_small", "llama_tied_small"])
def test_head_and_embedding_at_their_own_bits(architecture, model_folder, text_file, tmp_path):
    """They are predicted, reported, listed and evaluated like all other layers."""
    folder, output = model_folder(architecture), tmp_path / "packed"
    settings = ["--bits", 4, "--group-size", 32, "--head-bits", 6, "--calibration", text_file]
    settings += ["--num-samples", 3, "--seqlen", 128, "--output", output]
    expected = run("quantize", folder, *settings, "--dry-run")
    made = run("quantize", folder, *settings)
    assert made.returncode == 0, made.stderr
    report = json.loads((output / "quantkit_report.json").read_text())
    assert f"{report['bits_per_weight']:.3f}" in expected.stdout
    assert f"{report['bytes_after'] / 2**10:.2f} KiB" in expected.stdout
    assert "model.embed_tokens" in made.stdout and "lm_head" in made.stdout
    assert ("tied to lm_head" in made.stdout) == (architecture == "llama_tied_small")
    listing = json.loads(run("inspect", output, "--json").stdout)
    assert listing["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert len(listing["layers"]) == 16
    if architecture == "llama_tied_small":
        evaluation = ["--data", text_file, "--seqlen", 128, "--num-samples", 2, "--baseline", folder, "--json"]
        assert 0 < json.loads(run("eval", output, *evaluation).stdout)["kl"] < 0.1
    else:
        ignored = [*settings[:-1], tmp_path / "other", "--ignore", "lm_head", "--ignore", "model.embed_tokens"]
        assert "layers to pack     14" in run("quantize", folder, *ignored, "--dry-run").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gptk"], "did you mean 'gptq'"),
        (["--calibration", "wikitext"], "did you mean 'wikitext2'"),
        (["--calibration", "missing.txt"], "no file 'missing.txt'"),
        (["--group-size", "0"], "use -1 for one group a row"),
        (["--group-size", "100000"], "exceeds the widest layer"),
        (["--bits", "9"], "1 to 8 bits"),
        (["--target-shift", "7"], "use 0 (off) to 1"),
        (["--ignore", "*.nothing"], "matches none"),
        (["--device", "cuda:77"], "torch sees"),
        (["--num-samples", "0"], "at least one sequence"),
        (["--check", "-1"], "check=-1 sequences: give 0 (off)"),
        (["--head-bits", "9"], "9 bits for head and embedding: give 1 to 8"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, model_folder, text_file, tmp_path, complaint):
    defaults = ["--calibration", text_file, "--seqlen", 64, "--num-samples", 2]
    code, said = complaint("quantize", model_folder("llama"), *defaults, *arguments, "--output", tmp_path / "out")
    assert code == 2
    lines = [line for line in said.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_process_ends_with_the_same(tmp_path):
    result = run("quantize", "./nothing-here", "--output", tmp_path / "out")
    assert result.returncode == 2
    assert "is not a folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_models_that_are_none(tmp_path, complaint):
    assert "holds no config.json" in complaint("quantize", tmp_path, "--output", tmp_path / "o")[1]
    assert "no config.json" in complaint("inspect", tmp_path)[1]


def test_empty_and_short_text(model_folder, tmp_path, complaint):
    empty, short, folder = tmp_path / "empty.txt", tmp_path / "short.txt", model_folder("llama")
    empty.write_text("  \n")
    short.write_text("hardly anything")
    for path, message in ((empty, "holds no text"), (short, "give more text or --seqlen")):
        code, said = complaint("quantize", folder, "--calibration", path, "--output", tmp_path / "out")
        assert code == 2
        assert message in said
    assert not list(tmp_path.glob("out*"))


def test_ctrl_c_keeps_what_is_done(short_reference, text_file, tmp_path):
    """Of two blocks the first; the second takes long enough."""
    output = tmp_path / "out"
    arguments = ["quantize", short_reference, "--calibration", text_file, "--num-samples", 8, "--output", output]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignored"
    )
    partial = output.with_name("out.partial")
    deadline = time.monotonic() + 240
    while not list(partial.rglob("*.safetensors")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert not output.exists()
    assert list(partial.rglob("*.safetensors"))


def test_settings_in_errors_are_named_as_the_verbs_options():
    """The library names its settings in backticks; what a verb has no option for stays as it is."""
    from quantkit.cli.main import _as_options

    text = "give another `output`, or lower `num_samples` and `micro_batch`; see `quantkit`"
    assert _as_options(text, ["tune", "x"]) == (
        "give another --output, or lower --num-samples and --micro-batch; see `quantkit`"
    )
    assert "`micro_batch`" in _as_options(text, ["quantize", "x"])
    assert _as_options(text, ["--help"]) == text


SHAPES = """
import os
from pathlib import Path

from quantkit.cli.options import ENVIRONMENT

os.environ.update(ENVIRONMENT)
import torch

torch.set_num_threads(1)
weight = torch.randn(256, 256).bfloat16()


def held():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])


sizes = iter(range(1, 2000))
for count in (100, 150):
    for _ in range(count):
        torch.nn.functional.linear(torch.randn(next(sizes), 256).bfloat16(), weight)
    print(held())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what a process holds")
def test_products_of_many_shapes_are_not_kept():
    """As experts have them: torch would keep a megabyte of each on some CPUs."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    assert after - before < 64 * 1024


def test_of_several_processes_the_first_says_what_is_wrong_with_a_command(complaint, monkeypatch):
    """The others leave it a moment, in which torchrun ends them; one that is alone with its error says it then."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for wrong in (["quantize", "model", "--bits", "x"], ["search", "model"], ["generalize"]):
        alone = complaint(*wrong)
        assert alone[0] == 2 and waited == []
        monkeypatch.setenv("RANK", "1")
        assert complaint(*wrong) == alone
        assert waited.pop() > 1 and not waited
        monkeypatch.delenv("RANK")
    monkeypatch.setenv("RANK", "1")
    assert complaint("--version")[0] == 0 and not waited
