"""Muon: its update, which parameters it is for, and training by it; states in the layout of the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sde_diffusion.networks import UNet
from sde_diffusion.optimizers import (
    Adam,
    AdamW,
    Muon,
    Together,
    follow_layout,
    layer_matrices,
    orthogonalized,
)
from sde_diffusion.training_settings import TrainingSettings


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (32, 32)])
def test_orthogonalized_has_the_singular_vectors_and_values_near_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(
        torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False
    )
    # Singular values from 1 down to 1/50: the smallest are not lifted all the way.
    s = torch.linspace(1.0, 0.02, len(s), dtype=torch.float64)
    found = orthogonalized(((u * s) @ vh).float())
    assert found.dtype == torch.float32
    inner = u.T @ found.double() @ vh.T
    values = inner.diagonal()
    assert (values[s > 0.1] > 0.6).all() and (values > 0.1).all() and (values < 1.3).all()
    assert (inner - torch.diag(values)).abs().max() < 0.05
    torch.testing.assert_close(orthogonalized(1e3 * ((u * s) @ vh).float()), found, rtol=0.02, atol=0.02)


def test_a_step_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, 6, 3, 3, generator=generator)
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    momentum = torch.zeros_like(start)
    expected = start.clone()
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        direction = orthogonalized((gradient + 0.9 * momentum).flatten(1)).view(start.shape)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(54) * direction
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-4)


def test_steps_are_as_large_as_those_of_adam() -> None:
    """The root mean square of a step is 0.2 learning rates whatever the shape: what Adam's is in practice."""
    for shape in ((64, 64), (16, 400), (400, 16)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0).step()
        assert 0.12 < weight.detach().square().mean().sqrt() < 0.25


def test_what_is_no_matrix_of_a_layer_is_left_to_adam() -> None:
    net = UNet(1, channels=16, num_classes=20)
    matrices = {id(p) for p in layer_matrices(net)}
    names = {name: id(p) in matrices for name, p in net.named_parameters()}
    assert names["encoder.0.0.block.conv1.weight"] and names["condition.second.weight"]
    # One input channel; one output channel; an embedding; vectors.
    left = [name for name, chosen in names.items() if not chosen]
    assert {"stem.weight", "conv_out.weight", "encoder.0.0.block.conv1.bias"} <= set(left)
    assert any("class" in name for name in left)
    net.encoder[0][0].block.conv1.weight.requires_grad_(False)
    assert len(layer_matrices(net)) == len(matrices) - 1
    with pytest.raises(ValueError, match=r"Muon is for matrices, got a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_the_optimizer_of_the_settings_holds_every_parameter_once() -> None:
    net = UNet(1, channels=16)
    optimizer = TrainingSettings(optimizer="muon", weight_decay=0.1).build_optimizer(net)
    assert isinstance(optimizer, Together)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(net.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    vectors = nn.Linear(2, 2)
    assert isinstance(TrainingSettings(optimizer="muon").build_optimizer(vectors), torch.optim.Optimizer)


def test_it_goes_on_from_its_state_to_the_same_bits() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16))
    x = torch.randn(8, 16)
    settings = TrainingSettings(optimizer="muon", learning_rate=0.01)
    optimizer = settings.build_optimizer(first)

    def step(net: nn.Module, optimizer: Together | torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (net(x) - x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(first, optimizer)
    second = copy.deepcopy(first)
    other = settings.build_optimizer(second)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(first, optimizer)
        step(second, other)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="the state is that of 0 optimizers, not of 2"):
        other.load_state_dict({})


def test_a_parametrized_layer_is_left_to_adam() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    assert layer_matrices(net) == []
    optimizer = TrainingSettings(optimizer="muon").build_optimizer(net)
    net(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()


def test_a_state_from_another_layout_means_the_same() -> None:
    """torch's fused Adam on CPUs would read it in the wrong order."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(32, 16, 3, 3, generator=generator)
    gradients = torch.randn(6, *start.shape, generator=generator)
    results = []
    for change in (False, True):
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
        for i, gradient in enumerate(gradients):
            if change and i == 3:
                state = optimizer.state_dict()
                weight = nn.Parameter(weight.detach().contiguous(memory_format=torch.channels_last))
                optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
                optimizer.load_state_dict(state)
                follow_layout(optimizer)
            weight.grad = torch.empty_like(weight).copy_(gradient)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_is_the_same_in_any_layout_of_weights_and_gradients(kind: type, last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    start, gradients = (torch.randn(n, 6, 5, 3, 3, generator=generator) for n in (1, 4))
    results = []
    for optimizer, fused, order in ((kind, True, layout), (kind.__mro__[2], False, torch.contiguous_format)):
        weights = [nn.Parameter(start[0].clone(memory_format=order)), nn.Parameter(torch.ones(3))]
        steps = optimizer(weights, lr=0.1, weight_decay=0.1, fused=fused)
        for i, gradient in enumerate(gradients):
            # Also gradients that do not lie as their weights do.
            weights[0].grad = gradient.clone(memory_format=torch.channels_last if i % 2 else order)
            weights[1].grad = gradient[0, 0, 0]
            steps.step()
        results.append([part.detach() for part in weights])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.contiguous(), b, rtol=1e-5, atol=1e-6)


def test_a_state_that_does_not_follow_its_weight_is_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 5, 3, 3).contiguous(memory_format=torch.channels_last))
    optimizer = Adam([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].contiguous()
    with pytest.raises(RuntimeError, match="another layout"):
        optimizer.step()
    follow_layout(optimizer)
    optimizer.step()
    plain = Adam([weight], fused=False)  # which may have any
    plain.step()
    plain.state[weight]["exp_avg"] = plain.state[weight]["exp_avg"].contiguous()
    plain.step()


def test_it_learns_a_linear_map() -> None:
    torch.manual_seed(0)
    net, target = nn.Linear(32, 32, bias=False), torch.randn(32, 32) / 6
    optimizer = Muon(net.parameters(), lr=0.05)
    x = torch.randn(256, 32)
    losses = []
    for i in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - i / 200)
        optimizer.zero_grad()
        loss = (net(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]
