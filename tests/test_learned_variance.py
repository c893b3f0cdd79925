"""Learned variances: the model, its steps between DDIM and ancestral sampling, and bad input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, mixture_2d
from sde_diffusion.bound import variational_bound
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.networks import MLP
from sde_diffusion.predictors import LearnedVariance
from sde_diffusion.schedules import cosine_betas, linear_betas
from sde_diffusion.score import ScoreModel
from sde_diffusion.variances import FixedLarge, FixedSmall, LearnedLog, LearnedRange, Limits, fixed_variance

CHAINS = {"linear": sd.DDPM(linear_betas(25), t_min=1 / 25), "cosine": sd.DDPM(cosine_betas(10), t_min=0.1)}


class Counted(nn.Module):
    """A network with twice as many outputs that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = MLP(2, out_dim=4, width=16, depth=1, num_classes=3), 0
        for p in self.net.parameters():  # a new network computes zero, whatever the time
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.net(x, c, y)


def constant(value: float):
    return lambda x, t: torch.full_like(x, value)


@pytest.mark.parametrize("name", CHAINS)
def test_the_ends_of_the_range_are_the_fixed_variances(name: str) -> None:
    chain, data = CHAINS[name], mixture_2d()
    score, times = data.score(chain), chain.times(data=True)
    x, z = torch.randn(2, 6, 2, dtype=torch.float64)
    for t, s in pairwise(times):
        for value, fixed in ((-1.0, "small"), (1.0, "large")):
            step = LearnedVariance(LearnedRange(constant(value))).step(chain, score, x, t, s, z)
            expected = sd.Ancestral(fixed).step(chain, score, x, t, s, z if float(s) else 0 * z)
            assert_close(step, expected, rtol=1e-10, atol=1e-12)
            middle = LearnedVariance(LearnedRange(constant(0.0))).step(chain, score, x, t, s, z)
            mean = sd.Ancestral().step(chain, score, x, t, s, 0 * z)
            if float(s):
                v = (chain.posterior(s, t)[2] * chain.transition(s, t)[1]).sqrt()
                assert_close(middle, mean + v.sqrt() * z, rtol=1e-10, atol=1e-12)
            else:
                assert_close(middle, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_ddim_is_the_exponential_integrator_at_0_and_ancestral_at_1(name: str) -> None:
    """On the chain and on every process, to rounding."""
    sde, data = SDES[name], mixture_2d()
    score = data.score(sde)
    x, z = torch.randn(2, 6, 2, dtype=torch.float64)
    times = CHAINS["linear"].times() * sde.t_max
    for t, s in pairwise(times):
        exponential = x * sde.alpha(s) / sde.alpha(t)
        # x_s / alpha_s = x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) eps: exact where eps is constant.
        noise = -sde.sigma(t) * score(x, t)
        h = sde.sigma(s) / sde.alpha(s) - sde.sigma(t) / sde.alpha(t)
        exponential = exponential + sde.alpha(s) * h * noise
        assert_close(sd.DDIM(0.0).step(sde, score, x, t, s, z), exponential, rtol=1e-9, atol=1e-9)
        ancestral = sd.Ancestral("small").step(sde, score, x, t, s, z)
        assert_close(sd.DDIM(1.0).step(sde, score, x, t, s, z), ancestral, rtol=1e-9, atol=1e-9)


def test_one_evaluation_serves_score_and_variance() -> None:
    net, chain = Counted(), CHAINS["linear"]
    model = LearnedVarianceModel(net, chain).eval()
    out = sd.sample(
        chain, model, (3, 2), predictor=LearnedVariance(model.reverse_variance()), times=chain.times()
    )
    assert net.calls == out.nfe == 25
    x = torch.randn(5, 2)
    variational_bound(chain, model, x, variance=model.reverse_variance(), batch_size=1000)
    assert net.calls == 26
    y = torch.tensor([0, 1, 2, 0, 1])
    variational_bound(chain, model, x, variance=model.reverse_variance(), cond={"y": y}, batch_size=30)
    assert net.calls == 26 + 5


@torch.no_grad()
def test_values_are_those_of_the_state_asked_for() -> None:
    net, chain = Counted(), CHAINS["linear"]
    model = LearnedVarianceModel(net, chain).eval()
    x, other, t = torch.randn(4, 2), torch.randn(4, 2), torch.full((4,), 0.4, dtype=torch.float64)
    noise, values = model.predict_noise_and_values(x, t)
    assert_close(noise, model.predict_noise(x, t))
    before = net.calls
    assert_close(model.values(x, t), values)
    assert net.calls == before
    model(x, t)
    assert not torch.allclose(model.values(other, t), values)  # another state: evaluated anew
    model(x, t)
    assert not torch.allclose(model.values(x, t / 2), values)
    y = torch.tensor([0, 1, 2, 0])
    assert not torch.allclose(model.values(x, t, y=y), values)


def test_gradients_reach_both_halves() -> None:
    model = LearnedVarianceModel(Counted(), CHAINS["linear"])
    noise, values = model.predict_noise_and_values(torch.randn(4, 2), torch.full((4,), 0.4))
    (noise.sum() + values.square().sum()).backward()
    gradient = model.net.net.linear_out.weight.grad
    assert bool((gradient.abs().sum(1) > 0).all())


def test_learned_log_and_limits() -> None:
    chain = CHAINS["linear"]
    s, t = chain.step_times(torch.tensor([3, 9]))
    limits = Limits.of(chain, s, t)
    x = torch.zeros(2, 4, dtype=torch.float64)
    assert_close(limits.small, chain.posterior_log_variance[[2, 8]], rtol=1e-10, atol=0)
    assert_close(
        limits.large.exp(), torch.tensor(chain.betas, dtype=torch.float64)[[2, 8]], rtol=1e-10, atol=0
    )
    assert_close(LearnedLog(constant(-3.0))(x, t, limits), torch.full_like(x, -3.0))
    last = Limits(limits.small, limits.large, torch.tensor([True, False]))
    assert_close(FixedLarge()(x, t, last).flatten(), torch.stack([limits.small[0], limits.large[1]]))
    assert fixed_variance("small") == FixedSmall() and fixed_variance("large") == FixedLarge()
    with pytest.raises(ValueError, match="unknown variance 'smal'; did you mean 'small'"):
        fixed_variance("smal")


def test_channels_must_match_the_variance() -> None:
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    plain, double = MLP(2, width=8, depth=1), MLP(2, out_dim=4, width=8, depth=1)
    with pytest.raises(ValueError, match=r"LearnedVarianceModel needs .* of shape \(3, 4\), got \(3, 2\)"):
        LearnedVarianceModel(plain, CHAINS["linear"])(x, t)
    with pytest.raises(
        ValueError, match=r"ScoreModel needs a network output of shape \(3, 2\), got \(3, 4\)"
    ):
        ScoreModel(double, CHAINS["linear"])(x, t)
