"""The check before a kernel family's first use on a GPU: with stubs on a GPU that is not there, and all real cases."""

import json
import logging
import threading
import time
from contextlib import nullcontext

import pytest
import torch

from quantkit.kernels import hadamard, operators, self_check, viterbi
from quantkit.kernels.self_check import RIGHT, Case, check, keep, trusted, verdict_file
from quantkit.kernels.self_check_cases import FAMILIES

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A GPU that is not there, and families whose cases are given: a function (family, cases) -> times they ran."""
    cases, ran = {}, {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_on", lambda device: nullcontext())
    monkeypatch.setattr(self_check, "_capturing", lambda device: stub.capturing)
    monkeypatch.setattr(self_check, "_identity", lambda device: stub.identity)
    monkeypatch.setattr(self_check, "cases_of", lambda family: cases[family])
    monkeypatch.setattr(self_check, "_verdicts", {})

    def stub(family, found):
        def counted(device):
            ran[family] = ran.get(family, 0) + 1
            yield from found(device)

        cases[family] = counted
        return lambda: ran.get(family, 0)

    stub.capturing, stub.identity = False, "A GPU (80 GB) sm 90 driver 570.1"
    return stub


def right(device):
    yield Case("a small one", 1e-3, 1e-2)
    yield Case("another", 0.0, 1e-2)


def lies(device):
    yield Case("a small one", 1e-3, 1e-2)
    yield Case("17 rows in fp16", 0.7, 1e-2)


def raises(device):
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")
    yield


def not_a_number(device):
    yield Case("a small one", float("nan"), 1e-2)


def new_process():
    self_check._verdicts.clear()


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_family_that_is_right_is_checked_once(stub, caplog):
    runs = stub("family", right)
    assert all(trusted("family", GPU) for _ in range(5))
    assert runs() == 1
    new_process()
    assert trusted("family", GPU)
    assert runs() == 1, "the verdict is kept"
    assert json.loads(verdict_file(GPU).read_text()) == {"family": RIGHT}
    assert not told(caplog)


@pytest.mark.parametrize(
    ("cases", "why"),
    [
        (lies, "17 rows in fp16 is off by 0.7, where 0.01 is rounding"),
        (raises, "RuntimeError: out of resource: shared memory"),
        (not_a_number, "off by nan"),
    ],
)
def test_a_family_that_errs_is_named_once_a_process(cases, why, stub, caplog):
    runs, other = stub("family", cases), stub("other", right)
    assert not any(trusted("family", GPU) for _ in range(5))
    assert trusted("other", GPU)
    assert len(told(caplog)) == 1
    assert "the family kernel is not used on cuda:0" in told(caplog)[0] and why in told(caplog)[0]
    new_process()
    assert not trusted("family", GPU)
    assert trusted("other", GPU)
    assert (runs(), other()) == (1, 1)
    assert len(told(caplog)) == 2, "a new process is told what the file says"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"family": 1}', '{"family": {"right": true}}'])
def test_a_damaged_file_counts_as_none(content, stub):
    runs = stub("family", right)
    file = verdict_file(GPU)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert trusted("family", GPU)
    assert runs() == 1
    assert json.loads(file.read_text()) == {"family": RIGHT}
    assert not list(file.parent.glob("*.tmp"))


@pytest.mark.parametrize("what", ["GPU or driver", "kernels", "torch"])
def test_another_version_is_checked_anew(what, stub, monkeypatch):
    runs = stub("family", right)
    assert trusted("family", GPU)
    new_process()
    if what == "kernels":
        monkeypatch.setattr(self_check, "_source_digest", lambda: "0123456789ab")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    else:
        stub.identity = "A GPU (80 GB) sm 90 driver 580.2"
    assert trusted("family", GPU)
    assert runs() == 2


def test_a_new_check_replaces_the_verdict(stub, caplog):
    stub("family", raises)
    assert not trusted("family", GPU)
    stub("family", right)
    assert not trusted("family", GPU), "nothing is checked unasked"
    keep("family", GPU, check("family", GPU))
    assert trusted("family", GPU)
    new_process()
    assert trusted("family", GPU)


def test_a_folder_that_cannot_be_written(stub, tmp_path, monkeypatch):
    runs = stub("family", right)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert trusted("family", GPU) and trusted("family", GPU)
    assert runs() == 1


def test_nothing_runs_while_a_graph_is_recorded(stub):
    runs = stub("family", raises)
    stub.capturing = True
    assert trusted("family", GPU)
    assert runs() == 0
    stub.capturing = False
    assert not trusted("family", GPU), "checked at the next use"


def test_full_memory_says_nothing(stub):
    full = [True]

    def cases(device):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from right(device)

    runs = stub("family", cases)
    assert trusted("family", GPU)
    full.clear()
    assert trusted("family", GPU) and trusted("family", GPU)
    assert runs() == 2


def test_a_check_may_use_what_it_checks(stub):
    def cases(device):
        assert trusted("family", device) and trusted("other", device)
        yield from right(device)

    runs, other = stub("family", cases), stub("other", right)
    assert trusted("family", GPU)
    assert (runs(), other()) == (1, 1)


def test_threads_wait_for_one_check(stub):
    def slow(device):
        time.sleep(0.2)
        yield from lies(device)

    runs, found = stub("family", slow), []
    threads = [threading.Thread(target=lambda: found.append(trusted("family", GPU))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False] * 8
    assert runs() == 1


def test_the_callers_generator_and_autocast_are_left_alone(stub):
    seen = []

    def cases(device):
        seen.append((torch.is_autocast_enabled("cuda"), torch.is_grad_enabled()))
        yield from right(device)

    stub("family", cases)
    state = torch.get_rng_state()
    with torch.autocast("cuda", enabled=False):
        assert trusted("family", GPU)
    assert seen == [(False, False)]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_pass_their_own_check(family):
    """All real cases, through Triton's interpreter."""
    state = torch.get_rng_state()
    assert check(family, CPU) == RIGHT
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("rotate", "kv_attention", "viterbi_search")]
)
def test_a_kernel_that_errs_in_one_element_is_found(family, monkeypatch):
    """The result of the product with one number in thousands changed."""
    from quantkit.kernels import self_check_cases

    original = self_check_cases._off

    def spoiled(found, exact):
        found = found.clone()
        found.view(-1)[found.numel() // 3] += 0.2 * exact.square().mean().sqrt()
        return original(found, exact)

    monkeypatch.setattr(self_check_cases, "_off", spoiled)
    assert "is off by 0.2" in check(family, CPU)


class TestWhatRuns:
    """Each entry takes its reference where the family is not trusted; `asked` holds who was asked for."""

    @pytest.fixture
    def asked(self, monkeypatch):
        names = []
        monkeypatch.setattr(self_check, "trusted", lambda family, device: names.append(family) or self.answer)
        return names

    @pytest.mark.parametrize("answer", [True, False])
    def test_products(self, answer, asked, monkeypatch):
        self.answer, entries = answer, {}

        class Library:
            def impl(self, name, function, key):
                entries[key] = function
                operators_library.impl(name, function, key)

            def __getattr__(self, name):
                return getattr(operators_library, name)

        operators_library = torch.library.Library("quantkit", "FRAGMENT")
        monkeypatch.setattr(operators, "_LIBRARY", Library())
        monkeypatch.setattr(torch.library, "register_fake", lambda *args, **kwargs: None)
        monkeypatch.setattr(torch.library, "register_autograd", lambda *args, **kwargs: None)
        name = f"product_for_tests_{answer}".lower()
        ways = (lambda *args: "reference"), (lambda *args: "kernel")
        operators.register(name, "Tensor weight", None, None, *ways)
        assert entries["CUDA"](torch.ones(1), torch.ones(1)) == ("kernel" if answer else "reference")
        assert asked == [name]

    @pytest.mark.parametrize("answer", [True, False])
    def test_rotations(self, answer, asked, monkeypatch):
        self.answer = answer
        monkeypatch.setattr(hadamard, "launch", lambda *args: "kernel")
        monkeypatch.setattr(hadamard, "reference", lambda *args: "reference")
        found = hadamard._on_gpu(torch.ones(8), hadamard.random_signs(8, 0), False)
        assert found == ("kernel" if answer else "reference")
        assert asked == ["rotate"]

    @pytest.mark.parametrize("answer", [True, False])
    def test_searches(self, answer, asked, monkeypatch):
        from quantkit.kernels import viterbi_triton

        self.answer = answer
        monkeypatch.setattr(viterbi_triton, "search", lambda *args: "kernel")
        monkeypatch.setattr(viterbi, "reference", lambda *args: "reference")

        class OnGpu:
            is_cuda, is_cpu, device = True, False, GPU

        assert viterbi._search(OnGpu(), None, 2, None, None) == ("kernel" if answer else "reference")
        assert asked == ["viterbi_search"]
