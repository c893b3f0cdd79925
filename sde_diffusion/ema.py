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
    model, in evaluation mode and without gradients. Where a model keeps its tensors is looked up at its first update,
    as that takes as long as the averaging; tensors may be replaced afterwards, layers not.

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
        averaged, current = self._pairs.parameters()
        if not averaged:
            pass
        elif self.updates:
            torch._foreach_lerp_(averaged, current, 1.0 - ema_decay(self.decay, self.updates))
        else:
            torch._foreach_copy_(averaged, current)
        buffers, current = self._pairs.buffers()
        if buffers:
            torch._foreach_copy_(buffers, current)
        self.n_averaged += 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pairs": None}  # copies follow a model of their own


_Place = tuple[dict[str, Any], str]
"""Where a module keeps a tensor, which may be replaced there."""


class _Pairs(NamedTuple):
    """Where an averaged model and the one that it follows keep their tensors."""

    model: nn.Module
    places: tuple[list[_Place], list[_Place]]
    buffer_places: tuple[list[_Place], list[_Place]]

    @staticmethod
    def of(averaged: nn.Module, model: nn.Module) -> _Pairs:
        pairs = _Pairs(
            model,
            (_places(averaged, "_parameters"), _places(model, "_parameters")),
            (_places(averaged, "_buffers"), _places(model, "_buffers")),
        )
        for mine, theirs in (pairs.places, pairs.buffer_places):
            if [d[name].shape for d, name in mine] != [d[name].shape for d, name in theirs]:
                raise ValueError("the model has other parameters or buffers than its average")
        return pairs

    def parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the average, and those of the model on the same devices."""
        return _tensors(*self.places)

    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Likewise."""
        return _tensors(*self.buffer_places)


def _places(module: nn.Module, kind: str) -> list[_Place]:
    """Of a module's parameters or buffers, each once."""
    found: dict[int, _Place] = {}
    for part in module.modules():
        tensors = getattr(part, kind)
        for name, tensor in tensors.items():
            if tensor is not None:
                found.setdefault(id(tensor), (tensors, name))
    return list(found.values())


def _tensors(mine: list[_Place], theirs: list[_Place]) -> tuple[list[Tensor], list[Tensor]]:
    averaged, current = ([place[name] for place, name in places] for places in (mine, theirs))
    pairs = zip(averaged, current, strict=True)
    return averaged, [b if a.device == b.device else b.to(a.device) for a, b in pairs]
