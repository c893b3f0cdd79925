"""DPM-Solver++ (Lu et al. 2022b, "Fast solver for guided sampling of diffusion probabilistic models")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.exponential import DATA, Level, polynomial_weights
from sde_diffusion.predictors.multistep import Coefficients, MultistepRun, check_order, coefficients
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import Method, Stage, StagesRun, first_order, step_between, take
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

METHODS = ("multistep", "singlestep")


def slope_weights(whole: Tensor, factor: Tensor, ratio: Tensor) -> list[Tensor]:
    """Weights of ``m_0`` and ``m_1`` in ``whole m_0 + factor (m_1 - m_0) / (2 ratio)``.

    ``ratio`` is the distance of their nodes in units of the step. With ``factor = whole`` this is the whole integral
    at the value of the line through them in the middle of the step: the "midpoint" rule.
    """
    on_other = 0.5 * factor / ratio
    return [whole - on_other, on_other]


def _ramp(h: Tensor) -> Tensor:
    """``1 - (1 - e^-h) / h``: what the data-prediction integral over a step h makes of ``lambda / h``."""
    return 1 + torch.expm1(-h) / h


def _middle(sde: SDE, start: Level, end: Level, fraction: float) -> Level:
    """The level a fraction of the step further in lambda."""
    lam = start.lam + fraction * (end.lam - start.lam)
    return Level.at(sde, sde.time_of_log_snr(2 * lam))


def _second_order_step(sde: SDE, start: Level, end: Level) -> list[Stage]:
    """DPM-Solver++(2S): algorithm 1 of Lu et al. (2022b) with ``r = 1/2``, where ``D_0`` itself drops out."""
    middle, whole = _middle(sde, start, end, 0.5), DATA.whole(start, end)
    return [
        Stage.of(DATA, start, start, middle, [DATA.whole(start, middle)]),
        Stage.of(DATA, middle, start, end, [torch.zeros_like(whole), whole]),
    ]


def _third_order_step(sde: SDE, start: Level, end: Level) -> list[Stage]:
    """Order 3 with stages at a third and two thirds: DPM-Solver-3 (Lu et al. 2022a, algorithm 2) for the data."""
    one, two = (_middle(sde, start, end, fraction) for fraction in (1 / 3, 2 / 3))
    ramp_two = 2 * two.alpha * _ramp(two.lam - start.lam)  # r_2 / r_1 = 2
    ramp = 1.5 * end.alpha * _ramp(end.lam - start.lam)  # 1 / r_2
    whole = DATA.whole(start, end)
    return [
        Stage.of(DATA, start, start, one, [DATA.whole(start, one)]),
        Stage.of(DATA, one, start, two, [DATA.whole(start, two) - ramp_two, ramp_two]),
        Stage.of(DATA, two, start, end, [whole - ramp, torch.zeros_like(whole), ramp]),
    ]


_SINGLE: dict[int, Method] = {
    1: lambda sde, start, end: first_order(DATA, start, end),
    2: _second_order_step,
    3: _third_order_step,
}


@dataclass(frozen=True)
class DPMSolverPP:
    """DPM-Solver++ of order 1, 2 or 3: exponential integrators for the expected data ``D`` as a function of lambda.

    ``"multistep"`` evaluates once a step and takes the derivatives of ``D`` from the steps before: 2 is
    DPM-Solver++(2M), algorithm 2 of the paper. ``"singlestep"`` evaluates ``order`` times a step, at times between
    the two (2 is DPM-Solver++(2S), algorithm 1), and remembers nothing. Order 1 is DDIM in both. All go in either
    direction of time, and to the data themselves (``sigma = 0``) by a step of order 1.

    Order 3 of the multistep method integrates the parabola through three values of ``D`` exactly. The authors' code,
    and those after it, halve the term of its second derivative, which makes it converge at order 2;
    ``as_published=True`` does that.

    Args:
        order: 1, 2 or 3.
        method: ``"multistep"`` or ``"singlestep"``.
        lower_order_final: whether the last two steps of the multistep method have at most orders 2 and 1: the
            default None is the authors' rule, in runs of fewer than 15 steps. (An extrapolation over long steps
            through the data's finest structure does harm; over short ones it is what gives the order.)
        as_published: see above.

    Reference: Lu et al. (2022b), section 4 and 5, and the multistep order 3 of their code.
    """

    order: int = 2
    method: str = "multistep"
    lower_order_final: bool | None = None
    as_published: bool = False

    stochastic = False

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.method == "singlestep" and self.lower_order_final is not None:
            raise ValueError(
                f"every step of the singlestep method has the same order: it takes no lower_order_final, "
                f"got {self.lower_order_final!r}"
            )
        if self.as_published and (self.order, self.method) != (3, "multistep"):
            raise ValueError(
                f"as_published differs for the multistep order 3 only, got order {self.order}, {self.method}"
            )

    @property
    def convergence(self) -> int:
        """The order at which the error falls, for a grid of smooth spacing."""
        return 2 if self.as_published else self.order

    def _weights(self, nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
        if len(nodes) == 2:
            whole = DATA.whole(start, end)
            return slope_weights(whole, whole, (nodes[1] - nodes[0]) / (end.lam - start.lam))
        weights = polynomial_weights(DATA, nodes, start, end)
        if self.as_published and len(nodes) == 3:
            # The second difference m[0, 1, 2] = sum_j m_j / prod_k (node_j - node_k) has the share
            # int density (lambda - lambda_0)^2 of the integral: half of it goes.
            a, b, c = nodes
            h = end.lam - start.lam
            share = end.alpha * h.square() * (1 - 2 / h * _ramp(h))
            for j, others in enumerate([(a - b) * (a - c), (b - a) * (b - c), (c - a) * (c - b)]):
                weights[j] = weights[j] - 0.5 * share / others
        return weights

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of the multistep method along a grid."""
        return coefficients(
            DATA, sde, times, self.order, self._weights, lower_order_final=self.lower_order_final
        )

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        if self.method == "singlestep":
            return StagesRun(_SINGLE[self.order], DATA, sde, times)
        return MultistepRun(self.coefficients(sde, times))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: a multistep method's first step."""
        method = _SINGLE[self.order if self.method == "singlestep" else 1]
        return take([stage.like(x) for stage in step_between(method, DATA, sde, t, s)], score, x)
