"""Hashes of the packed bytes that every method, nesting and command writes: a refactor leaves them as they are.

    python -m quantkit.evals.benchmarks.packed_bytes [--quick] [--only REGEX] [--json FILE] [--against FILE]

Each case is a command line, run on the reference model or on a small untrained model of one of four architectures, and
its hash is one of all tensors that it wrote: names, types, shapes and bytes, whatever the files are called. `--json`
records them, `--against` compares with a record and fails where one differs. Floating-point sums depend on the machine
and on torch, so only records of the same processor features and versions can be compared; make one before a change.

Beside that some cases must be equal in any case: an interrupted run and a whole one, a loaded model and a folder.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from quantkit.evals.benchmarks.forks import become

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "model"
TEXT = "--calibration stdlib --num-samples 4 --seqlen 128 --device cpu"
METHODS = {
    "rtn": "--method rtn --bits 3 --group-size 64",
    "gptq": "--bits 3 --group-size 64 --asym",
    "gptq row": "--bits 4 --group-size -1 --target-shift 0",
    "pyramid": "--method pyramid --bits 2 --dimension 8 --no-hadamard",
    "pyramid wide": "--method pyramid --bits 2.5 --dimension 32",
    "pyramid in": "--method pyramid --bits 3 --dimension 16 --axis in",
    "trellis": "--method trellis --bits 2 --state-bits 12 --no-hadamard",
    "trellis in": "--method trellis --bits 3 --state-bits 10 --axis in",
    "trellis parts": "--method trellis --bits 2.5 --state-bits 8",
    "vptq": "--method vptq --bits 2 --vector-length 3 --no-hadamard",
    "vptq residual": "--method vptq --bits 2 --vector-length 4 --residual-bits 4",
    "vptq outliers": "--method vptq --bits 1.5 --vector-length 2 --outliers 0.05 --scale-inputs --no-hadamard",
    "vptq ranges": "--method vptq --bits 2 --ranges 2",
    "hadamard rtn": "--method rtn --bits 4 --group-size 64 --hadamard",
    "hadamard gptq": "--bits 2 --group-size 64 --hadamard",
    "low rank rtn": "--method rtn --bits 3 --group-size 64 --low-rank 3",
    "low rank gptq": "--bits 2 --group-size 64 --low-rank 4",
    "hadamard low rank pyramid": "--method pyramid --bits 2 --low-rank 4",
}
"""Options of `quantize`, by method and nesting."""
QUICK = ("rtn", "gptq", "trellis", "hadamard low rank pyramid")
SETTINGS = {
    "ranks by budget": "--bits 2 --low-rank-bits 0.1",
    "head bits": "--bits 3 --head-bits 6",
    "tuned blocks": "--bits 2 --tune-blocks 3",
    "tuned trellis blocks": "--method trellis --bits 2 --state-bits 8 --tune-blocks 2",
    "ignored layers": "--bits 3 --ignore *.0.*",
    "layers of a block at once": "--bits 3 --no-true-sequential",
}
CANDIDATES = ",".join(f"gptq({bits},64)" for bits in (2, 3, 4))
SEARCH = (
    "search {model} --search-samples 12 --held-out 4 --generations 2 --offspring 4 --candidates {candidates} "
    f"{TEXT} --database {{work}}/candidates --output {{work}}/"
)
STEPS = {
    "search": SEARCH + "search --avg-bits 3.8",
    "search by size": SEARCH + "sized --size {size}",
    "search for pruning": SEARCH.replace("--candidates {candidates}", "").replace("candidates", "sparse")
    + "pruned --sparsity 0.5",
    "search for blocks": SEARCH.replace("--candidates {candidates}", "") + "dropped --drop-blocks 1",
    "plan": "quantize {model} --plan {work}/search/quantkit_plan.json " + TEXT + " --output {work}/plan",
    "tune": "tune {work}/search --teacher {model} --steps 2 --batch 2 --micro-batch 1 --num-samples 12 --held-out 4 "
    "--evaluate-every 1 --calibration stdlib --seqlen 128 --device cpu --output {work}/tune",
    "tune from a cache": "tune {work}/search --teacher {model} --steps 2 --batch 2 --micro-batch 1 --num-samples 12 "
    "--held-out 4 --evaluate-every 1 --calibration stdlib --seqlen 128 --device cpu --cache {work}/teacher "
    "--output {work}/cached",
}
"""Commands that follow one another, each of which writes into the folder that it names last."""
EQUAL = [("interrupted", "gptq"), ("loaded", "gptq")]
"""Cases that write the same bytes on any machine; of each model."""


def small_models(folder: Path, only: Sequence[str] = ()) -> dict[str, Path]:
    """Small untrained models with odd widths, in bf16, made in a folder: name -> folder; all, or some."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    ends = {"bos_token_id": None, "eos_token_id": None}
    shape: dict[str, Any] = ends | {
        "vocab_size": len(tokenizer), "hidden_size": 80, "intermediate_size": 136, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "max_position_embeddings": 256,
    }  # fmt: skip
    gpt2: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "n_embd": 80,
        "n_inner": 136,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
    }
    gpt2 |= ends
    configs = {
        "llama": LlamaConfig(**shape),
        "qwen3": Qwen3Config(**shape, tie_word_embeddings=True),
        "gemma3": Gemma3TextConfig(**shape, sliding_window=64),
        "gpt2": GPT2Config(**gpt2),
    }
    configs = {name: config for name, config in configs.items() if not only or name in only}
    for name, config in configs.items():
        if not (folder / name).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in configs}


