"""Chains that accept or reject, and so have exactly ``p_t`` for their law: MALA and Barker's proposal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sde_diffusion.correctors.energy import LogRatio
from sde_diffusion.correctors.langevin import langevin_step
from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps, uniforms
from sde_diffusion.correctors.step_sizes import SigmaScaled, StepSize
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand, squared_norm


class _Known(NamedTuple):
    """Where the last step ended, and the score there."""

    x: Tensor
    t: Tensor
    gradient: Tensor

    @staticmethod
    def gradient_at(memory: _Known | None, score: Score, x: Tensor, t: Tensor) -> Tensor:
        """The score at ``x``, asked for only where the chain was moved since."""
        if memory is not None and memory.x is x and memory.t is t:
            return memory.gradient
        return score(x, t)


def _check(kernel: Kernel, policy: StepSize, steps: int) -> None:
    check_steps(steps)
    if policy.follows_state:
        raise ValueError(
            f"{type(kernel).__name__} needs a step size that does not depend on the state, for its acceptance to be "
            f"right; {type(policy).__name__} does. Use SigmaScaled, Fixed or DualAveraging"
        )


def _settle(
    x: Tensor,
    proposal: Tensor,
    log_acceptance: Tensor,
    draw: NoiseSource,
    t: Tensor,
    here: Tensor,
    there: Tensor,
) -> tuple[Tensor, Tensor, _Known]:
    """The state after accepting or not, the probability of acceptance, and what is known there."""
    # A proposal at which the density is not a number is a bad one.
    acceptance = torch.nan_to_num(log_acceptance.double(), nan=-torch.inf).clamp_max(0).exp()
    accepted = expand(uniforms(draw().flatten(1)[:, 0]) < acceptance, x).bool()
    after = torch.where(accepted, proposal, x)
    return after, acceptance.to(x.dtype), _Known(after, t, torch.where(accepted, there, here))


@dataclass(frozen=True)
class MALA(Kernel):
    """A Langevin step ``y = x + eta score(x) + sqrt(2 eta) z`` that is accepted with the probability ``min(1,
    p(y) q(x | y) / (p(x) q(y | x)))``: no bias (Roberts and Tweedie 1996).

    The score at the state that results serves the next step, so that a step costs one evaluation, and one
    more wherever something else has moved ``x``.

    Args:
        step_size: may not depend on the state: ``SigmaScaled``, ``Fixed``, ``DualAveraging``.
        steps: how often the step is applied at each time.
        energy: where ``log p(y) - log p(x)`` comes from, see :class:`~sde_diffusion.correctors.energy.LogRatio`:
            ``"exact"`` (the score's own ``log_prob(x, t)``; refused for a score that has none) or ``"path"`` (the
            integral of the score from x to y).
        points: of the path, its ends included.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.1))
    steps: int = 1
    energy: str = "path"
    points: int = 2

    def __post_init__(self) -> None:
        _check(self, self.step_size, self.steps)
        LogRatio(self.energy, self.points)

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step; two draws, of which the second decides on acceptance."""
        log_ratio = LogRatio(self.energy, self.points).of(score, type(self).__name__)
        noise, here = draw(), _Known.gradient_at(memory, score, x, t)
        eta = size(here, noise)
        proposal = langevin_step(x, here, noise, eta)
        there = score(proposal, t)
        back = (x - proposal - expand(eta, x) * there) / expand((2 * eta).sqrt(), x)
        log_acceptance = log_ratio(x, proposal, t, here, there)
        log_acceptance = log_acceptance + (squared_norm(noise) - squared_norm(back)) / 2
        after, acceptance, known = _settle(x, proposal, log_acceptance, draw, t, here, there)
        return Advance(after, eta, here, noise, acceptance, known)


@dataclass(frozen=True)
class Barker(Kernel):
    """``y = x + b w`` with ``w = sqrt(2 eta) z`` and for each coordinate ``b = 1`` with the probability ``1 / (1 +
    exp(-w score))``, else -1; accepted so that there is no bias (Livingstone and Zanella 2022, algorithm 1).

    To first order in ``eta`` a Langevin step, but the length of a step does not grow with the score: it stays
    sound for steps far too large for the narrowest direction, where MALA accepts nothing.

    Args:
        step_size: may not depend on the state, unless ``adjusted`` is False.
        steps: how often the step is applied at each time.
        adjusted: whether to accept and reject; without, the bias is of order ``eta`` and a step costs one evaluation.
        energy, points: as for :class:`MALA`.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.1))
    steps: int = 1
    adjusted: bool = True
    energy: str = "path"
    points: int = 2

    def __post_init__(self) -> None:
        if self.adjusted:
            _check(self, self.step_size, self.steps)
        check_steps(self.steps)
        if not self.adjusted and self.step_size.needs_acceptance:
            raise ValueError(
                "Barker(adjusted=False) accepts every step: a step size cannot adapt to its acceptance"
            )
        LogRatio(self.energy, self.points)

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step; three draws: lengths, directions, acceptance."""
        noise, here = draw(), _Known.gradient_at(memory, score, x, t)
        eta = size(here, noise)
        length = expand((2 * eta).sqrt(), x) * noise
        forward = uniforms(draw()) < torch.sigmoid((length * here).double())
        move = torch.where(forward, length, -length)
        proposal = x + move
        if not self.adjusted:
            return Advance(proposal, eta, here, noise)
        log_ratio = LogRatio(self.energy, self.points).of(score, type(self).__name__)
        there = score(proposal, t)
        # q(y | x) is symmetric but for the probabilities of the directions taken.
        log_q = logsigmoid((-move * there).double()) - logsigmoid((move * here).double())
        log_acceptance = log_ratio(x, proposal, t, here, there) + log_q.flatten(1).sum(1)
        after, acceptance, known = _settle(x, proposal, log_acceptance, draw, t, here, there)
        return Advance(after, eta, here, noise, acceptance, known)
