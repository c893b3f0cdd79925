"""A network that returns the exact target gives the exact score, in every parametrization and precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, gaussian_2d, mixture_2d, times64
from sde_diffusion.networks import UNet
from sde_diffusion.parametrization import RAW_SCORE
from sde_diffusion.score import LOG_NOISE, TIME, UNSCALED, conditioning

KINDS = {
    "noise": sd.NOISE,
    "data": sd.DATA,
    "score": sd.SCORE,
    "raw-score": RAW_SCORE,
    "v": sd.V,
    "edm": sd.edm(),
    "edm-0.5": sd.edm(0.5),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


class ExactNet(nn.Module):
    """Computes what a perfect network would, from its two inputs alone: scaled state and conditioning."""

    def __init__(self, sde: sd.SDE, kind: sd.Parametrization, mixture: sd.GaussianMixture, sigma_data: float):
        super().__init__()
        self.sde, self.kind, self.mixture, self.sigma_data = sde, kind, mixture, sigma_data
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_in: Tensor, c: Tensor) -> Tensor:
        self.inputs.append((x_in, c))
        t = self.sde.time_of_log_snr(-8 * c.double())
        alpha, sigma = self.sde.alpha(t)[:, None], self.sde.sigma(t)[:, None]
        x = x_in.double() * (alpha**2 * self.sigma_data**2 + sigma**2).sqrt()
        score = self.mixture.score(self.sde)(x, t)
        x0, noise = (x + sigma**2 * score) / alpha, -sigma * score
        a, b = self.kind.coefficients(alpha, sigma)
        return (a * x0 + b * noise).to(x_in.dtype)


def states(sde: sd.SDE, mixture: sd.GaussianMixture, t: Tensor) -> Tensor:
    x0 = mixture.sample(len(t), torch.Generator().manual_seed(0))
    return sde.perturb(x0, t, torch.randn(x0.shape, dtype=torch.float64))


@kinds
@sdes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_network_gives_the_exact_score(
    kind: sd.Parametrization, sde: sd.SDE, dtype: torch.dtype
) -> None:
    mixture, sigma_data = mixture_2d(), 1.7
    t = torch.linspace(0.05, sde.t_max, 12, dtype=torch.float64)
    x = states(sde, mixture, t)
    model = sd.ScoreModel(ExactNet(sde, kind, mixture, sigma_data), sde, kind, sigma_data=sigma_data)
    score = model(x.to(dtype), t.to(dtype))
    assert score.dtype == dtype and score.shape == x.shape
    # The network's inputs and outputs are float32; the data parametrization divides their rounding by sigma.
    exact = mixture.score(sde)(x, t)
    tolerance = 2e-5 * (1 + x.abs() / sde.sigma(t)[:, None]) / sde.sigma(t)[:, None]
    assert bool(((score.double() - exact).abs() <= tolerance).all())


@sdes
def test_noise_data_and_score_tell_the_same_story(sde: sd.SDE) -> None:
    mixture = mixture_2d()
    t = torch.linspace(0.1, sde.t_max - 0.05, 6, dtype=torch.float64)
    x = states(sde, mixture, t)
    model = sd.ScoreModel(ExactNet(sde, sd.V, mixture, 1.0), sde, sd.V)
    noise, data, score = model.predict_noise(x, t), model.predict_data(x, t), model(x, t)
    alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    assert_close(alpha * data + sigma * noise, x, rtol=1e-10, atol=1e-10)
    assert_close(score, -noise / sigma, rtol=1e-12, atol=1e-12)
    assert_close(data, sde.posterior_mean(x, score, t), rtol=1e-8, atol=1e-8)


@sdes
@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_the_networks_input_has_unit_variance_at_every_noise_level(sde: sd.SDE, sigma_data: float) -> None:
    net = ExactNet(sde, sd.NOISE, gaussian_2d(), sigma_data)
    model = sd.ScoreModel(net, sde, sigma_data=sigma_data)
    for t in (1e-4, 0.1, 0.5, sde.t_max):
        x0 = sigma_data * torch.randn(5000, 2, dtype=torch.float64)
        model(sde.perturb(x0, t, torch.randn_like(x0)).float(), torch.tensor(t))
        x_in, c = net.inputs[-1]
        assert float(x_in.var()) == pytest.approx(1, abs=4 * (2 / 10_000) ** 0.5)
        assert x_in.dtype == torch.float32 and c.dtype == torch.float32 and c.shape == (5000,)
        assert -3.5 < float(c[0]) < 2


def test_an_unscaled_network_sees_the_state_itself() -> None:
    net = ExactNet(sd.VE(), sd.NOISE, gaussian_2d(), 1.0)
    x = 50 * torch.randn(3, 2)
    sd.ScoreModel(net, sd.VE(), input_scaling=UNSCALED)(x, torch.tensor(0.9))
    assert torch.equal(net.inputs[0][0], x)


def test_an_output_of_another_shape_is_refused() -> None:
    """Broadcast, a network with one channel would quietly serve data with three."""

    class Net(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x[:, :1]

    with pytest.raises(ValueError, match=r"network output of shape \(2, 3, 4, 4\), got \(2, 1, 4, 4\)"):
        sd.ScoreModel(Net(), sd.VP())(torch.zeros(2, 3, 4, 4), torch.tensor(0.5))


def test_conditioning_is_a_quarter_of_the_log_of_the_noise_ratio_or_the_time() -> None:
    t = times64(0.1, 0.7)
    sde = sd.VP()
    assert_close(LOG_NOISE.function(sde, t), (sde.sigma(t) / sde.alpha(t)).log() / 4)
    assert_close(TIME.function(sde, t), t)
    assert conditioning("log_noise") is LOG_NOISE and conditioning("time") is TIME
    with pytest.raises(ValueError, match=r"unknown conditioning 'tim'; did you mean 'time'\? allowed: log"):
        conditioning("tim")


def test_the_time_conditioning_reaches_the_network() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
            seen.append((c, y))
            return x

    model = sd.ScoreModel(Net(), sd.VP(), conditioning=TIME)
    labels = torch.tensor([3, 1])
    model(torch.zeros(2, 4), torch.tensor(0.25), y=labels)
    assert_close(seen[0][0], torch.tensor([0.25, 0.25]))
    assert seen[0][1] is labels


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((4,), 0.3)])
def test_times_may_be_scalars_or_batches(t: Tensor | float) -> None:
    model = sd.ScoreModel(nn.Identity(), sd.VP())
    model.net.forward = lambda x, c: x * c[:, None]
    x = torch.randn(4, 2)
    assert_close(model(x, t), model(x, torch.full((4,), 0.3, dtype=torch.float64)), rtol=1e-5, atol=1e-6)


def test_times_of_another_batch_size_or_type_are_refused() -> None:
    model = sd.ScoreModel(nn.Identity(), sd.VP())
    with pytest.raises(ValueError, match=r"times must have shape \(\) or \(4,\), got \(3,\)"):
        model(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"times must have shape \(\) or \(4,\), got \(4, 1\)"):
        model(torch.zeros(4, 2), torch.zeros(4, 1))
    with pytest.raises(TypeError, match=r"times must be float32 or float64, got torch.bfloat16"):
        model(torch.zeros(4, 2), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        sd.ScoreModel(nn.Identity(), sd.VP(), sigma_data=0)


class Linear(nn.Module):
    """A small real network, which says in what type it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.ran_in: list[torch.dtype] = []

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y = self.layer(x)
        self.ran_in.append(y.dtype)
        return y * c[:, None]


