"""How codebooks lie in shared memory, and the PTX that reads vectors out of them.

A program multiplies by a *window* of the entries of each vector. In shared memory a window is cut into pieces of 2, 4
or 8 entries of 16 bits, each a load of 4, 8 or 16 bytes, and a piece is held in `copies` side by side:

    piece of vector c, copy i    ->    offset of the piece's table + (c * copies + i) * 2 * entries

Lane l reads copy l % copies: with 128 bytes for all copies of a piece no two lanes of a load meet in a bank.

Triton has no indexed reads of shared memory before 3.7 (and then in Gluon alone), so the table is a variable of the
PTX function that inline assembly declares, fills and reads, in every version: `setup_text` declares it, once in a
kernel; `point_text` says which range of columns is read from then on; `gather_text` turns a word with two codes, each
in the lowest bits of a half, into a word for each entry, with the two values. ptxas allows 48 KiB for such variables.
Codebooks that do not fit are read from global memory by the same texts, told so by copies = 0.

Stage 0 is the first code, stage 1 a second one that is added; its bits are 0 where there is none.
"""

from typing import NamedTuple

try:  # kernels call these functions while they are compiled
    from triton import constexpr_function
except ImportError:  # and the rest of the package where there is no Triton

    def constexpr_function(function):  # type: ignore[no-redef]
        """What Triton's returns to a caller outside a kernel."""
        return function


STATIC_LIMIT = 49152
"""Bytes of variables in shared memory that ptxas allows."""
SUM = 2
"""Instead of a stage: both, added in fp32 and rounded to bf16."""


class Piece(NamedTuple):
    """Entries of a window that are read at once.

    Attributes:
        first: the first of them.
        entries: how many, those that only fill up included.
        shift: log2 of the bytes between vectors.
        offset: of the first vector in the table.
    """

    first: int
    entries: int
    shift: int
    offset: int


@constexpr_function
def pieces(stage: int, window: int, copies: int, ranges: int, bits: int, more_bits: int) -> list[Piece]:
    """The pieces of a stage's codebooks in shared memory."""
    sizes = (2,) if window <= 2 else (4,) if window <= 4 else (4, 2) if window <= 6 else (8,)
    found: list[Piece] = []
    offset = 0
    for width in (bits, more_bits)[: stage + 1]:
        found, first = [], 0
        for entries in sizes:
            shift = (2 * entries * copies).bit_length() - 1
            found.append(Piece(first, entries, shift, offset))
            first += entries
            offset += (ranges << width) << shift
    return found


@constexpr_function
def field(name: str, number: int, stage: int, window: int, copies: int, ranges: int, bits: int, more_bits: int) -> int:
    """A field of a piece; 0 for one past the last."""
    found = pieces(stage, window, copies, ranges, bits, more_bits)
    return getattr(found[number], name) if number < len(found) else 0


