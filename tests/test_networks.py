"""The U-Net and the MLP: shapes, conditioning, and every way in which they are run and differentiated."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion.networks import MLP, UNet
from sde_diffusion.networks.unet import pixel_shuffle, pixel_unshuffle

SMALL: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "groups": 4}


def shaken(network: nn.Module, seed: int = 0) -> Any:
    """The network with random numbers added to all weights: no zero-initialised layer hides another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def small_unet(in_channels: int = 2, seed: int = 0, **options: Any) -> UNet:
    torch.manual_seed(seed)
    return shaken(UNet(in_channels, **{**SMALL, **options}), seed)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x, torch.rand(shape[0], generator=generator, dtype=dtype) * 4 - 2


# Shapes and sizes


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 6, 10), (2, 7, 9), (5, 1, 3)]
)
def test_unet_takes_images_of_any_size(channels: int, height: int, width: int) -> None:
    net = small_unet(channels, channel_multipliers=(1, 2, 2)).eval()
    x, c = inputs(2, channels, height, width)
    out = net(x, c)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert out.isfinite().all() and out.std() > 0


def test_padding_is_zeros_at_the_bottom_and_right() -> None:
    net = small_unet(channel_multipliers=(1, 1, 1)).eval()
    x, c = inputs(2, 2, 6, 5)
    padded = torch.zeros(2, 2, 8, 8)
    padded[:, :, :6, :5] = x
    torch.testing.assert_close(net(x, c), net(padded, c)[:, :, :6, :5])


@pytest.mark.parametrize("side", [2, 3])
def test_shuffles_are_those_of_torch(side: int) -> None:
    x = torch.arange(2 * 2 * 6 * 12.0).reshape(2, 2, 6, 12)
    squares = pixel_unshuffle(x, side)
    assert torch.equal(squares, nn.functional.pixel_unshuffle(x, side))
    assert torch.equal(pixel_shuffle(squares, side), x)


def test_unshuffled_squares_are_channels() -> None:
    """A network on squares of 2 x 2 pixels is the same network on the four images of every second pixel."""
    net = small_unet(unshuffle=2, out_channels=3).eval()
    x, c = inputs(2, 2, 8, 12)
    quarters = torch.stack([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], dim=2).flatten(1, 2)
    out = net.through_levels(quarters, net.condition(c, None, 2)).unflatten(1, (3, 2, 2))
    expected = torch.empty(2, 3, 8, 12)
    for i in range(2):
        for j in range(2):
            expected[:, :, i::2, j::2] = out[:, :, i, j]
    torch.testing.assert_close(net(x, c), expected)
    odd = torch.zeros(2, 2, 8, 12)
    odd[:, :, :7, :9] = x[:, :, :7, :9]
    torch.testing.assert_close(net(x[:, :, :7, :9], c), net(odd, c)[:, :, :7, :9])
    with pytest.raises(ValueError, match="unshuffle must be an integer >= 1, got 0"):
        small_unet(unshuffle=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unshuffle": 2},
        {"time_injection": "shift"},
        {"resampling": "resampled"},
        {"embedding": "fourier", "embedding_scale": 2.0},
        {"embedding_scale": 50.0, "embedding_channels": 12},
        {"channel_multipliers": (1,)},
        {"channel_multipliers": (0.5, 1, 1.5), "attention_levels": (0, -1)},
        {"attention_levels": (), "middle_attention": False},
        {"heads": 2},
        {"head_channels": 4},
        {"channels": 7, "channel_multipliers": (1, 3), "groups": 32},
        {"skip_rescale": True},
        {"dropout": 0.3},
        {"input_fourier": (1, 3), "coordinates": True},
        {"out_channels": 6},
        {"num_classes": 3},
    ],
    ids=str,
)
def test_every_option_trains_and_reaches_every_weight(options: dict[str, Any]) -> None:
    net = small_unet(**options)
    x, c = inputs(3, 2, 8, 7)
    y = torch.tensor([0, 1, 2]) if "num_classes" in options else None
    out = net(x, c, y)
    assert out.shape == (3, options.get("out_channels", 2), 8, 7)
    out.square().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_new_networks_compute_zero_and_give_the_last_layer_a_gradient() -> None:
    for net, shape in ((UNet(2, **SMALL), (3, 2, 8, 8)), (MLP(4, width=16), (3, 4))):
        x, c = inputs(*shape)
        out = net(x, c)
        assert out.shape == x.shape and out.abs().max() == 0
        (out - x).square().sum().backward()
        last = list(net.children())
        assert any(m.weight.grad.abs().sum() > 0 for m in last if getattr(m, "weight", None) is not None)


