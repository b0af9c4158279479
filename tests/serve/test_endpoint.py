"""`quantkit serve`: which server it takes, and what transformers' own says for a packed model."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.core.errors import QuantkitError
from quantkit.serve.endpoint import address, check_address, command, engine_of

from .test_chat import TEMPLATE


def installed(*names):
    return lambda name: name in names


WEB = ("fastapi", "uvicorn", "openai", "pydantic")


def test_the_first_server_that_is_installed():
    assert engine_of("auto", installed("vllm", *WEB)) == "vllm"
    assert engine_of("auto", installed(*WEB)) == "transformers"
    assert engine_of("transformers", installed("vllm", *WEB)) == "transformers"
    with pytest.raises(
        QuantkitError, match=r"fastapi missing\): pip install vllm or pip install 'quantkit-llm\[serve\]'"
    ):
        engine_of("auto", installed(*WEB[1:]))
    with pytest.raises(QuantkitError, match=r"vllm missing\): pip install vllm$"):
        engine_of("vllm", installed(*WEB))
    with pytest.raises(QuantkitError, match="take auto, vllm or transformers"):
        engine_of("llama.cpp", installed(*WEB))


def test_commands():
    made = command("DIR", "vllm", "0.0.0.0", 80, torch.bfloat16, ["--max-num-seqs", "8"])
    assert made[1] == "-c" and "vllm.entrypoints.cli.main" in made[2] and made[3] == "serve"
    assert made[4:] == ["DIR", "--host", "0.0.0.0", "--port", "80", "--dtype", "bfloat16", "--max-num-seqs", "8"]
    own = command("DIR", "transformers", "localhost", 8000, None)
    assert own[1:5] == ["-m", "quantkit.serve.by_transformers", "serve", "DIR"]
    assert "--dtype" not in own and "--trust-remote-code" not in own and "--log-level" not in own
    trusted = command("DIR", "transformers", "localhost", 8000, None, trusted=True, said="errors")
    assert trusted[9:] == ["--trust-remote-code", "--log-level", "error"]
    assert command("DIR", "vllm", "::1", 80, None, said="all")[-2:] == ["--uvicorn-log-level", "info"]


def test_addresses():
    assert address("::1", 80) == "http://[::1]:80/v1" and address("localhost", 80) == "http://localhost:80/v1"
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(QuantkitError, match=f"`port` {port} .*in use"):
            check_address("localhost", port)
    check_address("localhost", port)
    with pytest.raises(QuantkitError, match=r"`host` no\.such\.host"):
        check_address("no.such.host", 80)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: next(folder.glob("*.safetensors")).unlink(), "not there"),
        (lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"no"), "fetch it anew"),
    ],
)
def test_damaged_folders_are_said_before_a_server_starts(damage, message, packed, monkeypatch):
    monkeypatch.setattr("os.execv", lambda *_arguments: pytest.fail("a server would start"))
    damage(packed)
    said = CliRunner().invoke(app, ["serve", str(packed), "--engine", "transformers"])
    assert isinstance(said.exception, QuantkitError) and message in str(said.exception)


def test_what_is_told_and_started(packed, reference, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda _program, arguments: started.append(arguments))
    ask = ["--engine", "transformers", "--port", "0"]
    assert CliRunner().invoke(app, ["serve", str(packed), *ask]).exit_code == 2, "ports begin at 1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        ask[-1] = str(free.getsockname()[1])
    said = CliRunner().invoke(app, ["serve", str(packed), *ask, "--trust-remote-code"])
    assert said.exit_code == 0 and "--trust-remote-code" in started[-1] and "chat template" not in said.stderr
    said = CliRunner().invoke(app, ["serve", "reference", *ask, "-v"])
    assert "no chat template" in said.stderr and Path(started[-1][4]).is_dir() and "debug" in started[-1]
    monkeypatch.setenv("HOME", str(packed.parent))
    CliRunner().invoke(app, ["serve", f"~/{packed.name}", *ask, "-q"])
    assert started[-1][4] == str(packed) and "error" in started[-1]
    quantkit.export(packed, tmp_path / "gptq", to="gptq")
    said = CliRunner().invoke(app, ["serve", str(tmp_path / "gptq"), *ask])
    assert "`quantkit import" in str(said.exception)


@pytest.fixture
def packed(reference, tokenizer, tmp_path):
    quantkit.quantize(reference, output=tmp_path / "packed", method="rtn", bits=4)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "packed")
    tokenizer.chat_template = None
    return tmp_path / "packed"


@pytest.fixture
def url(packed):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    asked = [sys.executable, "-m", "quantkit.cli", "serve", packed, "--port", port, "--engine", "transformers"]
    with subprocess.Popen([*map(str, asked), "--dtype", "float32"], stderr=subprocess.PIPE, text=True) as server:
        try:
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health").close()
                    break
                except OSError:
                    time.sleep(0.5)
            assert server.poll() is None, server.stderr.read()
            yield f"http://localhost:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


@torch.no_grad()
def test_a_packed_model_answers(packed, url, tokenizer):
    turns = [{"role": "user", "content": "import os"}]
    body = {"model": str(packed), "messages": turns, "max_tokens": 12, "temperature": 0}
    asked = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        said = json.load(answer)["choices"][0]["message"]["content"]
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = None
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model = quantkit.load(packed, dtype=torch.float32)
    found = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert said == tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
