"""Restart sampling (Xu et al. 2023, "Restart sampling for improving generative processes")."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.exponential import Level
from sde_diffusion.predictors.protocol import Predictor, is_stochastic, start_run
from sde_diffusion.predictors.runge_kutta import EDMHeun
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand

_RHO = 7.0


@dataclass(frozen=True)
class RestartInterval:
    """Where a run goes back to noise: from ``sigma / alpha = low`` up to ``high``, and down again.

    Args:
        low: the noise level at which it restarts; the time of the grid whose level is nearest takes its place.
        high: the level that it goes back to.
        iterations: how often, ``K`` of the paper.
        steps: of the solver on each way down, on levels spaced as those of Karras et al. (2022), with ``rho = 7``.
    """

    low: float
    high: float
    iterations: int = 1
    steps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise ValueError(f"a restart needs 0 < low < high, got {self.low!r} and {self.high!r}")
        for name in ("iterations", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a restart must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True)
class Restart:
    """A solver of the ODE that goes back to noise: at the low end of each interval, ``iterations`` times,

        x_high = (alpha_high / alpha_low) x_low + sqrt(var) z,

    the exact forward kernel, and then the solver from there down again. The noise contracts the errors made before,
    as that of an SDE does, and the steps in between have the small errors of the ODE.

    Args:
        solver: of the grid and of the restarts, each a run of its own; one that adds no noise.
        intervals: where to restart.

    Reference: Xu et al. (2023), section 3.1 and algorithm 1. Default interval after theirs for CIFAR-10.
    """

    solver: Predictor = field(default_factory=EDMHeun)
    intervals: tuple[RestartInterval, ...] = (RestartInterval(0.06, 0.30, iterations=2, steps=3),)

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("restart sampling needs at least one interval")
        if is_stochastic(self.solver):
            raise ValueError(f"restart sampling needs a deterministic solver, and {self.solver!r} adds noise")

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``.

        Raises:
            ValueError: an interval that does not lie within the levels of the grid.
        """
        return _RestartRun(self, sde, times, draw)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s`` by the solver: restarts belong to a run."""
        return self.solver.step(sde, score, x, t, s, noise)


class _RestartRun:
    """One run: the solver's, and the grids of the restarts by the step of the grid that they follow."""

    def __init__(self, restart: Restart, sde: SDE, times: Tensor, draw: NoiseSource) -> None:
        self._solver, self._times, self._draw = restart.solver, times, draw
        self._run = start_run(restart.solver, sde, times, draw)
        self._step = 0
        self._grids: dict[int, list[tuple[int, Tensor]]] = {}
        rho = Level.at(sde, times).rho
        for interval in restart.intervals:
            nearest = int((rho.log() - torch.tensor(interval.low).log()).abs().argmin())
            inside = float(rho[-1]) <= interval.low and interval.high <= float(rho[0])
            if not inside or not 0 < float(rho[nearest]) < interval.high:
                raise ValueError(
                    f"a restart from {interval.low:g} to {interval.high:g} does not fit the grid, whose sigma / "
                    f"alpha goes from {float(rho[0]):g} to {float(rho[-1]):g}, {float(rho[nearest]):g} being nearest"
                )
            ends = torch.tensor([interval.high, float(rho[nearest])], dtype=torch.float64) ** (1 / _RHO)
            share = torch.linspace(0, 1, interval.steps + 1, dtype=torch.float64)
            levels = (ends[0] + share * (ends[1] - ends[0])) ** _RHO
            grid = sde.time_of_log_snr(-2 * levels.log()).to(times.device)
            grid[-1] = times[nearest]
            self._grids.setdefault(nearest, []).append((interval.iterations, grid))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, the next time of the grid, after its restarts."""
        x = self._run.step(sde, score, x, t, s, noise)
        self._step += 1
        for iterations, grid in self._grids.get(self._step, ()):
            ratio, var = sde.transition(grid[-1], grid[0])
            for _ in range(iterations):
                x = expand(ratio, x) * x + expand(var.sqrt(), x) * self._draw()
                run = start_run(self._solver, sde, grid, self._draw)
                for here, there in zip(grid[:-1].unbind(), grid[1:].unbind(), strict=True):
                    x = run.step(sde, score, x, here, there, noise)
        if self._step in self._grids and self._step + 1 < len(self._times):
            # What a multistep solver remembers belongs to the trajectory that was left.
            self._run = start_run(self._solver, sde, self._times[self._step :], self._draw)
        return x