def test_attention_lets_distant_pixels_meet_and_levels_count_from_either_end() -> None:
    def reach(**options: Any) -> float:
        net = small_unet(
            1, channel_multipliers=(1,), middle_attention=False, time_injection="shift", **options
        )
        net.eval()
        for module in net.modules():  # group statistics reach everywhere too: take them out of the question
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        x, c = inputs(1, 1, 24, 24)
        moved = x.clone()
        moved[0, 0, 0, 0] += 1
        return float((net(moved, c) - net(x, c))[0, 0, -1, -1].detach().abs())

    assert reach(attention_levels=()) == 0
    assert reach(attention_levels=(0,)) > 0
    first, last = small_unet(attention_levels=(1,)), small_unet(attention_levels=(-1,))
    assert [n for n, _ in first.named_parameters()] == [n for n, _ in last.named_parameters()]


def test_parameter_count() -> None:
    """Counted by hand: stem, three plain and two wide blocks, attention, modulations, condition, head."""
    w, e = 8, 32
    net = UNet(1, channels=w, channel_multipliers=(1,), blocks_per_level=1, attention_levels=())
    conv = w * w * 9 + w
    block = 2 * (2 * w) + 2 * conv
    wide = (
        block + 2 * w + w * w * 9 + (2 * w * w + w)
    )  # 2w inputs: wider first norm and convolution, 1x1 skip
    attention = 2 * w + (w * 3 * w + 3 * w) + (w * w + w)
    modulations = (e + 1) * (5 * 2 * w)
    condition = (w + 1) * e + (e + 1) * e
    head = 2 * w + (w * 9 + 1)
    expected = (9 * w + w) + 3 * block + attention + 2 * wide + modulations + condition + head
    assert sum(p.numel() for p in net.parameters()) == expected


# Conditioning


@pytest.mark.parametrize("embedding", ["sinusoidal", "fourier"])
@pytest.mark.parametrize("time_injection", ["scale_shift", "shift"])
def test_output_depends_on_each_samples_own_noise_level(embedding: str, time_injection: str) -> None:
    net = small_unet(embedding=embedding, time_injection=time_injection).eval()
    x, c = inputs(4, 2, 8, 8)
    moved = c.clone()
    moved[2] += 0.3
    change = (net(x, moved) - net(x, c)).flatten(1).abs().amax(dim=1)
    assert change[2] > 1e-3
    assert (change[[0, 1, 3]] < 1e-5).all()


@pytest.mark.parametrize(
    "make", [lambda: small_unet(num_classes=3), lambda: shaken(MLP(4, width=16, num_classes=3))]
)
def test_labels_matter_and_no_label_is_the_null_class(make: Callable[[], nn.Module]) -> None:
    net = make().eval()
    x, c = inputs(4, 4) if isinstance(net, MLP) else inputs(4, 2, 8, 8)
    null = torch.full((4,), 3)
    torch.testing.assert_close(net(x, c), net(x, c, null))
    torch.testing.assert_close(net(x, c), net(x, c, null.int()))
    outputs = [net(x, c, torch.full((4,), k)) for k in range(4)]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().max() > 1e-3
    mixed = net(x, c, torch.tensor([2, 3, 0, 1]))
    for i, k in enumerate([2, 3, 0, 1]):
        torch.testing.assert_close(mixed[i], outputs[k][i], rtol=1e-4, atol=1e-5)


def test_coordinates_tell_positions_apart() -> None:
    """Without padding a convolution of a constant image is constant; one of coordinates is not."""
    x, c = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    for coordinates in (False, True):
        net = small_unet(1, coordinates=coordinates).eval()
        net.stem = nn.Conv2d(net.stem.in_channels, 8, 1)
        seen: list[Tensor] = []
        net.stem.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        net(x, c)
        assert (seen[0].std(dim=(2, 3)) > 0.01).all() == coordinates


