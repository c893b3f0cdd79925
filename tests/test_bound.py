"""The bound against closed forms: its terms, what it bounds, its limits, and what it is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import gaussian_2d, mixture_2d, push_moments, slope, times64
from sde_diffusion.bound import clipped_score, continuous_bound, ode_bound, prior_kl, variational_bound
from sde_diffusion.decoders import DiscretizedGaussian, GaussianDecoder
from sde_diffusion.reverse_steps import ReverseSteps
from sde_diffusion.schedules import cosine_betas, linear_betas
from sde_diffusion.tensors import expand
from sde_diffusion.variances import FixedLarge, FixedSmall, LearnedRange

SDES = {
    "ddpm": sd.DDPM(linear_betas(30)),
    "cosine": sd.DDPM(cosine_betas(30)),
    "vp": sd.VP(t_min=1e-3),
    "subvp": sd.SubVP(t_min=1e-2),
    "ve": sd.VE(sigma_min=0.05, sigma_max=20.0),
}
VARIANCES = {
    "small": FixedSmall(),
    "large": FixedLarge(),
    "range": LearnedRange(lambda x, t: torch.tanh(x)),
}


def grid(sde: sd.SDE, n: int = 30) -> Tensor:
    return sde.times() if isinstance(sde, sd.DDPM) else sd.uniform_times(sde, n - 1)


def posterior_spread(gaussian: sd.GaussianMixture, sde: sd.SDE, t: Tensor) -> Tensor:
    """``E |x_0 - E[x_0 | x_t]|^2`` of Gaussian data, for each time: the trace of ``(C^-1 + snr I)^-1``."""
    eigenvalues = torch.linalg.eigvalsh(gaussian.covariances[0])
    snr = sde.log_snr(t).exp()
    return (eigenvalues / (1 + snr[:, None] * eigenvalues)).sum(1)


def expected_terms(
    gaussian: sd.GaussianMixture, sde: sd.SDE, times: Tensor, variance: str
) -> tuple[Tensor, Tensor]:
    """``E L_{i-1}`` for i = 2 .. n, and ``E L_0`` with the Gaussian decoder, of exact scores (fixed variances)."""
    rising = times.flip(0)
    d = len(gaussian.mean)
    on_data, _, small = sde.posterior(rising[:-1], rising[1:])
    large = sde.transition(rising[:-1], rising[1:])[1]
    v = small if variance == "small" else large
    spread = posterior_spread(gaussian, sde, rising)
    kl = 0.5 * (d * (small / v - 1 - (small / v).log()) + on_data**2 * spread[1:] / v)
    decoder = 0.5 * (d * (math.log(2 * math.pi) + small[0].log()) + spread[0] / small[0])
    return kl, decoder


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("name", SDES)
def test_terms_of_gaussian_data_are_the_closed_forms(name: str, variance: str) -> None:
    sde, data = SDES[name], gaussian_2d()
    times = grid(sde)
    x = data.sample(1000, torch.Generator().manual_seed(1))
    bound = variational_bound(
        sde, data.score(sde), x, times=times, variance=VARIANCES[variance], batch_size=20_000
    )
    kl, decoder = expected_terms(data, sde, times, variance)
    for values, expected in ((bound.terms, kl), (bound.decoder[:, None], decoder[None])):
        error = values.std(0) / len(x) ** 0.5
        assert float(((values.mean(0) - expected).abs() / (error + 1e-12)).max()) < 4.5
    alpha, var = sde.alpha(sde.t_max), sde.variance(sde.t_max)
    assert_close(bound.prior, alpha**2 * x.square().sum(1) / (2 * var), rtol=1e-10, atol=1e-14)
    assert_close(bound.total, bound.prior + bound.terms.sum(1) + bound.decoder)
    assert bound.nfe == len(times) and bound.dims == 2


def test_the_chain_bounds_what_it_generates() -> None:
    """With an exact score and Gaussian data the chain's own model of the data is a Gaussian, known exactly."""
    data, n = gaussian_2d(), 12
    sde = sd.DDPM(cosine_betas(n))
    score, steps = data.score(sde), ReverseSteps(sde, sde.times())
    mean, covariance = (
        torch.zeros(2, dtype=torch.float64),
        sde.prior_std**2 * torch.eye(2, dtype=torch.float64),
    )
    for index in range(n - 1, -1, -1):

        def step(x: Tensor, z: Tensor, index: int = index) -> Tensor:
            where = torch.full((len(x),), index)
            t = steps.times[where]
            out = steps.predict(score(x, t), x, where, FixedSmall())
            return out.mean + (0.5 * out.log_variance).exp() * z

        mean, covariance = push_moments(step, mean, covariance)
    model = sd.GaussianMixture(torch.ones(1), mean[None], covariance[None])
    x = data.sample(4000, torch.Generator().manual_seed(0))
    exact = -model.log_prob(x)
    bound = variational_bound(sde, score, x, batch_size=10_000).total
    gap = bound - exact
    error = float(gap.std()) / len(x) ** 0.5
    assert float(gap.mean()) > -4 * error
    assert 0.02 < float(gap.mean()) < 2.0


