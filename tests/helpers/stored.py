"""Models in the forms in which other toolkits store quantized weights: packed here, by their formats' descriptions."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes, bits):
    """int32 [rows, n * bits / 32] of a bit stream of codes [rows, n], lowest bits first."""
    ones = ((codes[..., None].long() >> torch.arange(bits)) & 1).flatten(1)
    ones = torch.nn.functional.pad(ones, (0, -ones.shape[1] % 32)).view(len(codes), -1, 32)
    return (ones << torch.arange(32)).sum(-1).to(torch.uint32).view(torch.int32)


def rounded(weight, bits, group):
    """(codes, zeros, factors) of [rows, columns] in groups along the columns, all within their widths."""
    grouped = weight.float().unflatten(1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zeros = (-low / scale.float()).round().clamp(1, 2**bits - 1)  # AutoGPTQ stores them less one
    codes = (grouped / scale.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).long(), zeros.long(), scale


def spread(of_groups, columns):
    return of_groups.repeat_interleave(columns // of_groups.shape[1], 1)


def fp8(weight):
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight.float(), (0, -columns % 32, 0, -rows % 32))
    scale = whole.unfold(0, 32, 32).unfold(1, 32, 32).abs().amax((-1, -2)) / 448
    whole = scale.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
    codes = (weight.float() / whole).to(torch.float8_e4m3fn)
    return {"": codes, "_scale_inv": scale}, codes.float() * whole


def fbgemm(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale}, codes.float() * scale


def gptq(bits, version):
    def pack(weight):
        codes, zeros, scale = rounded(weight, bits, 32)
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))  # of activations
        group = torch.empty_like(order)
        group[order] = torch.arange(weight.shape[1]) // 32
        codes = codes[:, order.argsort()]
        less = zeros - int(version == "gptq")
        parts = {
            ".qweight": words(codes, bits).T.contiguous(), ".qzeros": words(less.T, bits),
            ".scales": scale.T.contiguous(), ".g_idx": group.int(),
        }  # fmt: skip
        return parts, (codes - zeros[:, group]) * scale.float()[:, group]

    return pack


def awq(weight):
    codes, zeros, scale = rounded(weight, 4, 32)

    def along_outputs(values):
        return (values.unflatten(1, (-1, 8))[..., list(AWQ)] << torch.arange(0, 32, 4)).sum(-1).to(torch.uint32)

    parts = {
        ".qweight": along_outputs(codes.T).view(torch.int32), ".qzeros": along_outputs(zeros.T).view(torch.int32),
        ".scales": scale.T.contiguous(),
    }  # fmt: skip
    columns = weight.shape[1]
    return parts, (codes - spread(zeros, columns)) * spread(scale.float(), columns)


def compressed(bits, symmetric):
    def pack(weight):
        codes, zeros, scale = rounded(weight, bits, 32)
        middle = torch.full_like(zeros, 2 ** (bits - 1))
        zeros = middle if symmetric else zeros
        parts = {"_packed": words(codes, bits), "_scale": scale, "_shape": torch.tensor(weight.shape)}
        if not symmetric:
            parts["_zero_point"] = words(zeros.T, bits).T.contiguous()
        columns = weight.shape[1]
        return parts, (codes - spread(zeros, columns)) * spread(scale.float(), columns)

    return pack


def whole_codes(bits):
    """As compressed-tensors packed before 0.18: as many whole codes as a word holds."""

    def pack(weight):
        parts, meant = compressed(bits, True)(weight)
        codes, _, _ = rounded(weight, bits, 32)
        held = 32 // bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % held)).unflatten(1, (-1, held))
        packed = (codes << torch.arange(0, held * bits, bits)).sum(-1).to(torch.uint32).view(torch.int32)
        return parts | {"_packed": packed}, meant

    return pack


def channel_fp8(weight):
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"": codes, "_scale": scale.bfloat16()}, codes.float() * scale.bfloat16().float()


def nf4(nested):
    """bitsandbytes' 4 bits: a flat layout, the first of two codes in the high nibble, 16 values, factors by 64."""

    def pack(weight):
        values = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 16))
        values /= values.abs().max()
        blocks = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        factors, said = blocks.abs().amax(1), {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape)}
        parts = {".absmax": factors, ".quant_map": values}
        if nested:
            mean, levels = factors.mean(), torch.linspace(-1, 1, 256)
            sizes = torch.nn.functional.pad(factors - mean, (0, -len(factors) % 256)).view(-1, 256).abs().amax(1)
            spread_sizes = sizes.repeat_interleave(256)[: len(factors)]
            kept = ((factors - mean) / spread_sizes * 127.5 + 127.5).round().clamp(0, 255).byte()
            factors = levels[kept.long()] * spread_sizes + float(mean)
            parts |= {".absmax": kept, ".nested_absmax": sizes, ".nested_quant_map": levels}
            said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(mean)}
        codes = (blocks[..., None] / factors[:, None, None] - values).abs().argmin(-1)
        meant = (values[codes] * factors[:, None]).flatten()[: weight.numel()].view(weight.shape)
        codes = codes.flatten()[: weight.numel()].byte()
        parts |= {
            "": (codes[::2] << 4 | codes[1::2])[:, None],
            ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8),
        }
        return {f".weight{suffix}": part for suffix, part in parts.items()}, meant

    return pack


