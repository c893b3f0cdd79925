"""Correctors: Markov chain steps that leave ``p_t`` nearly invariant, pure in the noise.

Every corrector is a frozen dataclass with ``steps`` (how often the sampling loop applies it at each time) and
``step(sde, score, x, t, noise) -> x``. Both correctors here are unadjusted Langevin steps

    x <- x + eta score(x, t) + sqrt(2 eta) z,

and differ in the step size ``eta``, which belongs to each sample and never to its batch (unless asked for
by name).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand, squared_norm


class Corrector(Protocol):
    """A Markov chain step at a fixed time."""

    @property
    def steps(self) -> int:
        """How often the step is applied at each time."""
        ...

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state of the chain at time ``t``."""
        ...


def langevin_step(x: Tensor, gradient: Tensor, noise: Tensor, eta: Tensor) -> Tensor:
    """``x + eta gradient + sqrt(2 eta) noise``, with ``eta`` of shape () or (B,)."""
    return x + expand(eta, x) * gradient + expand((2 * eta).sqrt(), x) * noise


def _check(snr: float, steps: int) -> None:
    if not 0 < snr < float("inf"):
        raise ValueError(f"the signal-to-noise ratio must be positive, got {snr!r}")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a corrector needs an integer number of steps >= 1, got {steps!r}")


@dataclass(frozen=True)
class Langevin:
    """Langevin steps whose size follows the signal-to-noise rule, ``eta = 2 (snr ||z|| / ||score||)^2``.

    (Song et al. 2021, algorithms 4 and 5.) Three departures from the original, all undone by
    :meth:`original`:

    * The norms are those of one sample. The authors' code averages them over the batch (``norm="batch"``),
      which makes a sample depend on its batch-mates.
    * The norms are shrunk towards those of pure noise, as if the data had ``shrinkage`` more dimensions in
      which the score is all noise, ``-z / sigma``:  ``eta = 2 snr^2 variance (||z||^2 + k) / (variance
      ||score||^2 + k)``. A step size that depends on the state bends the stationary density from ``p``
      towards ``p / eta``. For images the norms hardly vary and nothing changes; in few dimensions the plain
      rule empties the modes, where ``||score||`` goes to 0 and ``eta`` grows without bound.
    * ``eta <= cap * variance(t)``, beyond which an unadjusted step is no longer a small one.

    The authors' factor ``alpha_i = 1 - beta_i`` for VP belongs to a chain of given length, and is 1 in
    continuous time.

    Args:
        snr: the signal-to-noise ratio of a step.
        steps: how often the step is applied at each time.
        norm: ``"sample"`` or ``"batch"``.
        shrinkage: the number ``k`` of dimensions above; 0 for the plain rule.
        cap: the largest step in units of ``variance(t)``, or None.
    """

    snr: float = 0.16
    steps: int = 1
    norm: str = "sample"
    shrinkage: float = 256.0
    cap: float | None = 1.0

    def __post_init__(self) -> None:
        _check(self.snr, self.steps)
        if self.norm not in ("sample", "batch"):
            raise unknown_name("norm", self.norm, ("sample", "batch"))
        if not 0 <= self.shrinkage < float("inf"):
            raise ValueError(f"the shrinkage must be at least 0, got {self.shrinkage!r}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"the cap must be positive, or None for no cap, got {self.cap!r}")

    @classmethod
    def original(cls, snr: float = 0.16, steps: int = 1) -> Langevin:
        """The rule of the authors' code: norms averaged over the batch, neither shrunk nor capped."""
        return cls(snr, steps, norm="batch", shrinkage=0.0, cap=None)

    def step_size(self, sde: SDE, gradient: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``eta`` of each sample, (B,)."""
        signal, disturbance = squared_norm(gradient), squared_norm(noise)
        if self.norm == "batch":
            signal = signal.sqrt().mean().square().expand_as(signal)
            disturbance = disturbance.sqrt().mean().square().expand_as(disturbance)
        variance = sde.variance(batched_time(t, gradient)).to(signal.dtype)
        shrinkage = self.shrinkage / variance
        eta = 2 * self.snr**2 * (disturbance + self.shrinkage) / (signal + shrinkage)
        return eta if self.cap is None else torch.minimum(eta, self.cap * variance)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state of the chain at time ``t``."""
        gradient = score(x, t)
        return langevin_step(x, gradient, noise, self.step_size(sde, gradient, t, noise))


@dataclass(frozen=True)
class AnnealedLangevin:
    """Langevin steps of size ``eta = 2 snr^2 variance(t)``, annealed with the noise level (ALD).

    Song and Ermon (2019), algorithm 1; as in Song et al. (2021), appendix G, the step is set by the
    signal-to-noise ratio. It is the same for every sample and depends on no norm.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        _check(self.snr, self.steps)

    def step_size(self, sde: SDE, t: Tensor) -> Tensor:
        """``eta = 2 snr^2 variance(t)``, of the shape of ``t``."""
        return 2 * self.snr**2 * sde.variance(t)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state of the chain at time ``t``."""
        return langevin_step(x, score(x, t), noise, self.step_size(sde, t))