def test_every_term_is_a_divergence() -> None:
    """KL divergences are not negative, whatever the variance."""
    data = mixture_2d()
    x = data.sample(50, torch.Generator().manual_seed(0))
    for sde in SDES.values():
        for variance in VARIANCES.values():
            bound = variational_bound(sde, data.score(sde), x, times=grid(sde), variance=variance)
            assert float(bound.terms.min()) > -1e-9 and float(bound.prior.min()) >= 0


def test_doubling_the_steps_halves_the_distance_to_the_continuous_limit() -> None:
    """On a grid of equal steps in log-SNR the sum is a Riemann sum: order 1 in the number of steps."""
    data, sde = gaussian_2d(), sd.VP(t_min=1e-3)
    ends = torch.linspace(float(sde.log_snr(1.0)), float(sde.log_snr(1e-3)), 200_001, dtype=torch.float64)
    spread = posterior_spread(data, sde, sde.time_of_log_snr(ends)) * ends.exp()
    limit = float(torch.trapezoid(spread, ends)) / 2
    sizes, gaps = [20, 40, 80, 160, 320], []
    for n in sizes:
        kl, _ = expected_terms(data, sde, sd.log_snr_times(sde, n), "small")
        gaps.append(float(kl.sum()) - limit)
    assert all(gap > 0 for gap in gaps)
    assert slope(sizes[2:], gaps[2:]) == pytest.approx(1.0, abs=0.05)
    x = data.sample(1000, torch.Generator().manual_seed(0))
    continuous = continuous_bound(sde, data.score(sde), x, draws=20, batch_size=10_000)
    error = float(continuous.diffusion.std()) / len(x) ** 0.5
    assert float(continuous.diffusion.mean()) == pytest.approx(limit, abs=4 * error)
    chain = variational_bound(sde, data.score(sde), x, times=sd.log_snr_times(sde, 320), batch_size=10_000)
    error = float(chain.diffusion.std()) / len(x) ** 0.5
    assert float(chain.diffusion.mean()) == pytest.approx(limit + gaps[-1], abs=4 * error)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_continuous_bound_ode_and_exact_density_agree(name: str) -> None:
    """With the exact score nothing is lost: on average over the data both bounds are the cross-entropy."""
    sde, data = SDES[name], mixture_2d()
    x = data.sample(200, torch.Generator().manual_seed(2))
    score, exact = data.score(sde), -data.log_prob(x)
    ode = ode_bound(sde, score, x, rtol=1e-3, atol=1e-3)
    continuous = continuous_bound(sde, score, x, draws=40, batch_size=10_000)
    for total in (ode.total, continuous.total):
        error = float((total - exact).std()) / len(x) ** 0.5
        assert float((total - exact).mean()) == pytest.approx(0, abs=4 * error + 5e-3)
    assert_close(ode.decoder, continuous.decoder)  # the same state at t_min


def test_a_wrong_score_costs_bits() -> None:
    """The bound grows by half the integral of the squared error of the noise prediction."""
    sde, data = sd.VP(t_min=1e-3), gaussian_2d()
    x = data.sample(500, torch.Generator().manual_seed(0))

    def shifted(x: Tensor, t: Tensor) -> Tensor:
        return data.score(sde)(x, t) + expand(0.3 / sde.sigma(t), x)

    right = continuous_bound(sde, data.score(sde), x, draws=20, batch_size=10_000).diffusion
    wrong = continuous_bound(sde, shifted, x, draws=20, batch_size=10_000).diffusion
    span = float(sde.log_snr(1e-3) - sde.log_snr(1.0))
    error = float((wrong - right).std()) / len(x) ** 0.5
    assert float((wrong - right).mean()) == pytest.approx(0.5 * span * 2 * 0.3**2, abs=4 * error)


