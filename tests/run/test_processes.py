"""What a process among several finds and sends, without the others."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from quantkit.cli import options
from quantkit.cli.display import aside
from quantkit.cli.main import _is_said_elsewhere
from quantkit.core.errors import Elsewhere, Interrupted, QuantkitError
from quantkit.io.source import open_folder
from quantkit.run import processes
from quantkit.run.fisher import measure
from quantkit.run.processes import Together


class Another(Together):
    """The second of two processes, as far as it can go alone: what the first makes is given."""

    def first(self, make):
        return {"config.json": "what the first has read"}

    def lead(self, make):
        return None

    def alike(self, make):
        return make()


@pytest.mark.parametrize(("said", "device"), [("cpu:0", "cpu"), ("cuda:1", "cuda:1")])
def test_processors_have_no_number(said, device, monkeypatch):
    """torch copies a tensor that goes from cpu to cpu:0, and a parameter's copy is none."""
    two = SimpleNamespace(num_processes=2, device=torch.device(said))
    monkeypatch.setattr(processes, "PartialState", lambda **_: two)
    assert processes.begin_processes("auto") == (two, torch.device(device))


def test_a_device_that_is_not_there_is_refused_before_anyone_is_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(QuantkitError, match="3 processes of this run are on this machine, and torch sees 2 GPUs"):
        processes.begin_processes("auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(QuantkitError, match="torch sees 0 GPUs"):
        processes.begin_processes("cuda")


def test_half_an_environment_is_an_error_in_one_line(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # which is put back, since accelerate sets some
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes.PartialState, "_shared_state", {})
    for _ in range(2):
        with pytest.raises(QuantkitError, match=r"does not find the others .*MASTER_ADDR.*unset RANK"):
            processes.begin_processes("cpu")


def test_what_is_sent_at_once_is_bounded_and_on_the_device(monkeypatch):
    """NCCL takes nothing from a CPU, where counts are, and a large layer's moments are sent in parts."""
    sent = []

    def gathered(found, own):
        sent.append(own)
        for rank, each in enumerate(found):
            each.copy_(own if rank == 0 else 2 * own)

    monkeypatch.setattr(dist, "all_gather", gathered)
    monkeypatch.setattr(processes, "BUNDLE", 4 * 60)
    sums = [torch.zeros(9, 20), torch.zeros(3, dtype=torch.float64)]
    products = [torch.arange(180.0).view(9, 20), torch.arange(3.0)]
    Together(0, 2).add(zip(sums, products, strict=True))
    assert [len(each) for each in sent] == [60, 60, 60, 3]
    for total, product in zip(sums, products, strict=True):
        assert torch.equal(total, 3 * product.to(total.dtype))
    sent.clear()
    with pytest.raises(NotImplementedError):  # nothing comes back from there
        Together(0, 2, torch.device("meta")).add([(torch.zeros(3), torch.ones(3))])
    assert sent[0].is_meta


def test_memory_is_shared_out_where_it_is_shared():
    assert Together(1, 4).beside(torch.device("cpu")) == 4
    assert Together(1, 4).beside(torch.device("cuda:1")) == 1


def test_another_model_and_a_folder_that_is_not_seen_are_refused(model_folder, tmp_path):
    """As on a machine that shares no file system with the first."""
    source = open_folder(model_folder("llama_small"))
    with pytest.raises(QuantkitError, match=r"config\.json of the model on .* is not that of the first process"):
        Another(1, 2).check_same(source.fingerprint)
    folder, tokens = tmp_path / "fisher", torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(QuantkitError, match="give an `output` on a file system that all machines see"):
        measure(source.model, [], tokens, source.weights({}), torch.device("cpu"), folder, together=Another(1, 2))
    assert not folder.exists(), "the first process makes it"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_says_that_all_were_stopped_and_what_it_has_chosen(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    aside.print("a word")
    assert capsys.readouterr().out == ("a word\n" if rank == "0" else "")
    assert _is_said_elsewhere(Interrupted("stopped")) == (rank == "1")
    assert not _is_said_elsewhere(QuantkitError("no such model"))
    assert _is_said_elsewhere(Elsewhere("no such model"))


def test_the_command_line_meets_the_others_before_it_refuses_anything(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    met = []
    monkeypatch.setattr(processes, "together", lambda device: met.append(device) or (Another(1, 2), None))
    assert options.by_all(lambda: 3, "cpu") == 3
    assert met == ["cpu"]
    assert options.by_all(lambda: 4, "cpu", alone=True) == 4
    assert met == ["cpu"], "nobody waits for a dry run"
