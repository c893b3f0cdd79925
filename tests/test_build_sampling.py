"""Samplers by their names in a config: every combination that makes sense, and what does not, by name."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import sde_diffusion as sd
from problems import mixture_2d
from sde_diffusion import build
from sde_diffusion.config import UsageError, changed, set_key

PLANE = build.DataInfo("moons", (2,), None, None)
# "learned_variance" needs a model of its own, see test_chain_training, and "restart" a grid that is fine enough.
PREDICTORS = [name for name in build.PREDICTORS if name not in ("learned_variance", "restart")]
CORRECTORS = ("none", "langevin")
SDES = ("vp", "subvp", "ve", "cosine", "ddpm")
GRIDS = ("uniform", "quadratic", "log_snr", "karras", "list")
AGAIN = sd.RestartInterval(0.1, 1.0, 3, 4)
PRODUCT = list(itertools.product(SDES, PREDICTORS, GRIDS, CORRECTORS))


def config(**sampling: Any) -> Any:
    made = changed(
        {"data.name": "moons", "model.name": "mlp", "model.parametrization": "noise", "sde.t_min": 1e-3}
    )
    for key, value in sampling.items():
        set_key(made, key if "." in key else f"sampling.{key}", value)
    return made


def run(made: Any, n: int = 4) -> torch.Tensor:
    process = build.sde(made)
    sampler = build.sampler(made).calibrated(process, mixture_2d().score(process), (16, 2))
    return sampler(process, mixture_2d().score(process), (n, 2), seed=1).x


def combination(process: str, predictor: str, grid: str, corrector: str) -> Any:
    chosen: dict[str, Any] = {
        "sde.name": process,
        "predictor": predictor,
        "grid": grid,
        "corrector": corrector,
    }
    if process == "ddpm":
        chosen["sde.t_min"] = 1e-3
    if grid == "list":
        chosen["times"] = (0.999, 0.5, 0.2, 0.01)
    return config(**chosen, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCT, ids="-".join)
def test_every_combination_samples(case: tuple[str, str, str, str]) -> None:
    x = run(combination(*case))
    assert x.shape == (4, 2) and bool(torch.isfinite(x).all())


@pytest.mark.parametrize("case", PRODUCT[:: max(1, len(PRODUCT) // 40) | 1], ids="-".join)
def test_some_combinations_sample(case: tuple[str, str, str, str]) -> None:
    x = run(combination(*case))
    assert x.shape == (4, 2) and bool(torch.isfinite(x).all())


@pytest.mark.parametrize("process", SDES)
def test_restarts_sample_and_refuse_a_grid_that_is_too_coarse(process: str) -> None:
    options = {"sde.name": process, "predictor": "restart", "grid": "log_snr", "corrector": "none"}
    assert bool(torch.isfinite(run(config(**options, steps=20))).all())
    with pytest.raises(ValueError, match="a restart from 0.06 to 0.3 does not fit the grid"):
        run(config(**options, steps=2, t_end=0.5))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"predictor": "edm_heun"}, sd.EDMHeun()),
        ({"predictor": "edm_heun", "churn": 40.0, "s_max": 50.0, "s_noise": 1.1}, sd.EDMHeun(40.0, 0.0, 50.0, 1.1)),
        ({"predictor": "rk4"}, sd.RK4()),
        ({"predictor": "dpm_solver++"}, sd.DPMSolverPP()),
        ({"predictor": "dpm_solver++", "solver_method": "singlestep"}, sd.DPMSolverPP(2, "singlestep")),
        ({"predictor": "unipc", "solver_order": 3, "variant": "bh1"}, sd.UniPC(3, "bh1")),
        ({"predictor": "unipc", "lower_order_final": False}, sd.UniPC(lower_order_final=False)),
        ({"predictor": "deis", "variable": "time"}, sd.DEIS(variable="time")),
        ({"predictor": "ipndm", "solver_order": 2}, sd.IPNDM(2)),
        ({"predictor": "euler_maruyama", "stochasticity": 0.5}, sd.EulerMaruyama(0.5)),
        ({"predictor": "sde_dpm_solver++", "solver_order": 3}, sd.SDEDPMSolverPP(3)),
        ({"predictor": "sa_solver", "s_max": 5.0}, sd.SASolver(s_max=5.0)),
        ({"predictor": "adaptive_sde", "sde_rtol": 0.05}, sd.AdaptiveSDE(rtol=0.05)),
        ({"predictor": "restart"}, sd.Restart()),
        ({"predictor": "restart", "restart": (0.1, 1.0, 3, 4)}, sd.Restart(intervals=(AGAIN,))),
        ({"predictor": "torchsde", "solver_method": "euler", "adaptive": False}, sd.TorchSDE("euler")),
        ({"predictor": "flow", "rtol": 1e-2}, sd.FlowSolver(sd.DormandPrince(1e-2, 1e-3))),
        ({"predictor": "flow", "solver": "bosh3"}, sd.FlowSolver(sd.TorchDiffEq("bosh3", 1e-3, 1e-3))),
    ],
)  # fmt: skip
def test_names_and_options(options: dict[str, Any], expected: sd.Predictor) -> None:
    assert build.predictor(config(**options)) == expected


def test_solvers_of_torchdiffeq() -> None:
    assert build.solver(config(solver="torchdiffeq_dopri5")) == sd.TorchDiffEq("dopri5", 1e-3, 1e-3)
    midpoint = build.solver(config(solver="midpoint", ode_steps=10, t_end=0.5))
    assert midpoint == sd.TorchDiffEq("midpoint", step_size=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "unipc", "solver_order": 7}, "config.sampling: the order must be an integer .*, got 7"),
        ({"predictor": "ddim", "solver_order": 2}, "solver_order=2 is not for sampling.predictor 'ddim', but for"),
        ({"predictor": "rk4", "churn": 3.0}, "sampling.churn=3.0 is not for .* 'rk4', but for edm_heun"),
        ({"predictor": "unipc", "stochasticity": 1.0}, "stochasticity=1.0 is not for .* 'unipc'"),
        ({"predictor": "dpm_solver"}, r"unknown sampling.predictor 'dpm_solver'; did you mean 'dpm_solver\+\+'"),
        ({"predictor": "flow", "solver": "heun"}, "for Heun's method use predictor 'edm_heun'"),
        ({"grid": "optimal"}, "'optimal' is for predictors without noise.*not 'reverse_diffusion'"),
        ({"method": "ode", "solver": "heun", "grid": "optimal"}, "'optimal' is for sampling.method 'pc'"),
        ({"solver": "dopri6", "method": "ode"}, "unknown sampling.solver 'dopri6'; did you mean"),
        ({"predictor": "restart", "restart": (0.1, 1.0)}, r"restart must be \(low, high, iterations, steps\), got"),
        ({"predictor": "restart", "restart": (2.0, 1.0, 1, 1)}, "config.sampling: a restart needs 0 < low < high"),
        ({"predictor": "ddim", "sde_rtol": 0.1}, "sde_rtol=0.1 is not for .* 'ddim', but for adaptive_sde, torchsde"),
        ({"threshold": "soft"}, "config.sampling: unknown thresholding 'soft'"),
        ({"threshold": "static", "threshold_bound": -1.0}, "config.sampling: the bound must be positive, got -1.0"),
        ({"sde": "learned"}, "unknown sampling.sde 'learned'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build.sampler(config(**options))


@pytest.mark.parametrize("name", ["subvp", "ve", "cosine", "edm", "ddpm"])
def test_another_process_gives_the_same_samples(name: str) -> None:
    # Along the exact flow the same noise comes to nearly the same data, whatever the path.
    chosen = {"predictor": "unipc", "corrector": "none", "steps": 60, "grid": "log_snr"}
    own, other = run(config(**chosen), 200), run(config(**chosen, sde=name), 200)
    apart = (own - other).norm(dim=1).median()
    assert float(apart) < 0.05, f"{name}: the median sample moved by {float(apart)}"


def test_the_score_is_compiled_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def stand_in(score: sd.Score) -> sd.Score:
        compiled.append(score)
        return score

    monkeypatch.setattr(torch, "compile", stand_in)
    run(config(steps=2))
    assert not compiled
    run(config(steps=2, compile=True))
    assert len(compiled) == 1


def test_thresholds_hold() -> None:
    free = run(config(steps=20), 100)
    assert float(free.abs().max()) > 1.5
    for kind in ("static", "dynamic"):
        assert float(run(config(steps=20, threshold=kind), 100).abs().max()) <= 1 + 1e-5


def test_a_grid_made_for_the_model() -> None:
    made = config(predictor="dpm_solver++", corrector="none", steps=5, grid="optimal")
    process, score = build.sde(made), mixture_2d().score(build.sde(made))
    first = build.sampler(made)
    assert isinstance(first, build.PCSampler) and first.optimal
    best = first.calibrated(process, score, (64, 2))
    assert isinstance(best, build.PCSampler) and not best.optimal
    assert len(best.times) == 6 and not torch.allclose(best.times, first.times)
    assert math.isclose(float(best.times[-1]), process.t_min)
