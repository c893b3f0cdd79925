"""The learned schedule: its shape, what does not depend on it, and what training does to it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import gaussian_2d
from sde_diffusion.bound import continuous_bound, variational_bound
from sde_diffusion.chain_losses import VariationalLoss
from sde_diffusion.learned_schedule import LearnedSchedule, MonotoneNetwork
from sde_diffusion.networks import MLP
from sde_diffusion.score import TIME, ScoreModel
from sde_diffusion.tensors import expand

T = torch.linspace(0, 1, 201, dtype=torch.float64)


def bent(power: float) -> MonotoneNetwork:
    """A network fitted to ``t -> t^power``, far from the identity."""
    net = MonotoneNetwork(16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (net(T) - T**power).square().mean().backward()
        optimizer.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def schedules() -> dict[str, LearnedSchedule]:
    return {f"t^{p}": LearnedSchedule(bent(p), 8.0, -8.0) for p in (0.5, 1.0, 3.0)}


def test_a_new_network_is_nearly_the_identity_and_monotone() -> None:
    net = MonotoneNetwork().requires_grad_(False)
    value = net(T)
    assert float((value - T).abs().max()) < 0.05
    assert value.dtype == torch.float64 and float(value[0]) == 0 and float(value[-1]) == 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # whatever the weights
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(3 * torch.randn(p.shape, generator=generator))
        assert bool((net(T).diff() >= 0).all())


def test_it_is_a_variance_preserving_process(schedules: dict[str, LearnedSchedule]) -> None:
    inner = T[1:-1]
    for sde in schedules.values():
        assert_close(sde.alpha(T) ** 2 + sde.variance(T), torch.ones_like(T), rtol=1e-12, atol=0)
        assert_close(sde.log_snr(T), 2 * sde.log_alpha(T) - sde.variance(T).log(), rtol=1e-9, atol=1e-9)
        assert float(sde.log_snr(0.0)) == pytest.approx(8) and float(sde.log_snr(1.0)) == pytest.approx(-8)
        assert_close(sde.time_of_log_snr(sde.log_snr(inner)), inner, rtol=1e-6, atol=1e-6)
        f, g2 = sde.f_and_g2(inner)
        assert_close(g2, -2 * f, rtol=1e-6, atol=1e-9)  # of every variance-preserving process
        assert bool((g2 > 0).all())
        chain = sd.DDPM(sde.discretize(20))
        assert chain.num_steps == 20
    first, last = schedules["t^0.5"].log_snr(0.5), schedules["t^3.0"].log_snr(0.5)
    assert float(last - first) > 5  # not the same curve


def test_the_continuous_bound_depends_on_the_ends_only(schedules: dict[str, LearnedSchedule]) -> None:
    """Kingma et al. (2021), eq. 18: the same numbers for every shape, with the same draws of the log-SNR."""
    data = gaussian_2d()
    x = data.sample(200, torch.Generator().manual_seed(0))

    def score_of(sde: sd.SDE):
        """A score that is wrong, as a function of the state and the log-SNR alone."""
        exact = data.score(sde)
        return lambda x, t: exact(x, t) * expand(1 + 0.1 * torch.tanh(sde.log_snr(t)), x)

    bounds = [
        continuous_bound(sde, score_of(sde), x, draws=20, batch_size=4000) for sde in schedules.values()
    ]
    for bound in bounds[1:]:
        for part in ("prior", "diffusion", "decoder"):
            assert_close(getattr(bound, part), getattr(bounds[0], part), rtol=1e-5, atol=1e-6)
    # A chain over the same times is another chain: what is invariant is the limit only.
    chains = [
        variational_bound(
            sde, score_of(sde), x, times=sd.uniform_times(sde, 20), batch_size=5000
        ).total.mean()
        for sde in schedules.values()
    ]
    assert abs(float(chains[0] - chains[2])) > 0.1


class Exact(torch.nn.Module):
    """The exact noise prediction of Gaussian data, as a function of the state and the log-SNR."""

    def __init__(self, sde: LearnedSchedule, data: sd.GaussianMixture) -> None:
        super().__init__()
        self.sde, self.data = sde, data

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        return -expand(self.sde.sigma(t), x) * self.data.score(self.sde)(x, t)


def moments(sde: LearnedSchedule, data: sd.GaussianMixture, n: int = 4000) -> tuple[float, float]:
    """Mean and variance of the loss over uniform times, by fixed draws."""
    generator = torch.Generator().manual_seed(5)
    x0 = data.sample(n, generator)
    t = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)].double()
    with torch.no_grad():
        loss = VariationalLoss()(
            Exact(sde, data), x0, t, torch.randn(n, 2, generator=generator, dtype=torch.float64)
        )
    return float(loss.mean()), float(loss.var())


def test_training_the_schedule_lowers_the_variance_and_not_the_mean() -> None:
    data = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 2), 0.01 * torch.eye(2)[None])
    sde = LearnedSchedule(MonotoneNetwork(16), 8.0, -8.0)
    model, before = Exact(sde, data), moments(sde, data)
    optimizer = torch.optim.Adam(sde.network.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        x0 = data.sample(256, generator)
        t = torch.rand(256, generator=generator, dtype=torch.float64)
        noise = torch.randn(256, 2, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        VariationalLoss()(model, x0, t, noise).mean().backward()
        optimizer.step()
    after = moments(sde, data)
    assert after[1] < 0.75 * before[1], (before, after)
    error = math.sqrt((before[1] + after[1]) / 4000)
    assert after[0] == pytest.approx(before[0], abs=4 * error)


def test_the_gradient_of_the_schedule_is_that_of_the_squared_loss() -> None:
    """Against differentiating ``mean L^2`` straight through everything."""
    data = gaussian_2d()
    sde = LearnedSchedule(MonotoneNetwork(4), 6.0, -6.0)
    x0, noise = torch.randn(2, 7, 2, dtype=torch.float64)
    t = torch.rand(7, dtype=torch.float64)
    parameters = list(sde.network.parameters())
    ours = torch.autograd.grad(VariationalLoss()(Exact(sde, data), x0, t, noise).mean(), parameters)

    # The exact noise prediction of a Gaussian, written out, differentiable in everything.
    here = t.clone().requires_grad_()
    log_snr = sde.log_snr(here)
    (slope,) = torch.autograd.grad(log_snr.sum(), here, create_graph=True)
    alpha, sigma = torch.sigmoid(log_snr).sqrt()[:, None], torch.sigmoid(-log_snr).sqrt()[:, None]
    x = alpha * x0 + sigma * noise
    covariance = alpha[..., None] ** 2 * data.covariances[0] + sigma[..., None] ** 2 * torch.eye(2)
    centred = x - alpha * data.means[0]
    predicted = sigma * torch.linalg.solve(covariance, centred[..., None])[..., 0]
    loss = -0.5 * slope * (predicted - noise).square().mean(1)
    expected = torch.autograd.grad(loss.square().mean(), parameters)
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_network_is_trained_by_the_plain_gradient() -> None:
    sde = LearnedSchedule(MonotoneNetwork(4), 6.0, -6.0)
    model = ScoreModel(MLP(2, width=8, depth=1), sde)
    torch.nn.init.normal_(model.net.linear_out.weight)
    x0, noise, t = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, dtype=torch.float64)
    (ours,) = torch.autograd.grad(
        VariationalLoss()(model, x0, t, noise).mean(), [model.net.linear_out.weight]
    )
    rate = sde.g2(t) / sde.variance(t)
    plain = (
        0.5 * rate.float() * (model.predict_noise(sde.perturb(x0, t, noise), t) - noise).square().mean(1)
    ).mean()
    (expected,) = torch.autograd.grad(plain, [model.net.linear_out.weight])
    assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_the_schedule_belongs_to_the_model() -> None:
    sde = LearnedSchedule(MonotoneNetwork(4))
    model = ScoreModel(MLP(2, width=8, depth=1), sde)
    names = [name for name in model.state_dict() if name.startswith("process.network.")]
    assert len(names) == 4
    twin = copy.deepcopy(model)
    assert twin.sde.network is twin.process["network"] and twin.sde.network is not sde.network
    assert (
        ScoreModel(MLP(2, width=8, depth=1), sd.VP()).state_dict().keys()
        == MLP(2, width=8, depth=1).state_dict(prefix="net.").keys()
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="need log_snr_min < log_snr_max, both finite, got 3.0 and -1.0"):
        LearnedSchedule(MonotoneNetwork(4), -1.0, 3.0)
    with pytest.raises(ValueError, match="hidden must be an integer >= 1, got 0"):
        MonotoneNetwork(0)
    model = ScoreModel(MLP(2, width=8, depth=1), LearnedSchedule(), conditioning=TIME)
    with pytest.raises(ValueError, match="needs the conditioning 'log_noise', got 'time'"):
        VariationalLoss()(model, torch.zeros(1, 2), torch.full((1,), 0.5), torch.zeros(1, 2))
