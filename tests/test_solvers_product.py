"""Every process with every solver of the ODE, grids and correctors in turn: samples of the right distribution."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import sde_diffusion as sd
from problems import CORRECTORS, SDES, assert_moments, mixture_2d

PROCESSES: dict[str, sd.SDE] = SDES | {"edm": sd.EDM()}

SOLVERS: dict[str, sd.Predictor] = {
    "ddim": sd.DDIM(),
    "heun": sd.EDMHeun(),
    "heun-churn": sd.EDMHeun(churn=10.0),
    "rk4": sd.RK4(),
    "dpm++2s": sd.DPMSolverPP(2, "singlestep"),
    "dpm++3s": sd.DPMSolverPP(3, "singlestep"),
    "dpm++2m": sd.DPMSolverPP(2),
    "dpm++3m": sd.DPMSolverPP(3),
    "unipc2-bh1": sd.UniPC(2, "bh1"),
    "unipc3-bh2": sd.UniPC(3, "bh2"),
    "deis3": sd.DEIS(3),
    "deis3-rho": sd.DEIS(3, "rho"),
    "deis3-time": sd.DEIS(3, "time"),
    "ipndm4": sd.IPNDM(4),
    "flow": sd.FlowSolver(sd.DormandPrince(1e-3, 1e-3)),
}
EVALUATIONS = {"heun": 2, "heun-churn": 2, "rk4": 4, "dpm++2s": 2, "dpm++3s": 3}

GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": sd.uniform_times,
    "quadratic": sd.quadratic_times,
    "log-snr": sd.log_snr_times,
    "karras": sd.karras_times,
}

# A time of EDM is a noise level: of 40 steps from 80, equal in it or its root, too few are left for the data.
FULL = [
    case
    for case in product(PROCESSES, SOLVERS, GRIDS, CORRECTORS)
    if not (case[0] == "edm" and case[2] in ("uniform", "quadratic"))
]
# Every pair of a process and a solver, with the grids and correctors in turn.
COVERING = []
for i, (process, solver) in enumerate(product(PROCESSES, SOLVERS)):
    grids = [g for g in GRIDS if (process, solver, g, "none") in FULL]
    COVERING.append((process, solver, grids[i % len(grids)], tuple(CORRECTORS)[(i // 4) % 3]))


def check(process: str, solver: str, grid: str, correctors: str, n: int = 150, steps: int = 40) -> None:
    sde, generator = PROCESSES[process], torch.Generator().manual_seed(1)
    out = sd.sample(
        sde,
        mixture_2d().score(sde),
        (n, 2),
        predictor=SOLVERS[solver],
        correctors=CORRECTORS[correctors],
        times=GRIDS[grid](sde, steps, t_end=0.01 if process != "edm" else 0.02),
        noise=lambda: torch.randn(n, 2, dtype=torch.float64, generator=generator),
        dtype=torch.float64,
    )
    if solver != "flow":
        assert out.nfe == steps * (EVALUATIONS.get(solver, 1) + len(CORRECTORS[correctors])) + 1
    # Four standard errors for chance, and one for the bias of 40 steps and of the correctors'.
    assert_moments(out.x, mixture_2d(), 5)


def test_the_covering_set_has_every_value() -> None:
    assert set(COVERING) <= set(FULL)
    for position, values in enumerate((PROCESSES, SOLVERS, GRIDS, CORRECTORS)):
        assert {case[position] for case in COVERING} == set(values)
    for grid, corrector in product(GRIDS, CORRECTORS):
        assert any(case[2:] == (grid, corrector) for case in COVERING)


@pytest.mark.parametrize("case", COVERING, ids="-".join)
def test_every_process_with_every_solver(case: tuple[str, str, str, str]) -> None:
    check(*case)
