"""Solvers of the reverse SDE: exact cases, weak and strong orders, independence of the batch, runs of others."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde
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
from sde_diffusion.noise import ChildNoise, SampleNoise
from sde_diffusion.predictors.adaptive import _Path

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


# The adaptive solver -------------------------------------------------------------------------------------


def test_an_adaptive_step_is_its_formula() -> None:
    """One step, of the length of the grid's, where the tolerance is loose."""
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    x, noise = torch.randn(2, 5, 2, dtype=torch.float64)
    t, s = times64(0.5, 0.49)
    z, h = ChildNoise(noise).normal(torch.zeros(5, dtype=torch.int64)), t - s
    first = sd.EulerMaruyama().step(sde, score, x, t, s, z)
    f, g2 = sde.f_and_g2(s)
    second = 0.5 * (first + x - h * (f * first - g2 * score(first, s)) + (g2 * h).sqrt() * z)
    counted = CallCounter(score)
    ours = sd.AdaptiveSDE(atol=10.0).step(sde, counted, x, t, s, noise)
    assert_close(ours, second, rtol=1e-12, atol=1e-12)
    assert counted.calls == 2
    # The error that decides, of each sample: with tolerances just above and below the largest, one step or more.
    ratio = float(((first - second).square().mean(1).sqrt()).max())
    for factor, calls in ((1.001, [2]), (0.999, range(4, 100))):
        counted = CallCounter(score)
        sd.AdaptiveSDE(rtol=0.0, atol=factor * ratio).step(sde, counted, x, t, s, noise)
        assert counted.calls in calls


@pytest.mark.parametrize("inner", [(), (0.6, 0.2)], ids=["one interval", "three"])
@pytest.mark.parametrize("correctors", [(), (sd.Langevin(),)], ids=["alone", "langevin"])
def test_an_adaptive_sample_does_not_depend_on_its_batch(inner: tuple, correctors: tuple) -> None:
    sde, options = sd.VP(), {"times": times64(1.0, *inner, 0.01), "predictor": sd.AdaptiveSDE(rtol=0.05)}
    options |= {"correctors": correctors, "dtype": torch.float64, "seed": 4}
    score = mixture_2d().score(sde)
    whole = sd.sample(sde, score, (6, 2), **options)
    part = sd.sample(sde, score, (2, 2), first_index=3, **options)
    assert_close(part.x, whole.x[3:5], rtol=1e-9, atol=1e-9)
    assert part.nfe <= whole.nfe  # but the slowest sample of the batch needs more
    assert (whole.nfe - 1 - len(correctors) * (len(inner) + 1)) % 2 == 0


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine"])
def test_adaptive_samples_have_the_moments_of_the_mixture(name: str) -> None:
    sde = SDES[name]
    out = sd.sample(
        sde,
        mixture_2d().score(sde),
        (400, 2),
        predictor=sd.AdaptiveSDE(rtol=0.02, atol=0.02),
        times=times64(sde.t_max, 1e-3),
        dtype=torch.float64,
    )
    assert_moments(out.x, mixture_2d(), 4)


def test_a_tighter_tolerance_brings_the_adaptive_solver_nearer_and_costs_more() -> None:
    """Also after many rejections: noise drawn anew for each of them would make the covariance 0.18 too small."""
    sde, data = sd.VP(), gaussian_2d()
    costs, errors = [], []
    for tolerance in (0.3, 0.003):
        out = sd.sample(
            sde,
            data.score(sde),
            (1000, 2),
            predictor=sd.AdaptiveSDE(rtol=tolerance, atol=tolerance),
            times=times64(1.0, 1e-3),
            dtype=torch.float64,
        )
        costs.append(out.nfe)
        errors.append(float((out.x.T.cov() - data.covariance).abs().max()))
    assert costs[1] > 3 * costs[0]
    assert errors[1] < 4 * 0.5 * (2 / 1000) ** 0.5


