"""Solvers of the reverse SDE: exact cases, weak and strong orders, independence of the batch, runs of others."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    CORRECTORS,
    SDES,
    CallCounter,
    assert_moments,
    gaussian_2d,
    marginal_moments,
    mixture_2d,
    queue_noise,
    run_moments,
    slope,
    times64,
)

CLOSE_SDES = {name: SDES[name] for name in ("vp", "subvp")}


def moment_error(predictor: sd.Predictor, sde: sd.SDE, times: torch.Tensor, **options: int) -> float:
    """The largest error of a mean plus the largest error of a covariance, for Gaussian data."""
    data = gaussian_2d()
    mean, covariance = run_moments(predictor, sde, data, times, **options)
    exact_mean, exact_covariance = marginal_moments(data, sde, times[-1])
    return float((mean - exact_mean).abs().max() + (covariance - exact_covariance).abs().max())


# The family between the ODE and the SDE ------------------------------------------------------------------


@pytest.mark.parametrize("sde", CLOSE_SDES.values(), ids=CLOSE_SDES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
def test_euler_maruyama_has_the_marginals_for_every_stochasticity(sde: sd.SDE, stochasticity: float) -> None:
    """Mean and full covariance at the end converge to those of ``p_t``, at order 1, whatever the noise."""
    sizes = [32, 64, 128]
    errors = [
        moment_error(sd.EulerMaruyama(stochasticity), sde, sd.quadratic_times(sde, n, 1e-3)) for n in sizes
    ]
    assert 0.9 < slope(sizes, errors) < 1.1, errors
    assert errors[-1] < 0.02


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
def test_reverse_diffusion_has_the_marginals_for_every_stochasticity(stochasticity: float) -> None:
    sizes, sde = [64, 128, 256], sd.VP()
    errors = [
        moment_error(sd.ReverseDiffusion(stochasticity), sde, sd.quadratic_times(sde, n, 1e-3)) for n in sizes
    ]
    assert 0.9 < slope(sizes, errors) < 1.2, errors
    assert errors[-1] < 0.2


def test_without_noise_none_is_drawn() -> None:
    def no_noise() -> torch.Tensor:
        raise AssertionError("a deterministic run needs no noise")

    for predictor in (sd.EulerMaruyama(stochasticity=0.0), sd.ReverseDiffusion(stochasticity=0.0)):
        sd.sample(
            sd.VP(),
            lambda x, t: -x,
            (2, 2),
            predictor=predictor,
            times=sd.uniform_times(sd.VP(), 3),
            noise=no_noise,
            x_init=torch.zeros(2, 2),
        )


# SDE-DPM-Solver++ and SA-Solver --------------------------------------------------------------------------


def wavy(t: Tensor, sde: sd.SDE) -> Tensor:
    """Expected data that depend on time only, and are no polynomial."""
    return 1.3 + torch.sin(0.8 * 0.5 * sde.log_snr(t))


def reference_run(
    predictor: sd.SDEDPMSolverPP | sd.SASolver, sde: sd.SDE, times: Tensor, x: float, noise: Tensor
) -> list[float]:
    """The states of a run for the data ``wavy``, by SciPy's quadrature of NumPy's interpolating polynomials."""
    lam, alpha, sigma = (v.tolist() for v in (0.5 * sde.log_snr(times), sde.alpha(times), sde.sigma(times)))
    data = wavy(times, sde).tolist()
    adams = isinstance(predictor, sd.SASolver)
    states = [x]
    for i, z in enumerate(noise.tolist()):
        inside = not adams or predictor.s_min <= sigma[i] / alpha[i] <= predictor.s_max
        a = predictor.stochasticity**2 if inside else 0.0
        h = lam[i + 1] - lam[i]

        def integral(nodes: list[int], i: int = i, a: float = a) -> float:
            centre = lam[i]
            fit = np.polyfit([lam[k] - centre for k in nodes], [data[k] for k in nodes], deg=len(nodes) - 1)
            middle = 0.5 * (lam[i] + lam[i + 1])
            at = (lambda u: middle) if len(nodes) == 2 and not adams else (lambda u: u)
            return quad(
                lambda u: (1 + a) * math.exp((1 + a) * (u - lam[i + 1])) * np.polyval(fit, at(u) - centre),
                lam[i],
                lam[i + 1],
                epsabs=1e-13,
            )[0]

        past = [i - j for j in range(min(predictor.order, i + 1))]
        keep = sigma[i + 1] / sigma[i] * math.exp(-a * h)
        rest = keep * x + sigma[i + 1] * math.sqrt(1 - math.exp(-2 * a * h)) * z
        states.append(rest + alpha[i + 1] * integral(past))
        corrects = adams and predictor.corrector
        x = rest + alpha[i + 1] * integral([i + 1, *past]) if corrects else states[-1]
    return states


EXPONENTIAL = [
    *(sd.SDEDPMSolverPP(order, amount, False) for order in (1, 2, 3) for amount in (0.6, 1.0)),
    *(sd.SASolver(order, 1.0, lower_order_final=False) for order in (1, 2, 3, 4)),
    sd.SASolver(3, 1.4, corrector=False, lower_order_final=False),
    sd.SASolver(3, 0.7, s_min=0.3, s_max=3.0, lower_order_final=False),
]


@pytest.mark.parametrize("predictor", EXPONENTIAL, ids=repr)
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_states_are_the_integrals_of_polynomials_through_the_evaluations(
    name: str, predictor: sd.SDEDPMSolverPP | sd.SASolver
) -> None:
    """Each node, weight, factor and amount of noise, with steps of any size, against a quadrature by others."""
    sde, times = SDES[name], sd.quadratic_times(SDES[name], 7, 0.02)
    noise = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def score(x: Tensor, t: Tensor) -> Tensor:
        return (sde.alpha(t) * wavy(t, sde) - x) / sde.variance(t)

    out = sd.sample(
        sde,
        score,
        (1, 1),
        predictor=predictor,
        times=times,
        noise=queue_noise(noise.reshape(7, 1, 1)),
        x_init=torch.full((1, 1), 0.7),
        denoise=False,
        trajectory=True,
        dtype=torch.float64,
    )
    want = reference_run(predictor, sde, times, float(torch.tensor(0.7)), noise)
    assert_close(out.trajectory.flatten(), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def run_2d(predictor: sd.Predictor, sde: sd.SDE, times: Tensor, **options) -> sd.SampleOutput:
    return sd.sample(
        sde, mixture_2d().score(sde), (5, 2), predictor=predictor, times=times, dtype=torch.float64, **options
    )


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_order_one_with_all_noise_is_ancestral_sampling(sde: sd.SDE) -> None:
    times = sd.uniform_times(sde, 6, 0.05)
    want = run_2d(sd.Ancestral(), sde, times).x
    for predictor in (sd.SDEDPMSolverPP(order=1), sd.SASolver(order=1, corrector=False)):
        assert_close(run_2d(predictor, sde, times).x, want, rtol=1e-9, atol=1e-9)
    x, z = torch.randn(2, 5, 2, dtype=torch.float64)
    score, t, s = mixture_2d().score(sde), times64(0.7)[0], times64(0.4)[0]
    want = sd.Ancestral().step(sde, score, x, t, s, z)
    for solver in (sd.SDEDPMSolverPP(order=3), sd.SASolver(order=3)):  # without history
        assert_close(solver.step(sde, score, x, t, s, z), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_noise_they_are_the_solvers_of_the_ode(sde: sd.SDE, order: int) -> None:
    times = sd.uniform_times(sde, 6, 0.05)
    want = run_2d(sd.DPMSolverPP(order), sde, times).x
    ours = run_2d(sd.SDEDPMSolverPP(order, stochasticity=0.0), sde, times).x
    assert_close(ours, want, rtol=1e-12, atol=1e-12)
    if order == 3:  # UniPC of order 3 corrects by the same polynomial, but for its first steps
        ours = run_2d(sd.SASolver(order, stochasticity=0.0, corrector=False), sde, times[:2]).x
        assert_close(ours, run_2d(sd.DPMSolverPP(1), sde, times[:2]).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "subvp", "cosine"])
@pytest.mark.parametrize("predictor", [sd.SDEDPMSolverPP(3), sd.SASolver(2)], ids=repr)
def test_a_step_to_the_data_gives_the_expected_data(name: str, predictor: sd.Predictor) -> None:
    sde = SDES[name]
    times = torch.cat([sd.uniform_times(sde, 5, 0.1), times64(0.0)])
    asked: list[tuple[Tensor, Tensor]] = []
    score = mixture_2d().score(sde)

    def remember(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return score(x, t)

    out = sd.sample(sde, remember, (5, 2), predictor=predictor, times=times, dtype=torch.float64)
    x, t = asked[-1]
    assert len(asked) == 6
    assert_close(out.x, sde.posterior_mean(x, score(x, t), t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize(
    ("predictor", "high"),
    [
        (sd.SDEDPMSolverPP(1), 1.1),
        (sd.SDEDPMSolverPP(2), 2.1),
        (sd.SDEDPMSolverPP(2, stochasticity=0.5), 2.1),
        (sd.SDEDPMSolverPP(3), 2.4),
        (sd.SASolver(1), 2.1),
        (sd.SASolver(2), 2.7),
        (sd.SASolver(3), 2.2),
    ],
    ids=repr,
)
def test_moments_converge_at_the_stated_order(name: str, predictor: sd.SDEDPMSolverPP, high: float) -> None:
    sde, sizes = SDES[name], [32, 64, 128]
    errors = [moment_error(predictor, sde, sd.log_snr_times(sde, n, 1e-2)) for n in sizes]
    assert predictor.convergence - 0.15 < slope(sizes, errors) < high, errors


@pytest.mark.parametrize("solver", [sd.SASolver, sd.SDEDPMSolverPP])
def test_the_last_steps_of_a_uniform_grid_do_not_extrapolate(solver: type) -> None:
    """The mistake: a parabola through rough values, 30 times as far as they lie apart, at every length of a run."""
    sde, data = SDES["vp"], gaussian_2d()
    times = sd.uniform_times(sde, 100)

    def error(**options) -> float:
        _, covariance = run_moments(solver(order=3, **options), sde, data, times)
        return float((covariance - marginal_moments(data, sde, times[-1])[1]).abs().max())

    assert error() < 0.03
    assert error(lower_order_final=None) > 0.3


# Strong convergence --------------------------------------------------------------------------------------

# One mode, but no Gaussian: between modes far apart a few paths change sides, and they would be the whole error.
BLOB = sd.GaussianMixture(
    torch.tensor([0.6, 0.4]),
    torch.tensor([[0.5, 0.2], [-0.5, 0.0]]),
    torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.1], [-0.1, 0.6]]]),
)
FINE, PATHS = 512, 100


@functools.lru_cache
def brownian_path(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A fine grid, the initial states and the increments of the paths in units of their standard deviation."""
    sde, generator = SDES[name], torch.Generator().manual_seed(3)
    times = torch.linspace(0.6, 0.1, FINE + 1, dtype=torch.float64)
    z = torch.randn(FINE + 1, PATHS, 2, dtype=torch.float64, generator=generator)
    return times, sde.perturb(BLOB.sample(PATHS, generator), times[0], z[-1]), z[:-1]


