"""What torch's optimizers leave open: Muon, several optimizers as one, and layouts of weights in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.devices import choose_precision
from sde_diffusion.networks.channels_last import is_channels_last

__all__ = ["Adam", "AdamW", "Muon", "Together", "follow_layout", "layer_matrices", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LEAST_SIDE = 16  # a thinner matrix has few directions to balance


def orthogonalized(matrix: Tensor) -> Tensor:
    """About ``U V^T`` for ``matrix = U S V^T`` (R, C): singular values of about 0.7 to 1.2 in place of S.

    Five Newton-Schulz steps ``X <- a X + b (X X^T) X + c (X X^T)^2 X``, from ``X / |X|``, with the coefficients of
    Jordan et al. (2024, "Muon"). In bfloat16 where the device computes in it.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(choose_precision("auto", matrix.device))
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """``m <- mu m + g``, then ``w <- (1 - lr decay) w - 0.2 sqrt(max(R, C)) lr orthogonalized(g + mu m)``.

    (Jordan et al. 2024; the factor, which gives steps the size of Adam's at the same learning rate, is that of Liu
    et al. 2025, "Muon is scalable for LLM training", eq. 4. The best rates are higher all the same: here about
    1e-2.) A convolution's weights are the matrix of its outputs by all their inputs.
    torch has one from 2.9 on, for weights of two dimensions only.

    Args:
        parameters: of two dimensions or more.
        lr: learning rate.
        momentum: mu, in [0, 1).
        weight_decay: decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        flat = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if flat:
            raise ValueError(f"Muon is for matrices, got a parameter of shape {flat[0]}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a parameter without a gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].mul_(momentum).add_(gradient)
                matrix = gradient.add(state["momentum"], alpha=momentum).flatten(1)
                scale = 0.2 * math.sqrt(max(matrix.shape))
                if group["weight_decay"]:
                    parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_(orthogonalized(matrix).view(parameter.shape), alpha=-rate * scale)
        return loss


class Together:
    """Several optimizers as one, each of its own parameters.

    Attributes:
        param_groups: of all.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(optimizer.param_groups for optimizer in self.optimizers))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            ValueError: a state of other optimizers.
        """
        states = state.get("optimizers", [])
        if len(states) != len(self.optimizers):
            raise ValueError(f"the state is that of {len(states)} optimizers, not of {len(self.optimizers)}")
        for optimizer, part in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(part)


class _InMemoryOrder:
    """For torch's fused Adam on CPUs: hands it weights with their channels last in the order in which they lie.

    By itself (torch 2.13) it goes through weights, gradients and states as they lie in memory, whatever their strides
    say, and copies these gradients besides. Gradients that lie otherwise are brought into order here, states refused.
    """

    def _init_group(self, group: dict[str, Any], *collected: Any) -> Any:
        found = super()._init_group(group, *collected)  # type: ignore[misc]
        if group["fused"]:
            parameters, gradients, *states = (part for part in collected if isinstance(part, list))
            for i, parameter in enumerate(parameters):
                if parameter.device.type != "cpu":
                    continue
                if not _lie_alike(gradients[i], parameter):
                    gradients[i] = torch.empty_like(parameter).copy_(gradients[i])
                beside = [part for part in states if len(part) == len(parameters)]
                beside = [part for part in beside if part[i].shape == parameter.shape]
                if not all(_lie_alike(part[i], parameter) for part in beside):
                    raise RuntimeError("a state has another layout than its weight: see follow_layout")
                if is_channels_last(parameter):
                    for part in (parameters, gradients, *beside):
                        part[i] = part[i].detach().permute(0, 2, 3, 1)
        return found


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return (
        a.stride() == b.stride()
        or (a.is_contiguous() and b.is_contiguous())
        or (is_channels_last(a) and is_channels_last(b))
    )


class Adam(_InMemoryOrder, torch.optim.Adam):
    """torch's Adam, right and faster where weights on CPUs have their channels last in memory."""


class AdamW(_InMemoryOrder, torch.optim.AdamW):
    """torch's AdamW, likewise."""


def layer_matrices(model: nn.Module) -> list[Tensor]:
    """The trained weights of linear layers and convolutions with at least 16 outputs and 16 inputs each."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    # A parametrized layer computes its weight from parameters of other shapes, which are not for Muon.
    weights = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    return [
        p
        for p in model.parameters()
        if id(p) in weights and p.requires_grad and min(p.shape[0], p[0].numel()) >= _LEAST_SIDE
    ]


def follow_layout(optimizer: torch.optim.Optimizer | Together) -> None:
    """Gives the state of each parameter the parameter's layout in memory, as it has where they grew up together.

    torch's fused Adam on CPUs goes through both as they lie in memory, whatever their strides say (torch 2.13), and
    a state that was loaded has the layout that it was saved with.
    """
    parts = optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,)
    for part in parts:
        for parameter, state in part.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