@constexpr_function
def table_bytes(window: int, copies: int, ranges: int, bits: int, more_bits: int) -> int:
    """Shared memory that all tables take, in whole KiB so that what Triton puts behind keeps its alignment."""
    last = pieces(1 if more_bits else 0, window, copies, ranges, bits, more_bits)[-1]
    end = last.offset + ((ranges << (more_bits or bits)) << last.shift)
    return -(-end // 1024) * 1024


@constexpr_function
def outputs(window: int) -> int:
    """Words that `gather_text` returns: one an entry, and some to make it a power of two."""
    return max(2, 1 << (window - 1).bit_length())


@constexpr_function
def constraints(stage: int, window: int) -> str:
    """Constraints of the assembly of `gather_text`."""
    return ",".join(["=r"] * outputs(window) + ["r"] * (2 if stage == 2 else 1))


@constexpr_function
def unit(v: int, window: int) -> int:
    """Entries of one aligned load from vectors of v entries in global memory."""
    return max(entries for entries in (1, 2, 4, 8) if v % entries == 0 and window % entries == 0)


@constexpr_function
def setup_text(window: int, copies: int, ranges: int, bits: int, more_bits: int) -> str:
    """Declares what the other texts use; gives the table's address."""
    if copies == 0:
        return ".reg .b64 qk_book0, qk_book1; mov.u32 $0, 0;"
    size = table_bytes(window, copies, ranges, bits, more_bits)
    lanes = " ".join([f"shl.b32 qk_lane{e}, qk_lane, {e.bit_length()};" for e in (2, 4, 8)])
    return (
        f".shared .align 1024 .b8 qk_table[{size}]; .reg .b32 qk_lane, qk_lane2, qk_lane4, qk_lane8; "
        ".reg .b32 qk_base00, qk_base01, qk_base10, qk_base11; "
        f"mov.u32 qk_lane, %laneid; and.b32 qk_lane, qk_lane, {copies - 1}; {lanes} mov.u32 $0, qk_table;"
    )


@constexpr_function
def point_text(stage: int, window: int, copies: int, ranges: int, bits: int, more_bits: int) -> str:
    """PTX that points to a range: $1 is its index, or the address of its codebook in global memory."""
    if copies == 0:
        return f"mov.b64 qk_book{stage}, $1; mov.u32 $0, 0;"
    width = more_bits if stage else bits
    text = ""
    for i, piece in enumerate(pieces(stage, window, copies, ranges, bits, more_bits)):
        base = f"qk_base{stage}{i}"
        text += f"mov.u32 {base}, qk_table; add.u32 {base}, {base}, {piece.offset}; "
        if ranges > 1:
            text += f"mad.lo.u32 {base}, $1, {1 << (width + piece.shift)}, {base}; "
    return text + "mov.u32 $0, 0;"


@constexpr_function
def store_text(entries: int) -> str:
    """Stores a piece's words, $2 and following, at address $1."""
    values = ", ".join([f"${2 + i}" for i in range(entries // 2)])
    return f"st.shared.{_type(entries)} [$1], " + (f"{{{values}}}" if entries > 2 else values) + "; mov.u32 $0, 0;"


@constexpr_function
def gather_text(stage: int, v: int, window: int, copies: int, ranges: int, bits: int, more_bits: int) -> str:
    """One output for each of `outputs(window)` entries; the words with the codes of a stage, or of both, come last."""
    sizes = (v, window, copies, ranges, bits, more_bits)
    codes, more_codes = f"${outputs(window)}", f"${outputs(window) + 1}"
    text = ".reg .b32 a, b, x<8>, y<8>, z<8>, w<8>; .reg .b64 p, q; .reg .b16 h<16>; .reg .f32 e, f, g, s; "
    text += _look_up(codes, "x", "y", 1 if stage == 1 else 0, *sizes)
    if stage == 2:
        text += _look_up(more_codes, "z", "w", 1, *sizes)
    for j in range(window):
        if stage == 2:
            for number, word in zip("efgs", "xyzw", strict=True):
                text += f"mov.b32 {{h0, h1}}, {word}{j // 2}; cvt.f32.f16 {number}, h{j % 2}; "
            text += f"add.f32 e, e, g; add.f32 f, f, s; cvt.rn.bf16x2.f32 ${j}, f, e; "
        else:
            text += f"prmt.b32 ${j}, x{j // 2}, y{j // 2}, {'0x7632' if j % 2 else '0x5410'}; "
    return "{ " + text + "".join([f"mov.b32 ${j}, 0; " for j in range(window, outputs(window))]) + "}"


@constexpr_function
def _look_up(
    codes: str,
    low: str,
    high: str,
    stage: int,
    v: int,
    window: int,
    copies: int,
    ranges: int,
    bits: int,
    more_bits: int,
) -> str:
    """Reads the vectors of the codes in the lower and in the upper half of a word into registers `low`, `high`."""
    width = more_bits if stage else bits
    if copies == 0:
        mask, book = (1 << width) - 1, f"qk_book{stage}"
        return (
            f"and.b32 a, {codes}, {mask}; shr.u32 b, {codes}, 16; and.b32 b, b, {mask}; "
            f"mad.wide.u32 p, a, {2 * v}, {book}; mad.wide.u32 q, b, {2 * v}, {book}; "
            + _global_loads("p", low, window, unit(v, window))
            + _global_loads("q", high, window, unit(v, window))
        )
    text = ""
    for i, piece in enumerate(pieces(stage, window, copies, ranges, bits, more_bits)):
        mask = ((1 << width) - 1) << piece.shift
        text += f"shl.b32 a, {codes}, {piece.shift}; shr.u32 b, {codes}, {16 - piece.shift}; "
        for address, to in (("a", low), ("b", high)):
            text += f"lop3.b32 {address}, {address}, {mask}, qk_lane{piece.entries}, 0xEA; "
            text += f"add.u32 {address}, {address}, qk_base{stage}{i}; "
            text += f"ld.shared.{_type(piece.entries)} {_words(to, piece.first, piece.entries)}, [{address}]; "
    return text


@constexpr_function
def _global_loads(address: str, to: str, window: int, entries: int) -> str:
    text = ""
    for first in range(0, window, entries):
        where = f"[{address}+{2 * first}]"
        if entries > 1:
            text += f"ld.global.nc.{_type(entries)} {_words(to, first, entries)}, {where}; "
        else:
            text += f"ld.global.nc.u16 h{first}, {where}; "
    for first in range(0, window if entries == 1 else 0, 2):
        text += f"mov.b32 {to}{first // 2}, {{h{first}, h{min(first + 1, window - 1)}}}; "
    return text


@constexpr_function
def _type(entries: int) -> str:
    """PTX's type of a load or store of some entries."""
    return {2: "b32", 4: "v2.b32", 8: "v4.b32"}[entries]


@constexpr_function
def _words(name: str, first: int, entries: int) -> str:
    words = [f"{name}{i}" for i in range(first // 2, (first + entries) // 2)]
    return words[0] if len(words) == 1 else "{" + ", ".join(words) + "}"
