"""The diffusion transformer against its formula written out, its derivatives, its errors, its use by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.nn import functional as F

import sde_diffusion as sd
from sde_diffusion import build
from sde_diffusion.config import changed
from sde_diffusion.networks import DiT
from sde_diffusion.networks.dit import positions

OPTIONS: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def shaken(net: DiT) -> DiT:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return net


def layer_norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def reference(net: DiT, x: Tensor, c: Tensor, y: Tensor | None) -> Tensor:
    """One patch and one token at a time."""
    p, width = net.patch_size, net.config["width"]
    batch, _, height, wide = x.shape
    rows, columns = height // p, wide // p
    tokens = []
    for i in range(rows):
        for j in range(columns):
            patch = x[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].flatten(1)
            token = patch @ net.stem.weight.flatten(1).T + net.stem.bias
            angles = [n / 10_000 ** (4 * k / width) for n in (i, j) for k in range(width // 4)]
            place = [f(a) for part in (angles[: width // 4], angles[width // 4 :]) for f in (math.sin, math.cos)
                     for a in part]  # fmt: skip
            tokens.append(token + torch.tensor(place))
    h = torch.stack(tokens, dim=1)
    condition = F.silu(net.condition(c, y, batch))
    modulation = condition @ net.modulations.linear.weight.T + net.modulations.linear.bias
    for index, block in enumerate(net.blocks):
        m = modulation[:, index * 6 * width : (index + 1) * 6 * width].view(batch, 6, 1, width)
        qkv = block.qkv(layer_norm(h) * (1 + m[:, 1]) + m[:, 0])
        size = width // block.heads
        parts = []
        for head in range(block.heads):
            q, k, v = (qkv[..., n * width + head * size : n * width + (head + 1) * size] for n in range(3))
            parts.append((q @ k.mT / math.sqrt(size)).softmax(-1) @ v)
        h = h + m[:, 2] * block.out(torch.cat(parts, dim=-1))
        z = block.linear1(layer_norm(h) * (1 + m[:, 4]) + m[:, 3])
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + m[:, 5] * block.linear2(z)
    shift, scale = modulation[:, None, -2 * width :].chunk(2, dim=-1)
    h = net.linear_out(layer_norm(h) * (1 + scale) + shift)
    out = torch.zeros(batch, net.out_channels, height, wide)
    for n in range(rows * columns):
        i, j = divmod(n, columns)
        out[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = h[:, n].view(batch, net.out_channels, p, p)
    return out


@pytest.mark.parametrize("outputs", [None, 5])
@pytest.mark.parametrize("training", [False, True])
def test_formula(outputs: int | None, training: bool) -> None:
    net = shaken(DiT(3, out_channels=outputs, num_classes=4, **OPTIONS)).train(training)
    x, c, y = torch.randn(3, 3, 4, 6), torch.rand(3), torch.tensor([0, 3, 4])
    with torch.no_grad():
        torch.testing.assert_close(net(x, c, y), reference(net, x, c, y), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(net(x, c), net(x, c, torch.full((3,), 4)), rtol=1e-5, atol=1e-5)


def test_a_new_network_gives_zero_and_its_blocks_nothing() -> None:
    net = DiT(2, num_classes=3, augment_dim=2, **OPTIONS)
    x, c = torch.randn(2, 2, 8, 8), torch.rand(2)
    assert net(x, c, torch.tensor([0, 1]), torch.ones(2, 2)).abs().max() == 0
    tokens = torch.randn(2, 5, 16)
    (modulation, *_) = net.modulations(net.condition(c, None, 2))
    assert torch.equal(net.blocks[0](tokens, modulation), tokens)


def test_everything_learns() -> None:
    """After two steps every parameter has a gradient, through the gates that began at zero."""
    net = DiT(1, num_classes=2, augment_dim=3, input_fourier=(0, 1), **OPTIONS)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    x, c, y, augment = (
        torch.randn(6, 1, 4, 4),
        torch.rand(6),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.randn(6, 3),
    )
    for _ in range(4):
        optimizer.zero_grad()
        (net(x, c, y, augment) - torch.randn(6, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_places() -> None:
    grid = positions(3, 4, 8)
    assert grid.shape == (12, 8)
    row, column = 2, 3
    expected = [math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)]
    expected += [math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)]
    torch.testing.assert_close(grid[row * 4 + column], torch.tensor(expected), rtol=0, atol=1e-6)
    assert torch.cdist(grid, grid).fill_diagonal_(1).min() > 0.01


@pytest.mark.filterwarnings("ignore:.*vmap.*:UserWarning")
def test_derivatives_in_all_modes() -> None:
    net = shaken(DiT(1, **OPTIONS)).double().eval()
    x, c = torch.randn(1, 1, 2, 4, dtype=torch.float64), torch.rand(1, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    eye = torch.eye(8, dtype=torch.float64).view(8, 1, 1, 2, 4)
    (rows,) = torch.autograd.grad(net(leaf, c), leaf, eye, is_grads_batched=True)
    columns = [torch.func.jvp(lambda x: net(x, c), (x,), (e,))[1].flatten() for e in eye]
    torch.testing.assert_close(rows.view(8, 8), torch.stack(columns, dim=1), rtol=1e-8, atol=1e-10)
    h = 1e-6
    difference = (net(x + h * eye[3], c) - net(x - h * eye[3], c)) / (2 * h)
    torch.testing.assert_close(columns[3], difference.flatten(), rtol=1e-5, atol=1e-8)


def test_checkpointing_changes_nothing() -> None:
    net = shaken(DiT(1, checkpointing=True, **OPTIONS))
    plain = DiT(**{**net.config, "checkpointing": False})
    plain.load_state_dict(net.state_dict())
    x, c = torch.randn(2, 1, 4, 4), torch.rand(2)
    for one in (net, plain):
        one(x, c).square().sum().backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 0}, "patch_size must be an integer >= 1, got 0"),
        ({"width": 18}, "width must be a multiple of 4, for the positions of tokens, got 18"),
        ({"heads": 3}, "heads must divide the 16 channels of the attention, got 3"),
        ({"depth": 0}, "depth must be an integer >= 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number, got 0"),
        ({"dropout": 1.5}, "dropout must be a number"),
    ],
    ids=str,
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(1, **{**OPTIONS, **options})


def test_refuses_images_that_patches_do_not_cover() -> None:
    net = DiT(1, patch_size=4, **OPTIONS)
    assert net(torch.zeros(1, 1, 4, 12), torch.zeros(1)).shape == (1, 1, 4, 12)
    with pytest.raises(ValueError, match=r"sides are multiples of 4, got \(1, 1, 8, 6\)"):
        net(torch.zeros(1, 1, 8, 6), torch.zeros(1))


def config(**model: Any) -> ConfigDict:
    return changed({"model": {"name": "dit", "width": 16, "depth": 1, "parametrization": "v", **model}})


def test_by_name() -> None:
    info = build.DataInfo("digits", (1, 8, 8), 17, 10)
    net = build.network(config(class_conditional=True, patch_size=4, dropout=0.1), info)
    assert isinstance(net, DiT)
    assert net.config["patch_size"] == 4 and net.config["num_classes"] == 10 and net.config["depth"] == 1
    model = build.score_model(config(), info)
    assert isinstance(model.net, DiT)
    out = sd.sample(
        model.sde,
        model.eval(),
        (2, 1, 8, 8),
        predictor=sd.DDIM(),
        times=sd.log_snr_times(model.sde, 3),
        seed=0,
    )
    assert out.x.shape == (2, 1, 8, 8) and out.x.isfinite().all()
    with pytest.raises(build.UsageError, match=r"name 'dit' is for images"):
        build.network(config(), build.DataInfo("moons", (2,), None, None))
