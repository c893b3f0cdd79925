"""GroupNorm, modulation, SiLU and dropout at once, for images whose channels come last in memory.

On CPUs that compute in bfloat16 convolutions are faster in that layout, with matrix units (AMX) about twice, but
torch's GroupNorm is many times slower there than in the usual one (torch 2.13). ``norm_silu.c`` has one that is
faster than either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.native import load_native
from sde_diffusion.processor import computes_in_bfloat16

_SOURCE = Path(__file__).with_name("norm_silu.c")


@lru_cache
def _library() -> ctypes.CDLL | None:
    return load_native(_SOURCE, norm_silu="PPPPPPPPPNNNNDIDNI", norm_silu_backward="PPPPPPPPPPPPNNNNI")


@lru_cache
def available() -> bool:
    """Whether this computer gains from the layout and can compile what that takes (which is tried, once)."""
    return computes_in_bfloat16() and _library() is not None


def preferred(device: torch.device, precision: torch.dtype) -> bool:
    """Whether networks in this precision compute with channels last there of their own accord; their weights, whose
    gradients then come so, should be kept that way in training."""
    return device.type == "cpu" and precision == torch.bfloat16 and available()


def transformed() -> bool:
    """Whether a transform of ``torch.func``, a batched derivative or forward-mode differentiation is at work."""
    # torch's own question for its autograd functions; without it the answer is yes, which is only slower.
    active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    return active() or torch.autograd.forward_ad._current_level >= 0


def watched(x: Tensor) -> bool:
    """Whether more is going on than the computation of values and gradients, which is all that C can do: a transform
    as in :func:`transformed`, a compiler, tracing, or a tensor that only stands for one."""
    return type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed()


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of x (B, C, H, W) are last in memory, and could be elsewhere; False for what stands for a
    batch of images under a transform."""
    if x.ndim != 4 or x.is_contiguous() or transformed():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def gains(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is better off with its channels last: on such a CPU, in bfloat16, with no transform of
    ``torch.func``, forward-mode derivative or compiler at work."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not x.numel():
        return False
    return not watched(x) and available()


def fastest_layout(x: Tensor) -> Tensor:
    """x (B, C, H, W) with its channels last in memory if it :func:`gains` by that, else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if gains(x) else x


def usual_layout(x: Tensor, last: nn.Module) -> Tensor:
    """``last(x)``, on CPUs with its channels before the pixels in memory."""
    if x.device.type != "cpu":
        return last(x)
    # A convolution takes the layout of its input; the smaller of input and result is what to change.
    grows = getattr(last, "out_channels", 0) > getattr(last, "in_channels", 0)
    out: Tensor = last(x.contiguous() if grows else x)
    return out.contiguous()


def fused(x: Tensor) -> bool:
    """Whether :func:`norm_silu` is for x: it has its channels last, and :func:`gains` by it."""
    return is_channels_last(x) and gains(x)


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    *,
    offset: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``f(weight GroupNorm(x + offset) + bias)`` in float32, f being SiLU, with dropout if wanted, or nothing.

    Args:
        x: (B, C, H, W), for which :func:`fused` holds.
        weight, bias: float32, (B, C): per image, or (1, C).
        groups, eps: of GroupNorm (Wu & He 2018).
        silu: whether to apply SiLU.
        offset: float32, (B, C) or (1, C), or None for zero.
        dropout: with SiLU, the probability of zeros among the results, of which the others are divided by 1 less it
            (Srivastava et al. 2014). Which those are depends on torch's random state, not on threads.

    Returns:
        (B, C, H, W) in the layout and type of x. It has all derivatives in reverse mode.
    """
    weight, bias = (part.expand(x.shape[:2]).contiguous() for part in (weight, bias))
    offset = None if offset is None else offset.expand(x.shape[:2]).contiguous()
    tensors = x, weight, bias, offset
    if dropout or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if dropout else 0
        return _NormSiLU.apply(*tensors, _Settings(groups, eps, silu, dropout, seed))
    return _forward(*tensors, _Settings(groups, eps, silu), keep=False)[0]


class _Settings(NamedTuple):
    groups: int
    eps: float
    silu: bool
    dropout: float = 0.0
    seed: int = 0


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None, settings: _Settings
    ) -> Tensor:
        out, saved = _forward(x, weight, bias, offset, settings, keep=True)
        ctx.save_for_backward(x, weight, bias, offset, *saved)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, offset, slope, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled() or not in_memory(grad):
            inputs = (x, weight, bias) if offset is None else (x, weight, bias, offset)
            found = differentiated(lambda *parts: written_out(*parts, settings=ctx.settings), inputs, grad)
            return *found, *[None] * (5 - len(found))
        # Whoever keeps saved tensors elsewhere may bring them back in another layout.
        last = torch.channels_last
        x, grad = x.contiguous(memory_format=last), grad.to(x.dtype).contiguous(memory_format=last)
        slope = None if slope is None else slope.contiguous(memory_format=last)
        weight, *statistics = (part.contiguous() for part in (weight, *statistics))
        of_x, of_weight, of_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        offset = None if offset is None else offset.contiguous()
        of_offset = None if offset is None else torch.empty_like(offset)
        images, channels, height, width = x.shape
        failed = _library().norm_silu_backward(  # type: ignore[union-attr]
            *pointers(grad, slope, x, weight, offset, *statistics, of_x, of_weight, of_bias, of_offset),
            images, height * width, channels, ctx.settings.groups, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the derivative of a GroupNorm")
        return of_x, of_weight, of_bias, of_offset, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None, settings: _Settings, *, keep: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The result, and what its derivative needs: the slope of SiLU, and of each channel (B, C) mean and 1 / deviation
    of its group and its own mean."""
    groups, eps, silu, dropout, seed = settings
    out, slope = torch.empty_like(x), torch.empty_like(x) if silu and keep else None
    statistics = [torch.empty_like(weight) for _ in range(3)]
    images, channels, height, width = x.shape
    failed = _library().norm_silu(  # type: ignore[union-attr]
        *pointers(x, weight, bias, offset, out, slope, *statistics),
        images, height * width, channels, groups, eps, silu, dropout, seed, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for a GroupNorm")
    return out, (slope, *statistics)


def differentiated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """The derivatives of ``function(*inputs)`` by those inputs that need one, for a backward pass that is
    differentiated itself or batched."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Without a second derivative in sight the graph must not reach what made the inputs.
        inputs = inputs if again else [part.detach().requires_grad_(part.requires_grad) for part in inputs]
        out = function(*inputs)
    wanted = [part for part in inputs if part.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again, materialize_grads=True))
    return [next(found) if part.requires_grad else None for part in inputs]


