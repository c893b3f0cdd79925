"""UniPC (Zhao et al. 2023, "A unified predictor-corrector framework for fast sampling of diffusion models")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.dpm_solver import slope_weights
from sde_diffusion.predictors.exponential import DATA, Level, polynomial_weights
from sde_diffusion.predictors.multistep import Coefficients, MultistepRun, check_order, coefficients
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import first_order, step_between, take
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

VARIANTS = ("bh1", "bh2")


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 1, 2 or 3, data prediction: a multistep predictor UniP with the corrector UniC, one evaluation a
    step.

    The evaluation at the end of a step, from which the next step starts, first corrects the state that it was made
    at: UniC of order p joins it to the p evaluations of UniP and so has order ``p + 1``. The evaluation is not
    repeated at the corrected state, and the last step, after which there is none, is not corrected.

    Both solve the equations ``R_p a_p B(h) = phi_p`` of the paper's theorem 3.1, and so integrate the polynomial
    through their evaluations exactly, whatever ``B(h)``: but where a single weight is left (UniP of order 2, UniC of
    order 1) the authors take 1/2 for it, and there the variants differ: ``"bh1"`` has ``B(h) = h``, and ``"bh2"``
    ``B(h) = 1 - e^-h``, with which UniP of order 2 is DPM-Solver++(2M).

    Args:
        order: 1, 2 or 3, of UniP.
        variant: ``"bh1"`` (the authors' advice for unconditional sampling with few steps) or ``"bh2"``.
        lower_order_final: whether the last two steps have at most orders 2 and 1: None for "in runs of fewer than
            15 steps", as for :class:`~sde_diffusion.predictors.dpm_solver.DPMSolverPP`; the authors' code always has
            them.
    """

    order: int = 3
    variant: str = "bh2"
    lower_order_final: bool | None = None

    stochastic = False

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.variant not in VARIANTS:
            raise unknown_name("variant", self.variant, VARIANTS)

    @property
    def convergence(self) -> int:
        """The order at which the error falls, for a grid of smooth spacing: that of UniC."""
        return self.order + 1

    def _b(self, start: Level, end: Level) -> Tensor:
        """``alpha B(h)``."""
        return end.alpha * (end.lam - start.lam) if self.variant == "bh1" else DATA.whole(start, end)

    def _predict(self, nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
        if len(nodes) == 2:
            ratio = (nodes[1] - nodes[0]) / (end.lam - start.lam)
            return slope_weights(DATA.whole(start, end), self._b(start, end), ratio)
        return polynomial_weights(DATA, nodes, start, end)

    def _correct(self, nodes: list[Tensor], start: Level, end: Level) -> list[Tensor]:
        if len(nodes) == 2:
            whole = DATA.whole(start, end)
            return slope_weights(whole, self._b(start, end), torch.ones_like(whole))[::-1]
        return polynomial_weights(DATA, nodes, start, end)

    def coefficients(self, sde: SDE, times: Tensor) -> Coefficients:
        """Those of a run along a grid."""
        return coefficients(
            DATA,
            sde,
            times,
            self.order,
            self._predict,
            lower_order_final=self.lower_order_final,
            corrector=self._correct,
        )

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return MultistepRun(self.coefficients(sde, times))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, without history: the step of order 1."""
        stages = step_between(lambda _, start, end: first_order(DATA, start, end), DATA, sde, t, s)
        return take([stage.like(x) for stage in stages], score, x)
