import pytest
import torch

from quantkit.kernels.tuning import Config, _table, cache_file, shares, tune, variations


def test_the_fastest_candidate_is_kept_for_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cache_file("A GPU (80 GB)")
    assert file.parent == tmp_path / "quantkit"
    assert "A-GPU-80-GB" in file.name
    assert torch.__version__.split("+")[0] in file.name
    times = {1: 3.0, 2: 1.0, 4: 2.0}

    def seconds(config):
        if config.split_k not in times:
            raise RuntimeError("out of resource: shared memory")
        return times[config.split_k]

    candidates = [Config(8, 128, split_k) for split_k in (1, 2, 4, 8)]
    assert tune(file, "launch a", candidates, seconds) == Config(8, 128, 2)
    assert tune(file, "launch b", candidates[:1], seconds) == Config(8, 128, 1)
    _table.cache_clear()
    assert _table(file) == {"launch a": Config(8, 128, 2), "launch b": Config(8, 128, 1)}
    with pytest.raises(ValueError, match="no configuration runs"):
        tune(file, "launch c", candidates[3:], seconds)
    assert not list(file.parent.glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "[]", '{"a": {"surprise": 1}}', "{"])
def test_a_damaged_file_counts_as_none(content, tmp_path):
    file = tmp_path / "damaged.json"
    file.write_text(content)
    assert _table(file) == {}


def test_shares_fill_the_gpu_and_keep_work_for_each():
    assert shares(tiles=32, full_tiles=32, multiprocessors=132) == 8
    assert shares(tiles=1000, full_tiles=224, multiprocessors=132) == 1
    assert shares(tiles=1, full_tiles=4, multiprocessors=132) == 1
    assert shares(tiles=2, full_tiles=1000, multiprocessors=132) == 16


def test_the_space_holds_the_rules_choice():
    for config in (Config(8, 128, 8), Config(8, 32, 1, 2, 7)):
        space = variations(config, full_tiles=32)
        assert config in space
        assert all(entry.split_k == 1 or 32 // entry.split_k >= 2 for entry in space)
        assert len(set(space)) == len(space)
