"""What the processor of this computer is fast at."""

from __future__ import annotations

import torch

__all__ = ["computes_in_bfloat16"]


def computes_in_bfloat16() -> bool:
    """Whether it has the AVX-512 BF16 or AMX instructions."""
    # torch has no public question for this; without the private one the answer is no, which is only slower.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)
