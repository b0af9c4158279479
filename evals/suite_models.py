"""Groups of the GPU suite that are about whole models, and about launch sizes other than the rules'."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.core.weight import QuantizedWeight
from quantkit.evals.kernel_kinds import integers, rotated, trellises
from quantkit.evals.suite_groups import Group, Run, call, relative_error
from quantkit.formats.int_group import ArrangedIntGroupWeight, IntGroupWeight
from quantkit.formats.rotated import RotatedWeight
from quantkit.formats.trellis import TrellisWeight
from quantkit.kernels import hadamard, int_group_matmul, trellis_matmul
from quantkit.kernels.tuning import Config, variations
from quantkit.models.linear import QuantizedLinear
from quantkit.quantizers.rtn import RTN

REFERENCE = Path(__file__).parent / "reference" / "model"
MODEL_LIMIT = 6e-2
"""Limit of the logits' relative error in bf16, six layers deep; with random weights it is 3e-2 by the specification."""
PROMPT, NEW = 16, 48


def decoding() -> list[Group]:
    """Generation by the reference model as one CUDA graph a token, dense and packed."""
    methods: dict[str, tuple[Callable[[Tensor], QuantizedWeight] | None, Any]] = {
        "dense bf16": (None, None),
        "int4 g128": (RTN(4, 128).quantize, integers(4)),
        "int3 g128": (RTN(3, 128).quantize, integers(3)),
        "rotated int4 g128": (_rotated, rotated(integers(4))),
        "trellis K=2": (_random_trellis, trellises(2)),
    }

    def group(name: str, pack: Any, kind: Any) -> Group:
        """A model whose linears are packed, decoding; `kind` is None where none of our kernels is launched."""

        def launch(device: torch.device) -> None:
            for N, K in _shapes() if kind else ():
                layer = kind.layer(N, K, device)
                for M in (1, PROMPT):
                    layer.linear(torch.randn(1, M, K, device=device, dtype=torch.bfloat16))

        return Group("decode", "reference model", name, launch, lambda run: _decode(run, name, pack))

    return [group(name, *method) for name, method in methods.items()]


def _rotated(weight: Tensor) -> QuantizedWeight:
    signs = hadamard.random_signs(weight.shape[1], 0).to(weight.device)
    return RotatedWeight(RTN(4, 128).quantize(hadamard.rotate(weight, signs)), signs)


def _random_trellis(weight: Tensor) -> QuantizedWeight:
    """Random codes, as large as the weight: the search for its own would take longer than everything else here."""
    N, K = weight.shape
    linear = trellises(2).make(N, K, weight.device).linear
    assert isinstance(linear, QuantizedLinear) and isinstance(linear.packed, TrellisWeight)
    packed = linear.packed
    return replace(packed, scale=packed.scale * weight.std() / packed.dequantize().std())


def _shapes() -> list[tuple[int, int]]:
    """(out_features, in_features) of the model's linears."""
    config = json.loads((REFERENCE / "config.json").read_text())
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return [(heads * size, hidden), (kv_heads * size, hidden), (hidden, heads * size), (inner, hidden), (hidden, inner)]


@torch.inference_mode()
def _decode(run: Run, name: str, pack: Callable[[Tensor], QuantizedWeight] | None) -> None:
    from transformers import AutoModelForCausalLM

    from quantkit.evals import decode

    model: Any = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.bfloat16)
    model = model.to(run.device).eval()
    if pack:
        dense = replace_linears(model, pack)
        tokens = torch.arange(2 * PROMPT, device=run.device).view(2, PROMPT)
        error = relative_error(model(tokens).logits, dense(tokens).logits.double())
        if not run.report.check("a token", f"logits' relative error {error:.2e}", error <= MODEL_LIMIT):
            return
    found = decode.measure(model, PROMPT, NEW)
    if found.how != "CUDA graph" and run.device.type == "cuda":
        run.report.note(f"{name}: could not be captured, {found.how} instead")
    base = run.once("decode", lambda: found.token_seconds if pack is None else math.nan)
    speed_up = None if math.isnan(base) else base / found.token_seconds
    run.report.time("a token", found.token_seconds, baseline=pack is None, speed_up=speed_up)


def replace_linears(model: Any, pack: Callable[[Tensor], QuantizedWeight]) -> Any:
    """Packs the linears of a model's blocks, in place; returns a copy in fp32 with what they stand for.

    Args:
        model: a causal language model with `model.layers`.
        pack: fp32 [out_features, in_features] -> the packed weight.
    """
    dense = copy.deepcopy(model).float()
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            packed = pack(module.weight.float())
            parent, _, child = name.rpartition(".")
            linear = QuantizedLinear(packed).to(module.weight.device)
            setattr(model.model.layers.get_submodule(parent), child, linear)
            dense.model.layers.get_submodule(name).weight.data = packed.dequantize()
    return dense


def sweep_integers(bits: int, shapes: Sequence[tuple[int, int]]) -> list[Group]:
    """Launch sizes around the rule's for one row of x."""
    return [_sweep(integers(bits), N, K, config) for N, K in shapes for config in _integer_configs(bits, N, K)]


def _integer_configs(bits: int, N: int, K: int) -> list[Config]:
    problem = int_group_matmul.Problem(1, N, K, bits, 128, torch.bfloat16)
    return variations(int_group_matmul.rule(problem), K // 128)


def sweep_trellis(bits: int, shapes: Sequence[tuple[int, int]]) -> list[Group]:
    """Splits other than the rule's for one row of x."""
    return [_sweep(trellises(bits), N, K, config) for N, K in shapes for config in _trellis_configs(bits, N, K)]


def _trellis_configs(bits: int, N: int, K: int) -> list[Config]:
    problem = trellis_matmul.Problem(1, N, K, bits, 16, torch.bfloat16)
    return [replace(trellis_matmul.rule(problem), split_k=1 << split) for split in range(6)]


def _sweep(kind: Any, N: int, K: int, config: Config) -> Group:
    def launch(device: torch.device) -> None:
        layer = kind.layer(N, K, device)
        _launched(layer.linear.used, config)(torch.randn(1, K, device=device, dtype=torch.bfloat16))

    def measure(run: Run) -> None:
        """Checks and times one launch size, beside torch's product."""
        base = run.dense(N, K, (1,))[1]
        layers = [kind.layer(N, K, run.device)]
        layers += [kind.layer(N, K, run.device, seed) for seed in range(1, run.distinct(layers[0].nbytes))]
        x = run.random(1, K)
        calls = [call(_launched(layer.linear.used, config), x) for layer in layers]
        replays = run.checked("M=1", calls, x.double() @ layers[0].dequantize().double().T)
        if replays:
            seconds = replays.seconds(repeats=5)
            share = layers[0].nbytes / seconds / run.bandwidth
            run.report.time("M=1", seconds, speed_up=base / seconds, bandwidth_share=share)

    sizes = f"block_n {config.block_n}, split {config.split_k}, stages {config.num_stages}"
    return Group("sweep", f"{N} x {K}", f"{kind.name}: {sizes}", launch, measure)


def _launched(weight: Any, config: Config) -> Callable[[Tensor], Tensor]:
    """The product with launch sizes that are given."""
    weight.prepare()
    if isinstance(weight, IntGroupWeight | ArrangedIntGroupWeight):
        return partial(weight.launch, config=config)
    form = weight.codes, weight.scales, weight.scale, weight.bits, weight.state_bits, weight.parts
    return lambda x: trellis_matmul.launch(x, *form, config=config)
