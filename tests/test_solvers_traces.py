"""Runs of the published solvers: the same grid and model in, the same states out.

The fixtures are described in tests/fixtures/FIXTURES.md.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

import sde_diffusion as sd
from problems import FIXTURES, queue_noise
from sde_diffusion.sdes import VariancePreserving, in_float64

SOLVERS = FIXTURES / "solvers"
INFO = json.loads((SOLVERS / "traces.json").read_text())
TRACES = INFO["traces"]


@dataclass(frozen=True)
class VPBySigma(VariancePreserving):
    """``alpha = 1 / sqrt(1 + t^2)``: time is ``sigma / alpha``, so that a grid of noise levels is a grid of times."""

    t_max: float = field(default=200.0, kw_only=True)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * torch.log1p(t.square())

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).exp()


@functools.lru_cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(SOLVERS / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@functools.lru_cache
def mixture() -> sd.GaussianMixture:
    parts = (INFO["mixture"][key] for key in ("weights", "means", "covariances"))
    return sd.GaussianMixture(*(torch.tensor(part, dtype=torch.float64) for part in parts))


class Recorded:
    """A score that remembers where it was asked."""

    def __init__(self, score: sd.Score) -> None:
        self.score = score
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.append(x)
        self.t.append(torch.as_tensor(t).double())
        return self.score(x, t)


def test_the_model_is_that_of_the_runs() -> None:
    check, sde = arrays("traces"), sd.EDM(t_max=200.0)
    score, x = mixture().score(sde), check["model_check/x"]
    for sigma, want in zip(check["model_check/sigma"], check["model_check/denoised"], strict=True):
        torch.testing.assert_close(x + sigma**2 * score(x, sigma), want, rtol=1e-10, atol=1e-10)
    score = mixture().score(VPBySigma())
    for sigma, want in zip(check["model_check/sigma"], check["model_check/eps_at_x_vp"], strict=True):
        std = sigma / (1 + sigma**2).sqrt()
        torch.testing.assert_close(-std * score(x, sigma), want, rtol=1e-9, atol=1e-9)


def predictor_of(name: str) -> sd.Predictor:
    """What makes the run of this name."""
    info = TRACES[name]
    match info["scheduler"]:
        case "DDIMScheduler":
            return sd.DDIM(eta=info["eta"])
        case "DPMSolverMultistepScheduler":
            return sd.DPMSolverPP(info["solver_order"], as_published=info["solver_order"] == 3)
        case "UniPCMultistepScheduler":
            return sd.UniPC(info["solver_order"], info["solver_type"], lower_order_final=True)
        case "DEISMultistepScheduler":
            return sd.DEIS(info["solver_order"])
        case "HeunDiscreteScheduler":
            return sd.EDMHeun()
        case "EDMEulerScheduler":
            return sd.DDIM()
    raise AssertionError(info["scheduler"])


# These two round their states to float32 in every step.
ROUNDED = ("DPMSolverMultistepScheduler", "EDMEulerScheduler")


def processes(name: str) -> dict[str, sd.SDE]:
    """The processes on which a run must be the same: its grid is given in noise levels."""
    if TRACES[name]["state_space"] == "sigma":
        return {"edm": sd.EDM(t_max=200.0, t_min=0.0)}
    return {"by-sigma": VPBySigma(), "vp": sd.VP(beta_max=25.0)}


CASES = [(name, process) for name in TRACES for process in processes(name)]


@pytest.mark.parametrize(("name", "process"), CASES, ids=["-".join(case) for case in CASES])
def test_the_runs_of_diffusers(name: str, process: str) -> None:
    """Every state of every run; for Heun's method also the states of its second stages."""
    run, info = arrays("traces"), TRACES[name]
    sde = processes(name)[process]
    states, sigmas = run[f"{name}/states_f64"], run[f"{name}/sigmas"].unique_consecutive()
    times = sde.time_of_log_snr(-2 * sigmas.log())
    score = Recorded(mixture().score(sde))
    start = states[0]
    out = sd.sample(
        sde,
        score,
        tuple(start.shape),
        predictor=predictor_of(name),
        times=times,
        x_init=start,
        noise=queue_noise(run[f"{name}/noise"]) if info["eta"] else None,
        trajectory=True,
        denoise=False,
        dtype=torch.float64,
    )
    # Where the score was asked, in the order of the reference ...
    levels = torch.stack([(-0.5 * sde.log_snr(t)).exp() for t in score.t])
    torch.testing.assert_close(levels, run[f"{name}/eval_sigmas"], rtol=2e-7, atol=0)
    # ... and what became of it.
    if info["scheduler"] in ROUNDED:
        rtol, atol = 3e-7, 2e-5 if info["state_space"] == "sigma" else 2e-6
    else:
        rtol, atol = 1e-9, 1e-9
    torch.testing.assert_close(torch.stack(score.x), states[:-1], rtol=rtol, atol=atol)
    torch.testing.assert_close(out.x, states[-1], rtol=rtol, atol=atol)
    if info["scheduler"] != "HeunDiscreteScheduler":
        assert out.trajectory is not None
        torch.testing.assert_close(out.trajectory, states, rtol=rtol, atol=atol)


