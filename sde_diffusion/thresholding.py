"""Thresholding of the expected data, as a change of the score: it works with every sampler."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand

KINDS = ("static", "dynamic")


@dataclass(frozen=True)
class Thresholded:
    """The score whose expected data ``D = (x + sigma^2 score) / alpha`` stay within ``[-bound, bound]``.

    * ``"static"``: ``D`` is clipped.
    * ``"dynamic"``: ``D`` is clipped to ``[-c, c]`` and scaled by ``bound / c``, where ``c`` is the quantile of
      ``|D|`` over a sample's values, at least ``bound`` (Saharia et al. 2022, "Imagen", section 2.3).

    Both act on each sample alone. Where ``D`` is within the bounds the score is what it was, to the last digit.

    Args:
        score: ``(x, t) -> grad log p_t(x)``.
        sde: its process.
        kind: ``"static"`` or ``"dynamic"``.
        bound: the largest absolute value of the data.
        quantile: of ``"dynamic"``.
    """

    score: Score
    sde: SDE
    kind: str = "static"
    bound: float = 1.0
    quantile: float = 0.995

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("thresholding", self.kind, KINDS)
        if not 0 < self.bound < float("inf"):
            raise ValueError(f"the bound must be positive, got {self.bound!r}")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"the quantile must lie in (0, 1], got {self.quantile!r}")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, (B, *D)."""
        score = self.score(x, t)
        t = batched_time(t, x).double()
        data = self.sde.posterior_mean(x, score, t)
        change = self._within(data) - data
        return score + expand(self.sde.alpha(t) / self.sde.variance(t), score) * change

    def _within(self, data: Tensor) -> Tensor:
        if self.kind == "static":
            return data.clamp(-self.bound, self.bound)
        # A sample at a time: torch.quantile takes at most 2^24 values.
        sizes = [torch.quantile(sample.abs().flatten(), self.quantile) for sample in data]
        largest = torch.stack(sizes).clamp_min(self.bound)
        c = expand(largest, data)
        return torch.where(c > self.bound, data.clamp(-c, c) * (self.bound / c), data.clamp(-c, c))