@kinds
def test_only_the_network_runs_under_autocast(kind: sd.Parametrization) -> None:
    net, sde = Linear(), sd.VP()
    full = sd.ScoreModel(net, sde, kind)
    lower = sd.ScoreModel(net, sde, kind, autocast=torch.bfloat16)
    x, t = torch.randn(5, 3), torch.linspace(0.2, 0.9, 5)
    exact, rough = full(x, t), lower(x, t)
    assert net.ran_in == [torch.float32, torch.bfloat16]
    assert exact.dtype == rough.dtype == torch.float32
    scale = 1 / sde.sigma(t)[:, None] / torch.minimum(sde.sigma(t), sde.alpha(t))[:, None]
    assert bool(((exact - rough).abs() <= 0.05 * scale).all())
    assert lower(x.double(), t).dtype == torch.float64


def test_the_score_is_differentiable_in_the_state_and_the_weights() -> None:
    model = sd.ScoreModel(Linear(), sd.VP(), sd.V)
    x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    score = model(x, torch.tensor(0.4))
    gradients = torch.autograd.grad(score.square().sum(), [x, *model.parameters()])
    assert all(bool(g.abs().sum() > 0) for g in gradients)
    assert gradients[0].dtype == torch.float64


def test_a_score_model_samples_like_its_score() -> None:
    """The module is a Score: nothing downstream knows that a network is inside."""
    mixture, sde = gaussian_2d(), sd.VP()
    model = sd.ScoreModel(ExactNet(sde, sd.V, mixture, 1.0), sde, sd.V)
    arguments = {"predictor": sd.DDIM(), "times": sd.uniform_times(sde, 20), "dtype": torch.float64}
    ours = sd.sample(sde, model, (6, 2), **arguments).x
    exact = sd.sample(sde, mixture.score(sde), (6, 2), **arguments).x
    assert_close(ours, exact, rtol=1e-3, atol=1e-3)


def test_frozen_weights_are_cast_once_with_the_same_results_and_come_back() -> None:
    torch.manual_seed(0)
    net = UNet(1, channels=8, channel_multipliers=(1, 2), dropout=0.1).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = sd.ScoreModel(net, sd.VP()).requires_grad_(False)
    x, t = torch.randn(4, 1, 16, 16), torch.tensor(0.3)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    exact = model(x, t)
    model.autocast = torch.bfloat16
    expected = model(x, t)
    model.autocast = None
    assert not torch.equal(expected, exact)
    with model.computing_in(torch.bfloat16):
        assert net.stem.weight.dtype == torch.bfloat16
        assert torch.equal(model(x, t), expected)
    with pytest.raises(RuntimeError, match="inside"), model.computing_in(torch.bfloat16):
        raise RuntimeError("inside")
    assert torch.equal(model(x, t), exact) and model.autocast is None
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1])
    model.requires_grad_(True)
    with model.computing_in(torch.bfloat16):
        assert net.stem.weight.dtype == torch.float32
