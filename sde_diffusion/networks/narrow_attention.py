"""Attention in heads of 8 channels, as diffusers' networks have by default, for CPUs: ``narrow_attention.c``.

So narrow, most of the time of attention goes into writing and reading the weights, tokens x tokens for each head.
Here they are never written. The products are those of the processor's matrix tiles (AMX) or of its pairs in bfloat16
(AVX-512 BF16), where it has them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.networks.attention import plain_attention
from sde_diffusion.networks.channels_last import differentiated, in_memory, pointers, watched
from sde_diffusion.networks.native import load_native

WIDTH = 8
_SOURCE = Path(__file__).with_suffix(".c")


@lru_cache
def _library() -> ctypes.CDLL | None:
    return load_native(_SOURCE, narrow_attention="PPPNNNI", narrow_attention_backward="PPPPPNNNI")


def is_narrow(qkv: Tensor, heads: int) -> bool:
    """Whether :func:`narrow_attention` is for ``qkv``, (B, T, 3 C): bfloat16 on a CPU, heads of 8 channels, a C
    compiler, and no transform of ``torch.func``, forward-mode derivative or program of torch's compiler at work."""
    fitting = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[2] == 3 * heads * WIDTH
    if not fitting or not qkv.numel() or watched(qkv):
        return False
    return _library() is not None


def narrow_attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(8)) v for ``qkv`` (B, T, 3 C), channels in the order (q/k/v, head, channel) -> (B, T, C).

    For which :func:`is_narrow` holds. Computed in float32, but that with tiles or pairs the weights, and in the
    derivative their slopes, are rounded to bfloat16 before they are summed; it has all derivatives in reverse mode.
    """
    qkv = qkv.contiguous()
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _NarrowAttention.apply(qkv, heads)
    return _forward(qkv, heads, keep=False)[0]


class _NarrowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        out, logs = _forward(qkv, heads, keep=True)
        ctx.save_for_backward(qkv, out, logs)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        qkv, out, logs = ctx.saved_tensors
        if torch.is_grad_enabled() or not in_memory(grad):
            return differentiated(lambda x: written_out(x, ctx.heads), [qkv], grad)[0], None
        qkv, out, logs, grad = (part.contiguous() for part in (qkv, out, logs, grad.to(qkv.dtype)))
        of_qkv = torch.empty_like(qkv)
        failed = _library().narrow_attention_backward(  # type: ignore[union-attr]
            *pointers(qkv, out, grad, logs, of_qkv),
            *qkv.shape[:2], ctx.heads, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the derivative of attention")
        return of_qkv, None


def _forward(qkv: Tensor, heads: int, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The result, and the logarithms (B, heads, T) of the sums of exponentials if ``keep``."""
    batch, tokens, channels = qkv.shape
    out = qkv.new_empty(batch, tokens, channels // 3)
    logs = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device) if keep else None
    failed = _library().narrow_attention(  # type: ignore[union-attr]
        *pointers(qkv, out, logs), batch, tokens, heads, torch.get_num_threads()
    )
    if failed:
        raise MemoryError("no memory for attention")
    return out, logs


def written_out(qkv: Tensor, heads: int) -> Tensor:
    """:func:`narrow_attention` by torch's operations."""
    q, k, v = qkv.float().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return plain_attention(q, k, v).transpose(1, 2).flatten(2).to(qkv.dtype)
