"""The 3x3 convolution of stride 1 that U-Nets are made of, by what is fastest.

In bfloat16, where the processor has it, that is :mod:`~sde_diffusion.networks.conv_bfloat16`. In training on
processors with AVX2 and nothing wider, it is algorithms with fewer products. Winograd's and Fourier's (Winograd 1980;
Lavin & Gray 2016) need 2 to 5 products where a 3x3 convolution as it stands needs 9, and torch computes the latter
there at nearly the full rate of the processor, so that only fewer products can be faster: NNPACK, which torch ships,
has them. In float32 its results differ from torch's by about 1e-5 of the largest, and those of a single image from
those in a batch, which training can bear and samples and likelihoods cannot: only a module in training mode uses it.
``torch.backends.nnpack.set_flags(False)`` turns it off.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks import conv_bfloat16

_MIN_PIXELS = 14 * 14
_MIN_CHANNELS = 32


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 that keeps height and width: ``nn.Conv2d(in, out, 3, padding=1)``.

    Where :meth:`is_fast` in bfloat16, it is :func:`~sde_diffusion.networks.conv_bfloat16.conv3x3`; else in training
    mode :func:`trained_conv3x3`, and torch's in evaluation mode.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """input: (B, in_channels, H, W) -> (B, out_channels, H, W)."""
        if self.is_fast(input):
            return conv_bfloat16.conv3x3(input, self.weight, self.bias)
        if self.training:
            return trained_conv3x3(input, self.weight, self.bias)
        return super().forward(input)

    def is_fast(self, input: Tensor) -> bool:
        """Whether for this input it is :func:`~sde_diffusion.networks.conv_bfloat16.conv3x3`."""
        # In evaluation mode derivatives of all kinds may be asked for, which are torch's.
        allowed = self.training or not torch.is_grad_enabled()
        return allowed and conv_bfloat16.fitting(input, self.weight, self.bias)


def trained_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, H, W) convolved with weight (C', C, 3, 3), zeros around it, and bias (C') or None -> (B, C', H, W)."""
    if _pays(x, weight):
        return _FewerProducts.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


@lru_cache
def _wanted_here() -> bool:
    """Whether this processor is one of those that gain."""
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX2"
        and torch.backends.nnpack.is_available()
        and hasattr(torch, "_nnpack_spatial_convolution")
    )


def _pays(x: Tensor, weight: Tensor) -> bool:
    """Whether there is something to gain."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[2] * x.shape[3] >= _MIN_PIXELS
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and len(x) > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _wanted_here()
        and torch._C._get_nnpack_enabled()
        # torch.func's transforms have rules for torch's own convolution.
        and torch._C._functorch.peek_interpreter_stack() is None
    )


class _FewerProducts(torch.autograd.Function):
    """The same by NNPACK, and so the derivative by x; the derivative by the weight is torch's."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch._nnpack_spatial_convolution(x, weight, bias, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        by_x = trained_conv3x3(gradient, weight.flip(2, 3).transpose(0, 1), None) if of_x else None
        by_weight = None
        if of_weight:
            ones, zeros = [1, 1], [0, 0]
            by_weight = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, ones, ones, ones, False, zeros, 1, [False, True, False]
            )[1]
        return by_x, by_weight, gradient.sum((0, 2, 3)) if of_bias else None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = [] if x_t is None else [F.conv2d(x_t, weight, padding=1)]
        if weight_t is not None:
            parts.append(F.conv2d(x, weight_t, padding=1))
        total = sum(parts[1:], parts[0]) if parts else x.new_zeros(len(x), len(weight), *x.shape[2:])
        return total if bias_t is None else total + bias_t[:, None, None]
