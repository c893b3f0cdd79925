"""GroupNorm with SiLU and narrow attention in C against the formulas in float64, and networks that use them."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from sde_diffusion.networks import UNet, channels_last, narrow_attention, native
from sde_diffusion.networks.blocks import SelfAttention, normalized
from sde_diffusion.networks.channels_last import fastest_layout, is_channels_last, norm_silu
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.unet2d import UNet2D

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HAVE_BOTH = channels_last._library() is not None and narrow_attention._library() is not None
pytestmark = pytest.mark.skipif(not HAVE_BOTH, reason="no C compiler here, or they are turned off")
ROUNDING = 2.0**-8  # of bfloat16: half a unit in the last place, and as much for one step within


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that gains, whichever this one is."""
    monkeypatch.setattr(channels_last, "available", lambda: True)


def randomised(net: nn.Module) -> nn.Module:
    """With nothing left at zero."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def images(*shape: int, seed: int = 0, mean: float = 0.5) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def affine(batch: int, channels: int) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, batch, channels, generator=torch.Generator().manual_seed(1)).unbind(0)
    return weight, bias


def formula(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    y = F.group_norm(x, groups, eps=eps) * weight[:, :, None, None] + bias[:, :, None, None]
    return F.silu(y) if silu else y


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().contiguous().requires_grad_() for tensor in tensors]


def derivatives(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor
) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, cotangent.to(out.dtype))


# Channels that fill blocks of 32, of 16, neither; more pixels than one portion of a sum, fewer.
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((3, 64, 16, 12), 16), ((2, 48, 5, 7), 12), ((2, 20, 3, 50), 5), ((1, 7, 4, 4), 1), ((4, 96, 2, 1), 96)],
)
def test_values_and_gradients_are_those_of_the_formula(
    gains: None, shape: tuple[int, ...], groups: int, silu: bool
) -> None:
    inputs = [part.requires_grad_() for part in (images(*shape), *affine(*shape[:2]))]
    cotangent = images(*shape, seed=2, mean=0.0)
    found = derivatives(lambda *parts: norm_silu(*parts, groups, 1e-5, silu), inputs, cotangent)
    wanted = derivatives(lambda *parts: formula(*parts, groups, 1e-5, silu), exact(*inputs), cotangent)
    assert is_channels_last(found[0]) and found[0].dtype == found[1].dtype == torch.bfloat16
    assert found[2].dtype == found[3].dtype == torch.float32
    values = wanted[0].detach()
    assert ((found[0] - values).abs() <= ROUNDING * values.abs() + 1e-5).all()
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert relative(a, b) < ROUNDING


@pytest.mark.parametrize("mean", [0.5, 50.0])
def test_an_offset_is_normalised_with_the_image(gains: None, mean: float) -> None:
    shape = (3, 48, 5, 7)
    generator = torch.Generator().manual_seed(3)
    offset = 3 * torch.randn(shape[:2], generator=generator) + mean
    inputs = [part.requires_grad_() for part in (images(*shape), *affine(*shape[:2]), offset)]
    cotangent = images(*shape, seed=2, mean=0.0)

    def ours(*parts: Tensor) -> Tensor:
        return norm_silu(*parts[:3], 12, 1e-5, True, offset=parts[3])

    def wanted(*parts: Tensor) -> Tensor:
        return formula(parts[0] + parts[3][:, :, None, None], *parts[1:3], 12, 1e-5, True)

    found, leaves = derivatives(ours, inputs, cotangent), exact(*inputs)
    truth = derivatives(wanted, leaves, cotangent)
    assert found[4].dtype == torch.float32
    for a, b in zip(found, truth, strict=True):
        assert relative(a.detach(), b.detach()) < ROUNDING
    results = []
    for function, parts in ((ours, inputs), (wanted, leaves)):
        out = function(*parts)
        first = torch.autograd.grad(out, parts, cotangent.to(out.dtype), create_graph=True)
        results.append(torch.autograd.grad(sum(p.double().square().sum() for p in first), parts))
    for a, b in zip(*results, strict=True):
        assert relative(a, b) < 0.02


def test_a_large_mean_costs_nothing_but_the_rounding_of_the_input(gains: None) -> None:
    x = images(2, 32, 20, 20, mean=100.0)
    found = norm_silu(x, *affine(2, 32), 8, 1e-5, True)
    wanted = formula(x.double(), *(part.double() for part in affine(2, 32)), 8, 1e-5, True)
    assert ((found - wanted).abs() <= ROUNDING * wanted.abs() + 1e-3).all()


def test_an_image_does_not_depend_on_its_batch_or_on_threads(gains: None) -> None:
    x, (weight, bias) = images(5, 40, 9, 9), affine(5, 40)
    together = norm_silu(x, weight, bias, 10, 1e-5, True)
    alone = [norm_silu(x[i : i + 1], weight[i : i + 1], bias[i : i + 1], 10, 1e-5, True) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    qkv = torch.randn(3, 30, 3 * 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    attended = narrow_attention.narrow_attention(qkv, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(norm_silu(x, weight, bias, 10, 1e-5, True), together)
        assert torch.equal(narrow_attention.narrow_attention(qkv, 2), attended)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_so_and_stays_in_its_image(gains: None) -> None:
    x = images(3, 16, 4, 4)
    x[1, 3, 2, 2] = torch.nan
    out = norm_silu(x, *affine(3, 16), 4, 1e-5, True)
    # Only the channel's group of four is normalised with it.
    assert out[1, :4].isnan().all() and out[1, 4:].isfinite().all() and out[[0, 2]].isfinite().all()
    qkv = torch.randn(2, 20, 3 * 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    qkv[0, 5, 2] = torch.nan
    attended = narrow_attention.narrow_attention(qkv, 1)
    assert attended[0, 5].isnan().all() and attended[1].isfinite().all()
    qkv[0, 5, 2] = 0.0
    qkv[0, 5, 18] = torch.nan  # in a value, whose channel all queries sum
    qkv.requires_grad_()
    attended = narrow_attention.narrow_attention(qkv, 1)
    assert (
        attended[0, :, 2].isnan().all()
        and attended[0, :, 3:].isfinite().all()
        and attended[1].isfinite().all()
    )
    gradient = torch.zeros_like(attended)
    gradient[1, 7, 4] = torch.nan
    (slope,) = torch.autograd.grad(narrow_attention.narrow_attention(qkv, 1), qkv, gradient)
    assert slope[1, :, 20].isnan().all() and slope[1, :, [16, 17, 18, 19, 21, 22, 23]].isfinite().all()


def test_second_and_batched_derivatives(gains: None) -> None:
    inputs = [part.requires_grad_() for part in (images(2, 24, 6, 5), *affine(2, 24))]
    qkv = torch.randn(2, 19, 3 * 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def both(x: Tensor, weight: Tensor, bias: Tensor, qkv: Tensor) -> Tensor:
        normed = norm_silu(x, weight, bias, 6, 1e-5, True)
        return torch.cat([normed.flatten(), narrow_attention.narrow_attention(qkv, 2).flatten()])

    def plain(x: Tensor, weight: Tensor, bias: Tensor, qkv: Tensor) -> Tensor:
        attended = narrow_attention.written_out(qkv, 2)
        return torch.cat([formula(x, weight, bias, 6, 1e-5, True).flatten(), attended.flatten()])

    leaves = [*inputs, qkv]
    truths = exact(*leaves)
    cotangents = torch.randn(3, both(*leaves).numel(), generator=torch.Generator().manual_seed(1))
    for function, parts, into in ((both, leaves, []), (plain, truths, wanted := [])):
        out = function(*parts)
        batched = torch.autograd.grad(
            out, parts, cotangents.to(out.dtype), is_grads_batched=True, retain_graph=True
        )
        first = torch.autograd.grad(out, parts, cotangents[0].to(out.dtype), create_graph=True)
        total = sum(part.double().square().sum() for part in first)
        into += [*batched, *first, *torch.autograd.grad(total, parts)]
        if function is both:
            found = into
    for a, b in zip(found, wanted, strict=True):
        assert relative(a.detach(), b.detach()) < 0.02


@lru_cache
def attention_without(*flags: str) -> ctypes.CDLL | None:
    """Attention compiled as for a processor that lacks something; None if the compiler is not for those that could
    have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", " ".join([*native._compiler(), *flags]))  # type: ignore[misc]
        patch.setattr(native, "load_native", native.load_native.__wrapped__)
        patch.setattr(narrow_attention, "load_native", native.load_native)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return narrow_attention._library.__wrapped__()


