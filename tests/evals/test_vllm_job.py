"""The job that holds vLLM's answers against quantkit's own; all of it where an environment with vLLM is given."""

import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from quantkit.core.errors import QuantkitError
from quantkit.evals import vllm_job

PYTHON = "QUANTKIT_VLLM_PYTHON"
"""Names the Python of an environment with vLLM and quantkit."""


def spoken(rows, prompt, shift=0.0):
    """A completion as vLLM gives it, of log-probabilities [tokens, vocabulary] and the tokens after a prompt."""
    tokens, given, likeliest = list(prompt), [None], [None]
    for place in range(1, len(rows)):
        if place >= len(prompt):
            tokens.append(int(rows[place - 1].argmax()))
        given.append(float(rows[place - 1][tokens[place]]) + shift)
        best = rows[place - 1].topk(3)
        likeliest.append({f"token_id:{i}": float(v) + shift for v, i in zip(*best, strict=True)})
    said = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": given, "top_logprobs": likeliest}
    return {"text": "", "logprobs": said}


class TestDifferences:
    rows = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def test_none(self):
        found, greedy = vllm_job.differences(spoken(self.rows, [1, 2, 3]), self.rows, 3)
        assert max(found) < 1e-6 and greedy and len(found) >= 3 * 8

    def test_all_numbers_count(self):
        found, greedy = vllm_job.differences(spoken(self.rows, [1, 2, 3], shift=0.01), self.rows, 3)
        assert min(found) == pytest.approx(0.01, abs=1e-6) and greedy

    def test_an_answer_that_is_not_the_likeliest(self):
        choice = spoken(self.rows, [1, 2, 3])
        worst = int(self.rows[5].argmin())
        choice["logprobs"]["tokens"][6] = f"token_id:{worst}"
        choice["logprobs"]["token_logprobs"][6] = float(self.rows[5][worst])
        found, greedy = vllm_job.differences(choice, self.rows, 3)
        assert max(found) < 1e-6 and not greedy
        assert vllm_job.differences(choice, self.rows, 7)[1]  # of the prompt anything may be said


@contextmanager
def server(reply):
    """A server that says the same to all, and remembers what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


def test_what_is_asked_for():
    with server({"choices": [{"text": "x"}]}) as (address, asked):
        assert vllm_job.completion(address, "model", [1, 2]) == {"text": "x"}
    path, body = asked[0]
    assert path == "/v1/completions"
    assert (body["prompt"], body["temperature"], body["echo"], body["logprobs"]) == ([1, 2], 0, True, 5)


def test_a_server_that_does_not_come_up_says_why(tmp_path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2\nexit 1\n")
    script.chmod(0o755)
    with (
        pytest.raises(QuantkitError, match=r"does not serve folder: ValueError: no such model; all is in .*log"),
        vllm_job.served(script, Path("folder"), "", tmp_path / "log"),
    ):
        pass


def test_where_vllm_cannot_be_installed_the_job_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vllm_job, "PINS", ("no-such-package-of-anyone==0.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "argv", ["vllm_job", "check", "--venv", str(tmp_path / "v"), "--work", str(tmp_path)])
    vllm_job.main()
    assert capsys.readouterr().out.startswith("skipped: vLLM cannot be installed: ERROR: No matching distribution")


@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python of an environment with vLLM")
@pytest.mark.parametrize("name", vllm_job.ROWS)
def test_vllm_says_what_quantkit_says(name, tmp_path):
    row, python = vllm_job.ROWS[name], Path(os.environ[PYTHON])
    if row.refused:
        with pytest.raises(QuantkitError, match=re.escape(row.refused)):
            vllm_job.check(name, row, python, tmp_path)
    else:
        assert vllm_job.check(name, row, python, tmp_path).right
