"""SciPy's Runge-Kutta method, as the original implementation of score SDEs uses it; for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sde_diffusion.ode import Field, Solution, SolverError, check_tolerances

__all__ = ["ScipyRK45"]


@dataclass(frozen=True)
class ScipyRK45:
    """``scipy.integrate.solve_ivp(method="RK45")`` over the whole batch as one state (Song et al. 2021, code).

    The state is float64 on the CPU, the field is evaluated in the type and on the device of ``x``, and one error norm
    and one step serve all samples: a result depends on its batch-mates. :class:`~sde_diffusion.ode.DormandPrince` is
    the same method without these three.

    Args:
        rtol, atol: the tolerances.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)

    def solve(self, field: Field, x: Tensor, t0: float, t1: float) -> Solution:
        """The state at ``t1`` given the state ``x`` at ``t0``.

        Raises:
            SolverError: SciPy gave up, because the field is not finite or the steps became too small.
        """
        batch = x.shape[0]

        def flat_field(t: float, y: np.ndarray) -> np.ndarray:
            state = torch.from_numpy(y.reshape(x.shape)).to(x)
            times = torch.full((batch,), t, dtype=torch.float64, device=x.device)
            slope: np.ndarray = field(times, state).detach().double().cpu().numpy().ravel()
            if not np.isfinite(slope).all():  # SciPy would try ever new steps of length NaN
                raise SolverError(f"SciPy's RK45 stopped at t = {t:.4g}: the field is not finite")
            return slope

        start = x.detach().double().cpu().numpy().ravel()
        with np.errstate(invalid="ignore"):
            run = solve_ivp(flat_field, (t0, t1), start, method="RK45", rtol=self.rtol, atol=self.atol)
        if run.status != 0 or not np.isfinite(run.y[:, -1]).all():
            raise SolverError(f"SciPy's RK45 stopped at t = {run.t[-1]:.4g}: {run.message}")
        end = torch.from_numpy(run.y[:, -1].reshape(x.shape)).to(x)
        return Solution(end, torch.full((batch,), int(run.nfev), device=x.device))