def in_memory(x: Tensor) -> bool:
    """Whether x has values of its own to read, and does not stand for a batch of tensors under a transform."""
    try:
        return not transformed() and x.data_ptr() is not None
    except RuntimeError:
        return False


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where the tensors are in memory, for C."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def written_out(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor | None = None, *, settings: _Settings
) -> Tensor:
    """:func:`norm_silu` by torch's operations, with the seed of its dropout."""
    groups, eps, silu, dropout, seed = settings
    x32 = x.float() if offset is None else x.float() + offset[:, :, None, None]
    weight, bias = weight[:, :, None, None], bias[:, :, None, None]
    y = torch.addcmul(bias, F.group_norm(x32.contiguous(), groups, eps=eps), weight)
    y = F.silu(y) if silu else y
    if dropout:
        y = y * stays(x.shape, dropout, seed) / (1 - dropout)
    return y.to(x.dtype)


def stays(shape: Sequence[int], dropout: float, seed: int) -> Tensor:
    """What the dropout of ``norm_silu.c`` leaves of (B, C, H, W), bool: a hash of each place in memory decides."""
    images, channels, height, width = shape
    low, high = seed % 2**32, seed // 2**32 % 2**32
    places = torch.arange(images * height * width * channels).view(images, height, width, channels)
    bits = _mixed(_mixed((places + low) % 2**32) ^ high)
    return (bits >= int(dropout * 2**32)).permute(0, 3, 1, 2)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32  # what int64 cannot hold wraps around, and leaves these bits
    return x ^ (x >> 16)
