"""Exponential solvers of the reverse SDE: SDE-DPM-Solver++ (Lu et al. 2022b) and SA-Solver (Xue et al. 2023).

The reverse process of stochasticity ``eta`` (:class:`~sde_diffusion.predictors.one_step.EulerMaruyama` has the same
family), written with the expected data ``D``, ``lambda = log(alpha / sigma)`` and the noise against the state, is
linear in the state but for ``D``. Between two times, with ``h = lambda_s - lambda_t``,

    x_s = (sigma_s / sigma_t) e^(-eta^2 h) x_t
          + (1 + eta^2) alpha_s int_{lambda_t}^{lambda_s} e^((1 + eta^2) (lambda - lambda_s)) D d lambda
          + sigma_s sqrt(1 - e^(-2 eta^2 h)) z

(Xue et al. 2023, proposition 4.2; Lu et al. 2022b, section 6, for ``eta = 1``), which for ``eta = 0`` is the exact
solution of the ODE in :mod:`sde_diffusion.predictors.exponential`. The noise is exact; a solver is a rule for
the integral of ``D``, and the rules are those of the ODE. But along a path of the SDE ``D`` is as rough as the path:
with noise all rules converge strongly at order 1, and their moments, from the second rule on, at order 2. A higher
order buys the part of the error that has nothing to do with the noise, which at few steps is most of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.dpm_solver import slope_weights
from sde_diffusion.predictors.exponential import DATA, Form, Level, next_step, per_step, polynomial_weights
from sde_diffusion.predictors.multistep import (
    Coefficients,
    MultistepRun,
    check_order,
    coefficients,
)
from sde_diffusion.predictors.one_step import check_stochasticity
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import first_order, step_between, take
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import as_time, expand


@dataclass(frozen=True)
class Amount:
    """``eta^2`` of a step, by where it starts: that of the solver where ``s_min <= rho <= s_max``, else 0."""

    stochasticity: float
    s_min: float = 0.0
    s_max: float = math.inf

    def __call__(self, start: Level) -> Tensor:
        """Of the shape of the level."""
        inside = (start.rho >= self.s_min) & (start.rho <= self.s_max)
        return self.stochasticity**2 * inside.double()

    def form(self) -> Form:
        """The integral of the module, without its noise."""
        return Form(
            output=DATA.output,
            # As a power of a quotient, and not of e: 0 in a step to the data, where h is infinite.
            keep=lambda start, end: end.sigma / start.sigma * (end.rho / start.rho).pow(self(start)),
            whole=lambda start, end: -end.alpha * torch.expm1((1 + self(start)) * (start.lam - end.lam)),
            density=lambda lam, start, end: (
                per_step((1 + self(start)) * end.alpha)
                * torch.exp(per_step(1 + self(start)) * (lam - per_step(end.lam)))
            ),
        )

    def on_noise(self, start: Level, end: Level) -> Tensor:
        """``sigma_s sqrt(1 - e^(-2 eta^2 h))``."""
        amount = self(start)
        spread = end.sigma * (-torch.expm1(2 * amount * (start.lam - end.lam))).sqrt()
        return torch.where(amount > 0, spread, torch.zeros_like(spread))


class NoisyRun:
    """A run of a multistep method with noise after each step."""

    def __init__(self, run: MultistepRun, on_noise: list[float]) -> None:
        self._run = run
        self._on_noise = iter(on_noise)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, the next time of the grid."""
        state = self._run.step(sde, score, x, t, s, noise)
        factor = next_step(self._on_noise)
        # In place: the method's own corrector must know the state again as the one that it gave.
        return state.add_(noise, alpha=factor) if factor else state


def _start(amount: Amount, table: Coefficients, sde: SDE, times: Tensor) -> Predictor:
    run = MultistepRun(table)
    if amount.stochasticity == 0:
        return run
    return NoisyRun(run, amount.on_noise(Level.at(sde, times[:-1]), Level.at(sde, times[1:])).tolist())


def _first_step(
    amount: Amount, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor
) -> Tensor:
    """The step of order 1, without history."""
    form = amount.form()
    stages = step_between(lambda _, start, end: first_order(form, start, end), form, sde, t, s)
    mean = take([stage.like(x) for stage in stages], score, x)
    factor = amount.on_noise(*(Level.at(sde, as_time(time)) for time in (t, s)))
    return mean + expand(factor, x) * noise if amount.stochasticity else mean


