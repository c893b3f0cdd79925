"""Random numbers that belong to a sample: the same whatever its batch, the batch size or the device.

A counter-based generator is a pure function ``(seed, stream, sample, draw, element) -> random bits``, so
sample 7 of seed 0 gets the same numbers alone, in a batch of 64 and on a GPU. The function is Philox-4x32
with ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain tensor
arithmetic; normals are by Box and Muller in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

NoiseSource: TypeAlias = Callable[[], Tensor]
"""Returns the next standard normal draw, of the shape of the state."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

SAMPLING, DIVERGENCE, DEQUANTIZATION, BOUND, PATHS = 0, 1, 2, 3, 4
"""Streams: noise of different purposes never coincides, whatever the seeds."""


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four words of 32 random bits for each counter of four words (int64 tensors holding unsigned 32-bit
    values)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products overflow int64 into its sign bit; shifting and masking recovers both unsigned halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _box_muller(words: Sequence[Tensor]) -> list[Tensor]:
    """Four normals from four words of 32 random bits."""
    w0, w1, w2, w3 = (w.double() for w in words)
    out = []
    for radius_bits, angle_bits in ((w0, w1), (w2, w3)):
        radius = (-2 * ((radius_bits + 1) / 2**32).log()).sqrt()
        angle = angle_bits * (2 * math.pi / 2**32)
        out += [radius * angle.cos(), radius * angle.sin()]
    return out


class SampleNoise:
    """A stream of draws of shape (B, *shape), one row per sample, where row ``i`` depends on ``(seed,
    indices[i])`` only.

    Args:
        seed: from 0 to 2^64 - 1.
        indices: the index of each sample, (B,) integers from 0 to 2^32 - 1 (for instance ``range(first,
            first + B)``).
        shape: the shape of one sample.
        dtype, device: of the draws; the numbers are the same for all, up to rounding.
        stream: which purpose the numbers serve; different streams are independent.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int] | Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        stream: int = SAMPLING,
    ) -> None:
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"a seed must be an integer from 0 to 2^64 - 1, got {seed!r}")
        rows = torch.as_tensor(indices, dtype=torch.int64, device=device)
        if rows.ndim != 1 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) <= _MASK):
            raise ValueError(
                f"sample indices must be a vector of integers from 0 to 2^32 - 1, got {indices!r}"
            )
        self.shape = (len(rows), *shape)
        self.dtype = dtype
        self.draws = 0
        self._key = (seed & _MASK, seed >> 32)
        self._size = math.prod(shape)
        blocks = torch.arange((self._size + 3) // 4, device=rows.device)
        self._block = blocks.expand(len(rows), -1)
        self._row = rows[:, None].expand_as(self._block)
        self._stream = torch.full_like(self._block, stream)

    def _bits(self) -> list[Tensor]:
        draw = torch.full_like(self._block, self.draws)
        self.draws += 1
        return philox((self._block, draw, self._row, self._stream), self._key)

    def _shaped(self, words: Sequence[Tensor]) -> Tensor:
        values = torch.stack(list(words), dim=-1).flatten(1)[:, : self._size]
        return values.reshape(self.shape).to(self.dtype)

    def normal(self) -> Tensor:
        """The next draw from ``N(0, I)``."""
        return self._shaped(_box_muller(self._bits()))

    def uniform(self) -> Tensor:
        """The next draw from the uniform distribution on [0, 1), always below 1 in the stream's type."""
        # 24 bits fit a float32 exactly; with 32 the largest values would round up to 1. Half types hold 8 or
        # 11.
        bits = min(24, 1 - round(math.log2(torch.finfo(self.dtype).eps)))
        return self._shaped([(w >> (32 - bits)).double() / 2**bits for w in self._bits()])

    def rademacher(self) -> Tensor:
        """The next draw of independent signs, -1 or 1."""
        return self._shaped([2 * (w & 1) - 1 for w in self._bits()])

    __call__ = normal


_CHILD = (0x3C6EF372, 0xA54FF53A)
"""A key that no seed below 2^32 has."""


class ChildNoise:
    """Normal draws that follow from one given draw, for a step that needs a number of them not known before.

    Row ``i`` of draw ``k`` is a function of ``k`` and of row ``i`` of the given draw, so it belongs to the sample as
    that does. What a sample draws here moves nothing in the stream that the given draw comes from.

    Args:
        parent: a normal draw, (B, *D): of it, up to 4 elements of each row, in single precision, are the seed.
    """

    def __init__(self, parent: Tensor) -> None:
        self._like = parent
        flat = parent.flatten(1)
        # Adding 0 turns -0 into 0: equal numbers have equal bits.
        bits = (flat[:, :4].float() + 0.0).contiguous().view(torch.int32).long() & _MASK
        columns = [bits[:, min(i, bits.shape[1] - 1)] for i in range(4)]
        self.words = torch.stack(philox(columns, _CHILD), 1)
        """128 bits for each sample, as (B, 4) words of 32."""
        self._size = flat.shape[1]
        self._block = torch.arange((self._size + 3) // 4, device=parent.device)

    def normal(self, draws: Tensor) -> Tensor:
        """Draw number ``draws``, (B,) integers, of each sample: like the given draw."""
        shape = (len(draws), len(self._block))
        counter = (
            self._block.expand(shape),
            draws[:, None].expand(shape),
            self.words[:, :1].expand(shape),
            self.words[:, 1:2].expand(shape),
        )
        values = torch.stack(_box_muller(philox(counter, _CHILD)), dim=-1)
        return values.flatten(1)[:, : self._size].reshape(self._like.shape).to(self._like.dtype)
