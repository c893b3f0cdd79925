"""The 3x3 convolution in bfloat16 on CPUs that compute in it, by what is fastest there.

That is :mod:`~sde_diffusion.networks.winograd` where it pays, and else torch, but that derivatives by the weights are
those of :mod:`~sde_diffusion.networks.conv_weights`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.networks import conv_weights, winograd
from sde_diffusion.networks.channels_last import differentiated, gains, in_memory


def fitting(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`conv3x3` is for them, and faster than torch.

    That is, x (B, C, H, W) is in bfloat16 and :func:`~sde_diffusion.networks.channels_last.gains` by channels last,
    its convolution with weight (C', C, 3, 3) and bias (C') would be in bfloat16, and either the weight is trained, or
    no derivative is wanted and :func:`~sde_diffusion.networks.winograd.pays`.
    """
    if not (x.ndim == 4 and weight.shape[1:] == (x.shape[1], 3, 3) and gains(x)):
        return False
    if weight.dtype != x.dtype and not (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == x.dtype
    ):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    parts = [weight] if bias is None else [weight, bias]
    if not all(part.device == x.device and part.dtype in (torch.bfloat16, torch.float32) for part in parts):
        return False
    if torch.is_grad_enabled() and any(part.requires_grad for part in (x, *parts)):
        return weight.requires_grad and conv_weights.available()
    return winograd.pays(weight)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x convolved with the weight, zeros around it, plus the bias (C') if any -> (B, C', H, W) with channels last.

    For which :func:`fitting` holds. It has all derivatives in reverse mode; those by weight and bias are summed in
    float32. The weight must not change between the two passes.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled() and weight.requires_grad:
        return _Conv3x3.apply(x, weight, bias)
    return winograd.convolve(x, weight, bias)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.fewer_products = winograd.pays(weight)
        narrow = None if ctx.fewer_products else weight.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, narrow)
        return written_out(x, narrow, bias) if narrow is not None else winograd.convolve(x, weight, bias)

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
            if ctx.fewer_products:
                of_x = winograd.derivative_by_image(grad, weight)
            else:
                of_x = _derivative_by_image(grad, x, narrow)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            by = winograd if ctx.fewer_products else conv_weights
            of_weight, of_bias = by.weight_gradient(x, grad)
            # In the layout of the weight, on which torch's fused Adam relies.
            if of_weight.dtype != weight.dtype or of_weight.stride() != weight.stride():
                of_weight = torch.empty_like(weight).copy_(of_weight)
            of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_x, of_weight, of_bias


def _derivative_by_image(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    ones, zeros = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, ones, ones, ones, False, zeros, 1, [True, False, False]
    )[0]


def written_out(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`conv3x3` by torch's operations."""
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)
