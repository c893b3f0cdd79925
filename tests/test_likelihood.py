"""Likelihoods against closed forms that are neither diagonal nor Gaussian; divergences against Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    LIKELIHOOD_DATA as DATA,
)
from problems import (
    SDES,
    CallCounter,
    gaussian_2d,
    gaussian_flow,
    mixture_2d,
    random_covariances,
    random_mixture,
    samples,
    times64,
)
from problems import exact_likelihood as likelihood
from sde_diffusion.likelihood import dequantization_noise
from shared_data import shared_path
from test_divergence import variance as trace_variance

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)

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


class LinearNet(nn.Module):
    """``net(x, c) = A x``, whatever the noise level; A is not symmetric."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (x.flatten(1).double() @ self.a.T).reshape(x.shape)


@pytest.mark.parametrize(("name", "divergence"), [*((name, "exact") for name in SDES), ("vp", "orthogonal")])
def test_a_linear_network_without_symmetry_for_every_process(name: str, divergence: str) -> None:
    """``eps_hat = A x / c(t)`` with ``c^2 = alpha^2 + sigma^2``: drifts at different times commute, so the flow is
    ``x_T = (alpha_T / alpha_0) exp(kappa A) x_0`` with ``kappa = 1/2 int g^2 / (sigma c) dt``, here by quadrature.
    As many orthogonal probes as dimensions are exact too."""
    sde, generator = SDES[name], torch.Generator().manual_seed(3)
    a = 0.15 * torch.randn(4, 4, generator=generator, dtype=torch.float64) + 0.1 * torch.eye(4).double()
    model = sd.ScoreModel(LinearNet(a), sde, sd.NOISE, sigma_data=1.0).requires_grad_(False)
    x = torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    out = sd.log_likelihood(sde, model, x, divergence=divergence, probes=4)

    t = torch.logspace(math.log10(sde.t_min), math.log10(sde.t_max), 200_001, dtype=torch.float64)
    t = t.clamp(sde.t_min, sde.t_max)
    rate = 0.5 * sde.g2(t) / (sde.sigma(t) * (sde.alpha(t) ** 2 + sde.variance(t)).sqrt())
    kappa = float(torch.trapezoid(rate, t))
    log_alpha = float(sde.log_alpha(sde.t_max) - sde.log_alpha(sde.t_min))
    latent = math.exp(log_alpha) * x.flatten(1) @ torch.linalg.matrix_exp(kappa * a).T
    assert_close(out.latent.flatten(1), latent, rtol=1e-4, atol=1e-4)
    expected = sde.prior_log_prob(latent) + 4 * log_alpha + kappa * a.trace()
    assert_close(out.log_prob, expected, rtol=2e-5, atol=2e-4)


@sdes
def test_an_image_shaped_gaussian_of_64_dimensions_to_1e_5_nats(sde: sd.SDE) -> None:
    data = random_mixture(1, (1, 8, 8))
    x = samples(data, 2)
    exact = data.marginal_log_prob(sde, x, times64(sde.t_min)[0])
    found = likelihood(sde, data, x, rtol=1e-7, atol=1e-7)
    assert_close(found.log_prob, exact, rtol=0, atol=1e-5)


def test_a_later_start_gives_the_density_there() -> None:
    data, sde = mixture_2d(), sd.VP()
    x = samples(data, 4)
    found = likelihood(sde, data, x, t_start=0.2).log_prob
    assert_close(found, data.marginal_log_prob(sde, x, times64(0.2)[0]), rtol=0, atol=1e-4)


# Derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE()], ids=["vp", "ve"])
def test_the_gradient_of_the_likelihood_is_the_score(sde: sd.SDE) -> None:
    data = mixture_2d()
    x = samples(data, 3).requires_grad_()
    out = likelihood(sde, data, x, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
    assert_close(gradient, data.score(sde)(x.detach(), times64(sde.t_min)[0]), rtol=1e-3, atol=1e-3)
    assert_close(out.log_prob.detach(), likelihood(sde, data, x.detach(), rtol=1e-6, atol=1e-6).log_prob)
    with torch.no_grad():
        assert not likelihood(sde, data, x).log_prob.requires_grad


def test_the_gradient_of_an_estimate_is_that_of_its_differences() -> None:
    data, sde, h = random_mixture(2, (3,)), sd.VP(), 1e-4
    x = samples(data, 2)
    direction = torch.ones_like(x)

    def estimate(x: Tensor) -> Tensor:
        return likelihood(sde, data, x, divergence="hutchinson", probes=2, rtol=1e-7, atol=1e-7).log_prob

    x.requires_grad_()
    (gradient,) = torch.autograd.grad(estimate(x).sum(), x)
    x = x.detach()
    differences = (estimate(x + h * direction) - estimate(x - h * direction)) / (2 * h)
    assert_close(gradient.sum(1), differences, rtol=1e-3, atol=1e-3)


# Estimates -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("divergence", ["hutchinson", "gaussian", "sphere", "orthogonal"])
@pytest.mark.parametrize("probes", [1, 3])
def test_estimates_have_the_variance_of_theory(divergence: str, probes: int) -> None:
    """Of Gaussian data the path does not feel the probe z, and ``int z^T J(t) z dt = z^T S z`` with ``S = 1/2
    log(C_T / C_0)``, a full matrix, ``C_t = alpha^2 C + sigma^2 I``: the estimate is one of the trace of a known
    matrix."""
    data, sde, n = random_mixture(1, (6,)), sd.VP(), 600
    eigenvalues, vectors = torch.linalg.eigh(data.covariances[0])
    start, end = (sde.alpha(t) ** 2 * eigenvalues + sde.variance(t) for t in (sde.t_min, sde.t_max))
    s = vectors @ torch.diag(0.5 * (end / start).log()) @ vectors.T
    name = {"hutchinson": "rademacher"}.get(divergence, divergence)
    expected = trace_variance(name, s, probes)
    x = samples(data, 1)
    exact = float(data.marginal_log_prob(sde, x, times64(sde.t_min)[0]))
    options = {"coordinates": sd.TimeCoordinates(), "rtol": 1e-4, "atol": 1e-4}
    found = likelihood(sde, data, x.expand(n, 6), divergence=divergence, probes=probes, **options).log_prob
    for part in found.split(200):
        assert float(part.mean()) == pytest.approx(exact, abs=3 * (expected / 200) ** 0.5 + 1e-3)
    squares = (found - exact).square()
    assert float(squares.mean()) == pytest.approx(expected, abs=4 * float(squares.std()) / n**0.5)


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
    "solver",
    [
        sd.TorchDiffEq("dopri5", 1e-6, 1e-6),
        sd.Heun(sd.log_snr_times(sd.VP(), 200)),
        sd.ScipyRK45(1e-6, 1e-6),
    ],
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


def test_scipy_in_the_angle_and_its_failures() -> None:
    data, sde = mixture_2d(), sd.VE()
    x = samples(data, 3)
    solver = sd.ScipyRK45(1e-8, 1e-8)
    found = likelihood(sde, data, x, solver=solver, coordinates=sd.LogSNRCoordinates()).log_prob
    exact = data.marginal_log_prob(sde, x, times64(sde.t_min)[0])
    assert_close(found, exact, rtol=0, atol=1e-5)
    with pytest.raises(sd.SolverError, match="SciPy's RK45 stopped"):
        likelihood(sde, data, x, solver=solver, divergence=NotFinite())


class NotFinite(sd.ExactDivergence):
    def __call__(self, field, t, x, prepared=None):
        value, trace = super().__call__(field, t, x)
        return value, torch.where(t > 0.3, math.nan, trace)


# The reference ------------------------------------------------------------------------------------------


class Probe(sd.HutchinsonDivergence):
    """With the probe of the reference instead of its own."""

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor:
        with np.load(shared_path("fixtures", "score_sde", "likelihood.npz")) as reference:
            return torch.from_numpy(reference["ddpmpp_vp/probe"])[None].to(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "bpd", "z", "nats"), [(1e-3, 2e-2, 0.15, 10.0), (1e-5, 2e-3, 0.03, 1.5)]
)
def test_numbers_of_the_original_implementation(tolerance: float, bpd: float, z: float, nats: float) -> None:
    """Its network, data and probe, by its solver. The tolerances are those of FIXTURES.md: the reference itself
    moves by 3e-4 bits/dim with the number of threads."""
    folder = shared_path("fixtures", "score_sde", "ddpmpp_vp")
    model = sd.load_pretrained(folder / "checkpoint.pth")
    with np.load(shared_path("fixtures", "score_sde", "likelihood.npz")) as arrays:
        prefix = f"ddpmpp_vp/tol={tolerance}/"
        reference = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}
        x = torch.from_numpy(arrays["ddpmpp_vp/data"])
    divergence = Probe()
    dims = x[0].numel()
    theirs = sd.log_likelihood(
        model.sde, model, x, divergence=divergence, solver=sd.ScipyRK45(tolerance, tolerance)
    )
    assert_close(sd.bits_per_dim(theirs.log_prob, dims).numpy(), reference["bpd"], rtol=0, atol=bpd)
    assert_close(theirs.latent.numpy(), reference["z"], rtol=0, atol=z)
    prior = model.sde.prior_log_prob(theirs.latent)
    assert_close(prior.numpy(), reference["prior_logp"], rtol=0, atol=nats)
    assert_close((theirs.log_prob - prior).double().numpy(), reference["delta_logp"], rtol=0, atol=nats)
    assert theirs.nfe == pytest.approx(int(reference["nfe"]), rel=0.1)


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
        ({"on_failure": "skip"}, "unknown on_failure 'skip'"),
        ({"t_start": 1.0}, r"t_start must lie in \[1e-05, 1.0\), got 1.0"),
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
        (lambda: sd.LogSNRCoordinates(0.0), "sigma_data must be positive and finite, got 0.0"),
        (lambda: sd.LogSNRCoordinates(1.0, "rho"), "unknown variable 'rho'"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 3, levels=1), "levels must be an integer >= 2, got 1"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 3, levels=255.5), "levels must be an integer >= 2"),
        (lambda: sd.bits_per_dim(torch.zeros(1), 0), "num_dims must be an integer >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def _bad_far_away(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.abs().amax(1, keepdim=True) > 50, torch.full_like(x, math.nan), -x)


def test_a_score_that_is_not_finite_names_the_samples() -> None:
    x = torch.zeros(3, 2)
    x[1] = 100.0
    with pytest.raises(sd.SolverError, match="samples 1"):
        sd.log_likelihood(sd.VP(), _bad_far_away, x)


@pytest.mark.parametrize("coordinates", [sd.TimeCoordinates(), sd.LogSNRCoordinates()])
def test_the_others_are_finished_where_one_fails(coordinates: sd.LogSNRCoordinates) -> None:
    """One is not finite from the start, one on its way."""
    x = torch.tensor([[0.3, -0.2], [100.0, 0.0], [1.0, 2.0], [8.0, 0.5]])
    late = torch.tensor([False, False, False, True])

    def score(x: Tensor, t: Tensor) -> Tensor:
        wrong = late[-len(x) :] & (t > 0.5) if len(x) == 4 else torch.zeros(len(x), dtype=torch.bool)
        return torch.where(wrong[:, None], torch.full_like(x, math.nan), _bad_far_away(x, t))

    options = {"coordinates": coordinates, "on_failure": "nan"}
    out = sd.log_likelihood(sd.VP(), score, x, **options)
    assert out.failed.tolist() == [False, True, False, True]
    assert torch.isnan(out.log_prob).tolist() == out.failed.tolist()
    alone = sd.log_likelihood(sd.VP(), score, x[[0, 2]], **options)
    assert torch.equal(out.log_prob[[0, 2]], alone.log_prob) and not bool(alone.failed.any())


def test_a_tolerance_that_cannot_be_met_within_the_cap() -> None:
    data, sde = mixture_2d(), sd.VP()
    x = samples(data, 4)
    needed = likelihood(sde, data, x).nfe_per_sample
    cap = int(needed.min())
    out = likelihood(sde, data, x, max_evaluations=cap, on_failure="nan")
    assert out.failed.tolist() == (needed > cap).tolist() and 0 < int(out.failed.sum()) < 4
    with pytest.raises(sd.SolverError, match=f"within {cap} evaluations"):
        likelihood(sde, data, x, max_evaluations=cap)
