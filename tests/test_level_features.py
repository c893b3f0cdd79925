"""Features of grey levels: against the sum over all levels, and models that see them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion.build import DataInfo, score_model
from sde_diffusion.cells import expected_noise
from sde_diffusion.config import UsageError, changed
from sde_diffusion.networks import DiT, UNet

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


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("cells", [0.01, 0.4, 1.2])
def test_counts_are_the_expected_numbers_of_pixels(levels: int, cells: float) -> None:
    y = 2.2 * torch.rand(2, 3, 6, 5, dtype=torch.float64) - 1.1
    s = torch.tensor(
        [2 * cells / levels, 3.1 / levels], dtype=torch.float64
    )  # the second: 1.55 cells, too much noise
    edges = 2 * torch.arange(levels + 1, dtype=torch.float64) / levels - 1
    masses = torch.special.ndtr((edges - y[0, ..., None]) / s[0]).diff(dim=-1).sum((1, 2))
    found = sd.level_counts(y, s, levels)
    assert found.shape == (2, 3, levels)
    assert_close(found[0].double(), masses * (1 - (cells / 1.5) ** 2) ** 2, atol=1e-4, rtol=1e-5)
    assert not found[1].any()


def test_counts_without_noise_are_those_of_the_image() -> None:
    x = torch.randint(0, 17, (2, 1, 8, 8))
    y = (2 * (x + 0.05 + 0.9 * torch.rand(x.shape, dtype=torch.float64)) / 17) - 1
    found = sd.level_counts(y, torch.full((2,), 1e-5, dtype=torch.float64), 17)
    for image, counts in zip(x, found, strict=True):
        assert_close(counts[0], image.flatten().bincount(minlength=17).float(), atol=1e-4, rtol=0)


def test_counts_do_not_depend_on_the_batch_and_have_derivatives() -> None:
    y = torch.rand(3, 1, 4, 4, dtype=torch.float64) * 2 - 1
    s = torch.tensor([0.001, 0.005, 0.02], dtype=torch.float64)
    alone = torch.cat([sd.level_counts(y[i : i + 1], s[i : i + 1], 64) for i in range(3)])
    assert torch.equal(sd.level_counts(y, s, 64), alone)
    weights = torch.randn(3, 1, 64)
    total = lambda state: (sd.level_counts(state, s, 64) * weights).sum()  # noqa: E731
    (slope,) = torch.autograd.grad(total(y.requires_grad_()), y)
    direction = torch.randn_like(y)
    _, along = torch.func.jvp(total, (y.detach(),), (direction,))
    assert_close(along.double(), (slope * direction).sum(), rtol=1e-4, atol=1e-3)


class Seen(nn.Module):
    """Gives logits that depend on everything it sees, and keeps it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor, context: Tensor | None = None) -> Tensor:
        self.x = x
        return (
            self.mix(x)
            if context is None
            else self.mix(x) * (1 + 0.3 * context.sin().mean(1)[:, None, None, None])
        )


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


def test_levels_that_the_image_has_become_more_likely() -> None:
    """By hand: with weights of nothing but the counts, the logits are their logarithms."""

    class Weights(nn.Module):
        def forward(self, x: Tensor, c: Tensor, context: Tensor) -> Tensor:
            self.context = context
            output = x.new_zeros(len(x), 19, *x.shape[2:])
            output[:, 17], output[:, 18] = 0.75, -0.25
            return output

    net = Weights()
    model = sd.QuantizedScoreModel(net, sd.VP(), 17, level_counts=True)
    x, t = torch.rand(2, 1, 4, 4) * 2 - 1, torch.tensor([1e-4, 1e-3], dtype=torch.float64)
    alpha, sigma = sd.VP().alpha(t), sd.VP().sigma(t)
    y = x.double() / alpha.reshape(-1, 1, 1, 1)
    counts = sd.level_counts(y, sigma / alpha, 17)
    model(x, t)
    assert_close(net.context, counts.log1p().flatten(1))
    logits = 0.75 * counts.log1p() - 0.25 * (10 * counts).log1p()
    wanted = expected_noise(logits[:, :, None, None].expand(2, 1, 4, 4, 17), y, sigma / alpha)
    assert_close(model.predict_noise(x, t), wanted)


