"""A grid of times made for one model, one process, one solver and one number of steps.

The grid is chosen by what it is for: the distance between the solver's samples and those of a fine grid, from the
same noise, on a small calibration batch. First the standard grids compete, among them grids that hold the product of
step and local error constant (from the change of the expected data along the fine path); then every time of the best
is moved, in units of log-SNR, as long as that brings the samples closer. On the calibration batch the result is at
least as good as any standard grid. "Align your steps" (Sabour et al. 2024) has the same aim and minimises a bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.noise import SampleNoise
from sde_diffusion.predictors import DPMSolverPP, Predictor, is_stochastic
from sde_diffusion.sampling import check_shape, sample
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.times import karras_times, log_snr_times, quadratic_times, uniform_times

_EXPONENTS = (-0.5, 0.0, 0.5, 1.0)
_SMALLEST_MOVE = 0.02


@dataclass(frozen=True)
class OptimalTimes:
    """The result of :func:`optimal_times`.

    Attributes:
        times: the grid, (n + 1,) float64.
        error: mean distance to the fine grid's samples on the calibration batch, over ``sqrt(D)``.
        standard: the same of each standard grid.
        evaluations: of the score, of a batch each, that the search took.
    """

    times: Tensor
    error: float
    standard: dict[str, float]
    evaluations: int


@torch.no_grad()
def optimal_times(
    sde: SDE,
    score: Score,
    n: int,
    shape: Sequence[int],
    *,
    predictor: Predictor | None = None,
    t_end: float | None = None,
    seed: int = 0,
    sweeps: int = 4,
    fine: int | None = None,
    device: torch.device | str | None = None,
) -> OptimalTimes:
    """A grid of ``n`` steps for this score and predictor: see the module.

    It costs about ``fine + n (10 + 2 n sweeps)`` evaluations of a batch; with the same arguments it gives the same
    grid.

    Args:
        sde: the process to be sampled.
        score: ``(x, t) -> grad log p_t(x)``.
        n: steps.
        shape: (B, *D) of the calibration batch; B of 32 is enough for images, 128 in two dimensions.
        predictor: deterministic; default ``DPMSolverPP(2)``.
        t_end: the last time; default ``t_min``.
        seed: of the calibration noise.
        sweeps: rounds over all times; 0 to choose among whole grids only.
        fine: steps of the fine grid; default ``max(200, 8 n)``.
        device: of the batch.

    Raises:
        ValueError: a predictor that adds noise, or numbers that make no sense.
    """
    shape = check_shape(shape)
    chosen = DPMSolverPP(2) if predictor is None else predictor
    if is_stochastic(chosen):
        raise ValueError(f"a grid is optimised for a deterministic predictor, and {chosen!r} adds noise")
    if not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps must be an integer >= 0, got {sweeps!r}")
    search = _Search(sde, score, shape, chosen, seed, device)
    reference = log_snr_times(sde, max(200, 8 * n) if fine is None else fine, t_end)
    search.follow(reference)
    found = {
        "uniform": uniform_times(sde, n, t_end),
        "quadratic": quadratic_times(sde, n, t_end),
        "log_snr": log_snr_times(sde, n, t_end),
        "karras": karras_times(sde, n, t_end=t_end),
    }
    errors = {name: search.error(times) for name, times in found.items()}
    best = min(errors, key=errors.__getitem__)
    times, error = found[best], errors[best]
    for candidate in search.equidistributed(n):
        new = search.error(candidate)
        if new < error:
            times, error = candidate, new
    times, error = search.descend(times, error, sweeps)
    return OptimalTimes(times, error, errors, search.evaluations)


class _Search:
    def __init__(
        self,
        sde: SDE,
        score: Score,
        shape: tuple[int, ...],
        predictor: Predictor,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        self._sde, self._score, self._shape, self._predictor = sde, score, shape, predictor
        self._device = device
        noise = SampleNoise(seed, range(shape[0]), shape[1:], device=device)
        self._noise = noise.normal()
        self.evaluations = 0

    def _samples(self, times: Tensor, score: Score) -> Tensor:
        x = self._sde.sigma(times[0]).to(self._noise.dtype) * self._noise
        out = sample(
            self._sde,
            score,
            self._shape,
            predictor=self._predictor,
            times=times,
            x_init=x,
            denoise=False,
            device=self._device,
        )
        self.evaluations += out.nfe
        return out.x

    def follow(self, reference: Tensor) -> None:
        """Solves along the fine grid; keeps the result and the change of the expected data on the way."""
        seen: list[tuple[float, Tensor]] = []

        def watched(x: Tensor, t: Tensor) -> Tensor:
            score = self._score(x, t)
            seen.append((0.5 * float(self._sde.log_snr(t).mean()), self._sde.posterior_mean(x, score, t)))
            return score

        self._target = self._samples(reference, watched)
        seen.sort(key=lambda pair: pair[0])
        lam = torch.tensor([pair[0] for pair in seen], dtype=torch.float64)
        moved = [float((b[1] - a[1]).square().mean().sqrt()) for a, b in itertools.pairwise(seen)]
        middle, width = (lam[1:] + lam[:-1]) / 2, lam.diff()
        keep = width > 1e-9
        self._lam = middle[keep]
        self._slope = torch.tensor(moved, dtype=torch.float64)[keep] / width[keep]
        self._ends = reference[0], reference[-1]

    def error(self, times: Tensor) -> float:
        """Mean distance to the fine grid's samples over ``sqrt(D)``; infinite where a grid leads nowhere.

        The mean of distances and not of their squares, which a few samples on the edge between two modes would rule.
        """
        apart = (self._samples(times, self._score) - self._target).double().flatten(1)
        distance = float(apart.square().mean(1).sqrt().mean())
        return distance if distance == distance else float("inf")

    def _of(self, lam: Tensor) -> Tensor:
        times = self._sde.time_of_log_snr(2 * lam)
        times[0], times[-1] = self._ends
        return times

    def equidistributed(self, n: int) -> Iterator[Tensor]:
        """Grids with the same integral of ``(rho^e |dD / d lambda|)^(1/2)`` over every step."""
        first, last = (0.5 * float(self._sde.log_snr(t)) for t in self._ends)
        for exponent in _EXPONENTS:
            density = (torch.exp(-exponent * self._lam) * self._slope).sqrt()
            density = density + 0.05 * density.mean()
            edges = torch.cat(
                [torch.tensor([first]), (self._lam[1:] + self._lam[:-1]) / 2, torch.tensor([last])]
            )
            mass = torch.cat([density.new_zeros(1), (density * edges.diff()).cumsum(0)])
            wanted = torch.linspace(0, float(mass[-1]), n + 1, dtype=torch.float64)
            i = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
            share = (wanted - mass[i - 1]) / (mass[i] - mass[i - 1])
            yield self._of(edges[i - 1] + share * (edges[i] - edges[i - 1]))

    def descend(self, times: Tensor, error: float, sweeps: int) -> tuple[Tensor, float]:
        """Moves each time in turn by a fraction of the room it has, which halves where nothing is gained."""
        lam = 0.5 * self._sde.log_snr(times)
        if not bool(torch.isfinite(lam).all()):  # a grid that ends at the data themselves
            lam[-1] = lam[-2] + 10
        move = 0.3
        for _ in range(sweeps):
            before = error
            for i in range(1, len(lam) - 1):
                for sign in (1, -1):
                    room = lam[i + 1] - lam[i] if sign > 0 else lam[i] - lam[i - 1]
                    trial = lam.clone()
                    trial[i] += sign * move * room
                    new = self.error(self._of(trial))
                    if new < error:
                        lam, error, times = trial, new, self._of(trial)
                        break
            if error > 0.98 * before:
                move /= 2
                if move < _SMALLEST_MOVE:
                    break
        return times, error
