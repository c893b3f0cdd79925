"""Correctors: the step sizes, the stationary laws, and the mistakes of the original rule in few dimensions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import FIXTURES, SDES, CallCounter, gaussian_2d, mixture_2d, push_moments, times64
from sde_diffusion.correctors import langevin_step

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
BOTH = {"langevin": sd.Langevin(snr=0.1), "annealed": sd.AnnealedLangevin(snr=0.1)}
both = pytest.mark.parametrize("corrector", BOTH.values(), ids=BOTH)
PLAIN = sd.Langevin(snr=0.16, shrinkage=0.0, cap=None)


@sdes
def test_annealed_steps_are_twice_the_squared_snr_times_the_variance(sde: sd.SDE) -> None:
    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    t, score = times64(0.1, 0.5, 0.9), mixture_2d().score(sde)
    eta = 2 * 0.16**2 * sde.variance(t)[:, None]
    ours = sd.AnnealedLangevin(snr=0.16).step(sde, score, x, t, z)
    assert_close(ours, x + eta * score(x, t) + (2 * eta).sqrt() * z, rtol=1e-12, atol=1e-12)


@sdes
def test_the_plain_rule_is_the_signal_to_noise_ratio_of_each_sample(sde: sd.SDE) -> None:
    """``eta ||score|| / (sqrt(2 eta) ||z||) = snr``: what the ratio of signal to noise in a step should be."""
    x, z = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = times64(0.5)[0]

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -torch.arange(1.0, 6.0).double().reshape(-1, 1, 1, 1) * x

    eta = PLAIN.step_size(sde, score(x, t), t, z)
    signal = eta * score(x, t).flatten(1).norm(dim=1)
    noise = (2 * eta).sqrt() * z.flatten(1).norm(dim=1)
    assert_close(signal / noise, torch.full((5,), 0.16, dtype=torch.float64))
    eta = eta.reshape(-1, 1, 1, 1)
    assert_close(PLAIN.step(sde, score, x, t, z), x + eta * score(x, t) + (2 * eta).sqrt() * z)


@sdes
def test_the_default_rule_has_its_stated_formula(sde: sd.SDE) -> None:
    gradient, z = torch.randn(2, 4, 3, dtype=torch.float64)
    gradient = gradient / sde.sigma(0.4)
    t, k = times64(0.4)[0], 256.0
    variance = sde.variance(t)
    expected = 0.02 * variance * (z.square().sum(1) + k) / (variance * gradient.square().sum(1) + k)
    assert_close(sd.Langevin(snr=0.1).step_size(sde, gradient, t, z), expected)
    per_sample_time = t.expand(4)
    assert_close(sd.Langevin(snr=0.1).step_size(sde, gradient, per_sample_time, z), expected)


def test_in_many_dimensions_shrinkage_changes_little() -> None:
    """Images of 3 x 64 x 64 whose score is mostly noise: the default is the plain rule within 1%."""
    sde, t = sd.VP(), times64(0.3)[0]
    gradient, z = torch.randn(2, 2, 3, 64, 64, dtype=torch.float64)
    gradient = 0.8 * gradient / sde.sigma(t)
    default = sd.Langevin(snr=0.16).step_size(sde, gradient, t, z)
    assert_close(default, PLAIN.step_size(sde, gradient, t, z), rtol=0.02, atol=0)


@sdes
@pytest.mark.parametrize("shrinkage", [0.0, 256.0])
def test_where_the_score_vanishes_the_step_is_capped(sde: sd.SDE, shrinkage: float) -> None:
    zero, z = torch.zeros(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    t = times64(0.2)[0]
    corrector = sd.Langevin(snr=0.16, shrinkage=shrinkage, cap=0.5)
    eta = corrector.step_size(sde, zero, t, z)
    assert bool((eta > 0).all()) and bool((eta <= 0.5 * sde.variance(t)).all())
    moved = corrector.step(sde, lambda x, t: zero, zero, t, z)
    assert_close(moved, (2 * eta).sqrt()[:, None] * z)
    if shrinkage == 0:
        assert_close(eta, 0.5 * sde.variance(t).expand(2))


@sdes
def test_norms_are_those_of_each_sample_unless_asked_otherwise(sde: sd.SDE) -> None:
    x, z = torch.randn(2, 4, 2, dtype=torch.float64)
    t, score = times64(0.9, 0.5, 0.3, 0.1), mixture_2d().score(sde)
    for corrector in (sd.Langevin(), PLAIN, sd.AnnealedLangevin()):
        batch = corrector.step(sde, score, x, t, z)
        for i in range(4):
            one = corrector.step(sde, score, x[i : i + 1], t[i], z[i : i + 1])
            assert_close(one[0], batch[i], rtol=1e-10, atol=1e-10)
    together = sd.Langevin.original().step(sde, score, x, t, z)
    alone = sd.Langevin.original().step(sde, score, x[:1], t[:1], z[:1])
    assert float((together[0] - alone[0]).abs().max()) > 1e-4


def test_the_original_rule_uses_means_of_norms_over_the_batch() -> None:
    original = sd.Langevin.original(snr=0.2, steps=3)
    assert (original.norm, original.shrinkage, original.cap, original.steps) == ("batch", 0.0, None, 3)
    gradient, z = torch.randn(2, 6, 5, dtype=torch.float64)
    eta = original.step_size(sd.VE(), gradient, times64(0.5)[0], z)
    expected = 2 * (0.2 * z.norm(dim=1).mean() / gradient.norm(dim=1).mean()) ** 2
    assert_close(eta, expected.expand(6))


@sdes
@both
def test_a_step_asks_for_the_score_once_and_keeps_shape_and_type(
    sde: sd.SDE, corrector: sd.Corrector
) -> None:
    for shape in ((2, 1), (2, 3, 4, 5)):
        for dtype in (torch.float32, torch.float64):
            score = CallCounter(lambda x, t: -x)
            x = torch.randn(shape, dtype=dtype)
            y = corrector.step(sde, score, x, times64(1e-5)[0], torch.randn_like(x))
            assert score.calls == 1 and y.shape == x.shape and y.dtype == dtype
            assert bool(torch.isfinite(y).all())


# Stationary laws ---------------------------------------------------------------------------------------


@sdes
def test_annealed_langevin_has_the_stationary_covariance_of_its_recursion(sde: sd.SDE) -> None:
    """Along an eigenvector of variance v: ``v' = (1 - eta/v)^2 v' + 2 eta``, so ``v' = v / (1 - eta / (2 v))``."""
    data, t = gaussian_2d(), times64(0.3)[0]
    corrector, score = sd.AnnealedLangevin(snr=0.3), data.score(sde)
    eigenvalues, vectors = torch.linalg.eigh(data.covariances[0])
    v = sde.alpha(t) ** 2 * eigenvalues + sde.variance(t)
    expected = vectors @ torch.diag(v / (1 - corrector.step_size(sde, t) / (2 * v))) @ vectors.T
    mean = sde.alpha(t) * data.means[0]
    after = push_moments(lambda x, z: corrector.step(sde, score, x, t, z), mean, expected)
    assert_close(after, (mean, expected), rtol=1e-10, atol=1e-12)
    wide = push_moments(lambda x, z: corrector.step(sde, score, x, t, z), mean + 1, 2 * expected)
    assert float((wide[0] - mean).norm()) < 2**0.5
    assert float((wide[1] - expected).trace()) < float(expected.trace())


