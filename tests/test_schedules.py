"""Schedules and the tables of chains against the OpenAI implementation, closed forms, and bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion.ddpm import DDPM, respaced_steps, strided_steps
from sde_diffusion.schedules import SCHEDULES, cosine_betas, linear_betas, scaled_linear_betas, sigmoid_betas

REFERENCE = np.load(FIXTURES / "openai" / "schedules.npz", allow_pickle=False)


def reference(name: str) -> Tensor:
    return torch.from_numpy(REFERENCE[name])


def tables(chain: DDPM) -> dict[str, Tensor]:
    on_data, on_state = chain.posterior_coefficients
    return {
        "betas": torch.tensor(chain.betas, dtype=torch.float64),
        "alphas_cumprod": chain.alphas_bar,
        "posterior_variance": chain.posterior_variance,
        "posterior_log_variance_clipped": chain.posterior_log_variance,
        "posterior_mean_coef1": on_data,
        "posterior_mean_coef2": on_state,
    }


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("n", [1000, 4000])
def test_tables_are_those_of_the_published_code(name: str, n: int) -> None:
    for table, ours in tables(DDPM(SCHEDULES[name](n))).items():
        theirs = reference(f"{name}_{n}/{table}" + ("/every_37th" if n == 4000 else ""))
        assert_close(ours[::37] if n == 4000 else ours, theirs, rtol=1e-11, atol=1e-17)


RESPACED = {
    "linear_1000_[100]": (linear_betas(1000), respaced_steps(1000, 100)),
    "linear_1000_[ddim50]": (linear_betas(1000), strided_steps(1000, 50)),
    "cosine_4000_[25,50,25]": (cosine_betas(4000), respaced_steps(4000, [25, 50, 25])),
}


@pytest.mark.parametrize("name", RESPACED)
def test_respaced_chains_are_those_of_the_published_code(name: str) -> None:
    betas, steps = RESPACED[name]
    chain, folder = DDPM(betas), f"respaced/{name}"
    assert torch.equal(steps - 1, reference(f"{folder}/timestep_map"))
    short = chain.respaced(steps)
    assert_close(
        torch.tensor(short.betas, dtype=torch.float64), reference(f"{folder}/betas"), rtol=1e-10, atol=0
    )
    assert_close(short.alphas_bar, reference(f"{folder}/alphas_cumprod"), rtol=1e-11, atol=0)
    clipped = reference(f"{folder}/posterior_log_variance_clipped")
    assert_close(short.posterior_log_variance, clipped, rtol=1e-10, atol=0)
    # No chain is needed to go along fewer steps: the kernels of the whole one between its times are the same.
    times = chain.times(steps, data=True)
    assert_close(
        chain.transition(times[1:], times[:-1])[1].flip(0), reference(f"{folder}/betas"), rtol=1e-10, atol=0
    )


def test_a_respaced_step_is_the_step_of_the_shorter_chain() -> None:
    """Ancestral and DDIM steps along few of the times are those of the respaced chain at its own times."""
    chain, steps = DDPM(linear_betas(1000)), respaced_steps(1000, [7, 3])
    short = chain.respaced(steps)
    x, z = torch.randn(2, 9, 3, dtype=torch.float64)
    times, own = chain.times(steps), short.times()
    for t, s, u, v in zip(times[:-1], times[1:], own[:-1], own[1:], strict=True):
        for predictor in (sd.Ancestral("small"), sd.Ancestral("large"), sd.DDIM(), sd.DDIM(0.4)):
            ours = predictor.step(chain, lambda x, t: -x, x, t, s, z)
            theirs = predictor.step(short, lambda x, t: -x, x, u, v, z)
            assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_linear_is_songs_discretization_of_vp() -> None:
    for n in (50, 1000):
        assert_close(linear_betas(n), sd.VP().discretize(n), rtol=1e-14, atol=0)


def test_cosine_is_the_exact_discretization_of_the_cosine_process() -> None:
    """At every step but the last ones, where h is clipped or the process has ended."""
    n = 1000
    process = sd.CosineVP()
    times = torch.arange(n, dtype=torch.float64) / n
    exact = -torch.expm1(2 * process.log_alpha(times).diff())
    assert_close(cosine_betas(n)[: n - 1], exact, rtol=1e-9, atol=0)
    assert float(cosine_betas(n)[-1]) == 0.999 and bool((cosine_betas(n)[:-1] < 0.999).all())


def test_closed_forms() -> None:
    roots = scaled_linear_betas(1000).sqrt()
    assert_close(roots.diff(), roots.diff()[:1].expand(999), rtol=1e-9, atol=0)
    assert_close(
        roots[[0, -1]], torch.tensor([0.00085, 0.012], dtype=torch.float64).sqrt(), rtol=1e-12, atol=0
    )
    rise = (sigmoid_betas(1001) * 1.001 - 1e-4) / (0.02 - 1e-4)
    assert_close(rise.logit(), torch.linspace(-6, 6, 1001, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    angles = (torch.arange(501, dtype=torch.float64) / 500 + 0.008) / 1.008 * (math.pi / 2)
    assert_close(
        DDPM(cosine_betas(500)).alphas_bar[:-1],
        (angles[1:-1].cos() / angles[0].cos()) ** 2,
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_tends_to_one_process(name: str) -> None:
    """Between n and 2 n the log of alpha_bar at half time changes like 1/n."""
    middle = [float(DDPM(SCHEDULES[name](n)).alphas_bar[n // 2 - 1].log()) for n in (200, 400, 800, 1600)]
    changes = [abs(b - a) for a, b in itertools.pairwise(middle)]
    assert max(changes) < 0.05 * abs(middle[-1])
    if changes[-1] > 1e-9:  # cosine is exact at any n
        assert all(1.8 < a / b < 2.2 for a, b in itertools.pairwise(changes)), changes


@pytest.mark.parametrize("name", SCHEDULES)
def test_continuous_to_chain_and_back(name: str) -> None:
    chain = DDPM(SCHEDULES[name](64))
    again = DDPM(chain.discretize(64))
    third = DDPM.of_alphas_bar(chain.alphas_bar)
    times = chain.times()
    for other in (again, third):
        assert_close(other.log_alpha(times), chain.log_alpha(times), rtol=1e-12, atol=1e-14)
        assert_close(other.variance(times), chain.variance(times), rtol=1e-12, atol=1e-15)


def test_the_mean_of_a_step_from_any_prediction() -> None:
    """mu_theta from eps is eq. 11 of Ho et al. (2020), from x0 the posterior mean, and all agree."""
    chain = DDPM(linear_betas(40))
    steps = torch.tensor([1, 2, 17, 40])
    x, eps = torch.randn(2, 4, 3, dtype=torch.float64)
    _, t = chain.step_times(steps)
    alpha, sigma = chain.alpha(t), chain.sigma(t)
    beta = torch.tensor(chain.betas, dtype=torch.float64)[steps - 1, None]
    bar = chain.alphas_bar[steps - 1, None]
    expected = (x - beta / (1 - bar).sqrt() * eps) / (1 - beta).sqrt()
    data = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    for kind in (sd.NOISE, sd.DATA, sd.SCORE, sd.V, sd.edm(0.5)):
        output = kind.target(data, eps, alpha, sigma)
        assert_close(chain.mean(output, x, steps, kind), expected, rtol=1e-9, atol=1e-10)
    clipped = chain.mean(eps, x, steps, clip=True)
    on_data, on_state = (c[steps - 1, None] for c in chain.posterior_coefficients)
    assert_close(clipped, on_data * data.clamp(-1, 1) + on_state * x, rtol=1e-9, atol=1e-10)
    assert float(data.abs().max()) > 1
    score = -eps / sigma[:, None]
    s, _ = chain.step_times(steps)
    assert_close(chain.posterior_mean(x, score, t, s), expected, rtol=1e-9, atol=1e-10)


def test_song_and_exact_differ_as_stated() -> None:
    """The claims of the docstring of ``VP.discretize``."""
    vp = sd.VP()
    for n in (1000, 4000):
        song, exact = vp.discretize(n, "song"), vp.discretize(n, "exact")
        ratio = song / exact - 1
        assert float(ratio[0]) == pytest.approx(-(20 - 0.1) / (2 * n * 0.1), rel=0.1)
        assert float(ratio[-1]) == pytest.approx(20 / (2 * n), rel=0.1)
        logs = (torch.log1p(-song) - torch.log1p(-exact)).cumsum(0)
        assert float(logs.abs().max()) == pytest.approx((0.1**2 + 0.1 * 20 + 20**2) / (6 * n), rel=0.02)
        assert float(logs.abs().argmax()) == n - 1


def test_the_repr_of_a_chain_is_short() -> None:
    assert repr(DDPM(linear_betas(1000))) == "DDPM(1000 betas from 0.0001 to 0.02, t_min=1e-05, t_max=1)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear_betas(20),
            "20 steps are too few for the linear schedule: its largest beta would be 1",
        ),
        (lambda: linear_betas(10), "largest beta would be 2, and betas must lie in"),
        (lambda: sigmoid_betas(15), "too few for the sigmoid schedule"),
        (lambda: scaled_linear_betas(12), "too few for the scaled linear schedule"),
        (lambda: linear_betas(1), "n >= 2, got 1"),
        (lambda: cosine_betas(True), "n >= 2, got True"),
        (lambda: cosine_betas(10.0), "n >= 2, got 10.0"),
        (lambda: linear_betas(100, 0.02, 1e-4), "0 < first <= last, got 0.02 and 0.0001"),
        (lambda: cosine_betas(10, s=-1.0), "offset s must be at least 0, got -1.0"),
        (lambda: cosine_betas(10, largest=1.0), r"largest beta must lie in \(0, 1\), got 1.0"),
        (lambda: sigmoid_betas(100, steepness=0.0), "steepness must be a finite number > 0, got 0.0"),
        (lambda: DDPM.of_alphas_bar([0.9, 0.5, 0.5]), "must fall strictly, got 0.5 and then 0.5 at index 2"),
        (lambda: DDPM.of_alphas_bar([0.9, 0.95]), "must fall strictly, got 0.9 and then 0.95 at index 1"),
        (lambda: DDPM.of_alphas_bar([1.0, 0.5]), r"alphas_bar must lie in \(0, 1\), got 1 at index 0"),
        (lambda: DDPM.of_alphas_bar([0.5, 0.0]), "got 0 at index 1"),
        (lambda: DDPM.of_alphas_bar([0.5]), "at least 2 alphas_bar, got shape"),
        (
            lambda: DDPM([0.1, 0.2]).step_times(torch.tensor([0])),
            r"steps must be integers from 1 to 2, got \[0\]",
        ),
        (lambda: DDPM([0.1, 0.2]).step_times(torch.tensor([1.0])), r"integers from 1 to 2, got \[1.0\]"),
        (lambda: respaced_steps(100, 101), "a part of 100 steps can be respaced to 1 to 100 steps, got 101"),
        (lambda: respaced_steps(100, [50, 51]), "a part of 50 steps .* got 51"),
        (lambda: respaced_steps(100, []), "at least one number of steps"),
        (lambda: strided_steps(1000, 300), "no whole stride gives 300 of 1000 steps"),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
