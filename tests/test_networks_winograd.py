"""3x3 convolutions with fewer products against Winograd's matrices in float64, and against the convolution itself."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sde_diffusion.networks import UNet, channels_last, conv_bfloat16, winograd
from sde_diffusion.networks.convolution import Conv3x3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = channels_last.available() and winograd._weights_library() is not None
pytestmark = pytest.mark.skipif(not HERE, reason="no AVX-512 BF16 here, or matrix tiles, or no compiler")

# Lavin & Gray (2016), section 4.1: F(2x2, 3x3).
PIXELS = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
FILTER = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
RESULT = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)

# Channels that fill 64, 32, 16 and do not; images that fill tiles and do not; one tile, one pixel, several blocks.
SHAPES = [
    (2, 64, 64, 8, 8), (3, 33, 70, 7, 5), (1, 32, 32, 1, 1), (5, 48, 96, 6, 3), (1, 100, 130, 4, 4),
    (9, 40, 33, 16, 12), (2, 128, 17, 2, 2), (1, 20, 112, 1, 9), (7, 96, 48, 5, 1),
]  # fmt: skip


def images(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.2
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def weights(out: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return weight, torch.randn(out, generator=generator)


def to_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(torch.bfloat16).double()


def by_matrices(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, but that what is multiplied is rounded to bfloat16."""
    height, width = x.shape[2:]
    padded = F.pad(x.double(), (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)
    points = to_bfloat16(torch.einsum("ia,bcrsad,jd->bcrsij", PIXELS, tiles, PIXELS))
    filters = to_bfloat16(torch.einsum("ia,ocad,jd->ocij", FILTER, weight.double(), FILTER))
    products = torch.einsum("bcrsij,ocij->borsij", points, filters)
    found = torch.einsum("ai,borsij,dj->borasd", RESULT, products, RESULT)
    found = found.flatten(4, 5).flatten(2, 3)[..., :height, :width]
    return found if bias is None else found + bias.double()[:, None, None]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def same_but_for_rounding(found: Tensor, wanted: Tensor) -> None:
    """Sums in float32 instead of float64 move a result across a limit of rounding now and then: by a unit."""
    assert found.dtype == torch.bfloat16 and channels_last.is_channels_last(found)
    rounded = to_bfloat16(wanted)
    assert (found.double() - rounded).abs().max() <= 2.0**-7 * wanted.abs().max()
    assert relative(found, rounded) < 3e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "channels", "out", "height", "width"), SHAPES)
def test_values_and_derivatives_are_those_of_the_matrices(
    batch: int, channels: int, out: int, height: int, width: int, dtype: torch.dtype
) -> None:
    x, grad = images(batch, channels, height, width), images(batch, out, height, width, seed=2)
    weight, bias = weights(out, channels)
    weight = weight.to(dtype)
    for shift in (bias, None):
        found = winograd.convolve(x, weight, shift)
        if height * width > 1:  # one pixel has its channels last in any layout
            same_but_for_rounding(found, by_matrices(x, weight, shift))
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        exact = exact if shift is None else exact + shift.double()[:, None, None]
        assert relative(found, exact) < 2.0**-7
    reverse = weight.flip(2, 3).transpose(0, 1)
    found = winograd.derivative_by_image(grad, weight)
    wanted = torch.ops.aten.convolution_backward(
        grad.double(), x.double(), weight.double(), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
        [True, False, False],
    )[0]  # fmt: skip
    assert relative(found, wanted) < 2.0**-7
    if height * width > 1:
        same_but_for_rounding(found, by_matrices(grad, reverse, None))


def test_errors_are_at_most_twice_those_of_torch() -> None:
    x, grad = images(8, 128, 16, 16), images(8, 128, 16, 16, seed=2)
    weight, _ = weights(128, 128)
    back = partial(
        torch.ops.aten.convolution_backward, bias_sizes=None, stride=[1, 1], padding=[1, 1], dilation=[1, 1],
        transposed=False, output_padding=[0, 0], groups=1, output_mask=[True, False, False],
    )  # fmt: skip
    narrow = weight.bfloat16()
    exact = (
        F.conv2d(x.double(), weight.double(), padding=1),
        back(grad.double(), x.double(), weight.double())[0],
    )
    torchs = F.conv2d(x, narrow, padding=1), back(grad, x, narrow)[0]
    ours = winograd.convolve(x, weight), winograd.derivative_by_image(grad, weight)
    for found, theirs, wanted in zip(ours, torchs, exact, strict=True):
        assert relative(found, wanted) < 2 * relative(theirs, wanted)


def test_results_do_not_depend_on_batch_or_threads() -> None:
    x, (weight, bias) = images(11, 64, 12, 10), weights(80, 64)
    found, threads = winograd.convolve(x, weight, bias), torch.get_num_threads()
    for i in range(len(x)):
        assert torch.equal(winograd.convolve(x[i : i + 1], weight, bias), found[i : i + 1])
    few = images(2, 64, 4, 4), *weights(160, 64)
    fewer = winograd.convolve(*few)
    try:
        for count in {1, 2, 3, 4, 5, 16} - {threads}:
            torch.set_num_threads(count)
            assert torch.equal(winograd.convolve(x, weight, bias), found)
            assert torch.equal(winograd.convolve(*few), fewer)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_so_and_stays_near() -> None:
    x, (weight, bias) = images(3, 32, 9, 9), weights(32, 32)
    before = winograd.convolve(x, weight, bias)
    x[1, 5, 4, 4] = torch.nan
    after = winograd.convolve(x, weight, bias)
    assert after[1, :, 3:6, 3:6].isnan().all()
    far = torch.ones(9, 9, dtype=torch.bool)
    far[2:8, 2:8] = False  # tiles that see the pixel
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and torch.equal(after[1][:, far], before[1][:, far])