@pytest.mark.parametrize(
    ("net", "shape"),
    [(small_unet(), (5, 2, 7, 8)), (shaken(MLP(3, width=16)), (5, 3))],
    ids=["unet", "mlp"],
)
def test_samples_do_not_see_their_batch_mates(net: nn.Module, shape: tuple[int, ...]) -> None:
    net = net.eval()
    x, c = inputs(*shape)
    together = net(x, c)
    for i in range(shape[0]):
        torch.testing.assert_close(net(x[i : i + 1], c[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    net = small_unet(dropout=0.5)
    x, c = inputs(2, 2, 8, 8)
    assert (net(x, c) - net(x, c)).abs().max() > 1e-3
    net.eval()
    torch.testing.assert_close(net(x, c), net(x, c), rtol=0, atol=0)


# Ways to run


def test_config_rebuilds_the_network() -> None:
    for net in (small_unet(num_classes=2, channel_multipliers=[1, 2], dropout=0.1), MLP(3, width=8, depth=1)):
        signature = [name for name in inspect.signature(type(net)).parameters]
        assert list(net.config) == signature
        twin = type(net)(**net.config)
        twin.load_state_dict(net.state_dict())
        assert twin.config == net.config
        x, c = inputs(2, 3) if isinstance(net, MLP) else inputs(2, 2, 8, 8)
        torch.testing.assert_close(twin.eval()(x, c), net.eval()(x, c), rtol=0, atol=0)
    assert net.config["width"] == 8 and small_unet(channel_multipliers=[1, 2]).config[
        "channel_multipliers"
    ] == (1, 2)


def test_channels_last_gives_the_same_output_and_stays_channels_last() -> None:
    net = small_unet(num_classes=2)
    x, c = inputs(3, 2, 8, 8)
    out = net(x, c)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)
    last: list[Tensor] = []
    other.decoder[-1][-1].register_forward_hook(lambda module, args, out: last.append(out))
    torch.testing.assert_close(other(x.to(memory_format=torch.channels_last), c), out, rtol=1e-4, atol=1e-5)
    assert last[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: small_unet(num_classes=2, input_fourier=(1, 2), coordinates=True, dropout=0.0),
            (3, 2, 7, 6),
        ),
        (lambda: small_unet(checkpointing=True), (3, 2, 8, 8)),
        (lambda: shaken(MLP(4, width=16, num_classes=2)), (3, 4)),
    ],
    ids=["unet", "checkpointing", "mlp"],
)
def test_compiles_as_one_graph(make: Callable[[], Any], shape: tuple[int, ...], training: bool) -> None:
    net = make().train(training)
    x, c = inputs(*shape)
    y = torch.tensor([0, 2, 1]) if net.config["num_classes"] else None
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    expected, got = net(x, c, y), compiled(x, c, y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), parameters, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True),
        strict=True,
    ):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, c, y), expected.detach(), rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient_even_with_dropout() -> None:
    plain = small_unet(dropout=0.3)
    saving = UNet(**{**plain.config, "checkpointing": True})
    saving.load_state_dict(plain.state_dict())
    x, c = inputs(3, 2, 8, 8)
    results = []
    for net in (plain, saving):
        torch.manual_seed(5)
        out = net(x, c)
        results.append((out, torch.autograd.grad(out.square().sum(), list(net.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_checkpointing_recomputes_and_saves_fewer_activations() -> None:
    x, c = inputs(3, 2, 8, 8)
    saved = []
    for checkpointing in (False, True):
        net = small_unet(checkpointing=checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t
        ):
            net(x, c)
        saved.append(sum(sizes))
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_is_close_and_returns_the_dtype_of_x(training: bool) -> None:
    for net, shape in ((small_unet(num_classes=2), (3, 2, 8, 8)), (shaken(MLP(4, width=16)), (3, 4))):
        net.train(training)
        x, c = inputs(*shape)
        exact = net(x, c)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x, c)
        assert out.dtype == torch.float32
        assert (out - exact).abs().max() < 0.05 * exact.abs().max()
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_whole_network_in_another_dtype(dtype: torch.dtype) -> None:
    net = small_unet(input_fourier=(1, 2), coordinates=True).eval()
    x, c = inputs(3, 2, 8, 8)
    expected = net(x, c)
    out = net.to(dtype)(x.to(dtype), c)
    assert out.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (out - expected).abs().max() < tolerance * expected.abs().max()


# Derivatives with respect to x: divergences are made of these


#: torch's own decompositions of normalisation layers for forward mode go through torch.jit.
jvp_warns = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def jacobian_by_differences(f: Callable[[Tensor], Tensor], x: Tensor, h: float = 1e-5) -> Tensor:
    """d f_i / d x_j by central differences, (outputs, inputs), in float64."""
    columns = []
    for j in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[j] = h
        step = step.reshape(x.shape)
        columns.append(((f(x + step) - f(x - step)) / (2 * h)).flatten())
    return torch.stack(columns, dim=1).detach()


@pytest.fixture(scope="module")
def double_unet() -> tuple[UNet, Tensor, Tensor, Tensor]:
    """A network in float64, one input, its noise level and the Jacobian there by finite differences."""
    net = small_unet(1, attention_levels=(0, 1)).double().eval()
    x, c = inputs(1, 1, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        return net, x, c, jacobian_by_differences(lambda x: net(x, c), x)


def test_batched_vjps_give_the_jacobian(double_unet: tuple[UNet, Tensor, Tensor, Tensor]) -> None:
    net, x, c, jacobian = double_unet
    x = x.clone().requires_grad_()
    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    (rows,) = torch.autograd.grad(net(x, c), x, basis, is_grads_batched=True)
    torch.testing.assert_close(rows.reshape(x.numel(), -1), jacobian, rtol=1e-6, atol=1e-7)


@jvp_warns
def test_jvps_give_the_jacobian_in_both_modes(double_unet: tuple[UNet, Tensor, Tensor, Tensor]) -> None:
    net, x, c, jacobian = double_unet
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    expected = (jacobian @ v.flatten()).reshape(x.shape)
    try:
        for training in (False, True):
            net.train(training)
            _, tangent = torch.func.jvp(lambda x: net(x, c), (x,), (v,))
            torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)
            with torch.no_grad():
                _, tangent = torch.func.jvp(lambda x: net(x, c), (x,), (v,))
            torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)
    finally:
        net.eval()
    basis = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    columns = torch.func.vmap(lambda v: torch.func.jvp(lambda x: net(x, c), (x,), (v,))[1])(basis)
    torch.testing.assert_close(columns.reshape(x.numel(), -1).T, jacobian, rtol=1e-6, atol=1e-7)


def test_second_derivatives(double_unet: tuple[UNet, Tensor, Tensor, Tensor]) -> None:
    """The gradient of |J^T v|^2 against its own finite difference along one direction."""
    net, x, c, _ = double_unet
    generator = torch.Generator().manual_seed(4)
    v, w = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))

    def energy(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x, c), x, v, create_graph=True)
        return g.square().sum(), x

    value, leaf = energy(x)
    (gradient,) = torch.autograd.grad(value, leaf)
    h = 1e-5
    slope = (energy(x + h * w)[0] - energy(x - h * w)[0]).item() / (2 * h)
    assert float((gradient * w).sum()) == pytest.approx(slope, rel=1e-5)


