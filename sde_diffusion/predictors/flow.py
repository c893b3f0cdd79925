"""Any solver of ordinary differential equations as a predictor."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sde_diffusion.ode import DormandPrince, Solver, probability_flow
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE


@dataclass(frozen=True)
class FlowSolver:
    """``x_s`` by solving the probability-flow ODE in t from ``t`` to ``s`` (Song et al. 2021, eq. 13).

    With an adaptive solver the grid only says where correctors come in; the solver takes what steps it needs between
    its times, from its first step on anew. The field has ``score(x, t)`` at the end of each step, which must be
    finite there: a grid may not lead to the data themselves (``sigma = 0``).

    Args:
        solver: :class:`~sde_diffusion.ode.DormandPrince` (the default, for each sample its own steps),
            :class:`~sde_diffusion.ode.TorchDiffEq`, or anything with ``solve(field, x, t0, t1)``.
    """

    solver: Solver = field(default_factory=DormandPrince)

    stochastic = False

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``.

        Raises:
            ValueError: times that differ within the batch, or without noise.
            SolverError: samples for which the tolerance cannot be met.
        """
        if t.numel() != 1 or s.numel() != 1:
            raise ValueError(
                "a FlowSolver goes from one time to another for the whole batch, got times of shape "
                f"{tuple(t.shape)} and {tuple(s.shape)}"
            )
        if not float(sde.variance(s)) > 0:
            raise ValueError(
                f"a FlowSolver needs noise at the end of a step, and there is none at {float(s):g}"
            )
        return self.solver.solve(probability_flow(sde, score), x, float(t), float(s)).x