def long_chain(
    corrector: sd.Langevin, x: Tensor, sde: sd.SDE, t: Tensor, score: Callable, steps: int
) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = corrector.step(sde, score, x, t, torch.randn(x.shape, dtype=x.dtype, generator=generator))
    return x


def test_the_plain_rule_bends_a_low_dimensional_target_and_the_default_does_not() -> None:
    """Chains started in ``p_t`` itself must stay there. Under the plain rule ``||score||`` near a mode is small, the
    step unbounded, and the modes are emptied: the median radius leaves by hundreds of standard errors.
    """
    sde, n, snr = sd.VP(), 10_000, 0.05
    unit = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    t, start = times64(0.5)[0], torch.randn(n, 2, dtype=torch.float64)  # p_t is N(0, I) at every t
    score = unit.score(sde)

    def inside(x: Tensor) -> float:
        """The share within the median radius, sqrt(2 log 2): 1/2, with standard error 0.5 / sqrt(n)."""
        return float((x.square().sum(1) < 2 * np.log(2)).double().mean())

    se = 0.5 / n**0.5
    ours = long_chain(sd.Langevin(snr=snr), start, sde, t, score, 100)
    assert abs(inside(ours) - 0.5) < 4 * se
    second = float(ours.square().sum(1).mean())
    # E||x||^2 = 2, standard error 2 / sqrt(n). The rule's own bias, by its noise norms, is (D + 2 + k) / (D + k) - 1
    # = 0.8%, and by its finite step snr^2 = 0.25%: together half a standard error here.
    assert abs(second - 2 * 1.0105) < 4 * 2 / n**0.5
    annealed = long_chain(sd.AnnealedLangevin(snr=snr), start, sde, t, score, 100)
    assert abs(inside(annealed) - 0.5) < 4 * se
    plain = long_chain(sd.Langevin(snr=snr, shrinkage=0.0, cap=None), start, sde, t, score, 100)
    assert abs(inside(plain) - 0.5) > 20 * se
    capped = long_chain(sd.Langevin(snr=snr, shrinkage=0.0), start, sde, t, score, 100)
    assert abs(inside(capped) - 0.5) > 20 * se  # a cap alone bounds the damage, but does not undo it


