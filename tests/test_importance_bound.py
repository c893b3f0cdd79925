"""The importance-weighted bound: its weights average to the likelihood, and bounds bracket what theory says they
do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import gaussian_2d, mixture_2d, push_moments, slope
from sde_diffusion.bound import continuous_bound, variational_bound
from sde_diffusion.decoders import DiscretizedGaussian
from sde_diffusion.importance_bound import PathWeights, importance_bound, log_normal_ratio
from sde_diffusion.reverse_steps import ReverseSteps
from sde_diffusion.schedules import cosine_betas
from sde_diffusion.tensors import expand
from sde_diffusion.variances import FixedDensity, FixedLarge, FixedSmall, LearnedRange
from test_bound import Levels

VARIANCES = {
    "small": FixedSmall(),
    "large": FixedLarge(),
    "density": FixedDensity(),
    "range": LearnedRange(lambda x, t: torch.full_like(x, -0.4)),
}


def samples(data: sd.GaussianMixture, n: int, seed: int = 0) -> Tensor:
    return data.sample(n, torch.Generator().manual_seed(seed))


def biased(data: sd.GaussianMixture, sde: sd.SDE) -> Callable[[Tensor, Tensor], Tensor]:
    """Linear in x where the data are Gaussian, wrong, and with a Jacobian that is not symmetric."""
    wrong = torch.tensor([[0.05, 0.1], [-0.06, -0.04]], dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return data.score(sde)(x, t) + (x @ wrong.T + 0.1) / expand(sde.sigma(t), x)

    return score


def chain_density(
    sde: sd.SDE, score: Callable[[Tensor, Tensor], Tensor], times: Tensor, variance
) -> sd.GaussianMixture:
    """What a chain with a linear score generates, a Gaussian, known exactly."""
    steps = ReverseSteps(sde, times)
    mean, covariance = torch.zeros(2, dtype=torch.float64), sde.prior_std**2 * torch.eye(2).double()
    for number in range(len(steps) - 1, -1, -1):

        def step(x: Tensor, z: Tensor, number: int = number) -> Tensor:
            index = torch.full((len(x),), number)
            out = steps.predict(score(x, steps.times[index]), x, index, variance)
            return out.mean + (0.5 * out.log_variance).exp() * z

        mean, covariance = push_moments(step, mean, covariance)
    return sd.GaussianMixture(torch.ones(1), mean[None], covariance[None])


def test_the_ratio_of_two_normal_densities() -> None:
    generator = torch.Generator().manual_seed(0)
    z, m_q, m_p, log_q, log_p = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    q, p = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m_q, log_q), (m_p, log_p)))
    x = m_q + (0.5 * log_q).exp() * z
    assert_close(log_normal_ratio(z, m_q - m_p, log_q, log_p), p.log_prob(x) - q.log_prob(x))


CHAINS = {
    "ddpm": sd.DDPM(torch.linspace(0.1, 0.6, 8)),
    "subvp": sd.SubVP(t_min=0.05),
    "ve": sd.VE(sigma_min=0.3, sigma_max=5.0),
}


@pytest.mark.parametrize(
    ("name", "variance"),
    [*(("subvp", kind) for kind in VARIANCES), ("ddpm", "small"), ("ve", "density")],
)
def test_weights_average_to_the_likelihood_of_the_chain_and_bounds_rise_to_it(
    name: str, variance: str
) -> None:
    """``E w = p(x_0)``, whatever the score and the variances: here known, for the chain's model is a Gaussian."""
    data, reverse, sde = gaussian_2d(), VARIANCES[variance], CHAINS[name]
    score, x, paths = biased(data, sde), samples(data, 60), 64
    times = sde.times() if isinstance(sde, sd.DDPM) else sd.log_snr_times(sde, 11)
    found = importance_bound(sde, score, x, times=times, paths=paths, variance=reverse, batch_size=100_000)
    exact = chain_density(sde, score, times, reverse).log_prob(x)
    weights = (found.log_weights - exact[:, None]).exp().mean(1)
    error = float(weights.std()) / len(x) ** 0.5
    assert error < 0.2
    assert float(weights.mean()) == pytest.approx(1, abs=4 * error)
    # On the same images: L_1 <= L_2 <= .. <= log p, by more than the error of their differences.
    bounds = [found.bound(k) for k in (1, 4, 16, 64)] + [exact]
    for low, high in itertools.pairwise(bounds):
        gap = high - low
        assert float(gap.mean()) > -3 * float(gap.std()) / len(x) ** 0.5
    assert float((bounds[1] - bounds[0]).min()) >= 0
    gap = exact - bounds[0]
    assert float(gap.mean()) > 4 * float(gap.std()) / len(x) ** 0.5
    assert float((exact - bounds[3]).mean()) < 0.5 * float(gap.mean())
    # One path: the variational bound of the same chain.
    one = variational_bound(sde, score, x, times=times, variance=reverse, batch_size=100_000).total
    difference = found.bound(1) + one
    assert float(difference.mean()) == pytest.approx(0, abs=4 * float(difference.std()) / len(x) ** 0.5)