def test_in_single_precision_too() -> None:
    """What a user runs: float32 states, 1e-5 from the reference's float64 where states are of order 1."""
    run, sde = arrays("traces"), VPBySigma()
    names = [name for name in TRACES if TRACES[name]["state_space"] == "vp" and not TRACES[name]["eta"]]
    assert len(names) == 23
    for name in names:
        states = run[f"{name}/states_f64"]
        out = sd.sample(
            sde,
            mixture().score(sde),
            (6, 2),
            predictor=predictor_of(name),
            times=run[f"{name}/sigmas"],
            x_init=states[0],
            denoise=False,
        )
        assert out.x.dtype == torch.float32
        torch.testing.assert_close(out.x.double(), states[-1], rtol=0, atol=1e-5)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", ["heun_18", "heun_9", "churn_18"])
def test_the_sampler_of_edm(name: str) -> None:
    """Karras et al.'s algorithm 2 with and without churn: every evaluation and every state, to 1e-9."""
    run = arrays("edm_sampler")
    sde = sd.EDM()
    churn = name == "churn_18"
    predictor = sd.EDMHeun(churn=40, s_min=0.05, s_max=50, s_noise=1.003) if churn else sd.EDMHeun()
    score, times = Recorded(mixture().score(sde)), run[f"{name}/t_steps"]
    out = sd.sample(
        sde,
        score,
        (6, 2),
        predictor=predictor,
        times=times,
        x_init=80 * run["latents"],
        noise=queue_noise(run[f"{name}/noise"]) if churn else None,
        trajectory=True,
        denoise=False,
        dtype=torch.float64,
    )
    close(torch.stack(score.t), run[f"{name}/eval_sigma"])
    close(torch.stack(score.x), run[f"{name}/eval_x"])
    close(out.x, run[f"{name}/final"])
    assert out.nfe == 2 * (len(times) - 1) - 1
    if not churn:
        assert out.trajectory is not None
        close(out.trajectory, run[f"{name}/states"])


@pytest.mark.parametrize("n", [9, 18])
def test_the_grid_of_edm(n: int) -> None:
    close(sd.karras_times(sd.EDM(), n - 1), arrays("edm_sampler")[f"heun_{n}/t_steps"][:-1])


def vp_of_ablation(sigmas: Tensor) -> sd.VP:
    """The VP process whose levels at t = 1 and 1e-3 are the first and last."""
    integrals = torch.log1p(sigmas[[0, -1]].square())  # beta_min t + (beta_max - beta_min) t^2 / 2
    t = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    low, rise = torch.linalg.solve(torch.stack([t, t.square() / 2], 1), integrals).tolist()
    return sd.VP(beta_min=low, beta_max=low + rise)


@dataclass(frozen=True)
class VarianceIsTime(sd.SDE):
    """Karras et al.'s "VE": ``sigma = sqrt(t)``."""

    t_max: float = field(default=1e4, kw_only=True)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        return t


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["vp-vp-vp", "ve-ve-none", "iddpm-linear-none", "edm-linear-none"])
def test_the_ablations_of_edm(solver: str, kind: str) -> None:
    """Euler's and Heun's methods in the time of the schedule for VP and VE, and in sigma for the others.

    The last step of both is Euler's, to the data.
    """
    run, key = arrays("edm_sampler"), f"ablation/{solver}-{kind}"
    sigmas = run[f"ablation/euler-{kind}/eval_sigma"]  # one evaluation a step: the grid, without its end at 0
    match kind.split("-")[1]:
        case "vp":
            sde: sd.SDE = vp_of_ablation(sigmas)
            times = sde.time_of_log_snr(-2 * sigmas.log())
            assert float(times[0]) == pytest.approx(1.0) and float(times[-1]) == pytest.approx(1e-3)
        case "ve":
            sde, times = VarianceIsTime(), sigmas.square()
        case _:
            sde, times = sd.EDM(t_max=float(sigmas[0])), sigmas
    score = Recorded(mixture().score(sde))
    x = sde.alpha(times[0]) * sigmas[0] * run["latents"]
    if sde == sd.EDM(t_max=float(sigmas[0])):
        predictor = sd.DDIM() if solver == "euler" else sd.EDMHeun()
        x = sd.sample(
            sde,
            score,
            (6, 2),
            predictor=predictor,
            times=torch.cat([times, torch.zeros(1)]),
            x_init=x,
            denoise=False,
            dtype=torch.float64,
        ).x
    else:
        flow = sd.probability_flow(sde, score)
        if solver == "heun":
            x = sd.Heun(times).solve(flow, x, float(times[0]), float(times[-1])).x
            times = times[-1:]
        zero = torch.zeros((), dtype=torch.float64)
        for t, s in zip(times, [*times[1:], zero], strict=True):
            x = sd.EulerMaruyama(stochasticity=0.0).step(sde, score, x, t, s, torch.zeros_like(x))
    levels = [float(t.flatten()[0]) for t in score.t]
    t = torch.tensor(levels, dtype=torch.float64)
    torch.testing.assert_close((-0.5 * sde.log_snr(t)).exp(), run[f"{key}/eval_sigma"], rtol=1e-9, atol=0)
    alphas = sde.alpha(t)[:, None, None]
    torch.testing.assert_close(torch.stack(score.x) / alphas, run[f"{key}/eval_x"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, run[f"{key}/final"], rtol=1e-9, atol=1e-9)
