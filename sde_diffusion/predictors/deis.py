"""DEIS (Zhang and Chen 2022, "Fast sampling of diffusion models with exponential integrator"): tAB and iPNDM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.exponential import NOISE, Level, Variable, polynomial_weights
from sde_diffusion.predictors.multistep import Coefficients, MultistepRun, check_order, coefficients
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import first_order, step_between, take
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

VARIABLES = ("log_rho", "rho", "time")


def _first_step(sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The step of order 1, without history."""
    stages = step_between(lambda _, start, end: first_order(NOISE, start, end), NOISE, sde, t, s)
    return take([stage.like(x) for stage in stages], score, x)


@dataclass(frozen=True)
class DEIS:
    """DEIS by Adams and Bashforth's rule: the polynomial through the last ``order`` values of the expected noise,
    integrated exactly against ``d rho``, ``rho = sigma / alpha``.

    Args:
        order: the number of evaluations in the polynomial, 1 to 4, so that tAB2 of the paper is order 3; 1 is DDIM.
        variable: of which it is a polynomial: ``"log_rho"``, ``"rho"`` (rhoAB of the paper), or ``"time"`` (its tAB,
            for which the schedule matters: the paper's is VP).
        lower_order_final: whether the last two steps have at most orders 2 and 1: None for "in runs of fewer than
            15 steps".

    Reference: Zhang and Chen (2022), section 3.
    """

    order: int = 3
    variable: str = "log_rho"
    lower_order_final: bool | None = None

    stochastic = False

    def __post_init__(self) -> None:
        check_order(self.order, 4)
        if self.variable not in VARIABLES:
            raise unknown_name("variable", self.variable, VARIABLES)

    @property
    def convergence(self) -> int:
        """The order at which the error falls, for a grid of smooth spacing."""
        return self.order

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of a run along a grid."""
        variables: dict[str, Variable | None] = {
            "log_rho": None,
            "rho": lambda lam: torch.exp(-lam),
            "time": lambda lam: sde.time_of_log_snr(2 * lam),
        }
        variable = variables[self.variable]
        return coefficients(
            NOISE,
            sde,
            times,
            self.order,
            lambda nodes, start, end: polynomial_weights(NOISE, nodes, start, end, variable),
            lower_order_final=self.lower_order_final,
        )

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return MultistepRun(self.coefficients(sde, times))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: the step of order 1."""
        return _first_step(sde, score, x, t, s)


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""The weights for equal steps, newest evaluation first."""


@dataclass(frozen=True)
class IPNDM:
    """iPNDM: a DDIM step with Adams and Bashforth's mean of the last values of the expected noise, whatever the grid.

    The weights, such as (55, -59, 37, -9) / 24, are those of equal steps in ``rho = sigma / alpha``, and only for
    these has the method its order: on any other grid it converges at order 2, where ``DEIS(variable="rho")``, with
    the weights of the grid, keeps it.

    Args:
        order: 1 to 4; lower in the first steps, where PNDM of Liu et al. (2022) has Runge-Kutta steps.

    Reference: Zhang and Chen (2022), appendix; after Liu et al. (2022), "Pseudo numerical methods", eq. 12.
    """

    order: int = 4

    stochastic = False

    def __post_init__(self) -> None:
        check_order(self.order, 4)

    @property
    def convergence(self) -> int:
        """The order at which the error falls, for a grid of equal steps in rho."""
        return self.order

    def _weights(self, nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
        return [NOISE.whole(start, end) * c for c in _ADAMS_BASHFORTH[len(nodes)]]

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of a run along a grid."""
        return coefficients(NOISE, sde, times, self.order, self._weights, lower_order_final=False)

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return MultistepRun(self.coefficients(sde, times))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: the step of order 1."""
        return _first_step(sde, score, x, t, s)
