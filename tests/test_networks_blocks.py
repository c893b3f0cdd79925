"""The parts of the networks against formulas written out here, and the errors of parts and networks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sde_diffusion.networks import MLP, UNet
from sde_diffusion.networks.attention import (
    ChannelAttention,
    attend,
    attend_channels,
    attend_tokens,
    cached_attention,
    plain_attention,
)
from sde_diffusion.networks.blocks import (
    AverageDownsample,
    RepeatUpsample,
    ResBlock,
    SelfAttention,
    StridedDownsample,
    StridedUpsample,
    dropout,
    group_count,
    in_rows,
    modulated_norm,
    pointwise,
    repeat_and_convolve,
)
from sde_diffusion.networks.convolution import Conv3x3
from sde_diffusion.networks.embeddings import (
    ConditionEmbedding,
    FourierEmbedding,
    Modulations,
    SinusoidalEmbedding,
    coordinate_channels,
    fourier_features,
)


def randomised(module: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module


@pytest.mark.parametrize(
    ("channels", "groups", "expected"),
    [
        (128, 32, 32),
        (64, 32, 16),
        (64, 8, 8),
        (48, 32, 12),
        (6, 32, 1),
        (7, 32, 1),
        (3, 1, 1),
        (96, 32, 24),
        (20, 4, 4),
    ],
)
def test_group_count(channels: int, groups: int, expected: int) -> None:
    assert group_count(channels, groups) == expected


def test_sinusoidal_embedding() -> None:
    c = torch.tensor([0.0, 0.25, -3.0])
    out = SinusoidalEmbedding(6, scale=10.0, max_period=1000.0)(c)
    for i, value in enumerate(c.tolist()):
        angles = [10 * value * 1000 ** (-k / 3) for k in range(3)]
        expected = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(out[i], expected, rtol=0, atol=1e-5)
    closed = SinusoidalEmbedding(6, scale=10.0, max_period=1000.0, endpoint=True).frequencies
    torch.testing.assert_close(closed, torch.tensor([10.0, 10 / 1000**0.5, 0.01]))
    assert SinusoidalEmbedding(2)(c).shape == (3, 2)


def test_fourier_embedding_is_frozen_and_stored() -> None:
    torch.manual_seed(0)
    embedding = FourierEmbedding(4000, scale=3.0)
    assert embedding.frequencies.std().item() == pytest.approx(3.0, rel=4 / math.sqrt(2 * 2000))
    assert not embedding.frequencies.requires_grad
    assert list(embedding.state_dict()) == ["frequencies"]
    c = torch.tensor([0.1])
    w = embedding.frequencies
    expected = torch.cat([(2 * torch.pi * w * c).sin(), (2 * torch.pi * w * c).cos()])
    torch.testing.assert_close(embedding(c)[0], expected, rtol=0, atol=1e-5)


def test_embeddings_work_in_float32_whatever_comes_in() -> None:
    embedding = SinusoidalEmbedding(8, scale=100.0)
    c = torch.tensor([0.5, 1.5])
    assert embedding(c.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(embedding(c.bfloat16()), embedding(c))
    assert embedding(c.double()).dtype == torch.float64


def test_fourier_features_and_coordinates() -> None:
    x = torch.rand(2, 3, 4, 5) * 2 - 1
    out = fourier_features(x, 1, 2)
    parts = [
        (2 * torch.pi * x).sin(),
        (4 * torch.pi * x).sin(),
        (2 * torch.pi * x).cos(),
        (4 * torch.pi * x).cos(),
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=1), rtol=0, atol=1e-5)
    grid = coordinate_channels(torch.zeros(2, 1, 4, 4), 3, 4)
    assert grid.shape == (2, 2, 4, 4)
    torch.testing.assert_close(grid[1, 0, :, 2], torch.tensor([-2 / 3, 0.0, 2 / 3, 4 / 3]))
    torch.testing.assert_close(grid[1, 1, 2, :], torch.tensor([-0.75, -0.25, 0.25, 0.75]))


def test_modulations_are_one_linear_map_in_pieces() -> None:
    modulations = Modulations(4, [2, 6, 1])
    embedding = torch.randn(3, 4)
    pieces = modulations(embedding)
    assert [tuple(p.shape) for p in pieces] == [(3, 2), (3, 6), (3, 1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), modulations.linear(F.silu(embedding)))


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("outputs", [4, 6])
def test_res_block_formula(scale_shift: bool, rescale: bool, outputs: int) -> None:
    block = randomised(ResBlock(4, outputs, scale_shift=scale_shift, groups=1, skip_rescale=rescale))
    x, m = torch.randn(2, 4, 5, 5), torch.randn(2, block.modulation_features)

    def norm(x: torch.Tensor, layer: torch.nn.GroupNorm) -> torch.Tensor:
        flat = x.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return flat.view_as(x) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + torch.exp(-x))

    h = block.conv1(silu(norm(x, block.norm1)))
    if scale_shift:
        scale, shift = m[:, :outputs, None, None], m[:, outputs:, None, None]
        h = norm(h, block.norm2) * (1 + scale) + shift
    else:
        h = norm(h + m[:, :, None, None], block.norm2)
    expected = block.skip(x) + block.conv2(silu(h))
    if rescale:
        expected = expected / math.sqrt(2)
    torch.testing.assert_close(block(x, m), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_attention_formula_and_its_two_kernels(training: bool) -> None:
    layer = randomised(SelfAttention(8, heads=2, groups=1)).train(training)
    x = torch.randn(2, 8, 3, 4)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    qkv = tokens @ layer.qkv.weight.T + layer.qkv.bias
    heads = []
    for i in range(2):
        q, k, v = (qkv[..., 8 * j + 4 * i : 8 * j + 4 * i + 4] for j in range(3))
        scores = torch.einsum("btd,bsd->bts", q, k) / 2
        heads.append(torch.einsum("bts,bsd->btd", scores.softmax(dim=-1), v))
    out = torch.cat(heads, dim=-1) @ layer.out.weight.T + layer.out.bias
    expected = x + out.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_attend_agrees_with_the_formula_in_half_precision_too() -> None:
    q, k, v = torch.randn(3, 2, 2, 9, 4).unbind(0)
    torch.testing.assert_close(attend(q, k, v), plain_attention(q, k, v), rtol=1e-5, atol=1e-6)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - plain_attention(q, k, v)).abs().max() < 0.05


def test_attention_in_portions_is_the_formula_with_all_its_derivatives() -> None:
    q, k, v = torch.randn(3, 5, 4, 256, 2, dtype=torch.float64, requires_grad=True).unbind(0)  # 2 heads each
    tangents = tuple(torch.randn_like(x) for x in (q, k, v))
    got, expected = (torch.func.jvp(f, (q, k, v), tangents) for f in (cached_attention, plain_attention))
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(q)
    grads = [
        torch.autograd.grad((f(q, k, v) * weights).sum(), (q, k, v))
        for f in (cached_attention, plain_attention)
    ]
    torch.testing.assert_close(grads[0], grads[1])


def attention_in_channels(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """The formula, for (B, 3 C, T)."""
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    scores = torch.einsum("bhdq,bhdk->bhqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("bhqk,bhdk->bhdq", scores.softmax(-1), v).flatten(1, 2)


# With large logits exponentials alone would overflow; with 256 tokens there are several portions.
@pytest.mark.parametrize(("scale", "tokens"), [(1.0, 6), (30.0, 6), (1.0, 256)])
@pytest.mark.parametrize(("heads", "batch"), [(1, 5), (3, 2)])
def test_attention_with_channels_first_and_its_gradient(
    scale: float, tokens: int, heads: int, batch: int
) -> None:
    qkv = torch.randn(batch, 3 * 6 * heads, tokens, dtype=torch.float64)
    qkv = qkv.mul_(scale).requires_grad_()
    got, expected = ChannelAttention.apply(qkv, heads), attention_in_channels(qkv, heads)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((out * weights).sum(), qkv)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_channels_first_is_as_exact_as_the_formula(scale: float, dtype: torch.dtype) -> None:
    qkv = (scale * torch.randn(8, 3 * 4 * 16, 256)).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weights = torch.randn(8, 64, 256, dtype=dtype)
    truth = attention_in_channels(exact, 4)
    truths = truth, torch.autograd.grad((truth * weights).sum(), exact)[0]
    errors = []
    for function in (lambda: attend_channels(qkv, 4, True), lambda: attention_in_channels(qkv, 4)):
        out = function()
        found = out, torch.autograd.grad((out * weights).sum(), qkv)[0]
        errors.append(
            [float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, truths, strict=True)]
        )
    assert errors[0][0] < 1.5 * errors[1][0]
    assert errors[0][1] < 1.5 * errors[1][1]
    with torch.no_grad():
        torch.testing.assert_close(attend_channels(qkv, 4, False), attend_channels(qkv, 4, True))


def test_attention_with_channels_first_leaves_other_derivatives_to_the_formula() -> None:
    qkv = torch.randn(2, 3 * 8, 64).bfloat16()
    tangent = torch.randn_like(qkv)
    got, expected = (
        torch.func.jvp(f, (qkv,), (tangent,))[1].float()
        for f in (lambda x: attend_channels(x, 2, True), lambda x: attention_in_channels(x, 2))
    )
    assert (got - expected).norm() < 0.02 * expected.norm()
    batched = torch.func.vmap(lambda x: attend_channels(x[None], 2, True)[0])(qkv)
    torch.testing.assert_close(batched, attend_channels(qkv, 2, True), rtol=0.03, atol=0.03)
    single = qkv.float()
    tokens = attend_tokens(single.transpose(1, 2), 2, True).transpose(1, 2)
    torch.testing.assert_close(attend_channels(single, 2, True), tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_modulated_norm_is_the_plain_one_with_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    norm = randomised(torch.nn.GroupNorm(4, 12, eps=1e-3))
    x, weights = torch.randn(2, 5, 12, 4, 6, dtype=dtype).unbind(0)
    scale, shift = torch.randn(2, 5, 12, dtype=dtype).unbind(0)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, scale, shift)]
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    parameters = [norm.weight, norm.bias]
    got = modulated_norm(norm, *leaves)
    assert got.dtype == dtype and got.shape == x.shape
    found = got, *torch.autograd.grad((got * weights).sum(), [*leaves, *parameters])
    plain = norm.double()
    truth = torch.addcmul(exact[2][:, :, None, None], plain(exact[0]), 1 + exact[1][:, :, None, None])
    truths = truth, *torch.autograd.grad((truth * weights).sum(), [*exact, plain.weight, plain.bias])
    for a, b in zip(found, truths, strict=True):
        assert float((a - b).detach().norm()) < tolerance * float(b.detach().norm())
    last = modulated_norm(
        plain, x.double().to(memory_format=torch.channels_last), scale.double(), shift.double()
    )
    torch.testing.assert_close(last, truth)


def test_pointwise_is_the_convolution() -> None:
    x, weight, bias = torch.randn(3, 6, 8, 9), torch.randn(5, 6, 1, 1), torch.randn(5)
    expected = F.conv2d(x, weight, bias)
    torch.testing.assert_close(pointwise(x, weight, bias), expected)
    half = [tensor.bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    got = pointwise(*half)
    assert got.dtype == torch.bfloat16 and in_rows(half[0]) and in_rows(x)
    other = F.conv2d(*half)
    torch.testing.assert_close(got, other, rtol=0.02, atol=0.02)
    weights = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((o * weights).sum(), half) for o in (got, other)), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("size", [(1, 3, 5), (4, 9, 8)])  # below and above where weights are folded
def test_convolution_of_repeated_pixels(size: tuple[int, int, int]) -> None:
    batch, height, width = size
    conv = Conv3x3(3, 5).double()
    x = torch.randn(batch, 3, height, width, dtype=torch.float64, requires_grad=True)
    got = repeat_and_convolve(x, conv)
    expected = conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    torch.testing.assert_close(got, expected)
    weights, inputs = torch.randn_like(got), (x, conv.weight, conv.bias)
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.7])
def test_dropout(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(3, 7, 101, 103, dtype=dtype, requires_grad=True)
    y = dropout(x, probability)
    scale = torch.tensor(1 / (1 - probability)).to(dtype)
    assert y.dtype == dtype and set(y.detach().unique().tolist()) == {0.0, scale.item()}
    rate = (y == 0).float()
    error = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(rate.mean().item() - probability) < 4 * error
    neighbours = (rate[..., 1:] * rate[..., :-1]).mean().item()
    assert abs(neighbours - probability**2) < 8 * error
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y.detach())  # the same elements, the same factor
    assert dropout(x, 0.0) is x and not torch.equal(dropout(x, probability), y)


def test_blocks_start_as_the_identity() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock(8)(x, torch.randn(2, 16)), x)
    assert torch.equal(SelfAttention(8, heads=2)(x), x)


def test_resampling() -> None:
    x = torch.randn(2, 3, 4, 6)
    down = AverageDownsample(3)(x)
    torch.testing.assert_close(down[:, :, 1, 2], x[:, :, 2:4, 4:6].mean(dim=(2, 3)))
    up = RepeatUpsample(3)(x)
    assert up.shape == (2, 3, 8, 12)
    torch.testing.assert_close(up[:, :, 5, 7], x[:, :, 2, 3])
    assert StridedDownsample(3)(x).shape == (2, 3, 2, 3)
    assert StridedUpsample(3)(x).shape == (2, 3, 8, 12)
    assert not list(AverageDownsample(3).parameters()) and not list(RepeatUpsample(3).parameters())


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be an integer >= 1, got 0"),
        ({"out_channels": -1}, "out_channels must be an integer >= 1, got -1"),
        ({"channels": 2.5}, "channels must be an integer >= 1, got 2.5"),
        ({"blocks_per_level": 0}, "blocks_per_level must be an integer >= 1, got 0"),
        ({"channel_multipliers": ()}, r"channel_multipliers must be .* got \(\)"),
        ({"channel_multipliers": (1, 0.3)}, r"channels=8 are whole, got \(1, 0.3\)"),
        ({"channel_multipliers": (1, -1)}, r"got \(1, -1\)"),
        ({"attention_levels": (2,)}, r"attention_levels must be integers from -2 to 1 .* got \(2,\)"),
        ({"attention_levels": (0.5,)}, r"got \(0.5,\)"),
        ({"heads": 3}, "heads must divide the 16 channels of the attention, got 3"),
        ({"heads": 0}, "heads must be an integer >= 1, got 0"),
        ({"head_channels": 3}, "head_channels must divide the 16 channels, got 3"),
        ({"heads": 2, "head_channels": 8}, "heads or head_channels, not both"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"embedding": "sinusoid"}, "unknown embedding 'sinusoid'; did you mean 'sinusoidal'"),
        ({"embedding_scale": -1.0}, "scale must be a positive number, got -1.0"),
        ({"embedding_channels": 0}, "embedding_channels must be an integer >= 1, got 0"),
        ({"time_injection": "scale"}, "unknown time_injection 'scale'; .*allowed: scale_shift, shift"),
        ({"resampling": "fir"}, "unknown resampling 'fir'; allowed: resampled, strided"),
        ({"num_classes": 0}, "num_classes must be an integer >= 1, got 0"),
        ({"groups": 0}, "groups must be an integer >= 1, got 0"),
        ({"input_fourier": (3, 2)}, r"input_fourier must be None or integers .* got \(3, 2\)"),
        ({"input_fourier": (1.5, 2)}, "input_fourier must be None or integers"),
    ],
    ids=str,
)
def test_unet_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{"in_channels": 1, "channels": 8, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"out_dim": 0}, "out_dim must be an integer >= 1, got 0"),
        ({"width": True}, "width must be an integer >= 1, got True"),
        ({"depth": 0}, "depth must be an integer >= 1, got 0"),
        ({"dropout": -0.1}, "dropout must be a number"),
        ({"embedding": "rff"}, "unknown embedding 'rff'"),
        ({"embedding_channels": 1.5}, "embedding_channels must be an integer >= 1, got 1.5"),
    ],
    ids=str,
)
def test_mlp_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(**{"dim": 2, **options})


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="chanels"):
        UNet(1, chanels=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("x", "c", "y", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), None, r"shape \(B, 1, H, W\), got \(2, 3, 8, 8\)"),
        (torch.zeros(1, 8, 8), torch.zeros(1), None, r"got \(1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 0), torch.zeros(2), None, "at least one pixel"),
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            torch.zeros(2),
            None,
            "floating-point dtype, got torch.uint8",
        ),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(3),
            None,
            r"c must be floating point of shape \(2,\), got .*\(3,\)",
        ),
        (torch.zeros(2, 1, 8, 8), torch.zeros(()), None, r"of shape \(\)"),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2, dtype=torch.int64),
            None,
            "c must be floating point .* torch.int64",
        ),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2),
            torch.tensor([0, 5]),
            r"labels must be in \[0, 4\].* from 0 to 5",
        ),
        (torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([-1, 0]), "values from -1 to 0"),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2),
            torch.tensor([0]),
            r"y must be .* shape \(2,\), got .*\(1,\)",
        ),
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2),
            torch.tensor([0.0, 1.0]),
            "y must be int64 .* got torch.float32",
        ),
    ],
)
def test_unet_refuses_inputs(x: torch.Tensor, c: torch.Tensor, y: torch.Tensor | None, message: str) -> None:
    net = UNet(1, channels=4, num_classes=4)
    with pytest.raises(ValueError, match=message):
        net(x, c, y)


def test_labels_without_classes_and_wrong_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=None"):
        UNet(1, channels=4)(torch.zeros(1, 1, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(B, 3\), got \(2, 4\)"):
        MLP(3)(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="even number of channels, got 5"):
        SinusoidalEmbedding(5)
    with pytest.raises(ValueError, match="max_period must be a positive number"):
        SinusoidalEmbedding(4, max_period=0.0)


def test_empty_batches_pass() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    condition = ConditionEmbedding(SinusoidalEmbedding(4), 8, num_classes=2)
    assert condition(torch.zeros(0), empty, 0).shape == (0, 8)
    assert UNet(1, channels=4, num_classes=2)(torch.zeros(0, 1, 4, 4), torch.zeros(0), empty).shape == (
        0,
        1,
        4,
        4,
    )
    assert MLP(3)(torch.zeros(0, 3), torch.zeros(0)).shape == (0, 3)