@functools.lru_cache
def on_path(predictor: sd.Predictor, name: str, n: int) -> Tensor:
    """The ends of the paths by ``n`` steps."""
    times, x, z = brownian_path(name)
    size = FINE // n
    return sd.sample(
        SDES[name],
        BLOB.score(SDES[name]),
        (PATHS, 2),
        predictor=predictor,
        times=times[::size],
        noise=queue_noise(z.reshape(n, size, PATHS, 2).sum(1) / size**0.5),
        x_init=x,
        denoise=False,
        dtype=torch.float64,
    ).x


def rms(difference: Tensor) -> float:
    return float(difference.square().sum(1).mean().sqrt())


@pytest.mark.parametrize(
    ("name", "predictor", "high"),
    [
        ("vp", sd.EulerMaruyama(), 1.2),
        ("ve", sd.EulerMaruyama(), 1.2),
        ("vp", sd.EulerMaruyama(stochasticity=0.5), 1.2),
        ("vp", sd.ReverseDiffusion(), 1.2),
        ("vp", sd.Ancestral(), 1.2),
        ("vp", sd.DDIM(eta=1.0), 1.2),
        ("vp", sd.SDEDPMSolverPP(1), 1.2),
        ("vp", sd.SDEDPMSolverPP(2), 1.5),
        ("ve", sd.SDEDPMSolverPP(2), 1.2),
        ("vp", sd.SASolver(3), 1.6),
        ("ve", sd.SASolver(3), 1.2),
    ],
    ids=repr,
)
def test_paths_converge_at_order_one(name: str, predictor: sd.Predictor, high: float) -> None:
    """Strong order 1, not 1/2: the diffusion depends on time only, so that Milstein's term is 0 and Euler and
    Maruyama's is his method. All solvers of one stochasticity converge to the same path.
    """
    sizes = [16, 32, 64]
    finest = on_path(predictor, name, FINE)
    errors = [rms(on_path(predictor, name, n) - finest) for n in sizes]
    assert 0.85 < slope(sizes, errors) < high, errors
    if getattr(predictor, "stochasticity", 1.0) == 1:
        assert rms(finest - on_path(sd.EulerMaruyama(), name, FINE)) < 0.01