def test_weights_in_any_layout() -> None:
    x, (weight, bias) = images(2, 32, 6, 6), weights(48, 32)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(winograd.convolve(x, last, bias), winograd.convolve(x, weight, bias))
    assert torch.equal(
        winograd.convolve(x, weight.transpose(2, 3), bias.bfloat16()),
        winograd.convolve(x, weight.transpose(2, 3).contiguous(), bias.bfloat16().float()),
    )


def test_where_it_is_used() -> None:
    conv, x = Conv3x3(32, 48).eval(), images(2, 32, 6, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = winograd.convolve(x, conv.weight, conv.bias)
        assert torch.equal(conv(x), wanted) and torch.equal(conv.train()(x), wanted)
        assert not torch.equal(F.conv2d(x, conv.weight, conv.bias, padding=1), wanted)
        assert not conv_bfloat16.fitting(x.float(), conv.weight, conv.bias)
        assert not conv_bfloat16.fitting(x, conv.weight[:16], None)
        assert not conv_bfloat16.fitting(x, conv.weight.double(), conv.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv.train()(x), wanted)
        # In evaluation mode derivatives of all kinds are torch's.
        conv.eval()
        assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
        frozen = conv.requires_grad_(False)
        assert not conv_bfloat16.fitting(x.requires_grad_(), frozen.weight, frozen.bias)


def test_a_network_in_bfloat16_is_near_itself_in_float32() -> None:
    torch.manual_seed(0)
    net = UNet(1, channels=32).eval()
    x, t = torch.randn(4, 1, 8, 8), torch.rand(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        wanted = net(x, t)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(x, t)
            assert torch.equal(net(x[:1], t[:1]), found[:1])
    assert 0 < relative(found, wanted.double()) < 0.02


def gradient_by_matrices(x: Tensor, grad: Tensor) -> Tensor:
    """The derivative by the weight in float64, but that what is multiplied is rounded to bfloat16."""
    height, width = x.shape[2:]
    padded = F.pad(x.double(), (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)
    results = F.pad(grad.double(), (0, width % 2, 0, height % 2)).unfold(2, 2, 2).unfold(3, 2, 2)
    points = to_bfloat16(torch.einsum("ia,bcrsad,jd->bcrsij", PIXELS, tiles, PIXELS))
    slopes = to_bfloat16(torch.einsum("ai,borsad,dj->borsij", RESULT, results, RESULT))
    products = torch.einsum("bcrsij,borsij->ocij", points, slopes)
    return torch.einsum("ia,ocij,jd->ocad", FILTER, products, FILTER)


@pytest.mark.parametrize(("batch", "channels", "out", "height", "width"), [*SHAPES, (40, 96, 80, 16, 16)])
def test_derivatives_by_weight_and_bias_are_those_of_the_matrices(
    batch: int, channels: int, out: int, height: int, width: int
) -> None:
    x, grad = images(batch, channels, height, width), images(batch, out, height, width, seed=2)
    of_weight, of_bias = winograd.weight_gradient(x, grad)
    assert of_weight.dtype == of_bias.dtype == torch.float32
    assert of_weight.is_contiguous(memory_format=torch.channels_last)
    # Each tile rounds a sum by a uniform share of 2^-24 at most.
    steps = batch * ((height + 1) // 2) * ((width + 1) // 2)
    assert relative(of_weight, gradient_by_matrices(x, grad)) < 2.0**-22 * (1 + (steps / 3) ** 0.5)
    assert relative(of_bias, grad.double().sum((0, 2, 3))) < 1e-6
    weight = torch.zeros(out, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    (exact,) = torch.autograd.grad(F.conv2d(x.double(), weight, padding=1), weight, grad.double())
    assert relative(of_weight, exact) < 2.0**-7


@pytest.mark.parametrize(("channels", "out"), [(128, 80), (256, 33), (40, 200)])
def test_derivatives_do_not_depend_on_threads(channels: int, out: int) -> None:
    x, grad = images(30, channels, 12, 10), images(30, out, 12, 10, seed=2)
    found, threads = winograd.weight_gradient(x, grad), torch.get_num_threads()
    try:
        for count in {1, 2, 3, 4, 8, 64} - {threads}:
            torch.set_num_threads(count)
            for a, b in zip(winograd.weight_gradient(x, grad), found, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_training_uses_all_three() -> None:
    conv, x = Conv3x3(32, 48).train(), images(2, 32, 6, 6).requires_grad_()
    grad = images(2, 48, 6, 6, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(x)
    found = torch.autograd.grad(out, (x, conv.weight, conv.bias), grad)
    wanted = winograd.derivative_by_image(grad, conv.weight), *winograd.weight_gradient(x.detach(), grad)
    assert torch.equal(out, winograd.convolve(x, conv.weight, conv.bias))
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
