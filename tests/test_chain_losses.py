"""Objectives of chains: steps, the bound as a loss, the hybrid, resampling, SMLD, and the references' losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import gaussian_2d
from sde_diffusion.bound import variational_bound
from sde_diffusion.chain_losses import (
    BoundLoss,
    ChainTime,
    HybridLoss,
    LadderTime,
    LossAwareTime,
    NoiseError,
    VariationalLoss,
)
from sde_diffusion.decoders import DiscretizedGaussian, GaussianDecoder
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.losses import StratifiedDraw
from sde_diffusion.networks import MLP
from sde_diffusion.schedules import linear_betas
from sde_diffusion.score import ScoreModel
from sde_diffusion.tensors import expand
from shared_data import shared_path

CHAIN = sd.DDPM(linear_betas(25), t_min=1 / 25)


class Exact(torch.nn.Module):
    """The optimal noise prediction for a distribution whose score is known."""

    def __init__(self, sde: sd.SDE, data: sd.GaussianMixture) -> None:
        super().__init__()
        self.sde, self.score = sde, data.score(sde)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score(x, t)

    def predict_noise(self, x: Tensor, t: Tensor) -> Tensor:
        return -expand(self.sde.sigma(t), x) * self.score(x, t)


def test_chain_and_ladder_times() -> None:
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t, weight = ChainTime()(CHAIN, u)
    assert_close(t.unique(), CHAIN.times().flip(0))
    assert bool((t.unique(return_counts=True)[1] == 40).all()) and bool((weight == 1).all())
    ve = sd.VE()
    t, weight = LadderTime(20)(ve, u)
    assert_close(ve.sigma(t.unique()), ve.discretize(20), rtol=1e-12, atol=0)
    assert bool((weight == 1).all())
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_close(ChainTime()(CHAIN, ends)[0], torch.tensor([1 / 25, 1.0], dtype=torch.float64))


def test_the_bound_as_a_loss_is_the_bound() -> None:
    """Averaged over the steps, with the same noise: the sum of the terms, in bits/dim, without L_T."""
    data = gaussian_2d()
    x0, noise = data.sample(6, torch.Generator().manual_seed(0)), torch.randn(26, 6, 2, dtype=torch.float64)
    model = Exact(CHAIN, data)
    bound = variational_bound(CHAIN, model, x0, noise=lambda step: noise[step])
    losses = []
    for step in range(1, 26):
        t = torch.full((6,), step / 25, dtype=torch.float64)
        losses.append(BoundLoss().for_data(None, True)(model, x0, t, noise[step]))
    bits = bound.bits_per_dim(bound.total - bound.prior)
    assert_close(torch.stack(losses).mean(0), bits, rtol=1e-10, atol=1e-10)


def test_the_hybrid_trains_the_variance_by_the_bound_alone() -> None:
    model = LearnedVarianceModel(MLP(2, out_dim=4, width=16, depth=1), CHAIN)
    torch.nn.init.normal_(model.net.linear_out.weight)
    x0, noise = torch.randn(2, 12, 2)
    t = ChainTime()(CHAIN, torch.linspace(0, 1, 12, dtype=torch.float64))[0]
    head = model.net.linear_out.weight

    def gradient(loss) -> Tensor:
        return torch.autograd.grad(loss(model, x0, t, noise).sum(), head)[0]

    hybrid, simple = gradient(HybridLoss(0.01)), gradient(NoiseError())
    bound = gradient(BoundLoss(decoder=GaussianDecoder()))
    assert_close(hybrid[:2], simple[:2])  # of the mean: L_simple only
    assert_close(hybrid[2:], 0.01 * bound[2:], rtol=1e-4, atol=1e-6)  # of the variance: the bound only
    assert float(bound[:2].abs().sum()) > 0 and float(simple[2:].abs().sum()) == 0
    weighted = HybridLoss(0.5)(model, x0, t, noise) - NoiseError()(model, x0, t, noise)
    assert_close(weighted, 0.5 * BoundLoss()(model, x0, t, noise), rtol=1e-4, atol=1e-5)


def test_training_the_variance_lowers_the_bound() -> None:
    """The gradient points the right way: a few steps on the variance alone, with the exact mean."""
    data = gaussian_2d()

    class Learned(Exact):
        def __init__(self) -> None:
            super().__init__(CHAIN, data)
            self.values = torch.nn.Parameter(torch.zeros(26, 1))
            from sde_diffusion.variances import LearnedRange

            self.variance = LearnedRange

        def predict_noise_and_values(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.predict_noise(x, t), self.values[(t * 25).round().long()].expand(x.shape)

    model, generator = Learned(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss = HybridLoss(1.0)
    for _ in range(200):
        x0 = data.sample(250, generator)
        t, _ = ChainTime()(CHAIN, (torch.arange(250) / 250).double())
        value = loss(model, x0, t, torch.randn(250, 2, generator=generator, dtype=torch.float64)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    # The optimum is known: the variance of x_{i-1} given x_i, of each step.
    eigenvalues = torch.linalg.eigvalsh(data.covariances[0])
    s, t = CHAIN.step_times(torch.arange(2, 26))
    on_data, _, small = CHAIN.posterior(s, t)
    spread = (eigenvalues / (1 + CHAIN.log_snr(t).exp()[:, None] * eigenvalues)).mean(1)
    best = (small + on_data**2 * spread).log()
    v = (model.values[2:, 0].detach().double() + 1) / 2
    ours = v * CHAIN.transition(s, t)[1].log() + (1 - v) * small.log()
    assert float((ours - best).abs().mean()) < 0.1


def test_loss_aware_steps() -> None:
    settings = LossAwareTime(history=4, uniform=0.01)
    steps = settings.start(CHAIN)
    even = torch.full((25,), 1 / 25, dtype=torch.float64)
    times = CHAIN.times().flip(0)
    scale = torch.arange(1, 26, dtype=torch.float64)
    for k in range(4):
        assert_close(steps.probabilities(), even)
        steps.observe(CHAIN, times, scale * (1 if k % 2 else -1))  # second moments, whatever the sign
    steps.observe(CHAIN, times[:1], torch.tensor([math.nan]))  # forgotten
    p = steps.probabilities()
    assert_close(p, 0.99 * scale / scale.sum() + 0.01 / 25)
    steps.observe(CHAIN, times[:1].expand(4), torch.full((4,), 100.0))
    assert float(steps.probabilities()[0]) > 0.2  # old losses are replaced
    u = StratifiedDraw()(200_000, torch.Generator().manual_seed(0))
    t, weight = steps(CHAIN, u)
    frequency = torch.bincount((t * 25).round().long() - 1, minlength=25).double() / len(t)
    assert_close(frequency, steps.probabilities(), rtol=0.01, atol=1e-4)
    # Weighted, the average of any function of the step is the plain average over the steps.
    values = torch.sin((t * 25).round())
    assert float((weight * values).mean()) == pytest.approx(float(torch.sin(scale).mean()), abs=2e-3)
    again = settings.start(CHAIN)
    again.load_state_dict(steps.state_dict())
    assert_close(again.probabilities(), steps.probabilities())
    again.observe(CHAIN, times, scale)
    assert not torch.equal(again.state_dict()["losses"], steps.state_dict()["losses"])
    assert_close(settings(CHAIN, u[:9])[0], ChainTime()(CHAIN, u[:9])[0])  # evaluations: all alike


def test_data_choose_the_decoder() -> None:
    assert BoundLoss().for_data(17, False).decoder == DiscretizedGaussian(17)
    assert BoundLoss().for_data(17, True).decoder == GaussianDecoder()
    assert BoundLoss().for_data(None, False).decoder == GaussianDecoder()
    assert BoundLoss(decoder=DiscretizedGaussian(3)).for_data(17, False).decoder == DiscretizedGaussian(3)
    assert HybridLoss().for_data(5, False).bound.decoder == DiscretizedGaussian(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChainTime()(sd.VP(), torch.rand(3)), "need a chain, such as DDPM"),
        (lambda: LossAwareTime().start(sd.VE()), "need a chain, such as DDPM"),
        (lambda: LossAwareTime(history=0), "history must be an integer >= 1, got 0"),
        (lambda: LossAwareTime(uniform=0.0), r"uniform must be a number in \(0, 1\], got 0.0"),
        (lambda: LadderTime(1), "levels must be an integer >= 2, got 1"),
        (lambda: HybridLoss(0.0), "weight must be a finite number > 0, got 0.0"),
        (
            lambda: HybridLoss()(
                ScoreModel(MLP(2, width=8, depth=1), CHAIN),
                torch.zeros(1, 2),
                torch.ones(1),
                torch.zeros(1, 2),
            ),
            "for a model with learned variances, got ScoreModel",
        ),
        (
            lambda: BoundLoss()(
                ScoreModel(MLP(2, width=8, depth=1), sd.VP()),
                torch.zeros(1, 2),
                torch.ones(1),
                torch.zeros(1, 2),
            ),
            "need a chain, such as DDPM",
        ),
    ],
)
def test_bad_input_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["ddpmpp_vp", "ddpm_vp", "ncsnpp_ve_discrete"])
@torch.no_grad()
def test_discrete_losses_of_the_score_sde_code(name: str) -> None:
    """The losses of DDPM and SMLD: the unit-weighted error at the steps of a chain and of a ladder."""
    with np.load(shared_path("fixtures", "score_sde", "losses.npz"), allow_pickle=False) as file:
        arrays = {
            k.removeprefix(f"{name}/"): torch.from_numpy(file[k]) for k in file.files if k.startswith(name)
        }
    model = sd.load_pretrained(shared_path("fixtures", "score_sde", name), ema=False)
    n, kind = 1000, "smld" if "smld/reduce_mean=True/loss" in arrays else "ddpm"
    labels = arrays["labels"].double()
    if kind == "ddpm":
        chain = sd.DDPM(sd.VP().discretize(n), t_min=1 / n)
        # Trained on a chain or not, the network is told the number of the step.
        told = sd.score.Conditioning("step", lambda sde, t: t * n - 1)
        model = ScoreModel(model.net, chain, sd.NOISE, conditioning=told, input_scaling=model.input_scaling)
        t = ChainTime()(chain, (labels + 0.5) / n)[0]
    else:
        t = LadderTime(n)(model.sde, (n - 1 - labels + 0.5) / n)[0]
        assert_close(
            model.sde.sigma(t.unique()), model.sde.discretize(n)[(n - 1 - arrays["labels"]).unique()]
        )
    loss = NoiseError()(model, arrays["x0"], t, arrays["z"])
    dims = arrays["x0"][0].numel()
    for reduced, ours in ((True, loss), (False, 0.5 * dims * loss)):
        theirs = arrays[f"{kind}/reduce_mean={reduced}/per_sample"].to(ours.dtype)
        assert_close(ours, theirs, rtol=2e-5, atol=0)
        assert_close(
            ours.mean(), arrays[f"{kind}/reduce_mean={reduced}/loss"].to(ours.dtype), rtol=2e-5, atol=0
        )


def test_the_variational_loss_is_the_continuous_bound() -> None:
    """Its average over uniform times is ``L_inf``, for any process."""
    data, sde = gaussian_2d(), sd.VP(t_min=1e-2)
    x0 = data.sample(20_000, torch.Generator().manual_seed(0))
    u = StratifiedDraw()(len(x0), torch.Generator().manual_seed(1))
    t = sde.t_min + (sde.t_max - sde.t_min) * u
    loss = VariationalLoss()(Exact(sde, data), x0, t, torch.randn_like(x0))
    eigenvalues = torch.linalg.eigvalsh(data.covariances[0])
    ends = torch.linspace(float(sde.log_snr(1.0)), float(sde.log_snr(1e-2)), 20_001, dtype=torch.float64)
    spread = (ends.exp()[:, None] * eigenvalues / (1 + ends.exp()[:, None] * eigenvalues)).sum(1)
    expected = float(torch.trapezoid(spread, ends)) / 4  # half, and two dimensions
    error = float(loss.std()) / len(x0) ** 0.5 * 0.99
    assert float(loss.mean()) * 0.99 == pytest.approx(expected, abs=4 * error)
