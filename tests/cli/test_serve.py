"""`quantkit serve`, where it cannot; see tests/serve/test_endpoint.py for where it can."""

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--engine", "ollama"], "take auto, vllm or transformers"),
        (["model.gguf"], "pack it first"),
        (["EMPTY"], "config.json"),
        (["MODEL", "--dtype", "int3"], "int3"),
    ],
)
def test_bad_input_is_one_line(arguments, message, reference, tmp_path, complaint):
    places = {"MODEL": reference, "EMPTY": tmp_path}
    code, said = complaint("serve", *(places.get(word, word) for word in arguments))
    assert code == 2 and message in said and "Traceback" not in said
