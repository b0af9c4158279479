"""Tensors that come one at a time become the layers of a checkpoint, side by side where engines fuse them."""

import pytest
import torch
from torch import nn

from quantkit.core.errors import CheckpointError, QuantkitError
from quantkit.formats.rotated import RotatedWeight
from quantkit.kernels.hadamard import random_signs
from quantkit.serve.stored import Stored, product, settled
from quantkit.serve.vllm import placeholders

from ..helpers.products import int_group_weight


def rotated(rows, bits=4):
    return RotatedWeight(int_group_weight(bits, rows, 64, 32, True), random_signs(64, 0))


def deliver(module, name, tensor, shard_id=None):
    parameter = module.get_parameter(name)
    parameter.weight_loader(parameter, tensor, shard_id)


def test_a_fused_layer_of_packed_and_dense_parts():
    q, k, v = rotated(16), rotated(8), torch.randn(8, 64)
    stored = [Stored("q_proj", q.metadata()), Stored("k_proj", k.metadata()), Stored("v_proj", None)]
    module = nn.Module()
    placeholders.put(module, stored, torch.float32)
    kinds = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert kinds == {
        "base.codes": torch.int32, "base.scales": torch.float16, "in_signs": torch.uint8, "weight": torch.float32,
    }  # fmt: skip
    for shard, weight in (("q", q), ("k", k)):
        for name, tensor in weight.state().items():
            deliver(module, name, tensor, shard)
    deliver(module, "weight", v, "v")
    found = [settled(one.weight(torch.float32), torch.device("cpu"), torch.float32) for one in stored]
    placeholders.remove(module, stored, torch.float32)
    assert not list(module.parameters()) and not list(module.children())
    x, bias = torch.randn(3, 64), torch.randn(32)
    whole = torch.cat([q.dequantize(), k.dequantize(), v])
    torch.testing.assert_close(product(found, x, bias), x @ whole.T + bias, atol=1e-4, rtol=1e-4)
    assert found[0].base.codes.data_ptr() != q.base.codes.data_ptr()


def test_a_part_by_its_index_and_one_that_nobody_knows():
    stored = [Stored(name, int_group_weight(4, 8, 64, 32, True).metadata()) for name in ("gate_proj", "up_proj")]
    module = nn.Module()
    placeholders.put(module, stored, torch.float32)
    deliver(module, "codes", torch.ones(8, 8), 1)
    assert [sorted(one.found) for one in stored] == [[], ["codes"]]
    for shard in (2, "x", (0, 1)):
        with pytest.raises(QuantkitError, match=r"has a part .* of gate_proj, up_proj, which quantkit does not know"):
            deliver(module, "codes", torch.ones(8, 8), shard)


def test_what_has_not_come_and_what_is_damaged():
    weight = int_group_weight(4, 8, 64, 32, True)
    stored = Stored("layers.0.q_proj", weight.metadata(), {"codes": weight.codes})
    with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj: tensor 'scales' is missing.* is damaged"):
        stored.weight(torch.float32)
    stored.found["scales"] = torch.full_like(weight.scales, torch.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.q_proj: scales holds NaN or Inf"):
        stored.weight(torch.float32)
    with pytest.raises(CheckpointError, match=r"layers\.0\.v_proj\.weight is missing"):
        Stored("layers.0.v_proj", None).weight(torch.float32)