@dataclass(frozen=True)
class SDEDPMSolverPP:
    """SDE-DPM-Solver++ of order 1, 2 ("2M") or 3 ("3M"): DPM-Solver++ for the reverse SDE, one evaluation a step.

    Order 1 with ``stochasticity = 1`` is ancestral sampling, and with ``stochasticity = 0`` every order is
    :class:`~sde_diffusion.predictors.dpm_solver.DPMSolverPP` of that order; 2 is the authors' method, 3 integrates
    the parabola through three values of ``D`` exactly (k-diffusion's "3M" halves the term of the second derivative).
    The ``eta`` of k-diffusion is ``stochasticity^2``.

    Args:
        order: 1, 2 or 3, of the integral of ``D``; see the module for what it means with noise.
        stochasticity: ``eta >= 0``; 1 is the reverse SDE.
        lower_order_final: whether the last two steps have at most orders 2 and 1; None for "in runs of fewer than
            15 steps". Without it, grids whose last steps are long in lambda (uniform ones, to ``t_min``) end far off.

    Reference: Lu et al. (2022b), section 6.
    """

    order: int = 2
    stochasticity: float = 1.0
    lower_order_final: bool | None = True

    def __post_init__(self) -> None:
        check_order(self.order)
        check_stochasticity(self.stochasticity)

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.stochasticity > 0

    @property
    def convergence(self) -> int:
        """The order at which errors of moments fall; those of paths, where there is noise, fall at order 1."""
        return min(self.order, 2) if self.stochastic else self.order

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of a run along a grid, without the noise."""
        form = Amount(self.stochasticity).form()

        def rule(nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
            if len(nodes) == 2:
                whole = form.whole(start, end)
                return slope_weights(whole, whole, (nodes[1] - nodes[0]) / (end.lam - start.lam))
            return polynomial_weights(form, nodes, start, end)

        return coefficients(form, sde, times, self.order, rule, lower_order_final=self.lower_order_final)

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return _start(Amount(self.stochasticity), self.coefficients(sde, times), sde, times)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: the step of order 1."""
        return _first_step(Amount(self.stochasticity), sde, score, x, t, s, noise)


@dataclass(frozen=True)
class SASolver:
    """SA-Solver: the stochastic Adams method, a multistep predictor with a corrector, one evaluation a step.

    The polynomial in lambda through the last ``order`` values of ``D`` is integrated exactly (Adams and Bashforth);
    the evaluation at the end of a step, from which the next step starts, first corrects the state that it was made
    at by the polynomial through it and those before (Adams and Moulton), with the same noise. The evaluation is not
    repeated, and the last step is not corrected.

    Args:
        order: 1 to 4: the number of values in the predictor's polynomial; the corrector has one more.
        stochasticity: ``tau >= 0`` of the paper; 1 is the reverse SDE.
        s_min, s_max: noise is added in the steps that start where ``s_min <= sigma / alpha <= s_max`` only, and
            elsewhere they are those of the ODE. (The paper has 0.05 and 1 for CIFAR-10, 0.05 and 50 for ImageNet.)
        corrector: whether to correct.
        lower_order_final: whether the last two steps have at most orders 2 and 1; None for "in runs of fewer than
            15 steps". Without it, grids whose last steps are long in lambda (uniform ones, to ``t_min``) end far off.

    Reference: Xue et al. (2023), "SA-Solver: stochastic Adams solver for fast sampling of diffusion models",
    eq. 14 and 17, algorithm 1.
    """

    order: int = 3
    stochasticity: float = 1.0
    s_min: float = 0.0
    s_max: float = math.inf
    corrector: bool = True
    lower_order_final: bool | None = True

    def __post_init__(self) -> None:
        check_order(self.order, 4)
        check_stochasticity(self.stochasticity)
        if not 0 <= self.s_min < self.s_max:
            raise ValueError(f"need 0 <= s_min < s_max, got {self.s_min!r} and {self.s_max!r}")

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.stochasticity > 0

    @property
    def convergence(self) -> int:
        """The order at which errors of moments fall; those of paths, where there is noise, fall at order 1."""
        order = self.order + self.corrector
        return min(order, 2) if self.stochastic else order

    @property
    def _amount(self) -> Amount:
        return Amount(self.stochasticity, self.s_min, self.s_max)

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of a run along a grid, without the noise."""
        form = self._amount.form()

        def rule(nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
            return polynomial_weights(form, nodes, start, end)

        return coefficients(
            form,
            sde,
            times,
            self.order,
            rule,
            lower_order_final=self.lower_order_final,
            corrector=rule if self.corrector else None,
        )

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return _start(self._amount, self.coefficients(sde, times), sde, times)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: the step of order 1."""
        return _first_step(self._amount, sde, score, x, t, s, noise)