def test_a_subset_of_the_steps_is_unbiased_and_belongs_to_the_sample() -> None:
    data, sde = mixture_2d(), sd.DDPM(linear_betas(40))
    x = data.sample(1000, torch.Generator().manual_seed(0))
    score = data.score(sde)
    whole = variational_bound(sde, score, x, batch_size=50_000)
    part = variational_bound(sde, score, x, steps=8, batch_size=50_000)
    assert part.terms.shape == (1000, 8) and part.nfe == 9 and float(part.weights.sum()) == 39
    strata = torch.stack([part.steps.amin(0), part.steps.amax(0)])
    starts = 2 + torch.arange(9) * 39 // 8
    assert torch.equal(strata[0], starts[:-1]) and torch.equal(strata[1], starts[1:] - 1)
    difference = part.total - whole.total
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(x) ** 0.5
    few = variational_bound(sde, score, x[5:8], steps=8, first_index=5)
    assert_close(few.total, part.total[5:8], rtol=1e-10, atol=1e-10)
    assert variational_bound(sde, score, x[:2], steps=1000).terms.shape == (2, 39)
    by_step = part.by_step()
    expected = whole.by_step()
    assert bool(torch.isfinite(by_step).all()) and by_step.shape == (41,)
    assert_close(by_step[[0, -1]], expected[[0, -1]])


def test_batches_do_not_change_the_bound() -> None:
    data, sde = mixture_2d(), sd.DDPM(cosine_betas(10))
    x, score = data.sample(7, torch.Generator().manual_seed(0)), data.score(sde)
    whole = variational_bound(sde, score, x).total
    for size in (1, 3, 50):
        assert_close(variational_bound(sde, score, x, batch_size=size).total, whole, rtol=1e-10, atol=1e-10)
    continuous = continuous_bound(sde, score, x, draws=5).total
    assert_close(
        continuous_bound(sde, score, x, draws=5, batch_size=2).total, continuous, rtol=1e-10, atol=1e-10
    )
    seen: list[int] = []
    variational_bound(sde, score, x, batch_size=50, progress=seen.append)
    assert max(seen) <= 50 and sum(seen) == 7 * 10


