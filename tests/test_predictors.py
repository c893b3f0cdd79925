"""Predictors: formulas, exact cases, measured orders of convergence, a public implementation's steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
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
    queue_noise,
    run_moments,
    slope,
    times64,
)
from sde_diffusion.correctors import langevin_step

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
predictors = pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)


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
        sd.EulerMaruyama(stochasticity=0.0): x - (f * x - g2 / 2 * gradient) * h,
        sd.EulerMaruyama(stochasticity=2.0): (
            x - (f * x - 2.5 * g2 * gradient) * h + 2 * (g2 * h).sqrt() * z
        ),
        sd.ReverseDiffusion(): x + (x - ratio * x) + var * gradient + var.sqrt() * z,
        sd.ReverseDiffusion(stochasticity=0.0): x + (x - ratio * x) + var / 2 * gradient,
        sd.ReverseDiffusion(stochasticity=0.5): (
            x + (x - ratio * x) + 0.625 * var * gradient + 0.5 * var.sqrt() * z
        ),
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
    for predictor in (sd.EulerMaruyama, sd.ReverseDiffusion):
        for stochasticity in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"stochasticity must be at least 0, got {stochasticity}"):
                predictor(stochasticity=stochasticity)


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


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize(
    ("name", "method", "stochasticity"),
    [
        *((name, "euler_maruyama", 1.0) for name in ("vp", "subvp", "ve")),
        ("subvp", "reverse_diffusion", 1.0),
        ("subvp", "reverse_diffusion_probflow", 0.0),
    ],
)
def test_euler_maruyama_equals_the_reference(
    updates: dict[str, Tensor], n: int, name: str, method: str, stochasticity: float
) -> None:
    """The reference's step is always 1/N; ours is ``t - s``, so ``s = t - 1/N`` (even beyond 0).

    For sub-VP, which it gives no discretization of its own, its "reverse diffusion" is Euler's too.
    """
    predictor = sd.EulerMaruyama(stochasticity)

    def step(which: str, n: int, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        return predictor.step(SDES[name], SCORES[which], x, t, t - 1 / n, z)

    # The reference's sub-VP diffusion is a float32 difference, wrong by up to 1% near t = 0.
    assert_matches(updates, name, n, method, step, skip_below=n // 20 if name == "subvp" else 0)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize(
    ("method", "predictor"),
    [
        ("reverse_diffusion", sd.ReverseDiffusion()),
        ("reverse_diffusion_probflow", sd.ReverseDiffusion(stochasticity=0.0)),
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


class Ladder(sd.SDE):
    """The VE process on the levels of the reference, a step below the first of which lies ``sigma = 0``."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__(t_min=0.0, t_max=1.0)
        # Squares in float32, as the reference has them: the steps are small differences of them.
        levels = torch.cat([torch.zeros(1), sigmas.float().square()]).double()
        object.__setattr__(self, "levels", levels)

    def log_alpha(self, t: Tensor) -> Tensor:
        return 0 * t

    def variance(self, t: Tensor) -> Tensor:
        return self.levels[(t * (len(self.levels) - 1)).round().long()]


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize(
    ("method", "predictor"),
    [
        ("reverse_diffusion", sd.ReverseDiffusion()),
        ("reverse_diffusion_probflow", sd.ReverseDiffusion(stochasticity=0.0)),
        ("ancestral_sampling", sd.Ancestral()),
    ],
)
def test_steps_on_the_ladder_equal_the_reference_for_ve(
    updates: dict[str, Tensor], n: int, method: str, predictor: sd.Predictor
) -> None:
    """Row ``i`` of the reference's tables is the step from level ``i`` to ``i - 1``, from the first to sigma = 0."""
    with np.load(FIXTURES / "score_sde" / "sde_quantities.npz") as arrays:
        sigmas = torch.from_numpy(arrays[f"ve/N{n}/discrete_sigmas"])
    assert_close(sigmas.double(), sd.VE().discretize(n), rtol=1e-5, atol=0.0)
    ladder = Ladder(sigmas)

    def step(which: str, n: int, x: Tensor, t: Tensor, z: Tensor, index: Tensor) -> Tensor:
        def score(x: Tensor, grid_time: Tensor) -> Tensor:
            return SCORES[which](x, t)

        grid = (index.double() + 1) / n
        return predictor.step(ladder, score, x, grid, grid - 1 / n, z)

    assert_matches(updates, "ve", n, method, step)


