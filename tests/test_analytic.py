"""Mixtures against torch.distributions and autograd: the exact answers other tests rest on must be exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, assert_moments, marginal_moments, mixture_2d, random_mixture, times64


def reference(mixture: sd.GaussianMixture, alpha: float = 1.0, variance: float = 0.0) -> MixtureSameFamily:
    eye = torch.eye(mixture.means.shape[1], dtype=torch.float64)
    components = MultivariateNormal(alpha * mixture.means, alpha**2 * mixture.covariances + variance * eye)
    return MixtureSameFamily(Categorical(mixture.weights), components)


@pytest.mark.parametrize(("k", "shape"), [(1, (2,)), (3, (2,)), (4, (8,)), (2, (1, 4, 4)), (2, (1,))])
def test_log_prob_is_that_of_a_mixture_of_multivariate_normals(k: int, shape: tuple[int, ...]) -> None:
    mixture = random_mixture(k, shape)
    x = 2 * torch.randn(7, *shape, dtype=torch.float64)
    assert_close(mixture.log_prob(x), reference(mixture).log_prob(x.flatten(1)), rtol=1e-10, atol=1e-10)
    assert mixture.log_prob(x.float()).dtype == torch.float32


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_marginals_are_the_diffused_mixture(sde: sd.SDE, shape: tuple[int, ...]) -> None:
    mixture = random_mixture(3, shape)
    x = 2 * torch.randn(4, *shape, dtype=torch.float64)
    t = times64(1e-5, 0.1, 0.5, sde.t_max)
    ours = mixture.marginal_log_prob(sde, x, t)
    for i in range(4):
        law = reference(mixture, float(sde.alpha(t[i])), float(sde.variance(t[i])))
        assert_close(ours[i], law.log_prob(x[i].flatten()), rtol=1e-9, atol=1e-9)
        assert_close(mixture.marginal_log_prob(sde, x[i : i + 1], t[i])[0], ours[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_score_is_the_gradient_of_the_log_density(sde: sd.SDE, shape: tuple[int, ...]) -> None:
    mixture = random_mixture(3, shape)
    x = torch.randn(5, *shape, dtype=torch.float64).requires_grad_()
    t = torch.linspace(1e-3, sde.t_max, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixture.marginal_log_prob(sde, x, t).sum(), x)
    score = mixture.score(sde)
    assert_close(score(x, t).detach(), gradient, rtol=1e-9, atol=1e-9)
    for i in range(5):
        one = score(x[i : i + 1], t[i]).detach()
        assert one.shape == (1, *shape)
        assert_close(one[0], gradient[i], rtol=1e-9, atol=1e-9)


def test_score_keeps_the_type_of_the_state_and_is_differentiable() -> None:
    mixture, sde = mixture_2d(), sd.VP()
    x = torch.randn(3, 2).requires_grad_()
    score = mixture.score(sde)(x, torch.tensor(0.3))
    assert score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), x)
    assert bool(gradient.abs().sum() > 0)


def test_far_away_the_score_is_finite_and_points_home() -> None:
    x = times64(1e4, -1e4)[None]
    score = mixture_2d().score(sd.VP())(x, times64(1e-5))
    assert bool(torch.isfinite(score).all()) and float((score * x).sum()) < 0


def test_samples_have_the_moments_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(3)
    for mixture in (mixture_2d(), random_mixture(3, (2, 2))):
        x = mixture.sample(20_000, generator)
        assert x.dtype == torch.float64 and x.shape == (20_000, *mixture.shape)
        assert_moments(x, mixture, 4)


def test_samples_come_from_the_generator() -> None:
    mixture = mixture_2d()
    first, second = (mixture.sample(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, mixture.sample(5, torch.Generator().manual_seed(2)))


def test_diffused_samples_have_the_marginal_moments() -> None:
    mixture, sde, t = mixture_2d(), sd.SubVP(), times64(0.3)[0]
    x0 = mixture.sample(40_000, torch.Generator().manual_seed(0))
    x = sde.perturb(x0, t, torch.randn_like(x0))
    mean, covariance = marginal_moments(mixture, sde, t)
    assert float((x.mean(0) - mean).abs().max()) < 4 * float(x.std(0).max()) / 200
    assert float((x.T.cov() - covariance).abs().max()) < 4 * 3**0.5 * float(covariance.max()) / 200


def test_moments_and_posterior_weights() -> None:
    mixture = mixture_2d()
    assert_close(mixture.mean, times64(0.5 * 2 - 0.3 * 1.5, 0.5 + 0.15 - 0.4), rtol=1e-6, atol=0)
    second = sum(
        w * (c + torch.outer(m, m))
        for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    )
    assert_close(mixture.covariance, second - torch.outer(mixture.mean, mixture.mean))
    posterior = mixture.posterior_weights(mixture.means)
    assert_close(posterior.sum(1), torch.ones(3, dtype=torch.float64))
    assert bool((posterior.diag() > 0.95).all())


def test_weights_are_normalised() -> None:
    mixture = sd.GaussianMixture(torch.tensor([2.0, 6.0]), torch.zeros(2, 1), torch.ones(2, 1, 1))
    assert_close(mixture.weights, times64(0.25, 0.75))


def test_a_point_is_a_mixture_whose_noisy_marginals_are_normal() -> None:
    point = sd.GaussianMixture(torch.ones(1), torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2, 2))
    sde, t = sd.VP(), times64(0.4)[0]
    x = torch.randn(3, 2, dtype=torch.float64)
    expected = -(x - sde.alpha(t) * point.means[0]) / sde.variance(t)
    assert_close(point.score(sde)(x, t), expected)
    assert_close(point.sample(2), point.means.expand(2, 2))
    for function in (point.log_prob, point.posterior_weights):
        with pytest.raises(ValueError, match="singular covariance has no density"):
            function(x)


I2 = torch.eye(2)[None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2), torch.zeros(1, 2), I2), r"means \(K, \*D\), got \(2,\) and \(1, 2\)"),
        ((torch.ones(1), torch.zeros(1), I2), "need weights"),
        ((torch.ones(1, 1), torch.zeros(1, 2), I2), "need weights"),
        ((torch.ones(1), torch.zeros(1, 3), I2), r"covariances must have shape \(1, 3, 3\), got \(1, 2, 2\)"),
        ((torch.tensor([0.0]), torch.zeros(1, 2), I2), r"weights must be positive, got \[0.0\]"),
        ((torch.tensor([float("nan")]), torch.zeros(1, 2), I2), "weights must be positive"),
        ((torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
        ((torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])), "semi-definite.* -1"),
    ],
)
def test_what_is_no_mixture_is_refused(arguments: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.GaussianMixture(*arguments)
