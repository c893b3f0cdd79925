"""Exponential moving average of the weights, with warm-up."""

from __future__ import annotations

from typing import Any, NamedTuple

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
    model, in evaluation mode and without gradients. Which tensors there are is looked up once for each model that is
    followed: of a network with many layers, that takes as long as the averaging.

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
        super().__init__(model)
        self.requires_grad_(False)
        self.eval()
        # The count lives on the CPU, so that reading it never waits for an accelerator.
        self.n_averaged = torch.zeros((), dtype=torch.long)
        self._pairs: _Pairs | None = None

    @property
    def updates(self) -> int:
        """How many updates there have been."""
        return int(self.n_averaged)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """One update.

        Raises:
            ValueError: a model with other parameters or buffers than the averaged one.
        """
        if self._pairs is None or self._pairs.model is not model:
            self._pairs = _Pairs.of(self.module, model)
        _, averaged, current, buffers, current_buffers = self._pairs
        if self.updates:
            torch._foreach_lerp_(averaged, current, 1.0 - ema_decay(self.decay, self.updates))
        else:
            torch._foreach_copy_(averaged, current)
        if buffers:
            torch._foreach_copy_(buffers, current_buffers)
        self.n_averaged += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pairs": None}  # copies follow a model of their own


class _Pairs(NamedTuple):
    """The tensors of an averaged model and of the one that it follows."""

    model: nn.Module
    averaged: list[Tensor]
    current: list[Tensor]
    buffers: list[Tensor]
    current_buffers: list[Tensor]

    @staticmethod
    def of(averaged: nn.Module, model: nn.Module) -> _Pairs:
        found: list[list[Tensor]] = []
        for name in ("parameters", "buffers"):
            found += [list(getattr(part, name)()) for part in (averaged, model)]
        for mine, theirs in (found[:2], found[2:]):
            if [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
                raise ValueError("the model has other parameters or buffers than its average")
        return _Pairs(model, *found)
