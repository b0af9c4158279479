"""What a compressed KV cache stores: widths, groups, corrections, and what all of it costs."""

import json
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from quantkit.core.errors import QuantkitError

Backbone = Literal["kivi", "kcvt"]
WIDTHS = (2, 3, 4, 8, 16)


@dataclass(frozen=True)
class KVCacheConfig:
    """Settings of a compressed cache (GEAR, arXiv 2403.05527; KIVI, arXiv 2402.02750).

    Attributes:
        k_bits, v_bits: of a code; 16 keeps keys or values as they are.
        backbone: "kivi": keys share a scale per channel and `group_size` tokens, values per token and `group_size`
            channels; "kcvt": keys per channel and all tokens that are compressed together, values per token and all
            channels of all heads.
        group_size: see `backbone`; where it counts channels, the most up to it that divide a head.
        buffer: the newest tokens stay as they are until so many have gathered.
        sink: so many of the first tokens stay as they are.
        rank: of the correction of what rounding lost, a head; 0 for none.
        decode_rank: of the corrections of tokens that come after the prompt; None: they are corrected in the prompt's
            basis, which costs no basis of their own.
        factor_bits: of what a token stores for its correction: 16, or 8 with a scale per buffer of tokens.
        targets: what has a correction and outliers: keys, values or both.
        outliers: fraction of a vector's numbers that are kept in 16 bits, the largest and the smallest; a vector is a
            token's channels.
        channel_outliers: of keys it is a channel's tokens, of all that are compressed together.
        weighted: weigh a key's error by its channels' queries before the correction is fitted.
        iterations: of the block power iteration.

    Raises:
        QuantkitError: a setting makes no sense.
    """

    k_bits: int = 4
    v_bits: int = 4
    backbone: Backbone = "kivi"
    group_size: int = 64
    buffer: int = 64
    sink: int = 0
    rank: int = 0
    decode_rank: int | None = None
    factor_bits: int = 8
    targets: tuple[str, ...] = ("k", "v")
    outliers: float = 0.0
    channel_outliers: bool = False
    weighted: bool = False
    iterations: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        least = {"group_size": 8, "buffer": 1, "sink": 0, "rank": 0, "iterations": 1}
        for name, smallest in (least | ({} if self.decode_rank is None else {"decode_rank": 0})).items():
            value = getattr(self, name)
            if type(value) is not int or value < smallest:
                raise QuantkitError(f"{name}={value!r}: give a whole number, at least {smallest}")
        for name in ("k_bits", "v_bits"):
            if type(getattr(self, name)) is not int or getattr(self, name) not in WIDTHS:
                raise QuantkitError(
                    f"{name}={getattr(self, name)!r}: a cache has 2, 3, 4 or 8 bits, as a whole number, or 16 for none"
                )
        if self.backbone not in get_args(Backbone):
            raise QuantkitError(f"backbone={self.backbone!r}: known are {', '.join(get_args(Backbone))}")
        if self.group_size > 256 or self.group_size % 8:
            raise QuantkitError(f"group_size={self.group_size}: give a multiple of 8 up to 256")
        if self.backbone == "kivi" and self.buffer % self.group_size:
            raise QuantkitError(
                f"buffer={self.buffer} is no multiple of the {self.group_size} tokens that share a scale"
            )
        if self.factor_bits not in (8, 16):
            raise QuantkitError(f"factor_bits={self.factor_bits}: give 8 or 16")
        if not set(self.targets) <= {"k", "v"}:
            raise QuantkitError(f"targets={self.targets}: name keys ('k'), values ('v') or both")
        if not 0 <= self.outliers <= 1:
            raise QuantkitError(f"outliers={self.outliers}: a fraction, 0 to 1")

    @staticmethod
    def gear(bits: int = 4, paper: bool = False) -> "KVCacheConfig":
        """Backbone, low rank and outliers.

        Args:
            bits: of keys and of values.
            paper: the public code's settings: KCVT and a buffer of 20 at 4 bits, else KIVI with 64; rank 4, and 2 for
                every later chunk, 2% outliers. Otherwise keys alone are corrected, in the prompt's basis, weighted by
                queries, without outliers: docs/guide/kv-cache.md says what each part is worth.
        """
        if not paper:
            rank = 0 if bits == 8 else 4  # 8 bits leave nothing to correct
            return KVCacheConfig(bits, bits, rank=rank, targets=("k",), weighted=rank > 0)
        coarse = bits == 4
        return KVCacheConfig(
            bits, bits, "kcvt" if coarse else "kivi", buffer=20 if coarse else 64,
            rank=4, decode_rank=2, factor_bits=16, outliers=0.02, channel_outliers=True,
        )  # fmt: skip

    @staticmethod
    def for_budget(
        bits_per_element: float, head_dim: int = 128, kv_heads: int = 8, tokens: int = 8192
    ) -> "KVCacheConfig":
        """The best settings that a cached number's true bits allow, by docs/guide/kv-cache.md: keys get bits first.

        Args:
            bits_per_element: every byte counted.
            head_dim, kv_heads: of the model.
            tokens: in the cache.

        Raises:
            QuantkitError: nothing is as small as that.
        """
        offers = [
            KVCacheConfig(keys, values) for keys, values in ((2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (8, 4), (8, 8))
        ]
        offers.insert(5, KVCacheConfig.gear(4))
        costs = [offer.bits_per_element(head_dim, kv_heads, tokens) for offer in offers]
        allowed = [offer for offer, cost in zip(offers, costs, strict=True) if cost <= bits_per_element]
        if not allowed:
            raise QuantkitError(f"{bits_per_element:g} bits a number: the least is {costs[0]:.2f} at {tokens:,} tokens")
        return allowed[-1]

    def bits_per_element(self, head_dim: int, kv_heads: int, tokens: int) -> float:
        """Bits that a cached number costs in all, in closed form.

        Args:
            head_dim: of keys and of values.
            kv_heads: of a layer.
            tokens: in the cache, all of one prompt.
        """
        packed = max(tokens - self.sink, 0) // self.buffer * self.buffer
        total = 0.0
        for side, bits in (("k", self.k_bits), ("v", self.v_bits)):
            if bits == 16:
                total += 16 * tokens
                continue
            if self.backbone == "kivi":
                scales = packed / (self.group_size if side == "k" else self.channels(head_dim))
            else:
                scales = float(packed > 0) if side == "k" else packed / (head_dim * kv_heads)
            total += bits * packed + 32 * scales + 16 * (tokens - packed)
            if side in self.targets and packed:
                factor = 16 if self.factor_bits == 16 else 8 + 32 / self.buffer
                total += self.rank * (factor * packed / head_dim + 16)
                vector = packed if side == "k" and self.channel_outliers else head_dim
                total += self.outlier_count(vector) * (16 + index_bits(vector)) * packed / vector
        return total / (2 * tokens)

    def channels(self, head_dim: int) -> int:
        """Channels that share a scale: `group_size`, or the most that divide a head, if less."""
        return max(count for count in range(1, min(self.group_size, head_dim) + 1) if head_dim % count == 0)

    def outlier_count(self, size: int) -> int:
        """Numbers of a vector that are kept, an even count: as many large as small ones; all if the fraction is 1."""
        return size if self.outliers == 1 else 2 * round(self.outliers * size / 2)

    def to_json(self) -> str:
        """The settings as text, for `from_json`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "KVCacheConfig":
        """Settings from what `to_json` wrote.

        Raises:
            QuantkitError: it is something else.
        """
        try:
            return KVCacheConfig(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise QuantkitError(f"these are no settings of a KV cache ({error})") from error


def index_bits(size: int) -> int:
    """Bits of an index into a vector of `size` numbers."""
    return 8 if size <= 256 else 16 if size <= 2**15 else 32
