"""`quantkit serve`: which server it takes, and what transformers' own says for a packed model."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

import quantkit
from quantkit.core.errors import QuantkitError
from quantkit.serve.endpoint import command, engine_of

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
    assert own[1] == "-c" and own[2].startswith("import quantkit;") and own[3:5] == ["serve", "DIR"]
    assert "--dtype" not in own


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