def int8_rows(weight):
    """bitsandbytes' LLM.int8."""
    size = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / size[:, None]).round().to(torch.int8)
    parts = {".weight": codes, ".SCB": size, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * size[:, None] / 127


def _group(bits, symmetric=True, strategy="group"):
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": 32}
    return {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}


def mlx(bits):
    def pack(weight):
        codes, zeros, scale = rounded(weight, bits, 32)
        offsets = -zeros * scale.float()
        parts = {".weight": words(codes, bits).view(torch.uint32), ".scales": scale, ".biases": offsets}
        columns = weight.shape[1]
        return parts, codes * spread(scale.float(), columns) + spread(offsets, columns)

    return pack


FORMS = {
    "fp8": (fp8, ".weight", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "fbgemm_fp8": (fbgemm, ".weight", {"quant_method": "fbgemm_fp8"}),
    "gptq-4": (gptq(4, "gptq"), "", {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq-3": (gptq(3, "gptq"), "", {"quant_method": "GPTQ", "bits": 3, "group_size": 32}),
    "gptq-8-v2": (
        gptq(8, "gptq_v2"), "", {"quant_method": "gptq", "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    ),
    "auto-round": (gptq(2, "gptq_v2"), "", {"quant_method": "auto-round", "bits": 2, "packing_format": "auto_round"}),
    "awq": (awq, "", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "bnb-4": (nf4(False), "", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb-4-nested": (nf4(True), "", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb-8": (int8_rows, "", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "compressed-4": (compressed(4, True), ".weight", {"quant_method": "compressed-tensors"} | _group(4)),
    "compressed-3-whole": (whole_codes(3), ".weight", {"quant_method": "compressed-tensors"} | _group(3)),
    "compressed-3-asym": (compressed(3, False), ".weight", {"quant_method": "compressed-tensors"} | _group(3, False)),
    "compressed-fp8": (
        channel_fp8, ".weight", {"quant_method": "compressed-tensors"} | _group(8, strategy="channel")
    ),
    "mlx-3": (mlx(3), "", {"bits": 3, "group_size": 32}),  # which names no method
}  # fmt: skip
"""How a weight is packed, what its tensors' names begin with behind the layer's, and the quantization_config."""


def store(folder, form, output, also=()):
    """Writes a model's folder anew with its blocks' matrices in a form, and those of the names in `also`.

    Returns the matrices that this stands for, by name.
    """
    pack, beginning, said = FORMS[form]
    output.mkdir()
    meant, tensors = {}, {}
    with safe_open(folder / "model.safetensors", "pt") as shard:
        for name in shard.keys():
            tensor = shard.get_tensor(name)
            left = ".layers." not in name or tensor.dim() != 2 or name.endswith(("gate.weight", "router.weight"))
            if left and name not in also:
                tensors[name] = tensor
                continue
            parts, meant[name] = pack(tensor)
            place = name.removesuffix(".weight") + beginning
            tensors |= {f"{place}{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (output / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return meant
