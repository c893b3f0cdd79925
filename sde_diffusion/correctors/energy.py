"""Differences of log-density between two states: what an acceptance needs, and a score does not say at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.score import Score

Difference: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(x, y, t, score at x, score at y) -> log p_t(y) - log p_t(x)``, (B,)."""

# Gauss and Lobatto's rules on [0, 1], which include the ends: inner nodes, their weights, the weight of an end.
_LOBATTO: dict[int, tuple[tuple[float, ...], tuple[float, ...], float]] = {
    2: ((), (), 1 / 2),
    3: ((0.5,), (2 / 3,), 1 / 6),
    4: ((0.5 - math.sqrt(0.05), 0.5 + math.sqrt(0.05)), (5 / 12, 5 / 12), 1 / 12),
    5: (
        (0.5 - math.sqrt(3 / 28), 0.5, 0.5 + math.sqrt(3 / 28)),
        (49 / 180, 16 / 45, 49 / 180),
        1 / 20,
    ),
}


@dataclass(frozen=True)
class LogRatio:
    """Where ``log p_t(y) - log p_t(x)`` comes from.

    * ``"exact"``: the score's own ``log_prob(x, t)``, (B,) nats, as the exact scores of mixtures have it.
    * ``"path"``: ``int_0^1 score(x + a (y - x)) . (y - x) da`` by the rule of Gauss and Lobatto with so many
      points. The ends cost nothing more, for the score is known there; the error falls as the length of the
      step to the power ``2 points - 1``. Exact for Gaussians with two points. For a network, whose field is
      no gradient, the result depends on the path.
    """

    energy: str = "path"
    points: int = 2

    def __post_init__(self) -> None:
        if self.energy not in ("exact", "path"):
            raise unknown_name("energy", self.energy, ("exact", "path"))
        if self.points not in _LOBATTO:
            raise ValueError(f"the points of a path must be 2, 3, 4 or 5, got {self.points!r}")

    def of(self, score: Score, name: str) -> Difference:
        """The difference for one score.

        Raises:
            ValueError: ``"exact"`` of a score without a ``log_prob``.
        """
        if self.energy == "path":
            return lambda x, y, t, here, there: self._path(score, x, y, t, here, there)
        log_prob = getattr(score, "log_prob", None)
        if log_prob is None:
            raise ValueError(
                f"{name}(energy='exact') needs a score with an energy, log_prob(x, t), and this one has none: use "
                "energy='path', which integrates the score along the proposal"
            )
        return lambda x, y, t, here, there: log_prob(y, t) - log_prob(x, t)

    def _path(self, score: Score, x: Tensor, y: Tensor, t: Tensor, here: Tensor, there: Tensor) -> Tensor:
        nodes, weights, end = _LOBATTO[self.points]
        mean = end * (here + there)
        for node, weight in zip(nodes, weights, strict=True):
            mean = mean + weight * score(x + node * (y - x), t)
        return (mean * (y - x)).flatten(1).sum(1)
