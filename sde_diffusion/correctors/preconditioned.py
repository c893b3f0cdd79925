"""Langevin steps in coordinates of their own scale: preconditioned SGLD."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.correctors.langevin import check_without_acceptance
from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps
from sde_diffusion.correctors.step_sizes import SigmaScaled, StepSize, check_positive
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand


class _Squares(NamedTuple):
    """The running mean of the squared score in units of the noise, (B, *D), and the number of steps."""

    mean: Tensor
    seen: int


@dataclass(frozen=True)
class PreconditionedSGLD(Kernel):
    """``x <- x + eta G score + sqrt(2 eta G) z`` with ``G = (1 + damping) / (sqrt(V) + damping)`` for each
    coordinate.

    ``V <- decay V + (1 - decay) (sigma score)^2`` starts at 1, its value for a score that is all noise (Li et
    al. 2016, "Preconditioned SGLD", algorithm 1, RMSprop; here ``G`` has no units, and is 1 where the score
    is all noise). As there, the term ``Gamma = div G`` is left out. That is harmless while ``V`` averages
    over much more than the chain's memory, or no longer changes; with a fast average and a small step ``G``
    follows the state, which bends the stationary density towards ``p / G``, whatever the step size. ``adapt``
    ends the averaging after so many steps; from then on the bias is of order ``eta``, as for SGLD.

    Args:
        step_size: of coordinates with ``G = 1``.
        steps: how often the step is applied at each time.
        decay: of the running mean, in [0, 1).
        damping: keeps ``G`` below ``(1 + damping) / damping``.
        adapt: after how many steps of a run ``V`` is kept; None for never.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.05))
    steps: int = 1
    decay: float = 0.99
    damping: float = 0.1
    adapt: int | None = None

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)
        if not 0 <= self.decay < 1:
            raise ValueError(f"the decay must lie in [0, 1), got {self.decay!r}")
        check_positive("the damping", self.damping)
        if self.adapt is not None and (not isinstance(self.adapt, int) or self.adapt < 0):
            raise ValueError(
                f"adapt must be an integer number of steps >= 0, or None for ever, got {self.adapt!r}"
            )

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step, one evaluation."""
        noise, gradient = draw(), score(x, t)
        squares = _Squares(torch.ones_like(x), 0) if memory is None else memory
        mean = squares.mean
        if squares.seen < (math.inf if self.adapt is None else self.adapt):
            new = expand(sde.variance(batched_time(t, x)), x) * gradient.square()
            mean = self.decay * mean + (1 - self.decay) * new
        scale = (1 + self.damping) / (mean.sqrt() + self.damping)
        eta = size(gradient, noise)
        eta_x = expand(eta, x) * scale
        return Advance(
            x + eta_x * gradient + (2 * eta_x).sqrt() * noise,
            eta,
            gradient,
            noise,
            memory=_Squares(mean, squares.seen + 1),
        )
