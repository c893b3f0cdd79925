"""Predictors: formulas, exact cases, measured orders of convergence, a public implementation's steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    FIXTURES,
    PREDICTORS,
    SDES,
    CallCounter,
    gaussian_2d,
    gaussian_flow,
    marginal_moments,
    mixture_2d,
    push_moments,
    queue_noise,
    slope,
    times64,
)

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
predictors = pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)


def run_moments(
    predictor: sd.Predictor, sde: sd.SDE, data: sd.GaussianMixture, times: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of a sampler's output for Gaussian data, started from the true ``p_T``."""
    score = data.score(sde)
    mean, covariance = marginal_moments(data, sde, times[0])
    for t, s in pairwise(times):

        def step(x: Tensor, z: Tensor, t: Tensor = t, s: Tensor = s) -> Tensor:
            return predictor.step(sde, score, x, t, s, z)

        mean, covariance = push_moments(step, mean, covariance)
    return mean, covariance


@sdes
@predictors
def test_every_predictor_converges_at_order_one_or_better(sde: sd.SDE, predictor: sd.Predictor) -> None:
    data, sizes, errors = gaussian_2d(), [16, 32, 64], []
    for n in sizes:
        # Neither uniform in t nor in the log-SNR: the steps must be those of the grid.
        times = sd.quadratic_times(sde, n, 1e-3)
        mean, covariance = run_moments(predictor, sde, data, times)
        exact_mean, exact_covariance = marginal_moments(data, sde, times[-1])
        errors.append(float((covariance - exact_covariance).abs().max() + (mean - exact_mean).abs().max()))
    assert slope(sizes, errors) > 0.7, errors
    assert errors[-1] < 0.15


def test_euler_maruyama_takes_the_steps_of_a_grid_spaced_otherwise() -> None:
    """The mistake: a step of 1/N whatever the grid. On a quadratic grid it misses; ours is right."""

    class FixedStep:
        def __init__(self, n: int) -> None:
            self.h = 1 / n

        def step(self, sde, score, x, t, s, noise):
            return sd.EulerMaruyama().step(sde, score, x, t, t - self.h, noise)

    sde, data, n = sd.VP(), gaussian_2d(), 200
    times = sd.quadratic_times(sde, n)
    exact = marginal_moments(data, sde, times[-1])[1]
    ours = run_moments(sd.EulerMaruyama(), sde, data, times)[1]
    fixed = run_moments(FixedStep(n), sde, data, times)[1]
    assert float((ours - exact).abs().max()) < 0.01
    assert float((fixed - exact).abs().max()) > 0.03


@sdes
def test_steps_are_their_formulas(sde: sd.SDE) -> None:
    x, z = torch.randn(2, 3, 4, dtype=torch.float64)
    gradient = torch.randn(3, 4, dtype=torch.float64)
    t, s = times64(0.6)[0], times64(0.52)[0]
    f, g2, h = sde.f(t), sde.g2(t), t - s
    ratio, var = (
        sde.alpha(t) / sde.alpha(s),
        sde.variance(t) - (sde.alpha(t) / sde.alpha(s)) ** 2 * sde.variance(s),
    )
    tilde = var * sde.variance(s) / sde.variance(t)
    x0, eps = (x + sde.variance(t) * gradient) / sde.alpha(t), -sde.sigma(t) * gradient
    mean = (x + var * gradient) / ratio
    expected = {
        sd.EulerMaruyama(): x - (f * x - g2 * gradient) * h + (g2 * h).sqrt() * z,
        sd.ReverseDiffusion(): x + (x - ratio * x) + var * gradient + var.sqrt() * z,
        sd.Ancestral(): mean + tilde.sqrt() * z,
        sd.Ancestral(variance="large"): mean + var.sqrt() * z,
        sd.DDIM(): sde.alpha(s) * x0 + sde.sigma(s) * eps,
        sd.DDIM(eta=0.7): (
            sde.alpha(s) * x0 + (sde.variance(s) - 0.49 * tilde).sqrt() * eps + 0.7 * tilde.sqrt() * z
        ),
    }
    for predictor, want in expected.items():
        ours = predictor.step(sde, lambda x, t: gradient, x, t, s, z)
        assert_close(ours, want, rtol=1e-10, atol=1e-10)


@sdes
def test_ddim_with_eta_one_is_ancestral_sampling(sde: sd.SDE) -> None:
    x, z = torch.randn(2, 5, 2, dtype=torch.float64)
    score, t, s = mixture_2d().score(sde), times64(0.7)[0], times64(0.4)[0]
    ours = sd.DDIM(eta=1.0).step(sde, score, x, t, s, z)
    assert_close(ours, sd.Ancestral().step(sde, score, x, t, s, z), rtol=1e-9, atol=1e-9)


