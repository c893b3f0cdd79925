"""NCSN++ and its parts: resampling against loops, every option, derivatives, errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.networks.blocks import FIRDownConv, FIRDownsample, FIRUpConv, FIRUpsample
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.progressive import Head, InputSkip, OutputSkip, OutputStart, SideResidual

TINY: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1}
PLAIN: dict[str, Any] = {"scale_by_sigma": False, "centered": True}
TAPS = (1.0, 3.0, 3.0, 1.0)


def randomised(module: torch.nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module.eval()


def filtered(x: np.ndarray, up: int, down: int, gain: float, pad: tuple[int, int]) -> np.ndarray:
    """Zeros between the pixels of each (H, W) image, zeros around, the filter, every ``down``-th pixel."""
    taps = np.array(TAPS) / sum(TAPS)
    kernel = gain * np.outer(taps, taps)
    images = []
    for image in x.reshape(-1, *x.shape[2:]):
        wide = np.zeros((image.shape[0] * up, image.shape[1] * up))
        wide[::up, ::up] = image
        wide = np.pad(wide, pad)
        out = np.zeros((wide.shape[0] - 3, wide.shape[1] - 3))
        for i, j in itertools.product(range(out.shape[0]), range(out.shape[1])):
            out[i, j] = (wide[i : i + 4, j : j + 4] * kernel).sum()
        images.append(out[::down, ::down])
    return np.stack(images).reshape(*x.shape[:2], *images[0].shape)


def close(a: Tensor, b: np.ndarray | Tensor) -> None:
    torch.testing.assert_close(a.double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-5)


# The paddings are those of the original: p = 4 - 2 taps too many, split in two.


def test_fir_resampling() -> None:
    x = torch.randn(2, 3, 4, 6)
    close(FIRDownsample(3)(x), filtered(x.numpy(), 1, 2, 1.0, (1, 1)))
    close(FIRUpsample(3)(x), filtered(x.numpy(), 2, 1, 4.0, (2, 1)))
    # Constants stay constants, but for the border.
    assert FIRUpsample(1)(torch.ones(1, 1, 6, 6))[0, 0, 2:-2, 2:-2].allclose(torch.ones(8, 8))


def test_fir_convolutions() -> None:
    x = torch.randn(2, 3, 4, 6)
    down, up = randomised(FIRDownConv(3, 5)), randomised(FIRUpConv(3, 5))
    blurred = torch.from_numpy(filtered(x.numpy(), 1, 1, 1.0, (2, 2))).float()
    close(down(x), F.conv2d(blurred, down.conv.weight, down.conv.bias, stride=2))
    assert down(x).shape == (2, 5, 2, 3)
    # Zeros between the pixels, the convolution with zeros around, and then the filter, whose bias is last.
    wide = torch.zeros(2, 3, 7, 11)
    wide[:, :, ::2, ::2] = x
    convolved = F.conv2d(wide, up.conv.weight, padding=2)
    expected = torch.from_numpy(filtered(convolved.detach().numpy(), 1, 1, 4.0, (1, 1)))
    close(up(x), expected + up.conv.bias.detach()[:, None, None])
    assert up(x).shape == (2, 5, 8, 12)


@pytest.mark.parametrize("taps", [(1,), (1, 2, 1), (1, 2, 3, 4), (-1, -1), ()])
def test_fir_taps(taps: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="taps must be an even number"):
        FIRDownsample(1, taps)


def test_side_paths() -> None:
    h, side = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8, 8)
    halve, double = torch.nn.AvgPool2d(2), torch.nn.UpsamplingNearest2d(scale_factor=2)
    small = F.avg_pool2d(side, 2)
    joint = randomised(InputSkip(3, 4, halve))
    close(joint(h, side)[0], h + joint.conv(small))
    close(joint(h, side)[1], small)
    both = randomised(InputSkip(3, 4, halve, concatenate=True))
    close(both(h, side)[0], torch.cat([both.conv(small), h], dim=1))
    assert both.out_channels == 8
    conv = torch.nn.Conv2d(3, 4, 2, stride=2)
    for rescale, scale in ((True, 0.5**0.5), (False, 1.0)):
        residual = SideResidual(4, conv, skip_rescale=rescale)
        close(residual(h, side)[0], (h + conv(side)) * scale)
        close(residual(h, side)[1], residual(h, side)[0])
    head = randomised(Head(4, 3))
    image = head.conv(F.silu(head.norm(h)))
    close(OutputStart(head)(h, None)[1], image)
    grown = torch.randn(2, 3, 2, 2)
    close(OutputSkip(head, double)(h, grown)[1], image + double(grown))


OPTIONS: list[dict[str, Any]] = [
    {"progressive_input": i, "progressive_output": o, "combination": c, "fir": fir}
    for i, o, c, fir in itertools.product(
        ("none", "skip", "residual"), ("none", "skip", "residual"), ("sum", "cat"), (None, TAPS)
    )
    if c == "sum" or i == "skip"
]
OPTIONS += [{"resample_in_block": False, "fir": fir} for fir in (None, TAPS)]
OPTIONS += [{"resample_in_block": False, "resample_with_conv": False, "fir": fir} for fir in (None, TAPS)]
OPTIONS += [{"embedding": "sinusoidal", "sigma_ladder": (0.01, 50.0, 100)}, {"num_classes": 4}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_every_option(options: dict[str, Any]) -> None:
    net = NCSNpp(2, **TINY, **options)
    again = NCSNpp(**net.config)
    again.load_state_dict(net.state_dict())
    x, c = torch.randn(3, 2, 8, 12), torch.tensor([0.5, 1.0, 20.0])
    assert net.eval()(x, c).shape == x.shape
    assert not net(x, c).any()  # a new network computes zero ...
    out = randomised(net)(x, c)  # ... and any other one something, of which every weight is a part
    assert out.isfinite().all() and not torch.equal(out[0], out[1])
    y = None if net.config["num_classes"] is None else torch.tensor([0, 1, 4])
    net(x, c, y).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
    if y is not None:
        assert not torch.equal(net(x, c, y)[0], net(x, c)[0])
        torch.testing.assert_close(net(x, c, y)[2], net(x, c)[2])


def test_scaling_and_centering() -> None:
    x, c = torch.rand(2, 3, 8, 8), torch.tensor([0.5, 20.0])
    plain = randomised(NCSNpp(3, **TINY, **PLAIN))
    for options, expected in (
        ({"centered": False}, plain(2 * x - 1, c)),
        ({"scale_by_sigma": True}, plain(x, c) / c[:, None, None].unsqueeze(-1)),
    ):
        net = NCSNpp(3, **TINY, **(PLAIN | options)).eval()
        net.load_state_dict(plain.state_dict())
        torch.testing.assert_close(net(x, c), expected)


def test_scaling_by_the_ladder() -> None:
    """The levels of SMLD: a geometric sequence, the largest first."""
    ladder = np.exp(np.linspace(np.log(50), np.log(0.01), 10))
    options = TINY | {"embedding": "sinusoidal", "centered": True}
    net = randomised(NCSNpp(3, **options, sigma_ladder=(0.01, 50.0, 10)))
    plain = NCSNpp(3, **options, scale_by_sigma=False).eval()
    plain.load_state_dict(net.state_dict())
    x, c = torch.randn(10, 3, 8, 8), torch.arange(10.0)
    expected = plain(x, c).double() / torch.from_numpy(ladder)[:, None, None].unsqueeze(-1)
    torch.testing.assert_close(net(x, c).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"progressive_input": "skip", "progressive_output": "skip"}])
def test_derivatives_of_both_modes_agree(options: dict[str, Any]) -> None:
    net = randomised(NCSNpp(1, **TINY, **options)).double()
    x, c = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    forward = torch.func.jacfwd(lambda u: net(u, c))(x)
    torch.testing.assert_close(forward, torch.func.jacrev(lambda u: net(u, c))(x))


def test_checkpointing_changes_nothing() -> None:
    gradients = []
    x, c = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    for checkpointing in (False, True):
        torch.manual_seed(1)
        net = randomised(NCSNpp(3, **TINY, dropout=0.0, checkpointing=checkpointing)).train()
        net(x, c).square().sum().backward()
        gradients.append(net.stem.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": "positional"}, "unknown embedding 'positional'"),
        ({"progressive_input": "input_skip"}, "unknown progressive_input 'input_skip'"),
        ({"progressive_output": "skips"}, "unknown progressive_output 'skips'; did you mean 'skip'"),
        ({"combination": "add"}, "unknown combination 'add'"),
        ({"blocks_per_level": 0}, "blocks_per_level must be an integer >= 1, got 0"),
        ({"attention_levels": (2,)}, "attention_levels must be integers from -2 to 1"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"sigma_ladder": (0.01, 50.0, 10)}, "sigma_ladder is for a sinusoidal embedding"),
        ({"embedding": "sinusoidal"}, "sigma_ladder must be .* got None"),
        ({"embedding": "sinusoidal", "sigma_ladder": (50.0, 0.01, 10)}, "0 < sigma_min < sigma_max"),
    ],
)
def test_errors_of_the_constructor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NCSNpp(3, **(TINY | options))


def test_errors_of_the_input() -> None:
    net = NCSNpp(3, **TINY)
    with pytest.raises(ValueError, match="sides are multiples of 2"):
        net(torch.zeros(1, 3, 7, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        net(torch.zeros(1, 1, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match="c must be floating point"):
        net(torch.zeros(1, 3, 8, 8), torch.ones(2))