def test_with_the_exact_score_every_path_tends_to_the_likelihood() -> None:
    """Each weight is then ``p(x_0)`` up to the length of the steps: its error falls at least with their root."""
    data, sde = mixture_2d(), sd.VP(t_min=1e-3)
    x, score, sizes = samples(data, 40), data.score(sde), [40, 80, 160]
    spread, gaps = [], []
    for n in sizes:
        found = importance_bound(sde, score, x, times=sd.log_snr_times(sde, n), paths=4, batch_size=10_000)
        spread.append(float((found.log_weights - data.log_prob(x)[:, None]).square().mean().sqrt()))
        gaps.append(float((data.log_prob(x) - found.bound()).mean()))
    assert slope(sizes, spread) > 0.4  # 1/2 in the end; here the bias, of order 1, still counts
    assert gaps[-1] < 0.3 and gaps[0] > 2 * gaps[-1]


# Which bound is of which model. Data N(0, I), which VP leaves as they are, and a score that is off by e(t).


def likelihoods(error: Callable[[sd.SDE, Tensor], Tensor]) -> tuple[dict[str, Tensor], Tensor, sd.SDE]:
    """Of the same samples: the variational and the importance-weighted bound, and the ODE's likelihood."""
    sde = sd.VP(t_min=1e-3)
    data = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    x = samples(data, 400)
    shift = torch.tensor([0.25, -0.15], dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x + expand(error(sde, t), x) * shift

    continuous = continuous_bound(sde, score, x, draws=40, batch_size=20_000)
    paths = importance_bound(sde, score, x, times=sd.log_snr_times(sde, 150), paths=8, batch_size=20_000)
    ode = sd.log_likelihood(sde, score, x, rtol=1e-4, atol=1e-4).log_prob
    exact = data.log_prob(x)
    return (
        {
            "exact": exact,
            "continuous": -continuous.total,
            "one": paths.bound(1),
            "eight": paths.bound(8),
            "ode": ode,
        },
        shift,
        sde,
    )


def below(low: Tensor, high: Tensor, by: float) -> None:
    """On average over the samples ``high - low`` is ``by``, within 4 standard errors."""
    gap = high - low
    assert float(gap.mean()) == pytest.approx(by, abs=4 * float(gap.std()) / len(gap) ** 0.5 + 0.01)


def test_bounds_are_of_the_reverse_sde_and_may_lie_above_the_ode() -> None:
    """A constant error: the SDE forgets it, the ODE does not. With ``B = int beta dt``,

    log p_SDE is that of N(2 e (1 - exp(-B / 2)), I), log p_ODE that of N(e B / 2, I), and the variational bound is
    ``|e|^2 B / 2`` below the data's log p.
    """
    found, e, sde = likelihoods(lambda sde, t: torch.ones_like(t))
    total = -2 * float(sde.log_alpha(1.0) - sde.log_alpha(sde.t_min))
    square = float(e.square().sum())
    by_sde = 0.5 * square * 4 * (1 - math.exp(-total / 2)) ** 2
    by_ode = 0.5 * square * total**2 / 4
    by_bound = 0.5 * square * total
    assert by_sde < by_bound < by_ode
    below(found["continuous"], found["exact"], by_bound)
    below(found["ode"], found["exact"], by_ode)
    in_sde = float(found["exact"].mean()) - by_sde  # log p_SDE on average over the data
    for name in ("continuous", "one", "eight"):
        error = float(found[name].std()) / 20
        assert float(found[name].mean()) < in_sde + error
    assert float(found["one"].mean()) < float(found["eight"].mean())
    # The bracket closes from the variational bound towards the SDE's likelihood.
    assert float(found["eight"].mean() - found["one"].mean()) > 0.3 * (by_bound - by_sde)
    assert float(found["ode"].mean()) < float(found["continuous"].mean())


def test_an_error_that_the_ode_averages_out() -> None:
    """``int beta e dt = 0``: the ODE has the data's own density, above what the bounds and the SDE have."""

    def wave(sde: sd.SDE, t: Tensor) -> Tensor:
        start, end = sde.log_alpha(sde.t_min), sde.log_alpha(1.0)
        return math.sqrt(2) * torch.cos(2 * math.pi * (sde.log_alpha(t) - start) / (end - start))

    found, e, sde = likelihoods(wave)
    total = -2 * float(sde.log_alpha(1.0) - sde.log_alpha(sde.t_min))
    below(found["ode"], found["exact"], 0.0)
    below(found["continuous"], found["exact"], 0.5 * float(e.square().sum()) * total)
    assert float(found["eight"].mean()) < float(found["ode"].mean())


@pytest.mark.parametrize("levels", [2, 5])
def test_grey_levels_cost_at_least_their_entropy(levels: int) -> None:
    """``-E log p >= H`` whatever the chain, and with the exact score not much more."""
    data = Levels(1 + torch.arange(levels) % 3)
    x, process = data.sample((150, 1, 2, 3)), sd.VP(t_min=1e-5)
    found = importance_bound(
        process,
        data.score(process),
        x,
        times=sd.log_snr_times(process, 100),
        paths=8,
        decoder=DiscretizedGaussian(levels),
        batch_size=10_000,
    )
    bits = [-found.bound(k) / (6 * math.log(2)) for k in (1, 8)]
    error = float(bits[1].std()) / len(x) ** 0.5
    assert data.entropy_bits - 4 * error < float(bits[1].mean()) < float(bits[0].mean())
    assert float(bits[1].mean()) < data.entropy_bits + 4 * error + 0.02


# What it is made of.


def test_paths_belong_to_the_sample_whatever_the_batch() -> None:
    data, sde = mixture_2d(), sd.VP(t_min=1e-2)
    x, score = samples(data, 5), data.score(sde)
    options = {"times": sd.log_snr_times(sde, 6), "paths": 3, "seed": 4}
    whole = importance_bound(sde, score, x, **options)
    assert whole.log_weights.shape == (5, 3) and whole.nfe == 21 and whole.dims == 2
    for size in (1, 4, 100):
        other = importance_bound(sde, score, x, batch_size=size, **options)
        assert_close(other.log_weights, whole.log_weights, rtol=1e-10, atol=1e-10)
    part = importance_bound(sde, score, x[3:], first_index=3, **options)
    assert_close(part.log_weights, whole.log_weights[3:], rtol=1e-10, atol=1e-10)
    more = importance_bound(sde, score, x, **options | {"paths": 5})
    assert_close(more.log_weights[:, :3], whole.log_weights, rtol=1e-10, atol=1e-10)
    assert (
        float((importance_bound(sde, score, x, **options | {"seed": 5}).bound() - whole.bound()).abs().max())
        > 1e-3
    )
    seen: list[int] = []
    importance_bound(sde, score, x, batch_size=4, progress=seen.append, **options)
    assert max(seen) == 4 and sum(seen) == 5 * 21


def test_conditions_follow_their_samples() -> None:
    sde, times = sd.DDPM(cosine_betas(10)), sd.DDPM(cosine_betas(10)).times()
    x, y = torch.zeros(6, 2, dtype=torch.float64), torch.arange(6.0, dtype=torch.float64)

    def score(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -(x - expand(sde.alpha(t) * y, x)) / expand(sde.variance(t), x)

    whole = importance_bound(sde, score, x, times=times, paths=2, cond={"y": y}, batch_size=5)
    for i in range(6):
        alone = importance_bound(
            sde, score, x[i : i + 1], times=times, paths=2, cond={"y": y[i : i + 1]}, first_index=i
        )
        assert_close(alone.log_weights[0], whole.log_weights[i], rtol=1e-9, atol=1e-9)


def test_groups_of_paths() -> None:
    log_weights = torch.tensor(
        [[0.0, math.log(3), math.log(2), math.log(6)], [-1000.0, -1001.0, -1002.0, -900.0]]
    )
    found = PathWeights(log_weights.double(), 2, 1.0)
    assert_close(found.bound(1), log_weights.double().mean(1))
    assert float(found.bound(2)[0]) == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert float(found.bound()[0]) == pytest.approx(math.log(3))
    assert float(found.bound(4)[1]) == pytest.approx(-900 - math.log(4))
    assert found.effective_paths.tolist() == pytest.approx([144 / 50, 1])
    for wrong in (3, 0, 2.0, True):
        with pytest.raises(ValueError, match=f"paths must divide the 4 that there are, got {wrong}"):
            found.bound(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(3)}, r"shape \(B, \*D\), got torch.float32 \(3,\)"),
        ({"x0": torch.full((1, 2), math.nan)}, "not finite"),
        ({"x0": torch.full((1, 2), 1.5), "decoder": DiscretizedGaussian()}, r"data in \[-1, 1\], got 1.5"),
        ({"paths": 0}, "paths must be an integer >= 1, got 0"),
        ({"paths": 1.5}, "paths must be an integer >= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"times": torch.tensor([0.5, 0.0])}, "a chain of at least 2 steps, got 1"),
        ({"times": torch.tensor([0.5, 0.7])}, "fall strictly"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    given = {
        "score": lambda x, t: -x,
        "x0": torch.zeros(1, 2),
        "times": torch.tensor([1.0, 0.5, 0.1]),
    } | change
    with pytest.raises(ValueError, match=message):
        importance_bound(sd.VP(), given.pop("score"), given.pop("x0"), **given)
