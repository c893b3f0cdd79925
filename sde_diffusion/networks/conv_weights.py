"""The derivative of a 3x3 convolution by its weights, on CPUs that compute in bfloat16: ``conv_weights.c``.

torch's takes longer than the convolution itself, the more so the smaller the image: with matrix tiles (AMX) two to
five times as long, with AVX-512 BF16 up to twice; and it is rounded to bfloat16 before the optimizer sees it. This
one is up to six times (AMX) or twice faster, and in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.networks.channels_last import pointers
from sde_diffusion.networks.native import load_native

_SOURCE = Path(__file__).with_suffix(".c")


@lru_cache
def _library() -> ctypes.CDLL | None:
    library = load_native(_SOURCE)
    if library is None or not library.conv_weights_available():
        return None
    return load_native(_SOURCE, conv_weights="PPPPNNNNNI")


def available() -> bool:
    """Whether there is :func:`weight_gradient` here."""
    return _library() is not None


def weight_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of ``sum(grad conv(x))`` by the weight, (C', C, 3, 3) with channels last, and by the bias (C').

    In float32, for x (B, C, H, W) and grad (B, C', H, W) in bfloat16 with channels last. The sums are made in an
    order that does not depend on the number of threads.
    """
    return sums_of(_library().conv_weights, x, grad)  # type: ignore[union-attr]


def sums_of(function: Callable[..., int], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`weight_gradient` by a function in C with the arguments of ``conv_weights``."""
    images, channels, height, width = x.shape
    of_weight = torch.empty(grad.shape[1], 3, 3, channels, dtype=torch.float32, device="cpu")
    of_bias = torch.empty(grad.shape[1], dtype=torch.float32, device="cpu")
    failed = function(
        *pointers(x, grad, of_weight, of_bias),
        images, height, width, channels, grad.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the derivative of a convolution")
    return of_weight.permute(0, 3, 1, 2), of_bias
