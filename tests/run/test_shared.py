"""Several processes that share a run make the bytes of one, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit
from quantkit.run.processes import ALONE, Together

from ..helpers.checkpoints import digest
from ..helpers.processes import run
from .shared_quantize import CASES, TEXT

SCRIPT = Path(__file__).with_name("shared_quantize.py")


@pytest.mark.parametrize(
    ("case", "name", "processes"),
    [
        ("gptq", "llama_small", 2),  # of three batches
        ("trellis", "llama_small", 2),
        ("experts", "qwen3_moe", 2),
        ("ranks", "llama_small", 3),  # one of which has no batch
        ("tuned", "llama_tied_small", 2),
    ],
)
def test_every_number_of_processes_makes_the_same_bytes(case, name, processes, model_folder, text_file, tmp_path):
    (alone,) = run(SCRIPT, 1, tmp_path / "one", case, model_folder(name), text_file)
    shared = run(SCRIPT, processes, tmp_path / "more", case, model_folder(name), text_file)
    assert shared == [alone] * processes, "all have the report"
    assert digest(tmp_path / "more" / "model") == digest(tmp_path / "one" / "model")


def test_torchrun_starts_them_for_the_command(reference, model_folder, text_file, tmp_path):
    """As the guide has it, from the shell."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "quantkit.cli", "quantize"]
    options = ["--group-size", "32", "--num-samples", "16", "--seqlen", "128", "--no-check", "--quiet"]
    model = [str(model_folder("llama_small")), "--calibration", str(text_file), "--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *model, *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(tmp_path / "out")], "one of them tells"
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_one_process_cannot_do_ends_all(model_folder, text_file, tmp_path):
    first, second = run(SCRIPT, 2, tmp_path / "two", "refuses", model_folder("llama_small"), text_file)
    assert second == {"error": "QuantkitError", "said": "the second process does not like this layer"}
    assert first == {"error": "Elsewhere", "said": second["said"]}, "which the first leaves to the second to say"


@pytest.mark.parametrize(
    ("case", "said"), [("alike", "'nothing*' matches no linear layer"), ("full", "the disk is full")]
)
def test_an_error_of_all_or_of_the_first_is_said_once(case, said, model_folder, text_file, tmp_path):
    first, second = run(SCRIPT, 2, tmp_path / "two", case, model_folder("llama_small"), text_file)
    assert first["error"] == "QuantkitError"
    assert said in first["said"]
    assert second == {"error": "Elsewhere", "said": first["said"]}


def test_a_process_that_is_gone_ends_all_and_one_alone_goes_on(model_folder, text_file, tmp_path):
    output, model = tmp_path / "two", model_folder("llama_small")
    with pytest.raises(FileNotFoundError):  # the second's record
        run(SCRIPT, 2, output, "dies", model, text_file)
    assert json.loads((output / "0.json").read_text()) == {
        "error": "QuantkitError",
        "said": "another process of this run has ended, and this one with it",
    }
    settings = TEXT | {"method": CASES["dies"]["method"]}
    quantkit.quantize(model, output=output / "model", calibration=text_file, resume=True, **settings)
    quantkit.quantize(model, output=tmp_path / "one", calibration=text_file, **settings)
    assert digest(output / "model") == digest(tmp_path / "one")


def test_work_is_shared_out_by_what_it_costs():
    costs = {"q": 4.0, "k": 1.0, "v": 1.0, "gate": 9.0, "up": 9.0}
    shares = [Together(rank, 3).share(costs) for rank in range(3)]
    assert shares == [["q", "k", "v"], ["up"], ["gate"]]
    assert ALONE.share(costs) == list(costs)


def test_turns_take_batches_in_their_order():
    batches = list("abcde")
    taken = [batches[Together(rank, 2).own] for rank in range(2)]
    assert taken == [["a", "c", "e"], ["b", "d"]]
    assert len(Together(0, 2).turns(5)) == 3
