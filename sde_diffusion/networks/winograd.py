"""3x3 convolutions in bfloat16 with fewer products, on CPUs with AVX-512 BF16 and no matrix tiles: ``winograd.c``.

The derivative by the weights is that of ``winograd_weights.c``.

Such a processor multiplies in bfloat16 twice as fast as in float32, which torch makes full use of; only fewer
products are faster. Those of Winograd (1980; Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks")
are 4 a result where there are 9 otherwise. As both factors are sums, of pixels and of weights, rounded to bfloat16,
values and derivatives by the image are up to twice as far from exact ones as those of torch in bfloat16. Sums of
16 pixels must be finite, and what is not finite spreads to the tiles of 2x2 results that see it.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.networks.channels_last import pointers
from sde_diffusion.networks.conv_weights import sums_of
from sde_diffusion.networks.native import load_native

_SOURCE = Path(__file__).with_suffix(".c")
_WEIGHTS_SOURCE = Path(__file__).with_name("winograd_weights.c")
_MIN_CHANNELS = 17  # products are made of 16 or 32 at a time


@lru_cache
def _library() -> ctypes.CDLL | None:
    library = load_native(_SOURCE)
    if library is None or not library.winograd_available():
        return None
    return load_native(_SOURCE, winograd="PPPPNNNNNIII")


@lru_cache
def _weights_library() -> ctypes.CDLL | None:
    return None if _library() is None else load_native(_WEIGHTS_SOURCE, winograd_weights="PPPPNNNNNI")


def pays(weight: Tensor) -> bool:
    """Whether the functions here are available and faster than torch's, for the weights (C', C, 3, 3). It does not
    depend on the images, so that a convolution computes the same in batches of every size."""
    return min(weight.shape[:2]) >= _MIN_CHANNELS and _weights_library() is not None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x convolved with the weight, zeros around it, plus the bias.

    Args:
        x: (B, C, H, W), bfloat16, with channels last in memory.
        weight: (C', C, 3, 3), float32 or bfloat16.
        bias: (C'), or None.

    Returns:
        (B, C', H, W) in the type and layout of x. It has no derivative.
    """
    return _computed(x, weight, bias, derivative=False)


def derivative_by_image(grad: Tensor, weight: Tensor) -> Tensor:
    """The derivative of ``sum(grad convolve(x, weight))`` by x (B, C, H, W), for grad (B, C', H, W) and the weight as
    there."""
    return _computed(grad, weight, None, derivative=True)


def weight_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`sde_diffusion.networks.conv_weights.weight_gradient`, but that the factors of its products are
    rounded sums: the derivatives by the weight are 4e-3 off, relative."""
    return sums_of(_weights_library().winograd_weights, x, grad)  # type: ignore[union-attr]


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None, *, derivative: bool) -> Tensor:
    weight = weight.detach().contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.detach().float().contiguous()
    images, channels, height, width = x.shape
    out_channels = weight.shape[1 if derivative else 0]
    shape = images, out_channels, height, width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    failed = _library().winograd(  # type: ignore[union-attr]
        *pointers(x, weight, bias, out),
        images, height, width, channels, out_channels,
        weight.dtype == torch.bfloat16, derivative, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a convolution")
    return out
