"""Likelihoods against closed forms that are neither diagonal nor Gaussian; divergences against Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    SDES,
    CallCounter,
    gaussian_2d,
    gaussian_flow,
    mixture_2d,
    random_covariances,
    random_mixture,
    times64,
)
from sde_diffusion.likelihood import dequantization_noise, make_divergence

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
DATA = {
    "gaussian-8": random_mixture(1, (8,)),
    "mixture-8": random_mixture(3, (8,)),
    "images": random_mixture(2, (1, 4, 4)),
}


def likelihood(sde: sd.SDE, data: sd.GaussianMixture, x: Tensor, **options) -> sd.Likelihood:
    """With the true ``p_T`` in place of the prior, so that the only error is the solver's."""
    end = times64(sde.t_max)[0]
    settings = {"prior_log_prob": lambda z: data.marginal_log_prob(sde, z, end)} | options
    return sd.log_likelihood(sde, data.score(sde), x, **settings)


def samples(data: sd.GaussianMixture, n: int, seed: int = 0) -> Tensor:
    return data.sample(n, torch.Generator().manual_seed(seed))


# Exact answers -----------------------------------------------------------------------------------------


@sdes
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_exact_to_1e_4_nats_by_default_and_closer_if_asked(sde: sd.SDE, data: sd.GaussianMixture) -> None:
    x = samples(data, 4)
    exact = data.marginal_log_prob(sde, x, times64(sde.t_min)[0])
    assert_close(likelihood(sde, data, x).log_prob, exact, rtol=0, atol=1e-4)
    assert_close(likelihood(sde, data, x, rtol=1e-6, atol=1e-6).log_prob, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "subvp", "cosine"])
@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_density_of_the_data_itself(name: str, data: sd.GaussianMixture) -> None:
    """At ``t_min = 1e-5`` the noise in the data is too small to matter; for VE it is not (sigma_min = 0.01)."""
    x = samples(data, 4)
    assert_close(likelihood(SDES[name], data, x).log_prob, data.log_prob(x), rtol=0, atol=3e-4)


def test_float32_data() -> None:
    data, sde = DATA["mixture-8"], sd.VP()
    x = samples(data, 4)
    single = likelihood(sde, data, x.float())
    assert single.log_prob.dtype == single.latent.dtype == torch.float32
    assert_close(single.log_prob.double(), likelihood(sde, data, x).log_prob, rtol=0, atol=1e-4)


@sdes
def test_the_prior_enters_by_its_density_at_the_latent(sde: sd.SDE) -> None:
    data = mixture_2d()
    x = samples(data, 4)
    ours, with_truth = sd.log_likelihood(sde, data.score(sde), x), likelihood(sde, data, x)
    end = times64(sde.t_max)[0]
    difference = sde.prior_log_prob(ours.latent) - data.marginal_log_prob(sde, ours.latent, end)
    assert_close(ours.log_prob - with_truth.log_prob, difference, rtol=1e-9, atol=1e-9)
    assert float(difference.abs().max()) < 0.1


