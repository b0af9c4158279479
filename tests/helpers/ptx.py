"""Runs the PTX that kernels write as inline assembly, on numpy arrays: there is no GPU to run it on.

`run` executes one statement. `Machine` keeps registers and shared memory from one to the next and, installed into
Triton's interpreter, makes whole kernels run with their assembly.
"""

import re

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

SHARED = 4096
"""Where shared memory begins: no access below it is right."""
_BYTES = {"u16": 2, "b32": 4, "u32": 4, "f32": 4, "v2.b32": 8, "v4.b32": 16}


def run(text, inputs, outputs, tables):
    """Executes assembly without branches.

    Args:
        text: of an asm statement; its operands are $0, $1, ...
        inputs: arrays for the operands that come after the outputs, uint32 or float32.
        outputs: how many operands are results.
        tables: arrays that may be read, by the name of the register that holds where they begin.

    Returns:
        The results, uint32 arrays.
    """
    machine = Machine()
    for name, table in tables.items():
        machine.registers[name] = np.uint64(table.ctypes.data)
        machine.readable.append((table.ctypes.data, table.nbytes))
    return machine.run(text, inputs, outputs)


class Machine:
    """What assembly declares and leaves behind, for all threads of a block.

    Attributes:
        registers: by name, a number for all threads or one for each lane of a warp.
        readable: (address, bytes) of memory that may be read; empty for all.
        shared: bytes of shared memory, NaN where nothing was written.
        looked_up: what the wide loads from shared memory read, by bytes.
        asked: addresses that caches were asked to fetch, and None where a program then declared shared memory.
    """

    def __init__(self):
        self.registers = {"%laneid": np.arange(32, dtype=np.uint32)}
        self.readable = []
        self.shared = np.zeros(0, np.uint8)
        self.looked_up = {}
        self.asked = []

    def install(self, monkeypatch):
        """Lets Triton's interpreter run assembly here; its programs run one after another."""

        def create_inline_asm(builder, text, constraints, values, types, is_pure, pack):
            outputs = constraints.count("=")
            shape = np.broadcast_shapes(*(value.data.shape for value in values))
            inputs = [np.broadcast_to(value.data, shape).flatten() for value in values]
            found = self.run(text, [i.view(np.uint32) if i.itemsize == 4 or pack > 1 else i for i in inputs], outputs)
            words, kind = int(np.prod(shape)) // pack, np.int32 if pack == 1 else np.float16
            return _Results([np.resize(np.asarray(word, np.uint32), words).view(kind).reshape(shape) for word in found])

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)

    def run(self, text, inputs, outputs):
        """As the module's `run`."""
        self.registers |= {f"${outputs + i}": value for i, value in enumerate(inputs)}
        self._threads = max((np.size(value) for value in inputs), default=1)
        for statement in text.split(";"):
            statement = re.sub(r"^[{}\s]+", "", statement).strip()
            if statement and not statement.startswith(".reg"):
                self._execute(statement)
        return [self.registers[f"${i}"] for i in range(outputs)]

    def _execute(self, statement):
        if statement.startswith(".shared"):
            name, size = re.fullmatch(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", statement).groups()
            self.registers[name], self.shared = np.uint32(SHARED), np.full(int(size), 0x7E, np.uint8)
            self.asked.append(None)
            return
        operation, rest = statement.split(" ", 1)
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        if operation.startswith("st.shared."):
            values = np.stack([np.broadcast_to(v, self._threads) for v in map(self._value, _names(operands[1]))], -1)
            places = self._places(operands[0], _BYTES[operation.removeprefix("st.shared.")])
            self.shared[places] = np.ascontiguousarray(values.astype(np.uint32)).view(np.uint8).reshape(places.shape)
        elif operation.startswith("prefetch."):
            self.asked.append(self._address(operands[0]))
        elif operation.startswith("ld."):
            size = _BYTES[operation.removeprefix("ld.shared.").removeprefix("ld.global.nc.")]
            if operation.startswith("ld.shared."):
                found = self.shared[self._places(operands[1], size)]
                self.looked_up[size] = self.looked_up.get(size, 0) + len(found)
            else:
                found = self._from_global(operands[1], size)
            words = found.view(np.uint16 if size == 2 else np.uint32).astype(np.uint32)
            self.registers |= {name: words[:, i] for i, name in enumerate(_names(operands[0]))}
        elif operation == "mov.b32" and operands[0].startswith("{"):  # apart into halves
            low, high = _names(operands[0])
            self.registers[low], self.registers[high] = _halves(self._value(operands[1]))
        elif operation == "mov.b32" and operands[1].startswith("{"):
            self.registers[operands[0]] = _join(*map(self._value, _names(operands[1])))
        else:
            self.registers[operands[0]] = _OPERATIONS[operation](*map(self._value, operands[1:]))

    def _value(self, name):
        if name not in self.registers:
            return np.uint32(int(name, 0))
        value = self.registers[name]
        return value if np.size(value) in (1, self._threads) else np.resize(value, self._threads)  # one for each lane

    def _address(self, operand):
        name, _, offset = operand.strip("[]").partition("+")
        return np.broadcast_to(np.asarray(self._value(name)).astype(np.int64) + int(offset or 0), self._threads)

    def _places(self, operand, size):
        address = self._address(operand)
        assert (address % size == 0).all(), f"{operand}: not aligned to {size} bytes"
        assert address.min() >= SHARED and address.max() + size <= SHARED + len(self.shared), (
            f"{operand}: out of bounds"
        )
        return (address - SHARED)[:, None] + np.arange(size)

    def _from_global(self, operand, size):
        address = self._address(operand)
        assert (address % size == 0).all(), f"{operand}: not aligned to {size} bytes"
        if self.readable:
            inside = [(start <= address) & (address + size <= start + length) for start, length in self.readable]
            assert np.logical_or.reduce(inside).all(), f"{operand}: out of bounds"
        places = (address[:, None] + np.arange(size)).astype(np.uint64)
        everywhere = np.ones(places.shape, dtype=bool)
        return interpreter._interpreter.load(places, everywhere, np.zeros(places.shape, np.uint8), np.dtype(np.uint8))


class _Results:
    """What the interpreter expects of an operation."""

    def __init__(self, words):
        self._words = words

    def get_result(self, index):
        """The tensor of an output."""
        words = self._words[index]
        return interpreter.TensorHandle(words, tl.int32 if words.itemsize == 4 else tl.float16)


def bf16(values):
    """float64 -> the bits of the nearest bf16, in uint32; for what is neither infinite nor below the normal range."""
    bits = np.asarray(values, dtype=np.float64).view(np.uint64)
    bits = bits + np.uint64(2**44 - 1) + (bits >> np.uint64(45) & np.uint64(1))
    bits &= ~np.uint64(2**45 - 1)
    return bits.view(np.float64).astype(np.float32).view(np.uint32) >> np.uint32(16)


def fp16(values):
    """float64 -> the bits of the nearest fp16, in uint32."""
    return np.asarray(values, dtype=np.float64).astype(np.float16).view(np.uint16).astype(np.uint32)


def _names(operand):
    return [name.strip() for name in operand.strip("{}").split(",")]


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


def _wide(a, b, c):
    return np.asarray(a).astype(np.uint64) * np.uint64(b) + np.uint64(c)


def _funnel(low, high, by):
    both = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
    return (both >> np.asarray(by).astype(np.uint64)).astype(np.uint32)


_LOGIC = {0xEA: lambda a, b, c: (a & b) | c, 0x6A: lambda a, b, c: (a & b) ^ c}


_OPERATIONS = {
    "mov.b32": lambda a: a.view(np.float32) if isinstance(a, np.ndarray) and a.ndim else a,
    "mov.u32": lambda a: a,
    "mov.b64": lambda a: a,
    "and.b32": lambda a, b: np.asarray(a).view(np.uint32) & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.r.wrap.b32": _funnel,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.wide.u32": _wide,
    "lop3.b32": lambda a, b, c, table: _LOGIC[int(table)](a, b, c),
    "prmt.b32": _permute_bytes,
    "fma.rn.bf16x2": _on_pairs(_fma, _of_bf16, bf16),
    "fma.rn.f16x2": _on_pairs(_fma, _of_fp16, fp16),
    "mul.rn.f16x2": _on_pairs(lambda a, b: a * b, _of_fp16, fp16),
    "sub.rn.f16x2": _on_pairs(lambda a, b: a - b, _of_fp16, fp16),
    "mul.rn.f32": lambda a, b: a.view(np.float32) * b.view(np.float32),
    "add.f32": lambda a, b: a.view(np.float32) + b.view(np.float32),
    "sub.f32": lambda a, b: a.view(np.float32) - b.view(np.float32),
    "cvt.f32.f16": lambda a: _of_fp16(a).astype(np.float32),
    "cvt.rn.f16x2.f32": lambda high, low: _join(fp16(low), fp16(high)),
    "cvt.rn.bf16x2.f32": lambda high, low: _join(bf16(low), bf16(high)),
}