def test_a_wrong_number_of_outputs_or_a_missing_context_is_named() -> None:
    model = sd.QuantizedScoreModel(Seen(1, 17), sd.VP(), 17, level_counts=True)
    with pytest.raises(ValueError, match=r"output of shape \(2, 19, 4, 4\), got \(2, 17, 4, 4\)"):
        model(torch.randn(2, 1, 4, 4), torch.tensor(0.1))
    net = UNet(1, out_channels=19, channels=8, channel_multipliers=(1,), blocks_per_level=1, context_dim=17)
    x, c = torch.randn(2, 1, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"context must be of shape \(2, 17\), got None"):
        net(x, c)
    with pytest.raises(ValueError, match=r"context must be of shape \(2, 17\), got \(2, 16\)"):
        net(x, c, context=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"context must be None, got \(2, 17\)"):
        UNet(1, channels=8, channel_multipliers=(1,), blocks_per_level=1)(x, c, context=torch.zeros(2, 17))


def test_autocast_does_not_reach_them() -> None:
    torch.manual_seed(0)
    y, s = (
        torch.rand(2, 1, 4, 4, dtype=torch.float64) * 2 - 1,
        torch.tensor([1e-3, 0.02], dtype=torch.float64),
    )
    model = sd.QuantizedScoreModel(Seen(10, 19), sd.VP(), 17, level_features=True, level_counts=True)
    plain = sd.level_features(y, s, 256), sd.level_counts(y, s, 256)
    output, counts = torch.randn(2, 1, 19, 4, 4), sd.level_counts(y, s, 17)
    logits = model._with_counts(output, counts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sd.level_features(y, s, 256), plain[0])
        assert torch.equal(sd.level_counts(y, s, 256), plain[1])
        assert torch.equal(model._with_counts(output, counts), logits)


def test_what_cannot_be_is_refused() -> None:
    y, s = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for function in (sd.level_features, sd.level_counts):
        with pytest.raises(ValueError, match="levels must be an integer >= 2, got 1"):
            function(y, s, 1)
    model = sd.QuantizedScoreModel(Seen(1, 19), sd.VP(), 17, level_counts=True)
    with pytest.raises(ValueError, match="the context of a network with level_counts is the counts"):
        model(torch.randn(1, 1, 4, 4), torch.tensor(0.1), context=torch.zeros(1, 17))
    config = changed({"model.level_features": True, "model.input_fourier": (1, 2)})
    with pytest.raises(
        UsageError, match=r"level_features takes the place of input_fourier, got both: .*\(1, 2\)"
    ):
        score_model(config, DataInfo("digits", (1, 8, 8), 17, 10))


@pytest.mark.parametrize("network", [UNet, DiT])
def test_a_context_changes_what_a_network_gives_once_it_is_trained(network: Any) -> None:
    small = (
        {"channels": 8, "channel_multipliers": (1,), "blocks_per_level": 1}
        if network is UNet
        else {"depth": 1}
    )
    net = network(1, context_dim=5, **small)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, c = torch.randn(1, 1, 4, 4).expand(2, 1, 4, 4), torch.zeros(2)
    same, other = torch.zeros(2, 5), torch.tensor([[0.0] * 5, [0.0, 1.0, 0.0, -1.0, 2.0]])
    assert_close(*net(x, c, context=same))
    first, second = net(x, c, context=other)
    assert (first - second).abs().max() > 1e-3
    assert_close(first, net(x, c, context=same)[0])


@pytest.mark.parametrize("counts", [False, True])
def test_the_divergence_sees_through_them(counts: bool) -> None:
    """The exact divergence against finite differences: the features' and counts' slopes are part of it."""
    torch.manual_seed(3)
    net = Seen(10, 19 if counts else 17).double()
    model = sd.QuantizedScoreModel(net, sd.VP(), 17, level_features=True, level_counts=counts)
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


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_config_builds_the_network_that_takes_them(network: str) -> None:
    info = DataInfo("digits", (1, 8, 8), 17, 10)
    config = changed({"model.name": network, "model.channels": 8, "model.depth": 1})
    config.model.level_features = config.model.level_counts = True
    model = score_model(config, info)
    assert model.level_features
    assert model.level_counts
    assert (model.net.in_channels, model.net.out_channels) == (10, 19)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor(0.3)).shape == (2, 1, 8, 8)
    config.model.parametrization = "noise"
    assert score_model(config, info).net.in_channels == 1
    assert score_model(config, info).net.condition.context is None