def digest(folder: Path, packed: bool = False) -> str:
    """SHA-256 of the tensors of a folder's safetensors files, by name, type, shape and bytes.

    Args:
        packed: those of packed layers alone, without biases, which have the type that a model in memory computes in.

    Raises:
        FileNotFoundError: there are no tensors.
    """
    layers = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("layers", {})
    found = hashlib.sha256()
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    if packed:
        own = tuple(f"{layer}." for layer in layers)
        places = {name: file for name, file in places.items() if name.startswith(own) and not name.endswith(".bias")}
    if not places and not packed:  # where blocks are left out nothing is packed
        raise FileNotFoundError(f"{folder} holds no tensors")
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def machine() -> dict[str, str]:
    """What the last bits of floating-point sums depend on."""
    versions = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return versions | {"machine": platform.machine(), "python": platform.python_version(), "threads": str(THREADS)}


THREADS = 1
"""Threads of torch: sums over several depend on how many there are."""


def run(arguments: list[str]) -> None:
    """A command line in this process, silently.

    Raises:
        RuntimeError: it failed; with what it printed.
    """
    from quantkit.cli.main import app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            app(arguments, standalone_mode=False)
        except Exception as error:
            raise RuntimeError(f"quantkit {' '.join(arguments)}: {error}\n{printed.getvalue()[-2000:]}") from error


def interrupted(model: Path, output: Path) -> None:
    """A run by a fork that is killed after its first block, continued by another.

    Raises:
        RuntimeError: the run was over before it could be killed, or the second failed.
    """
    arguments = ["quantize", str(model), *METHODS["gptq"].split(), *TEXT.split(), "--output", str(output)]
    first = _forked(arguments)
    status: int | None = None
    partial = output.with_name(output.name + ".partial")
    while status is None and not list(partial.rglob("model-*.safetensors")):
        time.sleep(0.01)
        ended, code = os.waitpid(first, os.WNOHANG)
        status = code if ended else None
    if status is None:
        os.kill(first, signal.SIGKILL)
        status = os.waitpid(first, 0)[1]
    if status == 0:
        raise RuntimeError(f"{output} was there before its run could be killed")
    if os.waitpid(_forked([*arguments, "--resume"]), 0)[1] != 0:
        raise RuntimeError(f"{output} could not be resumed")