@jvp_warns
def test_mlp_jacobian_in_all_modes() -> None:
    net = shaken(MLP(3, width=16, depth=2, input_fourier=(0, 1))).double().eval()
    x, c = inputs(1, 3, dtype=torch.float64)
    jacobian = jacobian_by_differences(lambda x: net(x, c), x)
    leaf = x.clone().requires_grad_()
    (rows,) = torch.autograd.grad(net(leaf, c), leaf, torch.eye(3).double()[:, None], is_grads_batched=True)
    torch.testing.assert_close(rows[:, 0], jacobian, rtol=1e-6, atol=1e-8)
    columns = [torch.func.jvp(lambda x: net(x, c), (x,), (e[None],))[1][0] for e in torch.eye(3).double()]
    torch.testing.assert_close(torch.stack(columns, dim=1), jacobian, rtol=1e-6, atol=1e-8)


def test_a_unet_learns_what_depends_on_input_noise_level_and_class() -> None:
    """Regression of x (c + 2 y - 1): a loss of 1/3 is left without c, 1 without y, 4/3 without x."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": 16, "channel_multipliers": (1,), "blocks_per_level": 1}
    net = UNet(1, **options, attention_levels=(), num_classes=1, embedding_scale=4.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(100):
        x = torch.randn(32, 1, 4, 4, generator=generator)
        c = torch.rand(32, generator=generator) * 2 - 1
        y = torch.randint(0, 2, (32,), generator=generator)
        loss = (net(x, c, y) - x * (c + 2 * y - 1)[:, None, None, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.15
