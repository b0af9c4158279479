"""Other toolkits' quantization of the same model from the same calibration tokens, and the bits that their files take.

    python3.11 -m venv PEER && PEER/bin/pip install torch==2.13.0 llmcompressor==0.14.* "compressed-tensors>=0.18"
    python3.11 -m venv OTHER && OTHER/bin/pip install torch==2.13.0 auto-round==0.16.*

Each peer is installed in an environment of its own, is given by the path of that environment's Python, and runs in a
process of its own with its defaults for the asked-for grid. Only linear layers in the decoder blocks are quantized; the
head stays dense. The time is that of the call that quantizes a model which is loaded already, and the peak memory that
of the process up to then. What is made is saved twice: once as an ordinary folder with dense fp32 weights, to be judged
by quantkit, and once in the peer's own packed format, to count what that stores.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.core.errors import QuantkitError, one_line
from quantkit.io.shards import DTYPES, Shards
from quantkit.models.structure import ROUTERS

PEERS = ("llm-compressor", "auto-round")
DENSE, PACKED = "dense", "packed"
"""Folders of what a peer has made."""
_ERROR = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")
"""How the line of a traceback begins that says what was raised."""

_COMMON = """
import json, resource, sys, time
from importlib.metadata import version
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
sequences = torch.load(asked["sequences"])

def stacked(made, name):  # a tensor, or the stack of what a peer has as gate_proj, up_proj and down_proj of each expert
    if name in made:
        return made[name]
    place, _, stack = name.rpartition(".")
    names = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
    experts = []
    while f"{place}.{len(experts)}.{names[0]}.weight" in made:
        experts.append(torch.cat([made[f"{place}.{len(experts)}.{one}.weight"] for one in names]))
    return torch.stack(experts)

def finish(model, start, packages, save):
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if asked["output"]:
        dense = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
        made = model.state_dict()
        dense.load_state_dict({name: stacked(made, name) for name in dense.state_dict()})
        dense.save_pretrained(Path(asked["output"]) / "dense")
        AutoTokenizer.from_pretrained(asked["model"]).save_pretrained(Path(asked["output"]) / "dense")
        save(str(Path(asked["output"]) / "packed"))
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "versions": versions}))
"""

_LLM_COMPRESSOR = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier

rows = Dataset.from_list([{"input_ids": s.tolist(), "attention_mask": [1] * len(s)} for s in sequences])
weights = {
    "num_bits": asked["bits"], "type": "int", "symmetric": asked["symmetric"], "strategy": "group",
    "group_size": asked["group_size"],
}
ignore = ["lm_head"]
if any(name.endswith(".experts") for name, _ in model.named_modules()):
    ignore.append("re:.*mlp[.]gate$")
recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=ignore)
start = time.monotonic()
oneshot(
    model=model, dataset=rows, recipe=recipe, max_seq_length=sequences.shape[1], num_calibration_samples=len(sequences)
)
packages = ("llmcompressor", "compressed-tensors")
finish(model, start, packages, lambda folder: model.save_pretrained(folder, save_compressed=True))
"""

_AUTO_ROUND = """
from auto_round import AutoRound

start = time.monotonic()
rounding = AutoRound(
    model, AutoTokenizer.from_pretrained(asked["model"]), bits=asked["bits"], group_size=asked["group_size"],
    sym=asked["symmetric"], iters=asked["iterations"], dataset=list(sequences.split(1)), nsamples=len(sequences),
    seqlen=sequences.shape[1], device_map="cpu",
)
model, _ = rounding.quantize()
finish(model, start, ("auto-round",), lambda folder: rounding.save_quantized(folder, format="auto_round", inplace=True))
"""

_SCRIPTS = {"llm-compressor": _LLM_COMPRESSOR, "auto-round": _AUTO_ROUND}


@dataclass(frozen=True)
class PeerGrid:
    """Settings of a peer's quantization.

    Attributes:
        peer: one of `PEERS`.
        bits: of a weight's code.
        group_size: weights of a row that share a scale.
        symmetric: a grid around zero, without a zero point of its own.
        iterations: of auto-round; 0 for its rounding to nearest with searched scales. llm-compressor has none.
    """

    peer: str
    bits: int
    group_size: int
    symmetric: bool = True
    iterations: int = 200

    def __post_init__(self) -> None:
        if self.peer not in PEERS:
            raise QuantkitError(f"unknown peer {self.peer!r}; known are {', '.join(PEERS)}")