def _forked(arguments: list[str]) -> int:
    """A silent command in a fork; its id."""
    child = os.fork()
    if not child:
        become("quantkit.cli", arguments, os.devnull, os.devnull)
    return child


def loaded(model: Path, output: Path) -> None:
    """A model in memory, quantized and saved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import quantkit

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    calibration = quantkit.Calibration("stdlib", 4, 128)
    tokenizer = AutoTokenizer.from_pretrained(model)
    packed = quantkit.quantize(
        dense, tokenizer, 3, group_size=64, symmetric=False, calibration=calibration, device="cpu"
    )
    packed.save_pretrained(output)


def cases(model: str, folder: Path, work: Path, quick: bool) -> Iterator[tuple[str, Path, Callable[[], None]]]:
    """(case, the folder that it makes, what makes it) of a model, in the order in which they must run."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2
    options = METHODS if not quick else {case: METHODS[case] for case in QUICK}
    options = options | ({} if quick else SETTINGS)
    if model in ("reference", "llama"):
        options = options | {"rotated model": "--bits 3 --rotate-model"}
    for case, flags in options.items():
        output = work / case.replace(" ", "-")
        yield case, output, partial(run, ["quantize", str(folder), *f"{flags} {TEXT} --output {output}".split()])
    for case, command in STEPS.items():
        if not quick or case in ("search", "plan", "tune"):
            arguments = command.format(model=folder, work=work, size=size, candidates=CANDIDATES).split()
            yield case, Path(arguments[arguments.index("--output") + 1]), partial(run, arguments)
    for case, make in {"interrupted": interrupted, "loaded": loaded}.items():
        yield case, work / case, partial(make, folder, work / case)


def record(folder: Path, quick: bool, only: str) -> dict[str, list[str]]:
    """Runs the cases in a folder: (model, case) -> hashes of all tensors and of the packed ones alone."""
    models = small_models(folder, ["llama"]) if quick else small_models(folder) | {"reference": REFERENCE}
    found = {}
    for model, source in models.items():
        work = folder / f"{model}-work"
        work.mkdir(exist_ok=True)
        for case, output, make in cases(model, source, work, quick):
            name = f"{model}: {case}"
            if not re.search(only, name):
                continue
            start = time.monotonic()
            make()
            found[name] = [digest(output), digest(output, packed=True)]
            print(f"{name:50} {found[name][0][:16]} {time.monotonic() - start:6.1f} s", flush=True)
    return found


def differences(found: dict[str, list[str]], recorded: dict[str, list[str]]) -> list[str]:
    """What differs from a record, and what is not equal that must be on any machine."""
    changed = [name for name, hashes in found.items() if recorded.get(name, hashes) != hashes]
    wrong = [f"{name}: other bytes than recorded" for name in changed]
    for name in found:
        model, case = name.split(": ")
        for left, right in EQUAL:
            other = found.get(f"{model}: {right}")
            if case == left and other is not None and found[name][1] != other[1]:
                wrong.append(f"{name}: other bytes than {right!r}")
    return wrong


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some cases of one small model")
    parser.add_argument("--only", default="", help="cases whose 'model: case' this regular expression finds")
    parser.add_argument("--json", type=Path, help="write the hashes")
    parser.add_argument("--against", type=Path, help="recorded hashes")
    arguments = parser.parse_args()
    recorded: dict[str, Any] = {"machine": machine(), "hashes": {}}
    if arguments.against:
        recorded = json.loads(arguments.against.read_text())
    torch.set_num_threads(THREADS)
    logging.getLogger("quantkit").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder), arguments.quick, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "hashes": found}, indent=1) + "\n")
    if recorded["machine"] != machine():
        print(f"the record was made on {recorded['machine']}, this is {machine()}: not compared")
        recorded["hashes"] = {}
    wrong = differences(found, recorded["hashes"])
    for line in wrong:
        print(line)
    print(f"{len(found)} cases, {sum(name in recorded['hashes'] for name in found)} compared, {len(wrong)} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
