"""Langevin dynamics with a velocity: underdamped (BAOAB) and SGHMC."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from sde_diffusion.correctors.langevin import check_without_acceptance
from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps
from sde_diffusion.correctors.step_sizes import SigmaScaled, StepSize
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand


class Kinetic(NamedTuple):
    """What a chain with a velocity remembers.

    Attributes:
        velocity: (B, *D), standard normal in equilibrium.
        x, t, gradient: where the score is known, if it is: the end of the last step.
    """

    velocity: Tensor
    x: Tensor | None = None
    t: Tensor | None = None
    gradient: Tensor | None = None

    def gradient_at(self, score: Score, x: Tensor, t: Tensor) -> Tensor:
        """The score at ``x``, asked for only where the chain was moved since."""
        if x is self.x and t is self.t and self.gradient is not None:
            return self.gradient
        return score(x, t)


@dataclass(frozen=True)
class Underdamped(Kernel):
    """``dx = v dt``, ``dv = score dt - gamma v dt + sqrt(2 gamma) dw`` by BAOAB, a step of length ``h =
    sqrt(2 eta)``.

    Half a kick ``v += h/2 score``, half a drift ``x += h/2 v``, ``v <- c v + sqrt(1 - c^2) z`` with ``c =
    exp(-gamma h)``, half a drift, half a kick (Leimkuhler and Matthews 2013, "Robust and efficient
    configurational molecular sampling"). The stationary law of ``x`` is exact for Gaussians, and has a bias
    of order ``h^2`` otherwise, as long as ``h < 2 std`` of the narrowest direction. The score at the end of a
    step serves the next, so that a step costs one evaluation, and one more wherever something else has moved
    ``x``.

    For ``friction = inf`` the velocity is new in every step, and the chain is ``x <- x + eta score + sqrt(2 eta)
    (z_k + z_{k-1}) / 2``: overdamped Langevin dynamics, in the form of Leimkuhler and Matthews.

    Args:
        step_size: ``eta = h^2 / 2``.
        steps: how often the step is applied at each time.
        friction: ``gamma sigma(t)``, the friction in units of the smallest scale that ``p_t`` can have; inf allowed.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.05))
    steps: int = 1
    friction: float = 1.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)
        if not self.friction > 0:
            raise ValueError(f"the friction must be positive, got {self.friction!r}")

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step; the first of a chain draws its velocity, too."""
        noise = draw()
        kinetic = Kinetic(draw()) if memory is None else memory
        gradient = kinetic.gradient_at(score, x, t)
        eta = size(gradient, noise)
        length = (2 * eta).sqrt()
        h = expand(length, x)
        keep = expand((-self.friction * length / sde.sigma(t).to(length.device)).exp(), x)
        kicked = kinetic.velocity + h / 2 * gradient
        middle = x + h / 2 * kicked
        mixed = keep * kicked + (1 - keep.square()).clamp_min(0).sqrt() * noise
        end = middle + h / 2 * mixed
        last = score(end, t)
        return Advance(end, eta, gradient, noise, memory=Kinetic(mixed + h / 2 * last, end, t, last))


@dataclass(frozen=True)
class SGHMC(Kernel):
    """``v <- (1 - a) v + eta score + sqrt(2 a eta) z``, ``x <- x + v``: stochastic gradient Hamiltonian Monte Carlo.

    (Chen, Fox and Guestrin 2014, eq. 15, with no estimate of the gradient's noise.) Euler's discretization of
    the underdamped dynamics, velocity first, with a time step ``sqrt(eta)``; its bias in x is of order
    ``eta``. One evaluation a step. With ``a = 1`` the velocity is forgotten, and the chain is SGLD.

    Args:
        step_size: ``eta``.
        steps: how often the step is applied at each time.
        friction: ``a`` in (0, 1].
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.02))
    steps: int = 1
    friction: float = 0.3

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)
        if not 0 < self.friction <= 1:
            raise ValueError(f"the friction must lie in (0, 1], got {self.friction!r}")

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step; the first of a chain with friction below 1 draws its velocity, too."""
        noise, gradient = draw(), score(x, t)
        eta = size(gradient, noise)
        scale = expand(eta.sqrt(), x)
        # The velocity is remembered in units of sqrt(eta), its standard deviation: steps may change in size.
        new = scale * gradient + math.sqrt(2 * self.friction) * noise
        if self.friction < 1:
            new = new + (1 - self.friction) * (draw() if memory is None else memory.velocity)
        return Advance(x + scale * new, eta, gradient, noise, memory=Kinetic(new))
