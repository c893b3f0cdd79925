"""Shapes and times: the few tensor helpers that everything else shares."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Time: TypeAlias = Tensor | float


def as_time(t: Time) -> Tensor:
    """A time as a float32 or float64 tensor; Python numbers become float64.

    Raises:
        TypeError: for a tensor of another type (a time in half precision is wrong by up to 0.4%).
    """
    if not isinstance(t, Tensor):
        return torch.tensor(float(t), dtype=torch.float64)
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"times must be float32 or float64, got {t.dtype}")
    return t


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """``coefficient`` of shape () or (B,), shaped and typed to multiply ``like`` of shape (B, *D)."""
    coefficient = coefficient.to(dtype=like.dtype, device=like.device)
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim != 1 or coefficient.shape[0] not in (1, like.shape[0]):
        raise ValueError(
            f"per-sample coefficients must have shape () or ({like.shape[0]},), got {tuple(coefficient.shape)}"
        )
    return coefficient.reshape(-1, *(1,) * (like.ndim - 1))


def squared_norm(x: Tensor) -> Tensor:
    """``||x||^2`` of each sample, (B, *D) -> (B,)."""
    return x.flatten(1).square().sum(1)


def batched_time(t: Time, x: Tensor) -> Tensor:
    """``t`` of shape () or (B,) as one time for each sample of ``x``, (B,), on its device."""
    t = as_time(t).to(x.device)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"times must have shape () or ({x.shape[0]},), got {tuple(t.shape)}")
    return t.expand(x.shape[0])
