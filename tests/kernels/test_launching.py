import itertools

import pytest
import torch

from quantkit.kernels import launching


@pytest.mark.parametrize("capturing", [False, True])
def test_counters_lie_where_kernels_expect_them(monkeypatch, capturing):
    """At multiples of 16 bytes, for which kernels are compiled: another address would compile another kernel, and that
    while a graph is captured."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(launching, "current_stream", lambda device: 0)
    counters = launching._Counters(torch.device("cpu"))
    taken = [counters.take(count) for count in (43, 5, 1, 32, 3000)]
    assert all(zeros.data_ptr() % 16 == 0 for zeros in taken)
    assert all(len(zeros) >= count for zeros, count in zip(taken, (43, 5, 1, 32, 3000), strict=True))
    if capturing:
        ends = [(zeros.storage_offset(), zeros.storage_offset() + len(zeros)) for zeros in taken]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