def test_langevin_step_is_its_formula() -> None:
    x, gradient, z = torch.randn(3, 4, 2, dtype=torch.float64)
    eta = times64(0.1, 0.2, 0.3, 0.4)
    e = eta[:, None]
    assert_close(langevin_step(x, gradient, z, eta), x + e * gradient + (2 * e).sqrt() * z)
    assert_close(langevin_step(x, gradient, z, eta[0]), x + 0.1 * gradient + 0.2**0.5 * z)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.Langevin(snr=0), "signal-to-noise ratio must be positive, got 0"),
        (lambda: sd.Langevin(snr=float("nan")), "signal-to-noise ratio must be positive, got nan"),
        (lambda: sd.AnnealedLangevin(snr=-1), "signal-to-noise ratio must be positive, got -1"),
        (lambda: sd.Langevin(steps=0), "integer number of steps >= 1, got 0"),
        (lambda: sd.AnnealedLangevin(steps=1.5), "integer number of steps >= 1, got 1.5"),
        (
            lambda: sd.Langevin(norm="bacth"),
            r"unknown norm 'bacth'; did you mean 'batch'\? allowed: batch, sample",
        ),
        (lambda: sd.Langevin(shrinkage=-1), "shrinkage must be at least 0, got -1"),
        (lambda: sd.Langevin(cap=0), "cap must be positive, or None for no cap, got 0"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# A public reference implementation -----------------------------------------------------------------------

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lin": lambda x, t: -x / (1 + t.reshape(-1, 1, 1, 1)),
    "tanh": lambda x, t: -torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1)),
}


@pytest.fixture(scope="module")
def updates() -> dict[str, Tensor]:
    with np.load(FIXTURES / "score_sde" / "updates.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("kind", ["b1", "b3"])
@pytest.mark.parametrize("which", SCORES)
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_langevin_equals_the_reference(
    updates: dict[str, Tensor], name: str, n: int, kind: str, which: str
) -> None:
    """The reference multiplies the step by ``alpha_i``: 1 for VE, ``1 - beta_i`` of the chain for VP.

    That factor scales the whole step, so the reference's VP step is ours with ``eta`` times ``1 - beta_i``.
    """
    sde, original = SDES[name], sd.Langevin.original(snr=0.16)
    inputs = {k: updates[f"{name}/N{n}/inputs/{kind}/{k}"] for k in ("x", "t", "z", "timestep_index")}
    for case in range(len(inputs["x"])):
        x, t, z, index = (inputs[k][case] for k in ("x", "t", "z", "timestep_index"))
        x, t, z = x.double(), t.double(), z.double()
        gradient = SCORES[which](x, t)
        eta = original.step_size(sde, gradient, t, z)
        if name == "vp":
            eta = eta * (1 - sd.VP().discretize(n)[index])
        mean = langevin_step(x, gradient, torch.zeros_like(z), eta)
        for key, ours in (("x_mean", mean), ("x_new", langevin_step(x, gradient, z, eta))):
            want = updates[f"{name}/N{n}/langevin/{which}/{kind}/{key}"][case].double()
            assert float((ours - want).abs().max() / want.abs().max()) < 1e-5
        if name == "ve":
            assert_close(original.step(sde, SCORES[which], x, t, z), ours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("kind", ["b1", "b3"])
@pytest.mark.parametrize("which", SCORES)
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_annealed_langevin_equals_the_reference(
    updates: dict[str, Tensor], name: str, n: int, kind: str, which: str
) -> None:
    """No norms here, so every sample is compared alone. For VP with the reference's ``1 - beta_i`` again."""
    sde, corrector = SDES[name], sd.AnnealedLangevin(snr=0.16)
    inputs = {k: updates[f"{name}/N{n}/inputs/{kind}/{k}"] for k in ("x", "t", "z", "timestep_index")}
    for case in range(len(inputs["x"])):
        x, t, z, index = (inputs[k][case] for k in ("x", "t", "z", "timestep_index"))
        x, t, z = x.double(), t.double(), z.double()
        eta = corrector.step_size(sde, t)
        if name == "vp":
            eta = eta * (1 - sd.VP().discretize(n)[index])
        gradient = SCORES[which](x, t)
        mean = langevin_step(x, gradient, torch.zeros_like(z), eta)
        for key, ours in (("x_mean", mean), ("x_new", langevin_step(x, gradient, z, eta))):
            want = updates[f"{name}/N{n}/ald/{which}/{kind}/{key}"][case].double()
            # The reference's VP standard deviation is a float32 1 - exp(.), 1e-4 wrong at t = 1e-3.
            rtol = 2e-5 if name == "vp" else 1e-5
            assert float((ours - want).abs().max() / want.abs().max()) < rtol
        if name == "ve":
            assert_close(corrector.step(sde, SCORES[which], x, t, z), ours, rtol=1e-12, atol=1e-12)