def test_conditions_follow_their_samples() -> None:
    sde = sd.DDPM(cosine_betas(10))
    x = torch.zeros(6, 2, dtype=torch.float64)
    y = torch.arange(6.0, dtype=torch.float64)

    def score(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -(x - sde.alpha(t)[:, None] * y[:, None]) / sde.variance(t)[:, None]

    # A prediction of y for data 0 costs the more the larger y: no mix-up of rows could keep that order.
    bound = variational_bound(sde, score, x, cond={"y": y}, batch_size=11)
    expected = bound.terms.sum(1)[1] * y**2
    assert_close(bound.terms.sum(1), expected, rtol=1e-9, atol=1e-9)
    part = continuous_bound(
        sd.VP(t_min=1e-2), lambda x, t, y: -x + 0 * y[:, None], x, cond={"y": y}, draws=5, batch_size=11
    )
    assert bool(torch.isfinite(part.total).all())


class Levels:
    """Independent pixels whose levels have given probabilities: the exact score of their cell centres."""

    def __init__(self, probabilities: Tensor) -> None:
        self.probabilities = probabilities.double() / probabilities.sum()
        k = len(probabilities)
        self.centres = (2 * torch.arange(k, dtype=torch.float64) + 1) / k - 1

    def score(self, sde: sd.SDE):
        def score(x: Tensor, t: Tensor) -> Tensor:
            alpha, variance = sde.alpha(t), sde.variance(t)
            shape = (-1, *(1,) * x.ndim)
            z = x[..., None] - alpha.reshape(shape) * self.centres
            weights = (self.probabilities.log() - z**2 / (2 * variance.reshape(shape))).softmax(-1)
            return -((weights * z).sum(-1)) / variance.reshape(shape[:-1])

        return score

    def sample(self, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        index = torch.multinomial(self.probabilities, math.prod(shape), True, generator=generator)
        return self.centres[index].reshape(shape)

    @property
    def entropy_bits(self) -> float:
        return float(-(self.probabilities * self.probabilities.log2()).sum())


@pytest.mark.parametrize("levels", [2, 5, 17])
def test_grey_levels_cost_their_entropy(levels: int) -> None:
    """Discrete data, exact score: the continuous bound and the ODE give the entropy, a chain a little more."""
    data = Levels(1 + torch.arange(levels) % 3)
    x = data.sample((100, 1, 2, 3))
    decoder, process = DiscretizedGaussian(levels), sd.VP(t_min=1e-5)
    continuous = continuous_bound(
        process, data.score(process), x, decoder=decoder, draws=40, batch_size=10_000
    )
    bits = continuous.bits_per_dim()
    error = float(bits.std()) / len(x) ** 0.5
    assert float(bits.mean()) == pytest.approx(data.entropy_bits, abs=4 * error)
    assert float(continuous.decoder.max()) < 1e-6  # at t_min every level is plain to see
    chain = sd.DDPM(linear_betas(100))
    bound = variational_bound(chain, data.score(chain), x, decoder=decoder, batch_size=10_000)
    bits, error = bound.bits_per_dim(), float(bound.bits_per_dim().std()) / len(x) ** 0.5
    assert data.entropy_bits - 4 * error < float(bits.mean()) < 1.5 * data.entropy_bits + 0.2


def test_the_ode_codes_grey_levels() -> None:
    data = Levels(torch.tensor([0.5, 0.2, 0.3]))
    x = data.sample((60, 2))
    process = sd.VP(t_min=1e-2)
    score, decoder = data.score(process), DiscretizedGaussian(3)
    ode = ode_bound(process, score, x, decoder=decoder, rtol=1e-4, atol=1e-4).bits_per_dim()
    error = float(ode.std()) / len(x) ** 0.5
    assert float(ode.mean()) == pytest.approx(data.entropy_bits, abs=4 * error)


def test_units() -> None:
    data, sde = gaussian_2d(), sd.DDPM(linear_betas(25))
    bound = variational_bound(sde, data.score(sde), data.sample(4, torch.Generator().manual_seed(0)))
    assert_close(bound.bits_per_dim(), bound.total / (2 * math.log(2)))
    assert_close(bound.bits_per_dim(levels=17), sd.bits_per_dim(-bound.total, 2, 17))
    assert_close(bound.bits_per_dim(bound.prior), bound.prior / (2 * math.log(2)))


def test_types_and_precision() -> None:
    """float32 data give float64 terms that agree with those of float64 data."""
    data, sde = gaussian_2d(), sd.DDPM(cosine_betas(30))
    x = data.sample(20, torch.Generator().manual_seed(0)).float()
    noise = torch.randn(31, 20, 2)
    low = variational_bound(sde, data.score(sde), x, noise=lambda i: noise[i])
    high = variational_bound(sde, data.score(sde), x.double(), noise=lambda i: noise[i].double())
    assert low.terms.dtype == torch.float64
    assert_close(low.terms, high.terms, rtol=2e-4, atol=1e-5)


def test_the_prior_of_the_papers() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    sde = sd.DDPM(linear_betas(1000))
    bar = sde.alphas_bar[-1]
    expected = 0.5 * (bar * x**2 + (1 - bar) - 1 - (1 - bar).log()).sum(1)
    assert_close(prior_kl(sde, x, 1.0), expected, rtol=1e-6, atol=1e-12)


def test_clipping_predicted_data() -> None:
    sde = sd.DDPM(linear_betas(25))
    x = torch.full((3, 2), 0.9, dtype=torch.float64)

    def far(x: Tensor, t: Tensor) -> Tensor:  # predicts data 5
        return -(x - 5 * sde.alpha(t)[:, None]) / sde.variance(t)[:, None]

    clipped = variational_bound(sde, far, x, clip=True)
    assert_close(
        variational_bound(sde, clipped_score(sde, far), x).total, clipped.total, rtol=1e-9, atol=1e-9
    )
    plain = variational_bound(sde, far, x)
    assert_close(plain.terms, clipped.terms * (4.1 / 0.1) ** 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3)}, r"shape \(B, \*D\), got torch.float32 \(3,\)"),
        ({"x0": torch.zeros(3, 2, dtype=torch.int64)}, "got torch.int64"),
        ({"x0": torch.full((1, 2), math.nan)}, "not finite"),
        ({"x0": torch.full((1, 2), 1.5), "decoder": DiscretizedGaussian()}, r"data in \[-1, 1\], got 1.5"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"sde": sd.VP(), "times": None}, "is no chain: give the times of one"),
        ({"times": times64(0.5, 0.0)}, "a chain of at least 2 steps, got 1"),
        ({"times": times64(0.5, 0.7)}, "fall strictly"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    sde = sd.DDPM(linear_betas(25))
    given = {"sde": sde, "score": lambda x, t: -x, "x0": torch.zeros(1, 2)} | change
    with pytest.raises(ValueError, match=message):
        variational_bound(**given)


def test_continuous_bound_refuses_an_infinite_log_snr_and_wrong_numbers() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="t_min at which the log-SNR is finite"):
        continuous_bound(sd.VP(t_min=0.0), lambda x, t: -x, x)
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        continuous_bound(sd.VP(), lambda x, t: -x, x, draws=0)
    with pytest.raises(ValueError, match="only the terms of a chain"):
        continuous_bound(sd.VP(), lambda x, t: -x, x, draws=2).by_step()


def test_the_default_decoder_is_a_density() -> None:
    sde, x = sd.DDPM(linear_betas(25)), torch.randn(4, 2, dtype=torch.float64)
    score = gaussian_2d().score(sde)
    given = variational_bound(sde, score, x, decoder=GaussianDecoder()).total
    assert np.array_equal(given, variational_bound(sde, score, x).total)