@sdes
def test_the_latent_is_where_the_flow_ends(sde: sd.SDE) -> None:
    data = gaussian_2d()
    x = samples(data, 4)
    out = likelihood(sde, data, x, rtol=1e-6, atol=1e-6)
    exact = gaussian_flow(data, sde, x, *times64(sde.t_min, sde.t_max))
    assert_close(out.latent, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_two_dimensional_density_integrates_to_one(name: str) -> None:
    """Whatever the prior, the flow is a bijection: a wrong sign or factor of the divergence would show here."""
    sde, data, n = SDES[name], mixture_2d(), 48
    axis = torch.linspace(-4.2, 4.8, n, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    out = sd.log_likelihood(sde, data.score(sde), grid, rtol=1e-3, atol=1e-3)
    total = float(out.log_prob.exp().sum()) * float(axis[1] - axis[0]) ** 2
    assert total == pytest.approx(1, abs=1e-3)


def test_a_linear_field_without_symmetry_in_closed_form() -> None:
    """``score = A x`` is no gradient; the flow is still a matrix exponential and its divergence a trace."""
    d, beta = 5, 3.0
    sde = sd.VP(beta_min=beta, beta_max=beta)
    a = torch.randn(d, d, dtype=torch.float64)
    generator = -0.5 * beta * (torch.eye(d, dtype=torch.float64) + a)
    x = torch.randn(3, d, dtype=torch.float64)
    out = sd.log_likelihood(sde, lambda x, t: x @ a.T, x, rtol=1e-9, atol=1e-9)
    span = sde.t_max - sde.t_min
    latent = x @ torch.linalg.matrix_exp(generator * span).T
    assert_close(out.latent, latent, rtol=1e-6, atol=1e-6)
    expected = sde.prior_log_prob(latent) + generator.trace() * span
    assert_close(out.log_prob, expected, rtol=1e-7, atol=1e-7)


# Divergences -------------------------------------------------------------------------------------------


class Warped:
    """A field that is no gradient, couples all elements, and differs between the samples of a batch."""

    def __init__(self, dims: int) -> None:
        self.a = torch.randn(dims, dims, dtype=torch.float64)
        self.b = torch.randn(dims, dims, dtype=torch.float64)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        rate = (1 + t).to(x.dtype)[:, None]
        bent = torch.sin(rate * (flat @ self.a.to(x.dtype).T)) @ self.b.to(x.dtype).T
        return (bent + flat**2).reshape(x.shape)

    def jacobian(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, D, D), by hand."""
        flat, rate = x.flatten(1), (1 + t)[:, None]
        inner = rate * torch.cos(rate * (flat @ self.a.T))
        return torch.einsum("ik,nk,kj->nij", self.b, inner, self.a) + torch.diag_embed(2 * flat)


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3, 1)])
@pytest.mark.parametrize("chunk", [1, 4, 6, 64])
def test_exact_divergence_is_the_trace_for_every_shape_and_chunk(shape: tuple[int, ...], chunk: int) -> None:
    field, x, t = Warped(6), torch.randn(4, *shape, dtype=torch.float64), times64(0.1, 0.4, 0.6, 0.9)
    value, divergence = sd.ExactDivergence(chunk)(field, t, x)
    jacobian = field.jacobian(t, x)
    automatic = torch.func.vmap(torch.func.jacrev(lambda x, t: field(t[None], x[None])[0]))(x, t)
    assert_close(automatic.reshape(4, 6, 6), jacobian, rtol=1e-9, atol=1e-9)
    assert_close(divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-10, atol=1e-10)
    assert_close(value, field(t, x), rtol=0, atol=0)
    assert not value.requires_grad and not divergence.requires_grad


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 4])
def test_hutchinson_is_unbiased_with_the_variance_of_theory(distribution: str, probes: int) -> None:
    """``2 ||S||_F^2 / K`` for Gaussian probes of the symmetric part S, without its diagonal for signs."""
    field, n = Warped(5), 20_000
    x, t = torch.randn(1, 5, dtype=torch.float64).expand(n, 5), times64(0.3).expand(n)
    estimator = sd.HutchinsonDivergence(probes, distribution)
    value, estimates = estimator(field, t, x, estimator.prepare(x, 0, 0))
    jacobian = field.jacobian(t[:1], x[:1])[0]
    symmetric = (jacobian + jacobian.T) / 2
    squares = symmetric.square()
    if distribution == "rademacher":
        squares = squares - torch.diag(squares.diag())
    variance = 2 * float(squares.sum()) / probes
    assert float(estimates.mean()) == pytest.approx(float(jacobian.trace()), abs=3 * (variance / n) ** 0.5)
    # The standard error of a variance, with room for the kurtosis of a quadratic form.
    assert float(estimates.var()) == pytest.approx(variance, rel=5 * (2 / n) ** 0.5 * 2)
    assert_close(value, field(t, x), rtol=0, atol=0)


@pytest.mark.parametrize("divergence", ["hutchinson", "gaussian"])
def test_estimated_likelihoods_are_unbiased_and_spread_as_one_over_the_probes(divergence: str) -> None:
    data, sde, n = random_mixture(2, (3,)), sd.VP(), 200
    x = samples(data, 1)
    exact = likelihood(sde, data, x).log_prob
    spread = {}
    for probes in (1, 4):
        repeats = likelihood(
            sde, data, x.expand(n, 3), divergence=divergence, probes=probes, rtol=1e-4, atol=1e-4
        ).log_prob
        spread[probes] = float(repeats.var())
        assert float(repeats.mean() - exact) == pytest.approx(0, abs=3 * (spread[probes] / n) ** 0.5 + 1e-3)
    # A ratio of two variances from 200 each has a relative standard error near 2 / sqrt(200) = 0.14, or more
    # for the heavy tails of Gaussian probes.
    assert 2 < spread[1] / spread[4] < 8


def test_signs_are_exact_where_the_jacobian_is_diagonal_and_normals_are_not() -> None:
    """Why a diagonal Gaussian is no test of an estimator."""
    data = sd.GaussianMixture(
        torch.ones(1), torch.zeros(1, 4), torch.diag(torch.tensor([0.2, 0.5, 1.0, 2.0]))[None]
    )
    full = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 4), random_covariances(1, 4))
    sde = sd.SubVP()
    for mixture, is_exact in ((data, True), (full, False)):
        x = samples(mixture, 3)
        exact = likelihood(sde, mixture, x, rtol=1e-6, atol=1e-6).log_prob
        signs = likelihood(sde, mixture, x, divergence="hutchinson", rtol=1e-6, atol=1e-6).log_prob
        normals = likelihood(sde, mixture, x, divergence="gaussian", rtol=1e-6, atol=1e-6).log_prob
        assert (float((signs - exact).abs().max()) < 1e-5) is is_exact
        assert float((normals - exact).abs().max()) > 1e-3


def test_probes_are_fixed_along_the_path_and_belong_to_the_sample() -> None:
    data, sde = random_mixture(2, (3,)), sd.VP()
    x = samples(data, 5)

    def estimate(rows: slice, first: int = 0, **options) -> Tensor:
        options = {"divergence": "hutchinson", "seed": 3, "rtol": 1e-4, "atol": 1e-4} | options
        return likelihood(sde, data, x[rows], first_index=first, **options).log_prob

    whole = estimate(slice(0, 5))
    assert torch.equal(estimate(slice(0, 5)), whole)
    assert_close(torch.cat([estimate(slice(0, 2)), estimate(slice(2, 5), 2)]), whole, rtol=1e-9, atol=1e-9)
    assert float((estimate(slice(0, 5), seed=4) - whole).abs().max()) > 1e-3
    assert float((estimate(slice(0, 5), 5) - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    data, sde = mixture_2d(), SDES[name]
    x = torch.cat([samples(data, 2), times64(6.0, -6.0)[None]])
    whole = likelihood(sde, data, x, rtol=1e-4, atol=1e-4)
    for i in range(3):
        alone = likelihood(sde, data, x[i : i + 1], rtol=1e-4, atol=1e-4)
        assert_close(alone.log_prob[0], whole.log_prob[i], rtol=1e-9, atol=1e-9)
        assert int(alone.nfe_per_sample) == int(whole.nfe_per_sample[i])


# Cost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "probes"), [("exact", 1), ("hutchinson", 1), ("hutchinson", 5), ("gaussian", 2)]
)
def test_value_and_derivative_share_one_evaluation_of_the_network(divergence: str, probes: int) -> None:
    data, sde = random_mixture(2, (4,)), sd.VP()
    score = CallCounter(data.score(sde))
    out = sd.log_likelihood(sde, score, samples(data, 3), divergence=divergence, probes=probes)
    assert out.nfe == score.calls == int(out.nfe_per_sample.max())


@pytest.mark.parametrize(
    "solver", [sd.TorchDiffEq("dopri5", 1e-6, 1e-6), sd.Heun(sd.log_snr_times(sd.VP(), 200))]
)
def test_any_solver_will_do(solver) -> None:
    data, sde = random_mixture(2, (3,)), sd.VP()
    x = samples(data, 2)
    ours = likelihood(sde, data, x)
    theirs = likelihood(sde, data, x, solver=solver)
    assert_close(theirs.log_prob, ours.log_prob, rtol=0, atol=1e-3)
    assert int(theirs.nfe_per_sample[0]) == theirs.nfe


def test_a_network_inside_and_the_callers_gradients() -> None:
    """Under ``no_grad`` and with frozen weights the divergence still sees the derivative in the state."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 3))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return self.layers(x) * torch.cos(c)[:, None]

    model = sd.ScoreModel(Net(), sd.VP(), sd.V)
    x = torch.randn(2, 3)
    free = sd.log_likelihood(sd.VP(), model, x).log_prob
    assert not free.requires_grad
    for p in model.parameters():
        p.requires_grad_(False)
        assert p.grad is None
    with torch.no_grad():
        assert_close(sd.log_likelihood(sd.VP(), model, x).log_prob, free)
    t, field = torch.full((2,), 0.5), sd.probability_flow(sd.VP(), model)
    jacobian = torch.autograd.functional.jacobian(lambda x: field(t, x), x)
    _, divergence = sd.ExactDivergence()(field, t, x)
    assert_close(divergence, torch.einsum("nini->n", jacobian), rtol=1e-4, atol=1e-5)


# Bits per dimension ------------------------------------------------------------------------------------


def test_offset_of_bits_per_dim() -> None:
    """256 levels on [-1, 1]: +7, not the +8 of data on [0, 1]; 17 levels: log2(8.5)."""
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(sd.bits_per_dim(zero, 10)) == 7
    assert float(sd.bits_per_dim(zero, 10, levels=17)) == pytest.approx(math.log2(8.5), rel=1e-14)
    assert float(sd.bits_per_dim(zero, 10, levels=2)) == 0
    nats = times64(-100.0, 20.0)
    assert_close(sd.bits_per_dim(nats, 64) - 7, -nats / (64 * math.log(2)))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_data_cost_the_logarithm_of_the_levels(levels: int) -> None:
    dims = 12
    log_prob = torch.full((3,), -dims * math.log(2), dtype=torch.float64)  # density 1/2 on [-1, 1]
    expected = torch.full((3,), math.log2(levels), dtype=torch.float64)
    assert_close(sd.bits_per_dim(log_prob, dims, levels), expected)


def test_the_code_length_of_a_histogram_is_its_entropy() -> None:
    """A density constant on each cell: no loss by dequantization, so bits/dim are ``-log2`` of the probabilities."""
    levels = 17
    probabilities = torch.rand(levels, dtype=torch.float64)
    probabilities = probabilities / probabilities.sum()
    density = probabilities * levels / 2  # on cells of width 2 / levels
    assert_close(sd.bits_per_dim(density.log(), 1, levels), -probabilities.log2())


def test_bits_do_not_depend_on_the_scale_of_the_data() -> None:
    """The same images on [-1, 1], and in units of grey levels, where a cell has width 1 and bits are plain."""
    levels, dims = 17, 4
    data = random_mixture(2, (dims,))
    x = samples(data, 3)
    in_levels = sd.GaussianMixture(
        data.weights, (data.means + 1) * levels / 2, data.covariances * (levels / 2) ** 2
    )
    plain = -in_levels.log_prob((x + 1) * levels / 2) / (dims * math.log(2))
    assert_close(sd.bits_per_dim(data.log_prob(x), dims, levels), plain)


def test_dequantization_noise_is_uniform_and_belongs_to_the_image() -> None:
    noise = dequantization_noise((50, 1, 8, 8), seed=1, dtype=torch.float64)
    assert noise.shape == (50, 1, 8, 8) and float(noise.min()) >= 0 and float(noise.max()) < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / noise.numel()) ** 0.5)
    part = dequantization_noise((3, 1, 8, 8), seed=1, first_index=10, dtype=torch.float64)
    assert torch.equal(part, noise[10:13])
    for other in ({"draw": 1}, {"seed": 2}):
        different = dequantization_noise((50, 1, 8, 8), **({"seed": 1, "dtype": torch.float64} | other))
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), different.flatten()]))[0, 1])) < 0.08
    assert dequantization_noise((2, 3)).dtype == torch.float32


# Errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"x": torch.zeros(3)},
            r"x must be float32 or float64 of shape \(B, \*D\), got torch.float32 \(3,\)",
        ),
        ({"x": torch.zeros(3, 2, dtype=torch.float16)}, "x must be float32 or float64"),
        ({"x": torch.zeros(3, 2, dtype=torch.uint8)}, "x must be float32 or float64"),
        ({"x": torch.tensor([[0.0, math.nan]])}, "not finite"),
        ({"x": torch.tensor([[0.0, math.inf]])}, "not finite"),
        (
            {"divergence": "exat"},
            r"unknown divergence 'exat'; did you mean 'exact'\? allowed: exact, gaussian",
        ),
        ({"divergence": "hutchinson", "probes": 0}, "probes must be an integer >= 1, got 0"),
        ({"rtol": 0.0}, "tolerances must be positive"),
        ({"seed": -1, "divergence": "hutchinson"}, "a seed must be an integer from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    settings = {"x": torch.zeros(2, 2)} | options
    with pytest.raises(ValueError, match=message):
        sd.log_likelihood(sd.VP(), gaussian_2d().score(sd.VP()), settings.pop("x"), **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.ExactDivergence(chunk=0), "chunk must be an integer >= 1, got 0"),
        (lambda: sd.ExactDivergence(chunk=2.5), "chunk must be an integer >= 1, got 2.5"),
        (lambda: sd.HutchinsonDivergence(probes=1.5), "probes must be an integer >= 1, got 1.5"),
        (lambda: sd.HutchinsonDivergence(distribution="normal"), "unknown probe distribution 'normal'"),
        (lambda: make_divergence("trace"), "unknown divergence 'trace'"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 3, levels=1), "levels must be an integer >= 2, got 1"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 3, levels=255.5), "levels must be an integer >= 2"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 0), "num_dims must be an integer >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_score_that_is_not_finite_names_the_samples() -> None:
    def score(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1, keepdim=True) > 50, torch.full_like(x, math.nan), -x)

    x = torch.zeros(3, 2)
    x[1] = 100.0
    with pytest.raises(sd.SolverError, match="samples 1"):
        sd.log_likelihood(sd.VP(), score, x)
