"""Peers: how they are asked, what is counted of what they save, and what is said where they fail."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from quantkit.core.errors import QuantkitError
from quantkit.evals import compare_llmcompressor, peers
from quantkit.evals.peers import PEERS, PeerGrid, quantize_by_peer, run_script, stored_by_peer
from quantkit.io.classes import meta_model
from quantkit.models.structure import block_linears, linear_weight


def test_the_scripts_are_python():
    assert set(peers._SCRIPTS) == set(PEERS)
    for name, script in peers._SCRIPTS.items():
        compile(peers._COMMON + script, name, "exec")
    with pytest.raises(QuantkitError, match="unknown peer 'other'; known are llm-compressor, auto-round"):
        PeerGrid("other", 3, 64)


@pytest.fixture
def python(tmp_path):
    """An interpreter that says what it was asked instead of running a script, as a peer's last line."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint('some progress')\n"
        "asked = json.loads(sys.argv[3]) | {'path': os.environ.get('PYTHONPATH')}\n"
        "print(json.dumps({'seconds': 1.5, 'peak_bytes': 7, 'versions': asked}))\n"
    )
    path.chmod(0o755)
    return path


def test_a_peer_is_asked_for_the_grid_and_given_the_tokens(python, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    tokens = torch.arange(6).view(2, 3)
    work = tmp_path / "work"
    work.mkdir()
    for save in (True, False):
        found = quantize_by_peer(python, PeerGrid("auto-round", 2, 64, False, 5), tmp_path, tokens, work, save=save)
        assert (found.seconds, found.peak_bytes) == (1.5, 7)
        asked = dict(found.versions)
        assert torch.equal(torch.load(asked.pop("sequences")), tokens)
        assert asked == {
            "model": str(tmp_path), "output": str(work) if save else "", "bits": 2, "group_size": 64,
            "symmetric": False, "iterations": 5, "path": None,
        }  # fmt: skip


def test_what_fails_is_one_line(tmp_path):
    with pytest.raises(QuantkitError, match=r"the peer fails: ValueError: no such grid$"):
        run_script(sys.executable, "raise ValueError('no such grid')", name="the peer")
    with pytest.raises(QuantkitError, match=r"the peer fails: ValueError: layers that do not fit:$"):
        run_script(sys.executable, "raise ValueError('layers that do not fit:\\n  - one\\n  - two')", name="the peer")
    with pytest.raises(QuantkitError, match=r"the peer fails: exit code 3$"):
        run_script(sys.executable, "raise SystemExit(3)", name="the peer")
    with pytest.raises(QuantkitError, match=r"the peer cannot be started by .*nowhere"):
        run_script(tmp_path / "nowhere", "", name="the peer")
    for script in ("", "print('no JSON')"):
        with pytest.raises(QuantkitError, match="the peer ends without a result"):
            run_script(sys.executable, script, name="the peer")


def test_bits_are_those_of_the_files(model_folder, tmp_path):
    model = model_folder("llama_small")  # bf16; 2 blocks of 7 layers, 64 and 96 wide
    layers = {name: linear_weight(layer).numel() for name, layer in block_linears(meta_model(model, None)).items()}
    dense = "model.layers.1.mlp.down_proj"
    saved = {"model.embed_tokens.weight": torch.zeros(2048, 64), "lm_head.weight": torch.zeros(2048, 64)}
    for name, weights in layers.items():
        if name == dense:
            saved[f"{name}.weight"] = torch.zeros(64, 96)  # in fp32, which the model has in bf16
            continue
        saved[f"{name}.weight_packed"] = torch.zeros(weights // 16, dtype=torch.int32)  # 2 bits
        saved[f"{name}.weight_scale"] = torch.zeros(weights // 32)  # fp32, counted as fp16: half a bit
        saved[f"{name}.weight_shape"] = torch.zeros(2, dtype=torch.int64)
    save_file(saved, tmp_path / "model.safetensors")
    found = stored_by_peer(tmp_path, model, "model.layers")
    assert found.dense_layers == (dense,) and found.packed_weights == sum(layers.values()) - 64 * 96
    assert found.packed_bytes == found.packed_weights * 2.5 / 8 + 16 * (len(layers) - 1)
    assert found.bytes == found.packed_bytes + 2 * (2 * 2048 * 64 + 64 * 96)


def test_times_are_compared_in_turns(model_folder, text_file, tmp_path, monkeypatch, capsys):
    times = iter([(4.0, 4.4, 2.0), (5.0, 4.0, 2.5), (4.0, 4.2, 2.1)])

    def turn(python, model, sequences, bits, group_size):
        assert (python, sequences.shape, bits, group_size) == ("PEER", (2, 32), 2, 64)
        sides = (compare_llmcompressor.PEER, compare_llmcompressor.DEFAULT, compare_llmcompressor.ONE_STREAM)
        return {"versions": {"llmcompressor": "0"}} | dict(zip(sides, next(times), strict=True))

    monkeypatch.setattr(compare_llmcompressor, "turn", turn)
    output = tmp_path / "times.json"
    asked = [str(model_folder("llama_small")), "--peer-python", "PEER", "--calibration", str(text_file), "--bits", "2"]
    asked += ["--group-size", "64", "--num-samples", "2", "--seqlen", "32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["compare", *asked])
    compare_llmcompressor.main()
    found = json.loads(output.read_text())
    assert found["ratios"] == {"llm-compressor": 1, "quantkit": 1.05, "quantkit, target shift 0": 0.525}
    assert (found["model"], found["calibration"]) == ("llama_small", "calibration.txt"), "no places of this machine"
    assert "4.20 s    1.05 x llm-compressor   (runs: 4.40, 4.00, 4.20)" in capsys.readouterr().out


def test_quantkit_s_side_of_a_turn(model_folder, monkeypatch):
    """Run, not only read: in processes of their own, and on the given tokens."""
    monkeypatch.setattr(
        compare_llmcompressor, "quantize_by_peer", lambda *_asked, save: peers.PeerRun(2.0, 1, {"p": str(save)})
    )
    found = compare_llmcompressor.turn("PEER", model_folder("llama_small"), torch.arange(64).view(2, 32), 3, 32)
    assert (found.pop("llm-compressor"), found.pop("versions")) == (2.0, {"p": "False"})
    assert set(found) == {"quantkit", "quantkit, target shift 0"} and all(0 < each < 60 for each in found.values())
