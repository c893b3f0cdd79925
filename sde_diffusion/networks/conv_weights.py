"""The 3x3 convolution of training on CPUs that compute in bfloat16: ``conv_weights.c``.

torch's derivative by the weights takes longer than the convolution itself, the more so the smaller the image: with
matrix tiles (AMX) two to five times, with AVX-512 BF16 up to twice. And it is rounded to bfloat16 before the optimizer
sees it. This one is up to six times, or twice, faster, and in float32. Values and the derivative by the image are torch's.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.networks.channels_last import differentiated, fastest_layout, gains, in_memory, pointers
from sde_diffusion.networks.native import load_native

_SOURCE = Path(__file__).with_suffix(".c")


@lru_cache
def _library() -> ctypes.CDLL | None:
    library = load_native(_SOURCE)
    if library is None or not library.conv_weights_available():
        return None
    return load_native(_SOURCE, conv_weights="PPPPNNNNNI")


def fitting(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`conv3x3_in_bfloat16` is for them: the weight (C', C, 3, 3) is trained, x (B, C, H, W) is in bfloat16
    and :func:`~sde_diffusion.networks.channels_last.gains` by channels last, and their convolution would be in
    bfloat16."""
    if not (x.ndim == 4 and torch.is_grad_enabled() and weight.requires_grad and gains(x)):
        return False
    if weight.dtype != x.dtype and not (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == x.dtype
    ):
        return False
    return weight.device == x.device and _library() is not None


def by_tiles() -> bool:
    """Whether :func:`conv3x3_in_bfloat16` is by matrix tiles here, next to which the convolution itself is slow."""
    library = _library()
    return library is not None and bool(library.conv_weights_has_tiles())


def conv3x3_in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x convolved with the weight, zeros around it, plus the bias (C') if any -> (B, C', H, W) with channels last.

    For which :func:`fitting` holds. It has all derivatives in reverse mode; those by weight and bias are summed in
    float32. The weight must not change between the two passes.
    """
    return _Conv3x3.apply(fastest_layout(x), weight, bias)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, narrow)
        return F.conv2d(x, narrow, None if bias is None else bias.to(x.dtype), padding=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, narrow = ctx.saved_tensors
        inputs = [x, weight] if bias is None else [x, weight, bias]
        if torch.is_grad_enabled() or not in_memory(grad):
            found = differentiated(written_out, inputs, grad)
            return found[0], found[1], found[2] if len(found) == 3 else None
        # Whoever keeps saved tensors elsewhere may bring them back in another layout.
        last = torch.channels_last
        x, grad = x.contiguous(memory_format=last), grad.to(x.dtype).contiguous(memory_format=last)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            ones, zeros = [1, 1], [0, 0]
            of_x = torch.ops.aten.convolution_backward(
                grad, x, narrow, None, ones, ones, ones, False, zeros, 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            of_weight, of_bias = weight_gradient(x, grad)
            # In the layout of the weight, on which torch's fused Adam relies.
            if of_weight.dtype != weight.dtype or of_weight.stride() != weight.stride():
                of_weight = torch.empty_like(weight).copy_(of_weight)
            of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_x, of_weight, of_bias


def weight_gradient(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of ``sum(grad conv(x))`` by the weight, (C', C, 3, 3) with channels last, and by the bias (C').

    In float32, for x (B, C, H, W) and grad (B, C', H, W) in bfloat16 with channels last. The sums are made in an
    order that does not depend on the number of threads.
    """
    images, channels, height, width = x.shape
    of_weight = torch.empty(grad.shape[1], 3, 3, channels, dtype=torch.float32, device="cpu")
    of_bias = torch.empty(grad.shape[1], dtype=torch.float32, device="cpu")
    failed = _library().conv_weights(  # type: ignore[union-attr]
        *pointers(x, grad, of_weight, of_bias),
        images, height, width, channels, grad.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the derivative of a convolution")
    return of_weight.permute(0, 3, 1, 2), of_bias


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`conv3x3_in_bfloat16` by torch's operations."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)
