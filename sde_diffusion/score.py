"""A network, an SDE and a parametrization together are a score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.parametrization import NOISE, Parametrization
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``score(x, t)``: (B, *D) and () or (B,) -> (B, *D). All that samplers and likelihoods ask for."""


@dataclass(frozen=True)
class Conditioning:
    """How a time is told to the network: ``c = function(sde, t)``, (B,) float64 -> (B,)."""

    name: str
    function: Callable[[SDE, Tensor], Tensor]


LOG_NOISE = Conditioning("log_noise", lambda sde, t: -sde.log_snr(t) / 8)
"""``log(sigma / alpha) / 4`` (Karras et al. 2022, table 1): about -2 to 2, and the same for every SDE."""

TIME = Conditioning("time", lambda sde, t: t)
"""The time itself, 0 to 1 (Ho et al. 2020; Song et al. 2021 for VP)."""

_CONDITIONINGS = {c.name: c for c in (LOG_NOISE, TIME)}


def conditioning(name: str) -> Conditioning:
    """The time conditioning of a name from a config: ``log_noise`` or ``time``."""
    if name not in _CONDITIONINGS:
        raise unknown_name("conditioning", name, _CONDITIONINGS)
    return _CONDITIONINGS[name]


@dataclass(frozen=True)
class InputScaling:
    """How the state is scaled for the network: ``c_in = function(alpha, sigma, sigma_data)``, all of shape
    (B,)."""

    name: str
    function: Callable[[Tensor, Tensor, float], Tensor]


UNIT_VARIANCE = InputScaling(
    "unit_variance", lambda alpha, sigma, d: ((alpha * d).square() + sigma.square()).rsqrt()
)
"""``1 / sqrt(alpha^2 sigma_data^2 + sigma^2)``: unit variance at every noise level (Karras et al. 2022,
table 1)."""

UNSCALED = InputScaling("unscaled", lambda alpha, sigma, d: torch.ones_like(alpha))
"""1: the state as it is (Song et al. 2021, for VE)."""


@contextmanager
def frozen_weights_in(net: nn.Module, precision: torch.dtype) -> Iterator[None]:
    """For a while the weights of ``net`` are those that autocast would cast them to at every call.

    Those of linear layers and convolutions in float32 that need no gradient. The results are the same, but of
    convolutions that would read the weights in float32 (:mod:`sde_diffusion.networks.winograd`).
    """
    weights = [
        module.weight
        for module in net.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
    ]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(precision)
        yield
    finally:
        for weight, exact in zip(weights, before, strict=True):
            weight.data = exact


class ScoreModel(nn.Module):
    """``score(x, t) = -eps(x, t) / sigma(t)`` from a network that predicts ``F = a x_0 + b eps``.

    The network is called as ``net(c_in x, c, **cond)`` with the input scaling ``c_in`` and the (B,) float32
    time conditioning ``c``. It never sees the SDE.

    Args:
        net: maps (B, *D), (B,) and conditions to (B, *D).
        sde: the forward process.
        parametrization: what the network predicts.
        conditioning: what the network is told of the time.
        input_scaling: how the state is scaled for the network.
        sigma_data: the standard deviation of the data, for the input scaling.
        data_range: the values that the data span, such as (-1, 1) or (0, 1); for those who prepare data or
            show samples.
        autocast: a lower precision for the network alone; the score is float32 or higher.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        parametrization: Parametrization = NOISE,
        *,
        conditioning: Conditioning = LOG_NOISE,
        input_scaling: InputScaling = UNIT_VARIANCE,
        sigma_data: float = 1.0,
        data_range: tuple[float, float] = (-1.0, 1.0),
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data!r}")
        self.net = net
        self.sde = sde
        self.parametrization = parametrization
        self.conditioning = conditioning
        self.input_scaling = input_scaling
        self.sigma_data = sigma_data
        self.data_range = data_range
        self.autocast = autocast
        # What a forward process has learned is trained, averaged, moved and saved with the network.
        self.process = nn.ModuleDict({k: v for k, v in vars(sde).items() if isinstance(v, nn.Module)})

    @contextmanager
    def computing_in(self, precision: torch.dtype) -> Iterator[None]:
        """For a while the network computes in ``precision``: float32, or a lower one by autocast, with frozen
        weights cast once."""
        before = self.autocast
        self.autocast = None if precision == torch.float32 else precision
        try:
            with frozen_weights_in(self.net, precision):
                yield
        finally:
            self.autocast = before

    def _expected(self, x: Tensor) -> tuple[int, ...]:
        """The shape that the network's output must have."""
        return tuple(x.shape)

    def _input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network sees of the state, float32."""
        c_in = self.input_scaling.function(alpha, sigma, self.sigma_data)
        return (expand(c_in, x) * x).float()

    def _output(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        c = self.conditioning.function(self.sde, t).float()
        x_in = self._input(x, alpha, sigma)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            output: Tensor = self.net(x_in, c, **cond)
        if tuple(output.shape) != self._expected(x):
            got = tuple(output.shape)
            raise ValueError(
                f"{type(self).__name__} needs a network output of shape {self._expected(x)}, got {got}"
            )
        return output.to(torch.promote_types(x.dtype, torch.float32))

    def predict_noise(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The expected noise ``E[eps | x_t = x]``, (B, *D)."""
        t = batched_time(t, x).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return self.parametrization.to_noise(self._output(x, t, alpha, sigma, cond), x, alpha, sigma)

    def predict_data(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The denoised data ``E[x_0 | x_t = x]``, (B, *D)."""
        t = batched_time(t, x).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return self.parametrization.to_data(self._output(x, t, alpha, sigma, cond), x, alpha, sigma)

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The score ``grad_x log p_t(x)``; ``x`` (B, *D), ``t`` () or (B,) -> (B, *D)."""
        noise = self.predict_noise(x, t, **cond)
        return -noise / expand(self.sde.sigma(batched_time(t, x).double()), noise)

    def rows(self, index: Tensor) -> ScoreModel:
        """The score of some samples of a batch: it is the same for all."""
        return self
