"""Attention among tokens, by the kernel that is fastest for device, precision and shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def attend_tokens(qkv: Tensor, heads: int, training: bool) -> Tensor:
    """The attention among tokens in ``heads`` heads.

    The fused kernels have neither forward-mode nor second derivatives, nor batched first ones on every
    device. A network in evaluation mode has them all: divergences, Jacobians and guidance need them there.

    Args:
        qkv: (B, T, 3 C), the channels in the order (q/k/v, head, channel of the head).
        heads: number of heads, dividing C.
        training: whether first derivatives are all that may be asked for.

    Returns:
        (B, T, C).
    """
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    plain = not training and torch.is_grad_enabled()
    h = cached_attention(q, k, v) if plain else attend(q, k, v)
    return h.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (B, heads, tokens, d), by the device's fastest kernel.

    That is the fused one, with two exceptions: it has no forward-mode derivative, and on CPUs its backward
    pass in 16 bits is 2 to 5 times slower than the formula written out (torch 2.13, up to 256 tokens).
    """
    differentiated = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and low_precision and differentiated and q.shape[2] <= 1024:
        return cached_attention(q, k, v)
    try:
        return F.scaled_dot_product_attention(q, k, v)
    except NotImplementedError:
        return plain_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, written out: differentiable in every mode and to every order."""
    weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    return weights @ v


#: Bytes of attention weights that stay in a core's cache from one pass over them to the next.
_CACHE = 2**20


def cached_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`plain_attention`, on CPUs a few heads at a time.

    The weights are tokens x tokens per head, for narrow heads most of what there is to read and write. In
    portions they stay in the cache, and their memory is used again: by itself 1.7 to 2 times faster with
    heads of 8 channels and 256 tokens in bfloat16 (torch 2.13), within a network less.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return plain_attention(q, k, v)
    batch, heads, tokens, _ = q.shape
    portion = max(1, _CACHE // (tokens * tokens * q.element_size()))
    if batch * heads < 4 * portion:
        return plain_attention(q, k, v)
    pieces = zip(*(tensor.flatten(0, 1).split(portion) for tensor in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*piece) for piece in pieces]).unflatten(0, (batch, heads))


def attend_channels(qkv: Tensor, heads: int, training: bool) -> Tensor:
    """:func:`attend_tokens` with channels before tokens, as images have them.

    On CPUs the tokens are then the long, contiguous side of every product of matrices, and nothing is
    transposed.

    Args:
        qkv: (B, 3 C, T), the channels in the order (q/k/v, head, channel of the head).
        heads, training: as in :func:`attend_tokens`.

    Returns:
        (B, C, T).
    """
    if not _own_kernel(qkv, training):
        return attend_tokens(qkv.transpose(1, 2), heads, training).transpose(1, 2)
    needed = torch.is_grad_enabled() and qkv.requires_grad
    return ChannelAttention.apply(qkv, heads) if needed else _portions(qkv, heads, keep=False)[0]


def _own_kernel(qkv: Tensor, training: bool) -> bool:
    """Whether :class:`ChannelAttention` may be used: on CPUs, where first derivatives are enough."""
    small = qkv.shape[2] <= 1024 and qkv.dtype in (torch.bfloat16, torch.float32)
    if qkv.device.type != "cpu" or not small or torch.compiler.is_compiling():
        return False
    if not training and torch.is_grad_enabled():
        return False
    # torch's own question for its autograd functions; without it the answer is no, which is only slower.
    transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    return not transformed() and torch.autograd.forward_ad._current_level < 0


#: The largest logit whose exponential needs no shift: sums of a million of them, or of their inverses, are in
#: the range of 8 exponent bits.
_SAFE_LOGIT = 60.0


class ChannelAttention(torch.autograd.Function):
    """Attention with channels before tokens, (B, 3 C, T) -> (B, C, T), and its first derivative, for CPUs.

    With P = exp(k^T q / sqrt(d)), keys before queries, the result is ``(v P) / (1 P)``: the sums 1 P come as
    one more row of the product with v, and no pass over P normalises it. Where a logit may be too large for
    that, P is the softmax. The backward pass is that of Dao et al. (2022, "FlashAttention", app. B.2) on the P
    kept: dS = P * (v^T g - D) with D = sum over channels of g * out, where D is one more row of the product.

    All goes by a few heads at a time, which stay in the cache, see :func:`cached_attention`. With heads of 8 channels
    and 256 tokens that is 2.4 times as fast as torch's fused kernels in float32 (3.5 times without the derivative),
    with wide heads as fast (torch 2.13, AVX2).
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        out, saved = _portions(qkv, heads, keep=True)
        ctx.save_for_backward(*saved, out)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        q, k, v, sums, weights, out = ctx.saved_tensors
        _, channels, tokens = out.shape
        width = channels // ctx.heads
        g = grad.to(q.dtype).reshape(-1, width, tokens)
        if sums is not None:
            g = g / sums
        wide = torch.cat([g, -(g * out.view(g.shape)).sum(1, keepdim=True)], 1)
        dq, dk, dv = q.new_empty(3, *q.shape)
        portion = _portion(tokens, q)
        slopes = q.new_empty(min(portion, len(q)), tokens, tokens)
        for start in range(0, len(q), portion):
            piece = slice(start, min(start + portion, len(q)))
            p, ds = weights[piece], slopes[: piece.stop - start]
            torch.bmm(v[piece].transpose(1, 2), wide[piece], out=ds)
            ds.mul_(p)
            torch.bmm(k[piece], ds, out=dq[piece])
            torch.bmm(q[piece], ds.transpose(1, 2), out=dk[piece])
            torch.bmm(g[piece], p.transpose(1, 2), out=dv[piece])
        # q was scaled, so dk is right and dq is not yet.
        parts = [part.view(out.shape) for part in (dq.mul_(width**-0.5), dk, dv)]
        return torch.cat(parts, 1), None


def _portion(tokens: int, like: Tensor) -> int:
    return max(1, _CACHE // (tokens * tokens * like.element_size()))


@torch.no_grad()
def _portions(qkv: Tensor, heads: int, *, keep: bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The attention (B, C, T), and what its derivative needs if ``keep``."""
    batch, channels, tokens = qkv.shape
    q, k, v = qkv.view(batch, 3, heads, -1, tokens).unbind(1)
    width = q.shape[2]
    q = (q * width**-0.5).flatten(0, 1)
    k = k.flatten(0, 1)
    # Cauchy and Schwarz: no logit is larger than this.
    largest = (q.square().sum(1).amax() * k.square().sum(1).amax()).sqrt()
    plain = bool(largest < _SAFE_LOGIT)
    v = torch.cat([v, v.new_ones(batch, heads, 1, tokens)], 2).flatten(0, 1)
    portion = _portion(tokens, q)
    weights = q.new_empty(len(q) if keep else min(portion, len(q)), tokens, tokens)
    out = q.new_empty(len(q), width + 1, tokens)
    for start in range(0, len(q), portion):
        piece = slice(start, min(start + portion, len(q)))
        p = weights[piece] if keep else weights[: piece.stop - start]
        torch.bmm(k[piece].transpose(1, 2), q[piece], out=p)
        if plain:
            p.exp_()
        else:
            torch.softmax(p, 1, out=p)
        torch.bmm(v[piece], p, out=out[piece])
    sums = out[:, width:] if plain else None
    result = out[:, :width] / sums if plain else out[:, :width]
    return result.reshape(batch, channels // 3, tokens), (q, k, v, sums, weights) if keep else ()