def test_wrong_settings_of_the_exponential_solvers_are_refused() -> None:
    for build, message in (
        (lambda: sd.SDEDPMSolverPP(4), "the order must be an integer from 1 to 3, got 4"),
        (lambda: sd.SASolver(5), "the order must be an integer from 1 to 4, got 5"),
        (lambda: sd.SDEDPMSolverPP(stochasticity=-1.0), "stochasticity must be at least 0, got -1.0"),
        (lambda: sd.SASolver(stochasticity=math.nan), "stochasticity must be at least 0, got nan"),
        (lambda: sd.SASolver(s_min=2.0, s_max=1.0), "need 0 <= s_min < s_max, got 2.0 and 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


# Restart -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("solver", [sd.DDIM(), sd.EDMHeun(), sd.DPMSolverPP(2)], ids=repr)
def test_restart_samples_have_the_moments_of_the_data(sde: sd.SDE, solver: sd.Predictor) -> None:
    """In closed form: 20 steps of the solver, and two restarts of 4, each with one draw."""
    times = sd.log_snr_times(sde, 20, 1e-2)
    restart = sd.Restart(solver, (sd.RestartInterval(0.3, 1.5, iterations=2, steps=8),))
    error = moment_error(restart, sde, times, draws=len(times) - 1 + 2)
    assert error < (0.2 if isinstance(solver, sd.DDIM) else 0.02)


def test_a_restart_is_the_forward_kernel_and_the_solver_again() -> None:
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    times = sd.uniform_times(sde, 8, 0.02)
    rho = sde.sigma(times) / sde.alpha(times)
    low, high = times[6], sde.time_of_log_snr(times64(-2 * math.log(2.0)))[0]
    restart = sd.Restart(sd.DDIM(), (sd.RestartInterval(float(rho[6]) * 1.05, 2.0, iterations=2, steps=1),))
    draws = torch.randn(10, 5, 2, dtype=torch.float64)
    start = torch.randn(5, 2, dtype=torch.float64)
    ours = sd.sample(
        sde,
        score,
        (5, 2),
        predictor=restart,
        times=times,
        x_init=start,
        noise=queue_noise(draws),
        denoise=False,
        dtype=torch.float64,
    )
    x, still = start, torch.zeros_like(start)
    for i, (t, s) in enumerate(pairwise(times)):
        x = sd.DDIM().step(sde, score, x, t, s, still)
        if i == 5:  # the draws 0 to 5 are those of the steps before
            for z in draws[6:8]:
                ratio, var = sde.transition(low, high)
                x = sd.DDIM().step(sde, score, ratio * x + var.sqrt() * z, high, low, still)
    assert_close(ours.x, x, rtol=1e-9, atol=1e-9)
    assert ours.nfe == 8 + 2


def test_a_restart_goes_down_the_levels_of_karras() -> None:
    sde, times = sd.VP(), sd.uniform_times(sd.VP(), 6, 0.05)
    score = CallCounter(mixture_2d().score(sde))
    low, high = float(sde.sigma(times[-1]) / sde.alpha(times[-1])), 2.0
    restart = sd.Restart(sd.DDIM(), (sd.RestartInterval(low, high, steps=4),))
    sd.sample(sde, score, (1, 2), predictor=restart, times=times, denoise=False, dtype=torch.float64)
    levels = torch.stack([(-0.5 * sde.log_snr(t)).exp() for t in score.times[6:]]).flatten()
    want = [(high ** (1 / 7) + i / 4 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(4)]
    assert_close(levels, times64(*want), rtol=1e-8, atol=0)


def test_restarts_contract_the_errors_made_before() -> None:
    """Few steps of DDIM end far off; what the restarts add forgets it: the point of the method."""
    sde = sd.VP()
    times = sd.log_snr_times(sde, 12, 1e-2)
    plain = moment_error(sd.DDIM(), sde, times)
    many = sd.RestartInterval(0.05, 3.0, iterations=6, steps=20)
    assert moment_error(sd.Restart(sd.DDIM(), (many,)), sde, times, draws=12 + 6) < 0.6 * plain


def test_restarts_that_make_no_sense_are_refused() -> None:
    for build, message in (
        (lambda: sd.RestartInterval(0.3, 0.1), "a restart needs 0 < low < high, got 0.3 and 0.1"),
        (lambda: sd.RestartInterval(0.1, 0.3, iterations=0), "iterations of a restart must be an integer"),
        (lambda: sd.RestartInterval(0.1, 0.3, steps=1.5), "steps of a restart must be an integer"),
        (lambda: sd.Restart(intervals=()), "at least one interval"),
        (lambda: sd.Restart(sd.EulerMaruyama()), "needs a deterministic solver, and EulerMaruyama"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    for interval in (
        sd.RestartInterval(1e-9, 1.0),
        sd.RestartInterval(0.1, 1e6),
        sd.RestartInterval(0.3, 0.31),
    ):
        with pytest.raises(ValueError, match="a restart from .* does not fit the grid"):
            sd.sample(
                sd.VP(),
                lambda x, t: -x,
                (1, 1),
                predictor=sd.Restart(intervals=(interval,)),
                times=sd.uniform_times(sd.VP(), 2, 0.5),
            )


# With the correctors -------------------------------------------------------------------------------------

WHOLE_STEP = {
    "adaptive": sd.AdaptiveSDE(rtol=0.05, atol=0.05),
    "restart": sd.Restart(sd.EDMHeun(), (sd.RestartInterval(0.3, 1.5, iterations=2),)),
    "torchsde": sd.TorchSDE("srk", per_sample=False),
}


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine"])
@pytest.mark.parametrize("predictor", WHOLE_STEP)
@pytest.mark.parametrize("corrector", [name for name in CORRECTORS if name != "none"])
def test_solvers_of_many_evaluations_a_step_go_with_every_corrector(
    name: str, predictor: str, corrector: str
) -> None:
    """What test_sampling does for the predictors of one evaluation a step."""
    sde = SDES[name]
    out = sd.sample(
        sde,
        mixture_2d().score(sde),
        (250, 2),
        predictor=WHOLE_STEP[predictor],
        correctors=CORRECTORS[corrector],
        times=sd.log_snr_times(sde, 25, 1e-3),
        dtype=torch.float64,
    )
    assert_moments(out.x, mixture_2d(), 5)
