"""`quantkit generate`, and compressed caches in `eval` and `bench`, as a user meets them."""

import json

import pytest

from .conftest import run


def test_text_with_and_without_a_compressed_cache(reference):
    plain = run("generate", reference, "--prompt", "def main():", "--max-new-tokens", 12)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.strip() and "new ones a second" in plain.stderr and "KV cache" not in plain.stderr
    packed = run("generate", reference, "--prompt", "def main():", "--max-new-tokens", 12, "--kv-bits", 8)
    assert packed.returncode == 0, packed.stderr
    assert packed.stdout == plain.stdout, "nothing is packed before a buffer is full"
    assert "bits a number" in packed.stderr


@pytest.fixture(scope="module")
def text(text_file, tmp_path_factory):
    """What is read in a moment."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(text_file.read_text()[:40_000])
    return path


def test_what_a_compressed_prefix_costs(reference, text):
    arguments = ["--data", text, "--seqlen", 256, "--num-samples", 3, "--baseline", reference, "--json"]
    found = []
    for bits in (2, 4):
        result = run("eval", reference, *arguments, "--kv-bits", bits)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
    assert found[0]["kl"] > 4 * found[1]["kl"] > 0
    assert found[0]["kv_cache"]["prefix"] == 192 and 2.5 < found[0]["kv_cache"]["bits_per_element"] < 4
    assert found[0]["tokens"] == 3 * 63


def test_retrieval_from_a_compressed_cache(reference, text):
    arguments = ["--data", text, "--seqlen", 256, "--num-samples", 2, "--kv-bits", 4, "--kv-retrieval"]
    result = run("eval", reference, *arguments, 2, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0 < found["kl"] < 0.02, "to the model itself with an exact cache"
    retrieval, exact = found["kv_cache"]["retrieval"], found["kv_cache"]["retrieval_exact"]
    assert len(retrieval) == len(exact) == 4
    assert all(abs(one - other) < 0.15 for one, other in zip(retrieval, exact, strict=True)) and min(exact) > 0.8
    said = run("eval", reference, *arguments, 1).stdout
    assert "by depth, oldest first" in said and "with an exact cache" in said


def test_bench(reference):
    result = run("bench", reference, "--prompt-tokens", 150, "--new-tokens", 4, "--kv-bits", 4, "--json")
    assert result.returncode == 0, result.stderr
    plain = run("bench", reference, "--prompt-tokens", 150, "--new-tokens", 4, "--json")
    packed, full = (json.loads(one.stdout)["model"]["bytes_per_token"] for one in (result, plain))
    assert packed < full


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", " "], "the prompt is empty"),
        (["generate", "--prompt", "x", "--kv-bits", 5], "2, 3, 4 or 8 bits"),
        (["generate", "--prompt", "x", "--max-new-tokens", 5000], "exceed the context"),
        (["generate", "--prompt", "x", "--temperature", -1], "temperature"),
        (["generate", "--prompt", "x", "--chat"], "no chat template"),
        (["eval", "--data", "TEXT", "--kv-prefix", 9], "nothing without --kv-bits"),
        (["eval", "--data", "TEXT", "--kv-retrieval", 9], "nothing without --kv-bits"),
        (["eval", "--data", "TEXT", "--kv-bits", 4, "--kv-retrieval", 0], "at least 1"),
        (["eval", "--data", "TEXT", "--kv-bits", 4, "--kv-prefix", 511], "leaves nothing to score"),
        (["eval", "--data", "TEXT", "--kv-bits", 4, "--kv-prefix", 0], "at least as many"),
        (["bench", "--kv-bits", 7], "2, 3, 4 or 8 bits"),
    ],
)
def test_bad_input_is_one_line(arguments, message, reference, text, complaint):
    code, said = complaint(arguments[0], reference, *(text if word == "TEXT" else word for word in arguments[1:]))
    assert code == 2
    assert message in said and "Traceback" not in said
