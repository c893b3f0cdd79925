"""What a predictor is: one step of the reverse process from time ``t`` to ``s < t``, pure in the noise.

A predictor is a frozen dataclass with ``step(sde, score, x, t, s, noise) -> x_s``; ``x`` and ``noise`` have shape
(B, *D), ``t`` and ``s`` shape () or (B,). It may have, beside that,

* ``stochastic = False``, where it never uses its noise, so that none is drawn for it;
* ``start(sde, times, draw)``, where one step needs to know of the others: it is called once at the beginning of
  every run of the sampling loop, with the grid of times and a source of further noise, and returns the object
  whose ``step`` the run then calls. That object holds what a run remembers (earlier evaluations, tables of
  coefficients); the predictor itself, which is a configuration, stays as it is and serves any number of runs.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE


class Predictor(Protocol):
    """One step of the reverse process."""

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s < t`` given the state ``x`` at ``t``."""
        ...


@runtime_checkable
class StartsRuns(Protocol):
    """A predictor whose runs have a memory."""

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """The predictor of one run along the falling ``times``, (n + 1,) float64; ``draw()`` gives noise of the shape
        of the state."""
        ...


def start_run(predictor: Predictor, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
    """What the sampling loop steps with: the predictor, or what it starts for one run."""
    return predictor.start(sde, times, draw) if isinstance(predictor, StartsRuns) else predictor


def is_stochastic(predictor: Predictor) -> bool:
    """Whether a predictor uses the noise that its steps are given."""
    return bool(getattr(predictor, "stochastic", True))