# By what this processor has, and without its matrix tiles, and without its products of pairs either.
@pytest.mark.parametrize("flags", [(), ("-mno-amx-bf16",), ("-mno-amx-bf16", "-mno-avx512bf16")])
@pytest.mark.parametrize(
    "scale", [1.0, 12.0, 300.0]
)  # the latter two with logits whose exponentials overflow
@pytest.mark.parametrize(
    ("batch", "tokens", "heads"), [(2, 64, 3), (1, 37, 2), (3, 5, 1), (1, 16, 2), (1, 97, 1)]
)
def test_narrow_attention_is_the_formula(
    flags: tuple[str, ...],
    scale: float,
    batch: int,
    tokens: int,
    heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if flags:
        library = attention_without(*flags)
        if library is None:
            pytest.skip("the compiler is for other processors")
        monkeypatch.setattr(narrow_attention, "_library", lambda: library)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 24 * heads, generator=generator)
    qkv[..., : 16 * heads] *= scale**0.5
    qkv = qkv.bfloat16().requires_grad_()
    cotangent = torch.randn(batch, tokens, 8 * heads, generator=generator).bfloat16()
    assert narrow_attention.is_narrow(qkv, heads) and not narrow_attention.is_narrow(qkv, 2 * heads)
    found = derivatives(lambda x: narrow_attention.narrow_attention(x, heads), [qkv], cotangent)

    def wanted(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(2, (3, heads, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    truth = derivatives(wanted, exact(qkv), cotangent)
    assert relative(found[0], truth[0]) < ROUNDING
    # The result is rounded before its derivative uses it.
    assert relative(found[1], truth[1]) < (3 if scale == 1.0 else 8) * ROUNDING
    with torch.no_grad():
        assert torch.equal(narrow_attention.narrow_attention(qkv, heads), found[0])


def test_large_gradients_of_few_tokens_stay_finite() -> None:
    """Logits near the bound of what needs no shift: keys that fill up a block must not overflow."""
    qkv = torch.cat([torch.full((1, 5, 8), 4.4), torch.full((1, 5, 8), -4.4), torch.randn(1, 5, 8)], 2)
    qkv = qkv.bfloat16().requires_grad_()
    out = narrow_attention.narrow_attention(qkv, 1)
    (found,) = torch.autograd.grad(out, qkv, torch.full_like(out, 1e16))
    assert found.isfinite().all()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(1, channels=16, heads=2, dropout=0.0, skip_rescale=True),
    "unet, shift, resampled": lambda: UNet(
        1, channels=16, time_injection="shift", resampling="resampled", attention_levels=(0,)
    ),
    "unet2d": lambda: UNet2D(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ),
    "ncsnpp": lambda: NCSNpp(
        1, channels=16, channel_multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), dropout=0.0
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_the_same_in_either_layout(
    monkeypatch: pytest.MonkeyPatch, name: str, training: bool
) -> None:
    torch.manual_seed(0)
    net = randomised(NETWORKS[name]()).train(training)
    x, c, cotangent = torch.randn(3, 1, 8, 8), torch.rand(3), torch.randn(3, 1, 8, 8)
    seen = []
    for block in net.modules():
        if isinstance(block, SelfAttention):
            block.register_forward_hook(lambda module, inputs, out: seen.append(is_channels_last(out)))
    results = []
    for last in (True, False):
        monkeypatch.setattr(channels_last, "available", lambda last=last: last)
        seen.clear()
        x_in = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x_in, c)
        assert seen and all(found is last for found in seen)
        assert out.is_contiguous() and out.dtype == torch.float32
        leaves = [x_in, *(p for p in net.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        results.append([out.detach().flatten(), *(g.flatten() for g in gradients if g is not None)])
    exact_net = net.double()
    x_in = x.double().requires_grad_()
    leaves = [x_in, *(p for p in exact_net.parameters() if p.requires_grad)]
    out = exact_net(x_in, c.double())
    gradients = torch.autograd.grad(out, leaves, cotangent.double(), allow_unused=True)
    truth = [out.detach().flatten(), *(g.flatten() for g in gradients if g is not None)]
    # As far from the truth as the usual layout is: the result, its gradient by the image, those by the weights.
    parts = slice(1), slice(1, 2), slice(2, None)
    here, there = (
        [relative(torch.cat(result[part]), torch.cat(truth[part])) for part in parts] for result in results
    )
    for a, b in zip(here, there, strict=True):
        assert a < 1.5 * b + 1e-3 and a < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_in_evaluation_have_batched_and_second_derivatives(gains: None, name: str) -> None:
    torch.manual_seed(0)
    net = randomised(NETWORKS[name]()).eval()
    x, c = torch.randn(2, 1, 8, 8).requires_grad_(), torch.rand(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, c)
    cotangents = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(out, x, part, create_graph=True)[0] for part in cotangents]
    assert relative(batched, torch.stack(singly).detach()) < 0.05
    (second,) = torch.autograd.grad(singly[0].square().sum(), x)
    with torch.enable_grad():
        exact_x = x.detach().double().requires_grad_()
        (first,) = torch.autograd.grad(
            net.double()(exact_x, c.double()), exact_x, cotangents[0].double(), create_graph=True
        )
        (wanted,) = torch.autograd.grad(first.square().sum(), exact_x)
    assert relative(second, wanted) < 0.1


def test_other_types_and_transforms_stay_in_the_usual_layout(gains: None) -> None:
    x = torch.randn(2, 8, 4, 4)
    assert is_channels_last(fastest_layout(x.bfloat16()))
    assert not is_channels_last(fastest_layout(x)) and fastest_layout(x) is x
    inside = []
    torch.func.vmap(lambda part: inside.append(is_channels_last(fastest_layout(part[None]))) or part)(
        x.bfloat16()
    )
    assert inside == [False]
    # Given all the same, they are normalised by torch.
    norm = nn.GroupNorm(2, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(normalized(norm, last, silu=True), F.silu(norm(x)))
    tangent = torch.randn_like(x)
    forward = torch.func.jvp(lambda part: normalized(norm, part, silu=True), (last,), (tangent,))[1]
    torch.testing.assert_close(forward, torch.func.jvp(lambda part: F.silu(norm(part)), (x,), (tangent,))[1])


def test_traces_and_stand_ins_do_without(gains: None) -> None:
    net = randomised(NETWORKS["unet2d"]()).eval()
    x, c = torch.randn(2, 1, 8, 8), torch.rand(2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, (x, c), check_trace=False)
        assert relative(traced(x, c), net(x, c).double()) < 0.02
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x, c).shape == x.shape


def test_saved_tensors_may_come_back_in_another_layout(gains: None) -> None:
    inputs = [part.requires_grad_() for part in (images(2, 32, 6, 6), *affine(2, 32))]
    qkv = torch.randn(2, 20, 3 * 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        normed = norm_silu(*inputs, 8, 1e-5, True)
        total = normed.float().sum() + narrow_attention.narrow_attention(qkv, 2).float().square().sum()
        return torch.autograd.grad(total, [*inputs, qkv])

    wanted = gradients()

    def elsewhere(x: Tensor) -> Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
        found = gradients()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_last_layer_of_ones_own_and_hooks(gains: None) -> None:
    net = UNet(1, out_channels=20, channels=16).eval()
    x, c = torch.randn(2, 1, 8, 8), torch.rand(2)
    calls = []
    net.conv_out.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        randomised(net.conv_out)
        expected = net(x, c)
        net.conv_out = nn.Sequential(net.conv_out)
        assert torch.equal(net(x, c), expected) and len(calls) == 2


# Channels that fill blocks of 32, of 16, neither.
@pytest.mark.parametrize("shape", [(3, 64, 16, 12), (2, 48, 5, 7), (2, 20, 3, 50)])
def test_dropout_is_that_of_its_hash(gains: None, shape: tuple[int, ...]) -> None:
    inputs = [part.requires_grad_() for part in (images(*shape), *affine(*shape[:2]))]
    cotangent = images(*shape, seed=2, mean=0.0)
    torch.manual_seed(3)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    torch.manual_seed(3)
    found = derivatives(lambda *parts: norm_silu(*parts, 4, 1e-5, True, dropout=0.3), inputs, cotangent)
    mask = channels_last.stays(shape, 0.3, seed)

    def wanted(*parts: Tensor) -> Tensor:
        return formula(*parts, 4, 1e-5, True) * mask / 0.7

    truth = derivatives(wanted, exact(*inputs), cotangent)
    assert torch.equal(found[0] == 0, ~mask) and is_channels_last(found[0])
    for a, b in zip(found, truth, strict=True):
        assert relative(a.detach(), b.detach()) < ROUNDING
    torch.manual_seed(3)
    out = norm_silu(*inputs, 4, 1e-5, True, dropout=0.3)
    first = torch.autograd.grad(out, inputs, cotangent, create_graph=True)
    second = torch.autograd.grad(sum(part.double().square().sum() for part in first), inputs)
    leaves = exact(*inputs)
    first = torch.autograd.grad(wanted(*leaves), leaves, cotangent.double(), create_graph=True)
    truth = torch.autograd.grad(sum(part.square().sum() for part in first), leaves)
    for a, b in zip(second, truth, strict=True):
        assert relative(a, b) < 0.02


def test_dropout_has_its_rate_and_no_pattern(gains: None) -> None:
    x, (weight, bias) = images(32, 32, 32, 16), affine(32, 32)
    torch.manual_seed(0)
    masks = [(norm_silu(x, weight, bias, 4, 1e-5, True, dropout=0.25) == 0).double() for _ in range(3)]
    error = (0.25 * 0.75 / x.numel()) ** 0.5
    a, b, c = masks
    assert all(abs(float(mask.mean()) - 0.25) < 4 * error for mask in masks)
    # Of neighbours in any direction, and of one call and another, both are dropped at the square of the rate.
    pairs = [(a, b), (b, c), (a, c), *((a, a.roll(1, axis)) for axis in range(4)), (a, a.roll(16, 1))]
    for one, other in pairs:
        assert abs(float((one * other).mean()) - 0.25**2) < 5 * error
    # The number that is dropped in a channel of an image is binomial: its variance is that of 512 draws.
    counts = a.flatten(2).sum(2).flatten()
    assert abs(float(counts.var()) / (512 * 0.25 * 0.75) - 1) < 5 * (2 / len(counts)) ** 0.5


def test_a_seed_of_torch_sets_dropout_and_threads_do_not(gains: None) -> None:
    torch.manual_seed(0)
    net = randomised(UNet(1, channels=16, dropout=0.5)).train()
    x, c = torch.randn(3, 1, 8, 8), torch.rand(3)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results.append([net(x, c).detach() for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert relative(one, other.double()) < 2.0**-8
    assert relative(results[0][0], results[0][1].double()) > 0.05
