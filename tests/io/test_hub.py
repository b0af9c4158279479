"""Checkpoints on the hub: asked for before the work, uploaded after it; the hub itself is a stand-in."""

import json
import sys

import huggingface_hub
import pytest

import quantkit
from quantkit.cli.main import main
from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.io.hub import check_push

from ..cli.conftest import complaint  # noqa: F401  (a fixture)


class Hub:
    """Remembers what it was asked for."""

    def __init__(self, monkeypatch):
        self.calls, self.role, self.fails = [], "write", {}
        for name in ("whoami", "create_repo", "upload_folder"):
            monkeypatch.setattr(huggingface_hub, name, self.answering(name))

    def answering(self, name):
        def answer(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name in self.fails:
                raise self.fails[name]
            me = {"name": "me", "auth": {"accessToken": {"role": self.role}}}
            return me if name == "whoami" else "https://hub/me/it"

        return answer

    def named(self):
        return [name for name, _, _ in self.calls]


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


@pytest.fixture(scope="module")
def packed(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("hub") / "a folder"
    quantkit.quantize(model_folder("llama_small"), method="rtn", bits=4, group_size=32, output=output)
    return output


def test_a_folder_is_uploaded_whole(hub, packed):
    assert quantkit.push_to_hub(packed, "it", private=True) == "https://hub/me/it"
    assert hub.named() == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == (("me/it",), {"private": True, "exist_ok": True})
    assert hub.calls[2][2]["repo_id"] == "me/it" and hub.calls[2][2]["folder_path"] == packed
    quantkit.push_to_hub(packed, "team/it")
    assert hub.calls[4][1:] == (("team/it",), {"private": None, "exist_ok": True})


def test_what_stands_in_the_way_is_said(hub, packed, model_folder):
    for name in ("a/b/c", "a b", "-x", "a--b", "", "x" * 200):
        with pytest.raises(QuantkitError, match="is no id of a repository on the hub"):
            check_push(name)
    assert hub.calls == []
    with pytest.raises(CheckpointError, match="is not a quantkit checkpoint"):
        quantkit.push_to_hub(model_folder("llama_small"), "me/it")
    hub.role = "read"
    with pytest.raises(QuantkitError, match="token here can only read"):
        check_push("me/it")
    hub.fails["whoami"] = huggingface_hub.errors.LocalTokenNotFoundError("Token is required, but no token found.\nMore")
    with pytest.raises(QuantkitError, match=r"would upload to me/it \(nobody is logged in; `hf auth login`"):
        check_push("me/it")
    hub.fails = {"upload_folder": OSError("the line is dead\nand more")}
    hub.role = "write"
    with pytest.raises(QuantkitError, match=r"whole and was not uploaded; `hf upload me/it '.*a folder' \.` .*dead\)$"):
        quantkit.push_to_hub(packed, "me/it")


def quantize(model, output, *more):
    return ["quantize", model, "--method", "rtn", "--bits", 4, "--group-size", 32, "--output", output, *more]


def test_nobody_is_asked_after_the_work(hub, model_folder, tmp_path, complaint):  # noqa: F811
    """A run that could not be uploaded does not begin."""
    hub.fails["whoami"] = ConnectionError("no route")
    model = model_folder("llama_small")
    for more, message in (
        (["--push-to-hub", "me/it"], "the hub does not say who would upload to me/it (no route)"),
        (["--push-to-hub", "not an id"], "is no id of a repository"),
        (["--push-to-hub", "a/b/c", "--dry-run"], "is no id of a repository"),
        (["--private"], "--private says nothing without --push-to-hub"),
    ):
        code, said = complaint(*quantize(model, tmp_path / "out", *more))
        assert code == 2 and message in said, said
    assert not list(tmp_path.iterdir())


def test_a_failed_upload_leaves_the_folder_and_says_how(hub, model_folder, tmp_path, monkeypatch, capsys):
    hub.fails["upload_folder"] = ConnectionError("no route")
    output = tmp_path / "out"
    arguments = quantize(
        model_folder("llama_small"), output, "--no-check", "--push-to-hub", "me/it", "--private", "--json"
    )
    monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and (output / "config.json").exists()
    assert f"hf upload me/it {output} . --private" in told.err.replace("\n", " ")
    assert json.loads(told.out)["hub"] is None
    hub.fails = {}
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--overwrite"])
    with pytest.raises(SystemExit):
        main()
    assert "on the hub: https://hub/me/it" in capsys.readouterr().out