def test_the_adaptive_solver_gives_up_with_the_names_of_the_samples() -> None:
    score = mixture_2d().score(sd.VP())
    with pytest.raises(
        sd.SolverError, match=r"samples \[0, 1, 2\] did not reach t = 0.01 within 10 evaluations"
    ):
        sd.sample(
            sd.VP(),
            score,
            (3, 2),
            predictor=sd.AdaptiveSDE(max_evaluations=10),
            times=times64(1.0, 0.01),
        )
    with pytest.raises(ValueError, match="needs noise at the end of a step"):
        sd.sample(sd.VP(), score, (3, 2), predictor=sd.AdaptiveSDE(), times=times64(1.0, 0.0))
    for options, message in (
        ({"rtol": 1.5}, "rtol=1.5"),
        ({"atol": 0.0}, "atol=0.0"),
        ({"h_init": 0.0}, r"h_init must lie in \(0, 1\], got 0.0"),
        ({"safety": 1.0}, "safety must lie between 0 and 1, got 1.0"),
        ({"exponent": 0.2}, r"the exponent must lie in \[0.5, 1\], got 0.2"),
        ({"max_evaluations": 1}, "max_evaluations must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.AdaptiveSDE(**options)


def adaptive_reference(
    solver: sd.AdaptiveSDE, sde: sd.SDE, score: sd.Score, x: Tensor, times: list[float], noises: list[Tensor]
) -> tuple[Tensor, int, int]:
    """The algorithm for one sample, in numbers: the state, and how many steps were accepted and rejected."""
    wanted, accepted, rejected = solver.h_init * sde.t_max, 0, 0
    for (t, s), noise in zip(pairwise(times), noises, strict=True):
        child, stack, tries, before = ChildNoise(noise), [], 0, x
        while t > s:
            h, z = min(wanted, t - s), child.normal(torch.tensor([tries]))
            tries += 1
            if not stack:
                stack.append((h, h**0.5 * z))
            else:
                length, whole = stack.pop()
                share = 1.0 if h >= 0.9 * length else min(h / length, 0.5)
                part = share * whole + (length * share * (1 - share)) ** 0.5 * z
                if share < 1:
                    stack.append((length - share * length, whole - part))
                stack.append((share * length, part))
            h, dw = stack[-1]
            there = s if abs(t - h - s) < 1e-9 else t - h

            def change(y: Tensor, at: float, h: float = h, dw: Tensor = dw) -> Tensor:
                f, g2 = sde.f_and_g2(times64(at))
                return -h * (f * y - g2 * score(y, times64(at))) + g2.sqrt() * dw

            first = x + change(x, t)
            second = 0.5 * (first + x + change(first, there))
            delta = torch.maximum(first.abs(), before.abs()).mul(solver.rtol).clamp_min(solver.atol)
            error = float(((first - second) / delta).square().mean().sqrt())
            grown = h * min(max(solver.safety * error**-solver.exponent, 0.02), 10)
            if error <= 1:
                stack.pop()
                wanted = min(max(wanted, grown) if h < wanted else grown, sde.t_max)
                x, before, t, accepted = second, first, there, accepted + 1
            else:
                wanted, rejected = grown, rejected + 1
    return x, accepted, rejected


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_run_of_the_adaptive_solver_is_that_of_each_sample_by_itself(name: str) -> None:
    """Over two intervals and with rejections: the sizes of steps, what is remembered, and the path."""
    sde, times = SDES[name], [0.9, 0.6, 0.3]
    score = mixture_2d().score(sde)
    solver = sd.AdaptiveSDE(rtol=0.2, atol=1e-2, h_init=0.3)
    x, *noises = torch.randn(3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    run, ours = solver.start(sde, times64(*times), lambda: x), x
    for (t, s), noise in zip(pairwise(times64(*times)), noises, strict=True):
        ours = run.step(sde, score, ours, t, s, noise)
    for i in range(len(x)):
        row = slice(i, i + 1)
        want, accepted, rejected = adaptive_reference(
            solver, sde, score, x[row], times, [noise[row] for noise in noises]
        )
        assert accepted > 2 and rejected > 0
        assert_close(ours[row], want, rtol=1e-7, atol=1e-7)


def test_a_brownian_path_is_one_whatever_is_rejected() -> None:
    """Increments are rejected here for being large: drawn anew they could not be. Of ours the sums up to times fixed
    beforehand are normal of the right variance, and independent."""
    n = 4000
    path = _Path(SampleNoise(0, range(n), (2,), dtype=torch.float64).normal())
    at, value, marks = torch.zeros(n).double(), torch.zeros(n, 2).double(), []
    tries, wanted = torch.zeros(n, dtype=torch.long), torch.full((n,), 0.5).double()
    for mark in (0.37, 1.0):
        active = at < mark
        while bool(active.any()):
            h, step = path.increment(torch.minimum(wanted, mark - at), tries, active)
            tries += active
            accept = active & ((step.abs().amax(1) < 1.1 * h.sqrt()) | (h < 0.1))
            path.advance(accept)
            value = value + accept[:, None] * step
            at = torch.where(accept, torch.where(mark - at - h < 1e-9, mark, at + h), at)
            wanted = torch.where(accept, 1.7 * h.clamp_min(0.05), 0.4 * h)
            active = at < mark
        marks.append(value)
    scaled = torch.cat([marks[0], marks[1] - marks[0]], 1) / times64(0.37, 0.37, 0.63, 0.63).sqrt()
    assert float(scaled.mean(0).abs().max()) < 4 / n**0.5
    assert_close(scaled.T @ scaled / n, torch.eye(4).double(), rtol=0, atol=4 * (2 / n) ** 0.5)
    assert_close(scaled.pow(4).mean(0), torch.full((4,), 3.0).double(), rtol=0, atol=4 * (96 / n) ** 0.5)


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


# torchsde ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "milstein"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_torchsdes_euler_is_euler_and_maruyama(method: str, per_sample: bool) -> None:
    """On its own Brownian interval, and Milstein's method is the same for noise of this kind."""
    sde, score = sd.SubVP(), mixture_2d().score(sd.SubVP())
    x, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    t, s = times64(0.5, 0.4)
    words = ChildNoise(noise).words.tolist()
    seeds = [sum(w << 32 * i for i, w in enumerate(row)) for row in words]
    sizes = [(seed, (1, 2)) for seed in seeds] if per_sample else [(seeds[0], (3, 2))]
    z = (
        torch.cat(
            [
                torchsde.BrownianInterval(0.0, float(t - s), size=size, dtype=torch.float64, entropy=seed)(
                    0.0, float(t - s)
                )
                for seed, size in sizes
            ]
        )
        / (t - s).sqrt()
    )
    for stochasticity in (1.0, 0.5):
        ours = sd.TorchSDE(method, stochasticity=stochasticity, per_sample=per_sample).step(
            sde, score, x, t, s, noise
        )
        want = sd.EulerMaruyama(stochasticity).step(sde, score, x, t, s, z)
        assert_close(ours, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "evaluations"),
    [("euler", 1), ("milstein", 1), ("srk", 2), ("euler_heun", 1), ("heun", 2), ("midpoint", 2)],
)
def test_torchsde_asks_as_often_as_its_method_has_stages(method: str, evaluations: int) -> None:
    sde, score = sd.VP(), CallCounter(mixture_2d().score(sd.VP()))
    times = sd.uniform_times(sde, 3, 0.1)
    predictor = sd.TorchSDE(method, steps=5)
    out = sd.sample(sde, score, (2, 2), predictor=predictor, times=times, denoise=False)
    # Once more in each step of the grid for some, whose first state is another tensor than that of the check.
    assert out.nfe in (15 * evaluations, 15 * evaluations + 3)
    assert out.x.dtype == torch.float32 and bool(torch.isfinite(out.x).all())


@pytest.mark.parametrize("method", ["srk", "heun"])
def test_a_torchsde_sample_has_its_own_path(method: str) -> None:
    sde = sd.VP()
    options = {"times": sd.uniform_times(sde, 4, 0.05), "dtype": torch.float64, "seed": 4}
    options |= {"predictor": sd.TorchSDE(method, steps=3)}
    whole = sd.sample(sde, mixture_2d().score(sde), (5, 2), **options).x
    part = sd.sample(sde, mixture_2d().score(sde), (2, 2), first_index=2, **options).x
    assert_close(part, whole[2:4], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "srk") for name in ("vp", "subvp", "ve", "cosine")), ("vp", "midpoint")]
)
def test_torchsde_samples_have_the_moments_of_the_mixture(name: str, method: str) -> None:
    sde = SDES[name]
    out = sd.sample(
        sde,
        mixture_2d().score(sde),
        (500, 2),
        predictor=sd.TorchSDE(method, per_sample=False),
        times=sd.quadratic_times(sde, 80, 1e-3),
        dtype=torch.float64,
    )
    assert_moments(out.x, mixture_2d(), 4)