@dataclass(frozen=True)
class AtReferenceTimes:
    """Predictor and corrector of a reference run at its own times, ``linspace(1, eps, N)``, with its own step of 1/N,
    for a loop whose ``t`` is ``(N - k) / N`` in step k."""

    n: int
    eps: float
    sde: sd.SDE
    predictor: sd.Predictor | None = None
    corrector: sd.Langevin | sd.AnnealedLangevin | None = None
    factors: Tensor | None = None  # of the Langevin steps: the reference's alpha_i
    steps: int = 1

    def time(self, t: Tensor) -> Tensor:
        return torch.linspace(1, self.eps, self.n, dtype=torch.float64)[self.n - round(float(t) * self.n)]

    def step(self, sde: sd.SDE, score: sd.Score, x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
        u, noise = self.time(t), rest[-1]
        if self.predictor is not None:
            return self.predictor.step(self.sde, lambda x, _: score(x, t), x, u, u - 1 / self.n, noise)
        gradient = score(x, t)
        if isinstance(self.corrector, sd.Langevin):
            eta = self.corrector.step_size(self.sde, gradient, u, noise)
        else:
            eta = self.corrector.step_size(self.sde, u)
        if self.factors is not None:
            eta = eta * self.factors[round(float(t) * self.n) - 1]
        return langevin_step(x, gradient, noise, eta)


RUNS = json.loads((FIXTURES / "score_sde" / "settings.json").read_text())


def test_no_run_of_the_reference_is_left_out() -> None:
    with np.load(FIXTURES / "score_sde" / "pc_runs.npz") as arrays:
        assert {key.rpartition("/")[0] for key in arrays.files} == set(RUNS["pc_runs"]["jobs"])


@pytest.mark.parametrize("job", RUNS["pc_runs"]["jobs"])
def test_a_complete_run_equals_the_reference(job: str) -> None:
    """With its noise and from its initial state: every state at which it asked for the score, and both final ones."""
    with np.load(FIXTURES / "score_sde" / "pc_runs.npz") as arrays:
        want = {
            k.rpartition("/")[2]: torch.from_numpy(arrays[k]) for k in arrays.files if k.startswith(job + "/")
        }
    settings, (name, method) = RUNS["pc_runs"], job.split("/")
    n, eps, process = settings["N"], RUNS["sampler_eps"][name], SDES[name]
    predictor, corrector = method.split("+")
    tables = {"vp": sd.DDPM(sd.VP().discretize(n)), "ve": Ladder(sd.VE().discretize(n))}
    own = AtReferenceTimes(n, eps, process)

    # What the reference steps with the tables of N levels is a step of ours on the chain or ladder; its
    # Euler-Maruyama step, and for sub-VP all others, are those of continuous time.
    on_table = predictor != "euler_maruyama" and name in tables
    steps = {
        "euler_maruyama": sd.EulerMaruyama(),
        "reverse_diffusion": sd.ReverseDiffusion() if on_table else sd.EulerMaruyama(),
        "ancestral_sampling": sd.Ancestral(variance="large" if name == "vp" else "small"),
    }
    correctors = {
        "none": None,
        "langevin": sd.Langevin.original(RUNS["snr"]),
        "ald": sd.AnnealedLangevin(RUNS["snr"]),
    }
    factors = 1 - sd.VP().discretize(n) if name == "vp" else None
    asked: list[Tensor] = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        alpha, variance = process.alpha(own.time(t)), process.variance(own.time(t))
        return -(x - alpha * settings["mu"]) / (alpha**2 * settings["s0"] ** 2 + variance)

    def run(noise: Tensor) -> sd.SampleOutput:
        asked.clear()
        chosen = correctors[corrector]
        return sd.sample(
            tables[name] if on_table else process,
            score,
            tuple(want["x_init"].shape),
            predictor=steps[predictor] if on_table else replace(own, predictor=steps[predictor]),
            correctors=() if chosen is None else (replace(own, corrector=chosen, factors=factors),),
            times=torch.linspace(1, 0, n + 1, dtype=torch.float64),
            x_init=want["x_init"],
            noise=queue_noise(noise.double()),
            dtype=torch.float64,
            denoise=False,
        )

    def close(ours: Tensor, theirs: Tensor) -> bool:
        return float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())

    out = run(want["noise"])
    assert out.nfe == len(want["model_inputs"]) == len(asked)
    # The reference always reports the evaluations of a run with a corrector.
    assert int(want["reported_nfe"]) == 2 * n
    for ours, theirs in zip(asked, want["model_inputs"], strict=True):
        assert close(ours, theirs)
    assert close(out.x, want["final_x"])
    silent = torch.cat([want["noise"][:-1], torch.zeros_like(want["noise"][:1])])
    assert close(run(silent).x, want["final_x_mean"])


def test_every_array_of_the_references_updates_is_compared(updates: dict[str, Tensor]) -> None:
    """The methods compared in this file and, for the correctors, in test_correctors."""
    steps = ("euler_maruyama", "reverse_diffusion", "reverse_diffusion_probflow")
    compared = {"vp": (*steps, "ancestral_sampling", "langevin", "ald"), "subvp": steps}
    compared["ve"] = compared["vp"]
    assert {tuple(key.split("/")[:3]) for key in updates} == {
        (name, f"N{n}", what)
        for name, methods in compared.items()
        for n in (100, 1000)
        for what in ("inputs", *methods)
    }
