"""Exponential moving average of the weights, with warm-up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["EMA", "ema_decay"]


def ema_decay(decay: float, updates: int) -> float:
    """``min(decay, (1 + k) / (10 + k))`` after ``k`` updates: early averages forget the random initial
    weights quickly."""
    return min(decay, (1 + updates) / (10 + updates))


class EMA(AveragedModel):
    """A copy of a model whose parameters follow ``ema <- d ema + (1 - d) weights``, ``d = ema_decay(decay,
    k)``.

    The first update copies the weights; buffers are copied at every update. ``.module`` is the averaged
    model, in evaluation mode and without gradients.

    Args:
        model: the model to follow; it is copied.
        decay: the largest decay, in [0, 1).

    Raises:
        ValueError: a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema decay must be in [0, 1), got {decay!r}")
        self.decay = decay
        super().__init__(model, multi_avg_fn=self._average)
        self.requires_grad_(False)
        self.eval()
        # The count lives on the CPU, so that reading it never waits for an accelerator.
        self.n_averaged = torch.zeros((), dtype=torch.long)

    @property
    def updates(self) -> int:
        """How many updates there have been."""
        return int(self.n_averaged)

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        torch._foreach_lerp_(averaged, current, 1.0 - ema_decay(self.decay, self.updates))
