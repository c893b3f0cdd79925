"""The adaptive solver of the reverse SDE of Jolicoeur-Martineau et al. (2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.noise import ChildNoise, NoiseSource
from sde_diffusion.ode import SolverError
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand


@dataclass(frozen=True)
class AdaptiveSDE:
    """The reverse SDE with a time and a step size ``h`` for each sample, two evaluations a step.

    With ``D(x, t) = f x - g^2 score`` and the same noise ``z`` in both,

        x'  = x - h D(x, t) + g(t) sqrt(h) z                        (Euler and Maruyama),
        x'' = (x' + x - h D(x', t - h) + g(t - h) sqrt(h) z) / 2    (Heun, "extrapolation").

    A step is accepted, to ``x''``, where the root mean square of ``(x' - x'') / delta`` over the elements of the
    sample, ``delta = max(atol, rtol max(|x'|, |x'_previous|))``, is ``E <= 1``; then, either way, ``h`` becomes
    ``safety h E^-exponent`` (at most ten times what it was).

    The Brownian path survives rejections, otherwise than in the paper, which draws anew: a shorter step takes its
    increment from the bridge within the rejected one, and the rest of it is kept for the steps that follow, none of
    which goes beyond what is known. Noise drawn anew would choose small increments: with a tolerance of 0.003, a
    covariance of 0.5 of a Gaussian came out 0.18 too small.

    A sample's result does not depend on its batch-mates: its noise follows from its own row of the one draw that a
    step of the grid is given. Samples that have arrived wait for the others, so that the evaluations counted for a
    run are those of its slowest sample. The grid says where correctors come in; ``h`` goes on from one of its times
    to the next.

    Args:
        rtol: relative tolerance; the paper has 0.01 to 0.1.
        atol: absolute tolerance; one grey level of data in [-1, 1] is 0.0078.
        h_init: the first step, in units of ``t_max``.
        safety: ``theta`` of the paper.
        exponent: ``r`` of the paper, between 0.5 and 1.
        max_evaluations: per sample and step of the grid; more raise an error.

    Reference: Jolicoeur-Martineau et al. (2021), "Gotta go fast when generating data with score-based models",
    algorithm 1.
    """

    rtol: float = 0.01
    atol: float = 0.0078
    h_init: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9
    max_evaluations: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.rtol < 1 or not 0 < self.atol < math.inf:
            raise ValueError(
                f"need 0 <= rtol < 1 and a positive atol, got rtol={self.rtol!r}, atol={self.atol!r}"
            )
        if not 0 < self.h_init <= 1:
            raise ValueError(f"h_init must lie in (0, 1], got {self.h_init!r}")
        if not 0 < self.safety < 1:
            raise ValueError(f"safety must lie between 0 and 1, got {self.safety!r}")
        if not 0.5 <= self.exponent <= 1:
            raise ValueError(f"the exponent must lie in [0.5, 1], got {self.exponent!r}")
        if self.max_evaluations < 2:
            raise ValueError(f"max_evaluations must be at least 2, got {self.max_evaluations!r}")

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return _AdaptiveRun(self)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, from a first step of ``h_init`` on.

        Raises:
            ValueError: there is no noise at ``s``.
            SolverError: samples for which the tolerance cannot be met.
        """
        return _AdaptiveRun(self).step(sde, score, x, t, s, noise)


class _AdaptiveRun:
    """One run: the step size that each sample has come to."""

    def __init__(self, settings: AdaptiveSDE) -> None:
        self._settings = settings
        self._h: Tensor | None = None

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        own, time, end = self._settings, batched_time(t, x).double(), batched_time(s, x).double()
        if not bool((sde.variance(end) > 0).all()):
            raise ValueError("the adaptive solver needs noise at the end of a step, and there is none")
        wanted = torch.full_like(time, own.h_init * sde.t_max) if self._h is None else self._h
        path, previous = _Path(noise), x
        attempts = torch.zeros_like(time, dtype=torch.int64)
        active = time > end

        def drift_and_diffusion(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            f, g2 = sde.f_and_g2(t)
            return expand(f, x) * x - expand(g2, x) * score(x, t), expand(g2.sqrt(), x)

        while bool(active.any()):
            left = time - end
            h, dw = path.increment(torch.minimum(wanted, left), attempts, active)
            last = h >= left * (1 - 1e-9)
            ahead = torch.where(last, end, time - h)
            drift, g = drift_and_diffusion(x, time)
            first = x - expand(h, x) * drift + g * dw
            drift, g = drift_and_diffusion(first, ahead)
            second = 0.5 * (first + x - expand(h, x) * drift + g * dw)
            delta = (own.rtol * torch.maximum(first.abs(), previous.abs())).clamp_min(own.atol)
            error = ((first - second) / delta).flatten(1).double().square().mean(1).sqrt()
            attempts = attempts + active
            accept = active & (error <= 1)
            path.advance(accept)
            rows = accept.reshape(-1, *(1,) * (x.ndim - 1))
            x, previous = torch.where(rows, second, x), torch.where(rows, first, previous)
            # What is not finite is rejected, and tried with a fifth.
            factor = (own.safety * error.clamp_min(1e-6) ** -own.exponent).nan_to_num(0.2).clamp(0.02, 10.0)
            # A step cut short, by the end or the path, shows what a longer one may be, not that it must be shorter.
            shorter = accept & (h < wanted)
            wanted = torch.where(
                active, torch.where(shorter, torch.maximum(wanted, h * factor), h * factor), wanted
            ).clamp_max(sde.t_max)
            time = torch.where(accept, ahead, time)
            active = active & ~(accept & last)
            stuck = active & (2 * attempts + 2 > own.max_evaluations)
            if bool(stuck.any()):
                names = stuck.nonzero().flatten().tolist()
                raise SolverError(
                    f"samples {names[:10]} did not reach t = {float(end[names[0]]):g} within {own.max_evaluations} "
                    f"evaluations at rtol={own.rtol:g}, atol={own.atol:g} (stopped near t = "
                    f"{float(time[names[0]]):.4g}); the score there may not be finite, or the tolerance is too small"
                )
        self._h = wanted
        return x


class _Path:
    """The Brownian path of each sample, as far as it is known ahead: segments of given length and increment.

    They lie on a stack, the next one on top. A step is always the segment on top: a new one where nothing is known,
    or the first part of what was there, by the Brownian bridge.
    """

    def __init__(self, parent: Tensor) -> None:
        self._noise, batch = ChildNoise(parent), len(parent)
        self._rows = torch.arange(batch, device=parent.device)
        self._known = torch.zeros(batch, dtype=torch.int64, device=parent.device)  # segments of each sample
        self._lengths = torch.zeros(1, batch, dtype=torch.float64, device=parent.device)
        self._increments = parent.new_zeros(1, *parent.shape)

    def increment(self, wanted: Tensor, draws: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The length of the next step, about ``wanted`` or less, and the increment over it; 0 where not active."""
        if int(self._known.max()) + 1 >= len(self._lengths):
            self._lengths = torch.cat([self._lengths, torch.zeros_like(self._lengths)])
            self._increments = torch.cat([self._increments, torch.zeros_like(self._increments)])
        z, rows, fresh = self._noise.normal(draws), self._rows, self._known == 0
        top = (self._known - 1).clamp_min(0)
        length, whole = self._lengths[top, rows], self._increments[top, rows]
        # No slivers: nearly all is all, and nearly half is half.
        share = torch.where(fresh, 1.0, wanted / torch.where(fresh, 1.0, length))
        share = torch.where(share >= 0.9, 1.0, torch.where(share > 0.5, 0.5, share))
        h = torch.where(fresh, wanted, share * length)
        bridge = expand(share, z) * whole + expand((h * (1 - share)).clamp_min(0).sqrt(), z) * z
        part = torch.where(expand(fresh, z) > 0, expand(h.sqrt(), z) * z, bridge)
        split = active & ~fresh & (share < 1)
        # Of a segment that is split the rest stays below the part that goes on top.
        rest = torch.where(expand(split, z) > 0, whole - part, whole)
        self._lengths[top, rows] = torch.where(split, length - h, length)
        self._increments[top, rows] = rest
        self._known = self._known + (active & (fresh | split))
        top = (self._known - 1).clamp_min(0)
        self._lengths[top, rows] = torch.where(active, h, self._lengths[top, rows])
        rows_active = expand(active, z) > 0
        self._increments[top, rows] = torch.where(rows_active, part, self._increments[top, rows])
        return torch.where(active, h, torch.zeros_like(h)), torch.where(rows_active, part, 0)

    def advance(self, accepted: Tensor) -> None:
        """Leave the segments on top behind."""
        self._known = self._known - accepted.long()