@sdes
def test_one_step_is_exact_for_a_point(sde: sd.SDE) -> None:
    """For a point, DDIM is the exact flow and ancestral sampling the exact posterior, whatever the step."""
    point = sd.GaussianMixture(torch.ones(1), torch.tensor([[0.7, -0.4]]), torch.zeros(1, 2, 2))
    times = times64(sde.t_max, 0.3, 0.01)
    for predictor in (sd.DDIM(), sd.DDIM(eta=0.5), sd.Ancestral()):
        mean, covariance = run_moments(predictor, sde, point, times)
        exact = marginal_moments(point, sde, times[-1])
        assert_close(mean, exact[0], rtol=1e-8, atol=1e-8)
        assert_close(covariance, exact[1], rtol=1e-8, atol=1e-12)


def test_one_large_ancestral_step_is_exact_for_unit_normals() -> None:
    """Ho et al. (2020), section 3.2: the other extreme of the two variances."""
    unit = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    for sde in (SDES["vp"], SDES["cosine"], SDES["ddpm"]):
        _, covariance = run_moments(sd.Ancestral("large"), sde, unit, times64(0.9, 0.4, 0.05))
        assert_close(covariance, torch.eye(2, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@sdes
def test_ddim_follows_the_probability_flow(sde: sd.SDE) -> None:
    data, sizes, errors = gaussian_2d(), [32, 64, 128], []
    start = sde.prior_std * torch.randn(4, 2, dtype=torch.float64)
    for n in sizes:
        times = sd.log_snr_times(sde, n, 1e-3)
        x = start
        for t, s in pairwise(times):
            x = sd.DDIM().step(sde, data.score(sde), x, t, s, torch.zeros_like(x))
        exact = gaussian_flow(data, sde, start, times[0], times[-1])
        errors.append(float((x - exact).abs().max()))
    assert 0.85 < slope(sizes, errors) < 1.25, errors


@sdes
@predictors
def test_a_step_asks_for_the_score_once_and_treats_samples_alone(
    sde: sd.SDE, predictor: sd.Predictor
) -> None:
    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    t, s = times64(0.9, 0.5, 0.2), times64(0.8, 0.45, 0.01)
    score = CallCounter(mixture_2d().score(sde))
    batch = predictor.step(sde, score, x, t, s, z)
    assert score.calls == 1
    for i in range(3):
        one = predictor.step(sde, score, x[i : i + 1], t[i], s[i], z[i : i + 1])
        assert_close(one[0], batch[i], rtol=1e-10, atol=1e-10)


@predictors
def test_a_step_keeps_shape_and_type(predictor: sd.Predictor) -> None:
    for shape in ((2, 1), (2, 3, 4, 5)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(shape, dtype=dtype)
            y = predictor.step(
                sd.VP(), lambda x, t: -x, x, times64(0.5)[0], times64(0.4)[0], torch.randn_like(x)
            )
            assert y.shape == shape and y.dtype == dtype


def test_float32_steps_agree_with_float64() -> None:
    for sde in SDES.values():
        score = mixture_2d().score(sde)
        x, z = torch.randn(2, 4, 2, dtype=torch.float64)
        for predictor in PREDICTORS.values():
            t, s = times64(0.31)[0], times64(0.3)[0]
            double = predictor.step(sde, score, x, t, s, z)
            single = predictor.step(sde, score, x.float(), t, s, z.float())
            assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown variance 'smal'; did you mean 'small'\? allowed: large, "):
        sd.Ancestral(variance="smal")
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"eta must lie between 0 and 1, got {eta}"):
            sd.DDIM(eta=eta)


# A public reference implementation -------------------------------------------------------------------

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lin": lambda x, t: -x / (1 + t.reshape(-1, 1, 1, 1)),
    "tanh": lambda x, t: -torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1)),
}


