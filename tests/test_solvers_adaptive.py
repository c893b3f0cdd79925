"""Solvers of the SDE that choose their own steps: the adaptive solver, and those of torchsde."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torchsde
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    SDES,
    CallCounter,
    assert_moments,
    gaussian_2d,
    mixture_2d,
    times64,
)
from sde_diffusion.noise import ChildNoise, SampleNoise
from sde_diffusion.predictors.adaptive import _Path

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
