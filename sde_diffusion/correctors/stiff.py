"""Langevin steps that stay bounded where the score is steep: tamed and implicit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sde_diffusion.correctors.langevin import check_without_acceptance, langevin_step
from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps
from sde_diffusion.correctors.step_sizes import SigmaScaled, StepSize
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand, squared_norm


@dataclass(frozen=True)
class TamedLangevin(Kernel):
    """``x <- x + eta score / (1 + eta ||score|| / (sigma sqrt(D))) + sqrt(2 eta) z``: tamed Langevin steps.

    (Brosse, Durmus, Moulines and Sabanis 2019, "The tamed unadjusted Langevin algorithm"; lengths here are in
    units of the noise, ``sigma sqrt(D)``, which a drift never exceeds.) Bias of order ``eta``; no score is
    too steep.

    Args:
        step_size: ``eta``.
        steps: how often the step is applied at each time.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.05))
    steps: int = 1

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step, one evaluation."""
        noise, gradient = draw(), score(x, t)
        eta = size(gradient, noise)
        unit = sde.variance(batched_time(t, x)).to(x.dtype) * x[0].numel()
        length = (squared_norm(gradient) / unit).sqrt()
        tamed = gradient / expand(1 + eta.to(x.device, x.dtype) * length, x)
        return Advance(langevin_step(x, tamed, noise, eta), eta, gradient, noise)


@dataclass(frozen=True)
class ImplicitLangevin(Kernel):
    """``x' = x + eta [(1 - theta) score(x) + theta score(x')] + sqrt(2 eta) z``, the theta method.

    (Casella, Roberts and Stramer 2011, "Stability of partially implicit Langevin schemes".) With ``theta =
    1/2`` the bias is of order ``eta^2``, and 0 for Gaussians, whatever the step; from there on every step is
    stable. The equation is solved by ``iterations`` of the simplified Newton method whose Jacobian is that of
    the steepest score there can be, ``-I / sigma^2``: each an evaluation, and a contraction where the density
    is log-concave.

    Args:
        step_size: ``eta``.
        steps: how often the step is applied at each time.
        theta: from 0 (which is SGLD) to 1.
        iterations: evaluations beside the one at ``x``; 0 only with ``theta = 0``.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.2))
    steps: int = 1
    theta: float = 0.5
    iterations: int = 2

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)
        if not 0 <= self.theta <= 1:
            raise ValueError(f"theta must lie between 0 and 1, got {self.theta!r}")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"the number of iterations must be an integer >= 0, got {self.iterations!r}")
        if self.theta > 0 and self.iterations == 0:
            raise ValueError(f"theta = {self.theta} needs at least 1 iteration, got 0")

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step, ``1 + iterations`` evaluations."""
        noise, gradient = draw(), score(x, t)
        eta = size(gradient, noise)
        step = expand(eta, x)
        slope = 1 + self.theta * step / expand(sde.variance(batched_time(t, x)), x)
        fixed = x + (1 - self.theta) * step * gradient + (2 * step).sqrt() * noise
        end = x + (step * gradient + (2 * step).sqrt() * noise) / slope
        if self.theta == 0:
            return Advance(fixed, eta, gradient, noise)
        for _ in range(self.iterations):
            end = end - (end - fixed - self.theta * step * score(end, t)) / slope
        return Advance(end, eta, gradient, noise)
