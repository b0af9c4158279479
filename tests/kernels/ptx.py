"""Runs the little PTX that kernels write as inline assembly, on numpy arrays: there is no GPU to run it on."""

import re

import numpy as np


def run(text, inputs, outputs, tables):
    """Executes assembly without branches.

    Args:
        text: of an asm statement; its operands are $0, $1, ...
        inputs: arrays for the operands that come after the outputs, uint32 or float32.
        outputs: how many operands are results.
        tables: arrays by the name of the register that holds where they begin.

    Returns:
        The results, uint32 arrays.
    """
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in text.strip(" {}").split(";"):
        statement = re.sub(r"^[{}\s]+", "", statement).strip()
        if not statement or statement.startswith(".reg"):
            continue
        operation, rest = statement.split(" ", 1)
        names = [name.strip(" {}") for name in rest.split(",")]
        if operation == "mov.b32" and "{" in rest:  # apart into halves
            registers[names[0]], registers[names[1]] = _halves(value(names[2]))
        elif operation == "mad.wide.u32":
            assert names[2] == "4"
            registers[names[0]] = (names[3], value(names[1]))
        elif operation.startswith("ld.global.nc"):
            base, index = registers[names[1].strip("[]")]
            assert index.max() < len(tables[base])
            registers[names[0]] = tables[base][index]
        else:
            registers[names[0]] = _OPERATIONS[operation](*(value(name) for name in names[1:]))
    return [registers[f"${i}"] for i in range(outputs)]


def bf16(values):
    """float64 -> the bits of the nearest bf16, in uint32; for what is neither infinite nor below the normal range."""
    bits = np.asarray(values, dtype=np.float64).view(np.uint64)
    bits = bits + np.uint64(2**44 - 1) + (bits >> np.uint64(45) & np.uint64(1))
    bits &= ~np.uint64(2**45 - 1)
    return bits.view(np.float64).astype(np.float32).view(np.uint32) >> np.uint32(16)


def fp16(values):
    """float64 -> the bits of the nearest fp16, in uint32."""
    return np.asarray(values, dtype=np.float64).astype(np.float16).view(np.uint16).astype(np.uint32)


def _halves(words):
    return words & np.uint32(0xFFFF), words >> np.uint32(16)


def _join(low, high):
    return low | high << np.uint32(16)


def _of_bf16(bits):
    return (bits << np.uint32(16)).view(np.float32).astype(np.float64)


def _of_fp16(bits):
    return bits.astype(np.uint16).view(np.float16).astype(np.float64)


def _on_pairs(function, read, write):
    def on_pairs(*words):
        words = np.broadcast_arrays(*words)
        return _join(*(write(function(*(read(_halves(word)[i]) for word in words))) for i in range(2)))

    return on_pairs


def _permute_bytes(a, b, selector):
    pool = [part >> np.uint32(8 * i) & np.uint32(0xFF) for part in (a, b) for i in range(4)]
    return sum(pool[int(selector) >> 4 * i & 7] << np.uint32(8 * i) for i in range(4))


def _fma(a, b, c):
    return a * b + c  # float64 holds the product of two 11-bit numbers and what is added here exactly


_OPERATIONS = {
    "mov.b32": lambda a: a.view(np.float32) if isinstance(a, np.ndarray) else a,
    "and.b32": lambda a, b: np.asarray(a).view(np.uint32) & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else None,
    "prmt.b32": _permute_bytes,
    "fma.rn.bf16x2": _on_pairs(_fma, _of_bf16, bf16),
    "fma.rn.f16x2": _on_pairs(_fma, _of_fp16, fp16),
    "mul.rn.f16x2": _on_pairs(lambda a, b: a * b, _of_fp16, fp16),
    "sub.rn.f16x2": _on_pairs(lambda a, b: a - b, _of_fp16, fp16),
    "mul.rn.f32": lambda a, b: a * b,
    "sub.f32": lambda a, b: a.view(np.float32) - b.view(np.float32),
    "cvt.f32.f16": lambda a: _of_fp16(a).astype(np.float32),
    "cvt.rn.f16x2.f32": lambda high, low: _join(fp16(low), fp16(high)),
    "cvt.rn.bf16x2.f32": lambda high, low: _join(bf16(low), bf16(high)),
}
