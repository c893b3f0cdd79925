"""EDM's U-Nets: sizes to the digit, filters, side paths, labels that may be absent, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sde_diffusion.networks.blocks import FIRDownConv, FIRDownsample, FIRUpsample
from sde_diffusion.networks.edm import DhariwalUNet, EDMUNet, SongUNet
from sde_diffusion.presets import PRESETS

# Trained parameters, counted in NVlabs/edm at commit 008a4e5 (where the 128 Fourier frequencies are a buffer).
COUNTS = {
    "edm_cifar10_vp": 55_733_891,
    "edm_cifar10_cond_vp": 55_735_299,
    "edm_cifar10_ve": 56_397_827,
    "edm_cifar10_cond_ve": 56_400_643,
    "edm_ffhq64_vp": 61_805_571,
    "edm_ffhq64_ve": 62_761_091,
    "edm_imagenet64": 295_899_267,
}
SMALL: dict[str, Any] = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_levels": (1,),
}
SONG_VE: dict[str, Any] = {
    "embedding": "fourier",
    "feature_multiplier": 2,
    "progressive_input": "residual",
    "fir": (1, 3, 3, 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_trained_parameters(name: str) -> None:
    net = PRESETS[name].build_network("meta")
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == COUNTS[name]
    frozen = 128 if name.endswith("_ve") else 0
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == frozen


def shaken(net: EDMUNet) -> EDMUNet:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return net.eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SongUNet, {}),
        (SongUNet, SONG_VE),
        (SongUNet, {"progressive_input": "skip", "progressive_output": "skip", "fir": (1, 3, 3, 1)}),
        (DhariwalUNet, {"head_channels": 8}),
    ],
)
def test_wiring(kind: type[EDMUNet], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = kind(2, out_channels=3, num_classes=4, augment_dim=2, **SMALL, **options)
    x, c = torch.randn(3, 2, 8, 12), torch.randn(3)
    assert net(x, c).shape == (3, 3, 8, 12)
    assert net(x, c).abs().max() == 0
    copy = kind(**net.config)
    shaken(net)
    copy.load_state_dict(net.state_dict())
    y, augment = torch.tensor([0, 3, 4]), torch.randn(3, 2)
    with torch.no_grad():
        out = net(x, c, y, augment)
        assert torch.equal(copy.eval()(x, c, y, augment), out)
        none = net(x, c)
        torch.testing.assert_close(net(x, c, torch.full((3,), 4)), none)
        torch.testing.assert_close(net(x, c, None, torch.zeros(3, 2)), none)
        assert (net(x, c, y) - none).flatten(1).abs().amax(1).gt(1e-6).tolist() == [True, True, False]
        assert (net(x, c, y, augment) - net(x, c, y)).flatten(1).abs().amax(1).gt(1e-6).all()
        # Samples of a batch do not see each other, and noise levels matter.
        torch.testing.assert_close(net(x[1:2], c[1:2], y[1:2], augment[1:2]), out[1:2], rtol=1e-4, atol=1e-5)
        assert (net(x, c + 1) - none).abs().max() > 1e-6


def test_gradients_reach_everything_and_checkpointing_changes_none() -> None:
    torch.manual_seed(0)
    options = {**SMALL, **SONG_VE, "dropout": 0.0, "num_classes": 2, "augment_dim": 2}
    net = shaken(SongUNet(1, **options)).train()
    again = SongUNet(1, **options, checkpointing=True)
    again.load_state_dict(net.state_dict())
    x, c, y, augment = torch.randn(3, 1, 8, 8), torch.randn(3), torch.tensor([0, 1, 2]), torch.randn(3, 2)
    for one in (net, again):
        one(x, c, y, augment).square().sum().backward()
    for (name, a), b in zip(net.named_parameters(), again.parameters(), strict=True):
        if a.requires_grad:
            assert a.grad is not None and a.grad.abs().max() > 0, name
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_narrow_blocks_have_no_attention() -> None:
    options = {"channels": 32, "blocks_per_level": 1, "channel_multipliers": (1, 2)}
    net = DhariwalUNet(1, attention_levels=(0, 1), **options)
    with_attention = [stages[0].attention is not None for stages in net.encoder]
    assert with_attention == [False, True]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            SongUNet,
            {"embedding": "positional"},
            "unknown embedding 'positional'; .*allowed: fourier, sinusoidal",
        ),
        (SongUNet, {"progressive_input": "standard"}, "unknown progressive_input 'standard'"),
        (SongUNet, {"fir": (1, 2, 1)}, "taps must be an even number of weights"),
        (SongUNet, {"condition_multiplier": 0}, "condition_multiplier must be an integer >= 1, got 0"),
        (SongUNet, {"augment_dim": -1}, "augment_dim must be an integer >= 1, got -1"),
        (SongUNet, {"attention_levels": (2,)}, "attention_levels must be integers from -2 to 1"),
        (DhariwalUNet, {"head_channels": 0}, "head_channels must be an integer >= 1, got 0"),
        (DhariwalUNet, {"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
    ],
)
def test_refuses_arguments(kind: type[EDMUNet], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(1, **{**SMALL, **options})


@pytest.mark.parametrize("kind", [SongUNet, DhariwalUNet])
def test_refuses_inputs(kind: type[EDMUNet]) -> None:
    net = kind(1, **SMALL, num_classes=2, augment_dim=3)
    x, c = torch.zeros(2, 1, 4, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"sides are multiples of 2, got \(2, 1, 4, 3\)"):
        net(torch.zeros(2, 1, 4, 3), c)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\]"):
        net(x, c, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"augmentation labels must have shape \(2, 3\), got \(2, 2\)"):
        net(x, c, None, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="got augmentation labels, but"):
        kind(1, **SMALL)(x, c, None, torch.zeros(2, 3))


def filtered(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """The filter at every place where it fits, by sums over its taps."""
    n = len(taps)
    height, width = x.shape[2] - n + 1, x.shape[3] - n + 1
    parts = [
        taps[i] * taps[j] / sum(taps) ** 2 * x[:, :, i : i + height, j : j + width]
        for i in range(n)
        for j in range(n)
    ]
    return torch.stack(parts).sum(0)


def padded(x: Tensor, sides: int) -> Tensor:
    return torch.nn.functional.pad(x, (sides,) * 4)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 5, 2, 1)])
def test_filters(taps: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 8)
    pad = len(taps) // 2 - 1
    down = FIRDownsample(3, taps)(x)
    torch.testing.assert_close(down, filtered(padded(x, pad), taps)[:, :, ::2, ::2])
    # Enlarging is the transpose of reducing, times 4.
    y = torch.randn(2, 3, 3, 4)
    up = FIRUpsample(3, taps)(y)
    assert up.shape == x.shape
    torch.testing.assert_close((up * x).sum(), 4 * (y * down).sum(), rtol=1e-4, atol=1e-4)
    conv = FIRDownConv(3, 5, taps)
    expected = torch.nn.functional.conv2d(
        filtered(padded(x, pad + 1), taps), conv.conv.weight, conv.conv.bias
    )
    torch.testing.assert_close(conv(x), expected[:, :, ::2, ::2], rtol=1e-4, atol=1e-5)
