"""The 3x3 convolution by fewer products against torch's own in float64, with all of its derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.networks import UNet, convolution
from sde_diffusion.networks.convolution import Conv3x3, trained_conv3x3

_HAS_IT = torch.backends.nnpack.is_available() and hasattr(torch, "_nnpack_spatial_convolution")


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor that gains, whichever this one is."""
    if not _HAS_IT:
        pytest.skip("this torch has no NNPACK, or it does not run on this processor")
    monkeypatch.setattr(convolution, "_wanted_here", lambda: True)
    yield


def problem(batch: int = 3, side: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 32, side, side + 3, generator=generator)
    return x, torch.randn(40, 32, 3, 3, generator=generator) / 17, torch.randn(40, generator=generator)


def close(found: Tensor, wanted: Tensor) -> None:
    """To 5e-5 of the largest value, as the module's text has it."""
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 5e-5 * wanted.abs().max()


def used(x: Tensor, weight: Tensor) -> bool:
    return convolution._pays(x, weight)


@pytest.mark.parametrize("side", [14, 16, 17, 28, 33])
def test_value_and_gradients_are_those_of_the_convolution(gains: None, side: int) -> None:
    inputs = [a.requires_grad_() for a in problem(side=side)]
    exact = [a.detach().double().requires_grad_() for a in inputs]
    assert used(*inputs[:2])
    out, wanted = trained_conv3x3(*inputs), F.conv2d(*exact, padding=1)
    close(out, wanted)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, inputs, cotangent)
    for a, b in zip(found, torch.autograd.grad(wanted, exact, cotangent.double()), strict=True):
        close(a, b)


def test_second_and_forward_derivatives(gains: None) -> None:
    """Gradients of a gradient's norm, and a directional derivative in every argument."""
    inputs = [a.requires_grad_() for a in problem()]
    exact = [a.detach().double().requires_grad_() for a in inputs]

    def penalty(arguments: list[Tensor], convolve: object) -> Tensor:
        out = convolve(*arguments).square().sum()  # type: ignore[operator]
        (slope,) = torch.autograd.grad(out, arguments[0], create_graph=True)
        return slope.square().sum()

    found = torch.autograd.grad(penalty(inputs, trained_conv3x3), inputs)
    wanted = torch.autograd.grad(penalty(exact, lambda *a: F.conv2d(*a, padding=1)), exact)
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    forward = torch.autograd.forward_ad
    with forward.dual_level():
        directions = [a.detach().flip(0) for a in inputs]
        duals = [forward.make_dual(a.detach(), d) for a, d in zip(inputs, directions, strict=True)]
        found_t = forward.unpack_dual(trained_conv3x3(*duals)).tangent
    _, wanted_t = torch.func.jvp(
        lambda *a: F.conv2d(*a, padding=1),
        tuple(a.detach() for a in exact),
        tuple(d.double() for d in directions),
    )
    close(found_t, wanted_t)


def test_torch_func_goes_through_torchs_own(gains: None) -> None:
    x, weight, bias = problem()
    _, by_func = torch.func.jvp(lambda a: trained_conv3x3(a, weight, bias), (x,), (x.flip(0),))
    close(by_func, F.conv2d(x.flip(0).double(), weight.double(), padding=1))
    each = torch.func.vmap(lambda a: trained_conv3x3(a[None], weight, bias)[0])(x)
    close(each, F.conv2d(x.double(), weight.double(), bias.double(), padding=1))


def test_layouts_do_not_matter(gains: None) -> None:
    x, weight, bias = problem(batch=5)
    strided = x.to(memory_format=torch.channels_last)
    found = trained_conv3x3(strided, weight, bias)
    torch.testing.assert_close(found, trained_conv3x3(x, weight, bias), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", ["dtype", "small", "narrow", "empty", "autocast", "switched off", "processor"]
)
def test_everywhere_else_it_is_torchs_own(gains: None, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    x, weight, bias = problem()
    if change == "dtype":
        x, weight, bias = x.double(), weight.double(), bias.double()
    elif change == "small":
        x = x[..., :8, :8]
    elif change == "narrow":
        x, weight = x[:, :16], weight[:, :16]
    elif change == "empty":
        x = x[:0]
    elif change == "processor":
        monkeypatch.setattr(convolution, "_wanted_here", lambda: False)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        torch.backends.nnpack.flags(enabled=change != "switched off"),
    ):
        assert not used(x, weight)
        out = trained_conv3x3(x, weight, bias)
        torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=0)


def test_a_module_is_a_convolution(gains: None) -> None:
    """Same parameters by the same names and initial values, so that checkpoints go from one to the other."""
    torch.manual_seed(0)
    ours = Conv3x3(32, 48)
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(32, 48, 3, padding=1)
    for (name, a), (other, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    x = problem()[0]
    close(ours(x), plain.double()(x.double()))
    assert not torch.equal(ours(x), plain.float()(x))
    # In evaluation it is torch's own to the bit.
    torch.testing.assert_close(ours.eval()(x), plain(x), rtol=0, atol=0)


def test_a_network_in_training_computes_the_same(gains: None) -> None:
    torch.manual_seed(0)
    net = UNet(3, channels=32, channel_multipliers=(1, 2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, c = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 2.0])
    with torch.no_grad():
        found = net(x, c)
        assert not torch.equal(found, net.eval()(x, c))
        close(found, net.double()(x.double(), c.double()))
