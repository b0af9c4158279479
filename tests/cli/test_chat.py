"""`quantkit chat`, as a user meets it: lines of a pipe are turns."""

import signal
import subprocess

import pytest
from transformers import AutoModelForCausalLM

from ..serve.test_chat import TEMPLATE
from .conftest import COMMAND


def chat(*arguments, said):
    command = [*COMMAND, "chat", *map(str, arguments)]
    return subprocess.run(command, input="\n".join(said), capture_output=True, text=True)


@pytest.fixture(scope="module")
def talkative(reference, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    AutoModelForCausalLM.from_pretrained(reference).save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    return folder


def test_turns(talkative):
    said = ["def main():", "/new", "def main():", "/help", "/usr", "import os", "/quit", "never read"]
    options = ["--temperature", 0, "--max-new-tokens", 6, "--system", "be brief", "--kv-bits", 8]
    found = chat(talkative, *options, said=said)
    assert found.returncode == 0, found.stderr
    notes = found.stderr.splitlines()
    counts = [line for line in notes if "a second" in line]
    assert len(counts) == 4 and counts[0].split(",")[0] == counts[1].split(",")[0]
    assert "forgotten" in notes and any(line.startswith("/new forgets") for line in notes)
    quiet = chat(talkative, *options, "--quiet", said=["def main():"])
    assert quiet.returncode == 0 and not quiet.stderr and found.stdout.startswith(quiet.stdout)


def test_a_line_that_is_too_long_and_one_that_is_not_utf8(talkative):
    command = [*COMMAND, "chat", str(talkative), "--max-new-tokens", "4"]
    said = b"x = 1 " * 2000 + b"\ncaf\xe9\n"
    found = subprocess.run(command, input=said, capture_output=True)
    notes = found.stderr.decode()
    assert found.returncode == 2 and "say it shorter" in notes and notes.count("a second") == 1
    assert "Traceback" not in notes and "indexing errors" not in notes


def test_ctrl_c_ends_an_answer_and_no_more(talkative):
    command = [*COMMAND, "chat", str(talkative), "--max-new-tokens", "400", "--temperature", "0"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as talk:
        talk.stdin.write(b"import os\n")
        talk.stdin.flush()
        talk.stdout.read(1)
        talk.send_signal(signal.SIGINT)
        _, notes = talk.communicate(b"import os\n", timeout=300)
    assert talk.returncode == 0, notes
    counts = [line for line in notes.decode().splitlines() if "a second" in line]
    assert len(counts) == 2 and int(counts[0].split()[2]) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["REFERENCE"], "no chat template"),
        (["MODEL", "--max-new-tokens", "0"], "at least 1"),
        (["MODEL", "--kv-bits", "5"], "2, 3, 4 or 8 bits"),
        (["nowhere"], "nowhere"),
        (["MODEL", "--temperature", "nan"], "--temperature of at least 0"),
        (["MODEL", "--seed", "-1"], "--seed"),
    ],
)
def test_bad_input_is_one_line(arguments, message, reference, talkative, complaint):
    places = {"REFERENCE": reference, "MODEL": talkative}
    code, said = complaint("chat", *(places.get(word, word) for word in arguments))
    assert code == 2 and message in said and "Traceback" not in said
