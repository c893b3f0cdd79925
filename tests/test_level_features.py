"""Features of grey levels: against the sum over all levels, and models that see them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.build import DataInfo, score_model
from sde_diffusion.config import changed

OCTAVES = {2: 1, 17: 5, 256: 8}


def summed(y: Tensor, s: Tensor, levels: int) -> Tensor:
    """As the formula stands, of one channel: all levels, and hundreds beyond the range, in float64."""
    k = torch.arange(-600, levels + 600, dtype=torch.float64)
    low, high = 2 * k / levels - 1, 2 * (k + 1) / levels - 1
    upper = torch.special.ndtr((high - y[..., None]) / s)
    lower = torch.special.ndtr((low - y[..., None]) / s)
    masses = upper - lower
    angles = 2 * math.pi * k[:, None] / 2.0 ** torch.arange(1, OCTAVES[levels] + 1)
    features = torch.cat([angles.cos(), angles.sin()[:, 1:]], 1)
    return (masses @ features).movedim(-1, 2).flatten(1, 2)


@pytest.mark.parametrize("levels", OCTAVES)
@pytest.mark.parametrize("cells", [0.01, 0.1, 0.5, 1.0, 1.49, 1.51, 2.0, 10.0, 60.0])
def test_they_are_the_expectation_over_all_levels(levels: int, cells: float) -> None:
    y = 2.6 * torch.rand(2, 1, 5, 7, dtype=torch.float64) - 1.3
    s = torch.full((2,), 2 * cells / levels, dtype=torch.float64)
    found = sd.level_features(y, s, levels)
    assert found.dtype == torch.float32
    assert found.shape == (2, sd.level_feature_count(levels), 5, 7)
    # Five standard deviations of 1.5 cells are counted; beyond, the next term of the Fourier series is left out.
    assert_close(found.double(), summed(y, s[0], levels), atol=2e-5, rtol=0)


def test_samples_have_each_their_own_noise_and_channels_their_own_features() -> None:
    y = torch.rand(3, 2, 4, 4, dtype=torch.float64) * 2 - 1
    s = torch.tensor([1e-4, 5e-3, 0.3], dtype=torch.float64)
    together = sd.level_features(y, s, 256).unflatten(1, (2, -1))
    for b in range(3):
        for c in range(2):
            alone = sd.level_features(y[b : b + 1, c : c + 1], s[b : b + 1], 256)
            assert_close(together[b, c], alone[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", [17, 256])
def test_without_noise_they_are_those_of_the_level_wherever_in_its_cell(levels: int) -> None:
    k = torch.arange(levels, dtype=torch.float64)
    inside = 0.002 + 0.996 * torch.rand(levels, dtype=torch.float64)
    y = (2 * (k + inside) / levels - 1)[None, None]
    found = sd.level_features(y, torch.tensor([2e-4 / levels], dtype=torch.float64), levels)
    angles = 2 * math.pi * k / 2.0 ** torch.arange(1, OCTAVES[levels] + 1)[:, None]
    assert_close(found[0].double(), torch.cat([angles.cos(), angles.sin()[1:]]), atol=1e-6, rtol=0)
    # Any two levels differ plainly, neighbours most of all.
    distances = torch.cdist(found[0].T, found[0].T) + 9 * torch.eye(levels)
    assert distances.min() > 1.5


def test_much_noise_leaves_nothing() -> None:
    y = torch.randn(1, 1, 100, dtype=torch.float64) * 30
    assert sd.level_features(y, torch.tensor([30.0], dtype=torch.float64), 256).abs().max() < 1e-12


@pytest.mark.parametrize("cells", [0.02, 0.3, 1.4, 1.6, 5.0])
def test_derivatives_are_those_of_the_sum_and_no_steeper_than_the_noise(cells: float) -> None:
    y = (2 * torch.rand(1, 1, 400, dtype=torch.float64) - 1).requires_grad_()
    s = torch.tensor([2 * cells / 256], dtype=torch.float64)
    weights = torch.randn(1, sd.level_feature_count(256), 400)
    (found,) = torch.autograd.grad((sd.level_features(y, s, 256) * weights).sum(), y)
    (wanted,) = torch.autograd.grad((summed(y, s[0], 256) * weights).sum(), y)
    assert_close(found * s, wanted * s, atol=2e-4, rtol=0)
    _, along = torch.func.jvp(
        lambda state: sd.level_features(state, s, 256), (y.detach(),), (torch.ones_like(y),)
    )
    assert (along.abs() * s).max() < 1.0
    assert_close((along * weights).sum(1).double(), found[:, 0], atol=1e-3, rtol=1e-4)


class Seen(nn.Module):
    """Gives logits that depend on everything it sees, and keeps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.x = x
        return self.mix(x)


def test_a_model_shows_them_to_its_network_beside_the_scaled_state() -> None:
    net = Seen(10, 17)
    model = sd.QuantizedScoreModel(net, sd.VP(), 17, level_features=True)
    assert model.inputs_per_channel == 10
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.01, 0.4], dtype=torch.float64)
    score = model(x, t)
    assert score.shape == x.shape
    alpha, sigma = sd.VP().alpha(t), sd.VP().sigma(t)
    y = x.double() / alpha.reshape(-1, 1, 1, 1)
    assert_close(net.x[:, 1:], sd.level_features(y, sigma / alpha, 17))
    plain = sd.QuantizedScoreModel(Seen(1, 17), sd.VP(), 17)
    plain(x, t)
    assert_close(net.x[:, :1], plain.net.x)


def test_the_divergence_sees_through_them() -> None:
    """The exact divergence against finite differences: the features' slopes are part of it."""
    torch.manual_seed(3)
    model = sd.QuantizedScoreModel(Seen(10, 17).double(), sd.VP(), 17, level_features=True)
    model._input = lambda *a: sd.QuantizedScoreModel._input(model, *a).double()  # type: ignore[method-assign]
    x, t = 0.5 * torch.randn(1, 1, 3, 3, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda state: model(state, t).flatten())(x).reshape(9, 9)
    h = 1e-4
    for i in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[i] = h
        step = step.reshape(x.shape)
        difference = (model(x + step, t) - model(x - step, t)).flatten() / (2 * h)
        assert_close(jacobian[:, i], difference, atol=0.02, rtol=2e-3)


def test_a_config_builds_the_network_that_takes_them() -> None:
    info = DataInfo("digits", (1, 8, 8), 17, 10)
    config = changed({"model.level_features": True, "model.channels": 8})
    model = score_model(config, info)
    assert model.level_features
    assert model.net.in_channels == 10
    assert model(torch.randn(2, 1, 8, 8), torch.tensor(0.3)).shape == (2, 1, 8, 8)
    config.model.parametrization = "noise"
    assert score_model(config, info).net.in_channels == 1
