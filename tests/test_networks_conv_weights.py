"""The 3x3 convolution with derivatives in C against torch's own in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks import UNet, channels_last, conv_weights, narrow_attention, winograd
from sde_diffusion.networks.blocks import repeat_and_convolve
from sde_diffusion.networks.conv_bfloat16 import conv3x3, fitting
from sde_diffusion.networks.conv_weights import weight_gradient
from sde_diffusion.networks.convolution import Conv3x3

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HERE = channels_last.available() and conv_weights.available()
pytestmark = pytest.mark.skipif(not HERE, reason="no bfloat16 in this processor, or no compiler for it")


def images(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.2
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def problem(
    batch: int = 3, channels: int = 12, out: int = 15, height: int = 5, width: int = 9
) -> list[Tensor]:
    """Images, weights and bias that are differentiated."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, channels, 3, 3, generator=generator) / 10
    bias = torch.randn(out, generator=generator)
    return [part.requires_grad_() for part in (images(batch, channels, height, width), weight, bias)]


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().contiguous().requires_grad_() for tensor in tensors]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


# Channels that fill blocks of 16 and do not, an odd number of blocks; an odd number of images, one; lines of one
# pixel; images in several portions.
@pytest.mark.parametrize(
    ("batch", "channels", "out", "height", "width"),
    [
        (4, 64, 64, 8, 8), (3, 20, 7, 5, 9), (1, 16, 16, 1, 1), (5, 48, 33, 4, 4), (2, 3, 64, 16, 12),
        (9, 64, 64, 32, 32), (4, 40, 24, 1, 7), (3, 17, 16, 6, 1), (7, 100, 130, 7, 7), (6, 1, 1, 3, 3),
    ],
)  # fmt: skip
def test_derivatives_by_weight_and_bias_are_those_of_the_convolution(
    batch: int, channels: int, out: int, height: int, width: int
) -> None:
    x, grad = images(batch, channels, height, width), images(batch, out, height, width, seed=2)
    of_weight, of_bias = weight_gradient(x, grad)
    weight = torch.zeros(out, channels, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(out, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(F.conv2d(x.double(), weight, bias, padding=1), (weight, bias), grad.double())
    assert of_weight.dtype == of_bias.dtype == torch.float32
    steps = (batch + 1) // 2 * height * width  # each rounds a sum by a uniform share of 2^-24 at most
    assert relative(of_weight, wanted[0]) < 2.0**-24 * (1 + 2 * (steps / 3) ** 0.5)
    assert relative(of_bias, wanted[1]) < 1e-6


def test_the_sums_do_not_depend_on_threads() -> None:
    x, grad = images(11, 64, 32, 32), images(11, 48, 32, 32, seed=2)
    found, threads = weight_gradient(x, grad), torch.get_num_threads()
    try:
        for count in {1, 2, 3} - {threads}:
            torch.set_num_threads(count)
            for a, b in zip(weight_gradient(x, grad), found, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_so_and_stays_in_its_channel() -> None:
    x, grad = images(2, 32, 6, 6), images(2, 32, 6, 6, seed=2)
    x[1, 5, 0, 3], grad[0, 20, 2, 2] = torch.nan, torch.inf
    of_weight, of_bias = weight_gradient(x, grad)
    assert of_weight[:, 5].isnan().all(2).any(1).all() and not of_weight[20].isfinite().any()
    others = [c for c in range(32) if c not in (5, 20)]
    assert of_weight[others][:, others].isfinite().all() and of_bias[others].isfinite().all()
    assert not of_bias[20].isfinite()


def test_value_and_derivative_by_the_image_are_those_of_torch() -> None:
    inputs, cotangent = problem(), images(3, 15, 5, 9, seed=3)
    with in_bfloat16():
        assert fitting(*inputs)
        out, wanted = conv3x3(*inputs), F.conv2d(*inputs, padding=1)
    assert torch.equal(out, wanted) and channels_last.is_channels_last(out)
    found, theirs = (torch.autograd.grad(part, inputs, cotangent) for part in (out, wanted))
    assert torch.equal(found[0], theirs[0])
    leaves = exact(*inputs)
    truth = torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, cotangent.double())
    # Theirs are rounded to bfloat16.
    for ours, rounded, right in zip(found[1:], theirs[1:], truth[1:], strict=True):
        assert ours.dtype == torch.float32 and relative(ours, right) < 1e-6 < relative(rounded, right)


# Channels in and out: with which winograd is not used, and with which it may be.
SIZES = pytest.mark.parametrize(("channels", "out"), [(12, 15), (40, 48)])


@SIZES
@pytest.mark.parametrize("needed", ["image", "weight", "bias"])
def test_each_derivative_alone(needed: str, channels: int, out: int) -> None:
    inputs = dict(zip(("image", "weight", "bias"), problem(3, channels, out), strict=True))
    cotangent = images(3, out, 5, 9, seed=3)
    results = []
    for function in (conv3x3, lambda *a: F.conv2d(*a, padding=1)):
        with in_bfloat16():
            result = function(*inputs.values())
        results.append(torch.autograd.grad(result, inputs[needed], cotangent)[0])
    assert relative(results[0], results[1].double()) < 2.0**-7
    with in_bfloat16():  # and without a bias
        result = conv3x3(inputs["image"], inputs["weight"], None)
    of_weight = torch.autograd.grad(result, inputs["weight"], cotangent)[0]
    gradient = winograd.weight_gradient if winograd.pays(inputs["weight"]) else weight_gradient
    assert torch.equal(of_weight, gradient(inputs["image"].detach(), cotangent)[0])


@SIZES
def test_second_and_batched_derivatives(channels: int, out: int) -> None:
    inputs = problem(3, channels, out)
    leaves = exact(*inputs)
    cotangents = torch.randn(3, 3, out, 5, 9, generator=torch.Generator().manual_seed(4))
    results = []
    for parts, function in ((inputs, conv3x3), (leaves, lambda *a: F.conv2d(*a, padding=1))):
        with in_bfloat16():
            result = function(*parts).tanh()
        batched = torch.autograd.grad(
            result, parts, cotangents.to(result.dtype), is_grads_batched=True, retain_graph=True
        )
        first = torch.autograd.grad(result, parts, cotangents[0].to(result.dtype), create_graph=True)
        total = sum(part.double().square().sum() for part in first)
        results.append([*batched, *first, *torch.autograd.grad(total, parts)])
    for a, b in zip(*results, strict=True):
        assert relative(a.detach(), b.detach()) < 0.03


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SIZES
def test_the_gradient_has_layout_and_type_of_the_weight(
    layout: torch.memory_format, dtype: torch.dtype, channels: int, out: int
) -> None:
    x, weight, bias = problem(3, channels, out)
    weight = weight.detach().to(dtype, memory_format=layout).requires_grad_()
    with in_bfloat16():
        (found,) = torch.autograd.grad(conv3x3(x, weight, bias).sum(), weight)
    assert found.stride() == weight.stride() and found.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_of_torch_changes_nothing(dtype: torch.dtype) -> None:
    x, grad = images(3, 40, 9, 9), images(3, 48, 9, 9, seed=2)
    qkv = torch.randn(2, 64, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = *weight_gradient(x, grad), *narrow_attention._forward(qkv, 8, keep=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = *weight_gradient(x, grad), *narrow_attention._forward(qkv, 8, keep=True)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_an_image_without_a_batch() -> None:
    conv, x = Conv3x3(8, 8).train(), images(1, 8, 6, 6)
    with in_bfloat16():
        torch.testing.assert_close(conv(x[0]), conv(x)[0])


@SIZES
def test_saved_tensors_may_come_back_in_another_layout(channels: int, out: int) -> None:
    inputs, cotangent = problem(3, channels, out), images(3, out, 5, 9, seed=3)
    results = []
    for unpack in (lambda t: t, lambda t: t.contiguous()):
        with in_bfloat16(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            result = conv3x3(*inputs)
            results.append(torch.autograd.grad(result, inputs, cotangent.contiguous()))
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < 2.0**-8


def test_only_where_weights_are_trained_in_bfloat16() -> None:
    x, weight, bias = problem()
    assert not fitting(x, weight, bias)  # a convolution of bfloat16 and float32
    assert fitting(x, weight.detach().bfloat16().requires_grad_(), bias)
    with in_bfloat16():
        assert fitting(x, weight, bias)
        assert not fitting(x.float(), weight, bias) and not fitting(x, weight.detach(), bias)
        assert not fitting(x[:0], weight, bias)
        with torch.no_grad():
            assert not fitting(x, weight, bias)
        seen = []
        torch.func.vmap(lambda part: seen.append(fitting(part[None], weight, bias)) or part)(x)
        assert seen == [False]


@SIZES
def test_what_does_not_match_is_refused_as_by_torch(channels: int, out: int) -> None:
    conv = Conv3x3(channels, out)
    for training in (True, False):
        conv.train(training)
        for wrong in (channels - 1, channels + 1, 2 * channels):
            x = images(2, wrong, 6, 6)
            for wanted in (True, False):
                with (
                    in_bfloat16(),
                    torch.set_grad_enabled(wanted),
                    pytest.raises(RuntimeError, match="channels"),
                ):
                    conv(x)
    conv.bias = nn.Parameter(torch.zeros(out - 1))
    with in_bfloat16(), torch.no_grad(), pytest.raises(RuntimeError):
        conv(images(2, channels, 6, 6))


@SIZES
def test_a_bias_trained_alone(channels: int, out: int) -> None:
    conv, x = Conv3x3(channels, out).train(), images(2, channels, 6, 6)
    conv.weight.requires_grad_(False)
    with in_bfloat16():
        conv(x).float().sum().backward()
    assert conv.bias is not None and conv.bias.grad is not None
    torch.testing.assert_close(conv.bias.grad, torch.full((out,), 72.0))


def names(out: Tensor) -> set[str]:
    """Of all functions behind a result."""
    found, open_nodes = set(), [out.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            open_nodes += [after for after, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("training", [True, False])
def test_networks_use_it_in_training(training: bool) -> None:
    torch.manual_seed(0)
    net = UNet(1, channels=16).train(training)
    with in_bfloat16():
        out = net(torch.randn(2, 1, 8, 8), torch.rand(2))
    assert ("_Conv3x3Backward" in names(out)) is training


@SIZES
def test_doubling_pixels_in_training_is_the_transposed_convolution(channels: int, out: int) -> None:
    conv, x = Conv3x3(channels, out), images(4, channels, 8, 8)
    weights: list[nn.Parameter] = list(conv.parameters())
    results = []
    for training in (True, False):
        conv.train(training)
        with in_bfloat16():
            result = repeat_and_convolve(x, conv)
        assert ("_Conv3x3Backward" in names(result)) is training
        grad = images(4, out, 16, 16, seed=1)
        results.append([result.detach(), *torch.autograd.grad(result, weights, grad)])
    for a, b in zip(*results, strict=True):
        assert relative(a, b.double()) < 0.02