def test_adaptive_torchsde_takes_the_steps_that_it_needs() -> None:
    sde, costs = sd.VP(), []
    for tolerance in (0.1, 0.01):
        out = sd.sample(
            sde,
            mixture_2d().score(sde),
            (100, 2),
            predictor=sd.TorchSDE(
                "srk", steps=10, adaptive=True, rtol=tolerance, atol=tolerance, per_sample=False
            ),
            times=times64(1.0, 0.01),
            dtype=torch.float64,
        )
        costs.append(out.nfe)
        assert_moments(out.x, mixture_2d(), 4.5)
    assert costs[1] > costs[0] > 30


def test_torchsde_settings_that_make_no_sense_are_refused() -> None:
    for options, message in (
        ({"method": "eular"}, "unknown method 'eular'; did you mean 'euler'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"stochasticity": 0.0}, "torchsde needs noise"),
    ):
        with pytest.raises(ValueError, match=message):
            sd.TorchSDE(**options)
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="torchsde needs noise at the end of a step, and there is none at 0"):
        sd.TorchSDE().step(sd.VP(), lambda x, t: -x, x, *times64(0.5, 0.0), x)
    with pytest.raises(ValueError, match=r"got times of shape \(2,\) and \(\)"):
        sd.TorchSDE().step(sd.VP(), lambda x, t: -x, x, times64(0.5, 0.6), times64(0.1)[0], x)


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