@dataclass(frozen=True)
class PeerRun:
    """What a peer says of its run.

    Attributes:
        seconds: of the call that quantizes.
        peak_bytes: largest resident memory of its process up to the end of that call.
        versions: of packages in its environment.
    """

    seconds: float
    peak_bytes: int
    versions: dict[str, str]


def quantize_by_peer(
    python: str | Path, grid: PeerGrid, model: Path, sequences: Tensor, work: Path, *, save: bool = True
) -> PeerRun:
    """Lets a peer quantize a model.

    Args:
        python: of the environment that has the peer.
        grid: what is asked for.
        model: folder of the full-precision model.
        sequences: int64 [samples, seqlen], calibration tokens.
        work: an empty folder; gets the folders `DENSE` and `PACKED`.
        save: whether they are wanted, or only the time.

    Raises:
        QuantkitError: the peer fails; the message is the last line of what it wrote.
    """
    tokens = work / "sequences.pt"
    torch.save(sequences, tokens)
    asked = {
        "model": str(model), "sequences": str(tokens), "output": str(work) if save else "", "bits": grid.bits,
        "group_size": grid.group_size, "symmetric": grid.symmetric, "iterations": grid.iterations,
    }  # fmt: skip
    return PeerRun(**run_script(python, _COMMON + _SCRIPTS[grid.peer], json.dumps(asked), name=grid.peer))


def run_script(python: str | Path, script: str, *arguments: str, name: str, own: bool = False) -> Any:
    """JSON of the last line that a script prints, in a process of its own.

    Args:
        python: the interpreter.
        script: its text; what it writes to its standard error goes on to this process's.
        arguments: of the script.
        name: for errors.
        own: whether it is a script of quantkit's, which needs this process's search path; a peer must not have it.

    Raises:
        QuantkitError: it cannot be started, or fails.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if not own:
        environment.pop("PYTHONPATH", None)
    try:
        done = subprocess.run([python, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    except OSError as error:
        raise QuantkitError(f"{name} cannot be started by {python} ({error.strerror})") from error
    sys.stderr.write(done.stderr)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if _ERROR.match(line)]  # of which some have several lines
        reason = one_line((errors or said or [f"exit code {done.returncode}"])[-1])[:300]
        raise QuantkitError(f"{name} fails: {reason}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise QuantkitError(f"{name} ends without a result") from error


@dataclass(frozen=True)
class Stored:
    """Sizes of a quantized model's files, headers of the files and JSON beside them left out.

    Attributes:
        packed_bytes: of the packed layers: codes, scales, zeros and what else lies under their names.
        packed_weights: of those layers.
        bytes: of all tensors.
        dense_layers: layers of the decoder blocks that were left dense.
    """

    packed_bytes: int
    packed_weights: int
    bytes: int
    dense_layers: tuple[str, ...] = ()


def stored_by_peer(folder: Path, model: Path, blocks: str) -> Stored:
    """What a peer's packed folder stores, counted in its files.

    Peers run in fp32 here, and so they save some of their scales, and all that is dense. Tensors that the model has too
    count as many bytes as there; other floating-point tensors count 2 bytes a number, as in fp16. Integers count as
    they are saved.

    Args:
        folder: in the peer's own format.
        model: folder of the full-precision model.
        blocks: name of the decoder blocks' list.
    """
    original, specs = Shards(model), Shards(folder).specs
    sizes = {
        name: original.tensor_nbytes(name) if name in original.specs else _nbytes(*spec) for name, spec in specs.items()
    }
    weights = {
        name.removesuffix(".weight"): math.prod(shape)
        for name, (_, shape) in original.specs.items()
        if name.startswith(f"{blocks}.") and name.endswith(".weight") and len(shape) == 2
    }
    dense = tuple(name for name in weights if f"{name}.weight" in specs and name.rpartition(".")[2] not in ROUTERS)
    packed = {name: count for name, count in weights.items() if f"{name}.weight" not in specs}
    return Stored(
        sum(size for name, size in sizes.items() if _layer_of(name) in packed and not name.endswith(".bias")),
        sum(packed.values()), sum(sizes.values()), dense,
    )  # fmt: skip


def _layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _nbytes(dtype: str, shape: Collection[int]) -> int:
    """Bytes of a tensor in the peer's files, 2 a number where it is floating-point."""
    kind = DTYPES[dtype]
    return math.prod(shape) * (2 if kind.is_floating_point else torch.empty(0, dtype=kind).element_size())