@pytest.fixture(scope="module")
def updates() -> dict[str, Tensor]:
    with np.load(FIXTURES / "score_sde" / "updates.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def assert_matches(
    updates: dict[str, Tensor],
    name: str,
    n: int,
    method: str,
    step: Callable[[str, int, Tensor, Tensor, Tensor, Tensor], Tensor],
    *,
    rtol: float = 1e-5,
    skip_below: int = 0,
) -> None:
    """``step(score name, ..)`` gives the reference's ``x_mean`` without noise and ``x_new`` with its noise.

    Errors are relative to the largest element of the array, as the reference states its tolerance. Samples
    whose ``timestep_index`` is less than ``skip_below`` are left out.
    """
    compared = 0
    for kind in ("b1", "b3"):
        inputs = {k: updates[f"{name}/N{n}/inputs/{kind}/{k}"] for k in ("x", "t", "z", "timestep_index")}
        for which in SCORES:
            for case in range(len(inputs["x"])):
                x, t, z, index = (inputs[k][case] for k in ("x", "t", "z", "timestep_index"))
                kept = index >= skip_below
                for key, noise in (("x_mean", torch.zeros_like(z)), ("x_new", z)):
                    want = updates[f"{name}/N{n}/{method}/{which}/{kind}/{key}"][case].double()
                    ours = step(which, n, x.double(), t.double(), noise.double(), index)
                    error = (ours - want).abs().flatten(1).amax(1) / want.abs().max()
                    assert bool((error[kept] < rtol).all()), (kind, which, case, key, error)
                    compared += int(kept.sum())
    assert compared >= 30


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("n", [100, 1000])
def test_euler_maruyama_equals_the_reference(updates: dict[str, Tensor], name: str, n: int) -> None:
    """The reference's step is always 1/N; ours is ``t - s``, so ``s = t - 1/N`` (even beyond 0)."""

    def step(which: str, n: int, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        return sd.EulerMaruyama().step(SDES[name], SCORES[which], x, t, t - 1 / n, z)

    # The reference's sub-VP diffusion is a float32 difference, wrong by up to 1% near t = 0.
    assert_matches(updates, name, n, "euler_maruyama", step, skip_below=n // 20 if name == "subvp" else 0)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize(
    ("method", "predictor"),
    [
        ("reverse_diffusion", sd.ReverseDiffusion()),
        ("ancestral_sampling", sd.Ancestral(variance="large")),
    ],
)
def test_steps_on_the_chain_equal_the_reference_for_vp(
    updates: dict[str, Tensor], n: int, method: str, predictor: sd.Predictor
) -> None:
    """Row ``i`` of the reference's tables is the chain's step from grid point ``i + 1`` to ``i``."""
    chain = sd.DDPM(sd.VP().discretize(n))

    def step(which: str, n: int, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        def score(x: Tensor, grid_time: Tensor) -> Tensor:
            return SCORES[which](x, t)  # the reference asks at its own, continuous time

        grid = (index.double() + 1) / n
        return predictor.step(chain, score, x, grid, grid - 1 / n, z)

    assert_matches(updates, "vp", n, method, step)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize(
    ("method", "predictor"),
    [("reverse_diffusion", sd.ReverseDiffusion()), ("ancestral_sampling", sd.Ancestral())],
)
def test_steps_on_the_ladder_equal_the_reference_for_ve(
    updates: dict[str, Tensor], n: int, method: str, predictor: sd.Predictor
) -> None:
    """Row ``i`` of the ladder is the time ``i / (N - 1)``.

    Left out is its last step, to sigma = 0, which here is the final denoising.
    """

    def step(which: str, n: int, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        def score(x: Tensor, grid_time: Tensor) -> Tensor:
            return SCORES[which](x, t)

        grid = index.double() / (n - 1)
        return predictor.step(sd.VE(), score, x, grid, (index.double() - 1) / (n - 1), z)

    # Differences of the reference's float32 ladder: its rounding, over the relative step 8.5 / N.
    assert_matches(updates, "ve", n, method, step, skip_below=1, rtol=1e-5 if n == 100 else 5e-5)


def test_a_complete_run_equals_the_reference() -> None:
    """Ancestral sampling with its 32 noises and states, from its initial state to its final one."""
    settings = json.loads((FIXTURES / "score_sde" / "settings.json").read_text())["pc_runs"]
    with np.load(FIXTURES / "score_sde" / "pc_run_vp_ancestral.npz") as arrays:
        run = {k.rsplit("/", 1)[1]: torch.from_numpy(arrays[k]).double() for k in arrays.files}
    n = settings["N"]
    chain = sd.DDPM(sd.VP().discretize(n))
    reference_times = torch.linspace(1, 1e-3, n, dtype=torch.float64)
    asked: list[Tensor] = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        u = reference_times[n - round(float(t) * n)]
        alpha, variance = sd.VP().alpha(u), sd.VP().variance(u)
        return -(x - alpha * settings["mu"]) / (alpha**2 * settings["s0"] ** 2 + variance)

    out = sd.sample(
        chain,
        score,
        tuple(run["x_init"].shape),
        predictor=sd.Ancestral(variance="large"),
        times=torch.linspace(1, 0, n + 1, dtype=torch.float64),
        x_init=run["x_init"],
        noise=queue_noise(run["noise"]),
        dtype=torch.float64,
        denoise=False,
    )
    assert out.nfe == n == len(asked)
    assert_close(torch.stack(asked), run["model_inputs"], rtol=1e-4, atol=1e-4)
    assert_close(out.x, run["final_x"], rtol=1e-4, atol=1e-4)
