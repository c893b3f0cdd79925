"""The solvers of torchsde (Li et al. 2020, "Scalable gradients for stochastic differential equations")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import ChildNoise
from sde_diffusion.predictors.one_step import check_stochasticity
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import as_time, expand

_ITO = ("euler", "milstein", "srk")
_STRATONOVICH = ("euler_heun", "heun", "midpoint")
METHODS = _ITO + _STRATONOVICH


@dataclass(frozen=True)
class TorchSDE:
    """``x_s`` by ``torchsde.sdeint`` on the reverse SDE of stochasticity ``lambda`` from ``t`` to ``s``.

    With diffusion that depends on time only, the integrals of Ito and Stratonovich are the same, ``milstein`` is
    ``euler``, and ``srk`` (two evaluations a step) has strong order 1.5. The Brownian motion is a
    ``torchsde.BrownianInterval`` for each step of the grid, seeded by the noise that the step is given.

    With ``per_sample=True`` every sample has a ``BrownianInterval`` of its own, seeded by its own row of the noise,
    so that its path depends on (seed, index) only, which costs time for small data, and little for images. With
    False one interval, seeded by the first row, serves the batch: the samples then depend on the seed, the first
    index and the size of the batch. With ``adaptive=True`` the steps are those of the whole batch, whatever the
    noise. torchsde makes its normals with torch's generator of the device, so that another device has other samples.

    Args:
        method: euler, milstein, srk, or, after Stratonovich, euler_heun, heun, midpoint.
        steps: of the solver between two times of the grid; for an adaptive run, what the first would be one of.
        adaptive: whether torchsde chooses the steps, by halving them.
        rtol, atol: the tolerances of that.
        stochasticity: ``lambda > 0``, as for :class:`~sde_diffusion.predictors.one_step.EulerMaruyama`.
        per_sample: see above.
    """

    method: str = "srk"
    steps: int = 1
    adaptive: bool = False
    rtol: float = 1e-3
    atol: float = 1e-3
    stochasticity: float = 1.0
    per_sample: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not 0 < self.rtol < 1 or not 0 < self.atol < math.inf:
            raise ValueError(
                f"tolerances must be positive, and rtol below 1, got rtol={self.rtol!r}, atol={self.atol!r}"
            )
        check_stochasticity(self.stochasticity)
        if self.stochasticity == 0:
            raise ValueError("torchsde needs noise: for stochasticity 0 take a solver of the ODE")

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``.

        Raises:
            ValueError: times that differ within the batch, or without noise.
        """
        import torchsde  # here, for it takes its time to load

        t, s = as_time(t).double(), as_time(s).double()
        if t.numel() != 1 or s.numel() != 1:
            raise ValueError(
                "torchsde goes from one time to another for the whole batch, got times of shape "
                f"{tuple(t.shape)} and {tuple(s.shape)}"
            )
        if not float(sde.variance(s)) > 0:
            raise ValueError(f"torchsde needs noise at the end of a step, and there is none at {float(s):g}")
        span = (t - s).reshape(())
        words = ChildNoise(noise).words.tolist()
        seeds = [sum(word << (32 * i) for i, word in enumerate(row)) for row in words]
        y = x.flatten(1)
        levy = "space-time" if self.method == "srk" else "none"
        paths = [
            torchsde.BrownianInterval(
                0.0,
                float(span),
                size=(1 if self.per_sample else len(y), y.shape[1]),
                dtype=y.dtype,
                device=y.device,
                entropy=seed,
                levy_area_approximation=levy,
            )
            for seed in (seeds if self.per_sample else seeds[:1])
        ]
        process = _Reverse(sde, score, t.reshape(()), x.shape, self)
        # A shade more than the step: rounding must not leave a sliver at the end.
        dt = float(span) / self.steps * (1 + 1e-12)
        times = torch.stack([torch.zeros_like(span), span])
        out = torchsde.sdeint(
            process,
            y,
            times,
            bm=_Paths(paths) if self.per_sample else paths[0],
            method=self.method,
            dt=dt,
            adaptive=self.adaptive,
            rtol=self.rtol,
            atol=self.atol,
            dt_min=1e-6 * float(span),
        )
        return out[-1].reshape(x.shape)


class _Reverse:
    """The reverse SDE in the form of torchsde, in the time ``u = t_0 - t`` that rises.

    It remembers its last values, since torchsde asks for some of them twice, and once only to see their shape.
    """

    noise_type = "additive"

    def __init__(self, sde: SDE, score: Score, start: Tensor, shape: Sequence[int], own: TorchSDE) -> None:
        self.sde_type = "ito" if own.method in _ITO else "stratonovich"
        self._sde, self._score, self._start, self._shape = sde, score, start, shape
        self._stochasticity = own.stochasticity
        self._last: list[tuple[float, Tensor, Tensor]] = []

    def f(self, u: Any, y: Tensor) -> Tensor:
        """The drift."""
        for when, state, value in self._last:
            if when == float(u) and state is y:
                return value
        t, x = self._start - u, y.reshape(self._shape)
        f, g2 = self._sde.f_and_g2(t)
        weight = 0.5 * (1 + self._stochasticity**2) * g2
        value = (expand(weight, x) * self._score(x, t) - expand(f, x) * x).flatten(1)
        self._last = [*self._last[-1:], (float(u), y, value)]
        return value

    def g_prod(self, u: Any, y: Tensor, v: Tensor) -> Tensor:
        """The diffusion times ``v``."""
        return expand(self._stochasticity * self._sde.g2(self._start - u).sqrt(), v) * v


class _Paths:
    """A Brownian interval for each sample, as one."""

    def __init__(self, paths: Sequence[Any]) -> None:
        self._paths = paths
        self.dtype, self.device = paths[0].dtype, paths[0].device
        self.shape = (len(paths), paths[0].shape[1])
        self.levy_area_approximation = paths[0].levy_area_approximation

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        values = [path(ta, tb, return_U=return_U, return_A=return_A) for path in self._paths]
        if isinstance(values[0], tuple):
            return tuple(torch.cat(column) for column in zip(*values, strict=True))
        return torch.cat(values)
