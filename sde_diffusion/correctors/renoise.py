"""Back into the noise and down again: a corrector made of the forward process and a predictor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps
from sde_diffusion.correctors.step_sizes import check_positive
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors import DDIM, Predictor, is_stochastic
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand


@dataclass(frozen=True)
class Renoise(Kernel):
    """Noise from ``t`` to an earlier ``u > t`` by the exact kernel, then a predictor's step back from ``u`` to ``t``.

    ``u`` is where the log-SNR is lower by ``drop``, the same for every process, or ``t_max``, whichever comes
    first. (At ``t_max`` itself there is nothing to do.) The forward half keeps ``p_t -> p_u`` exactly, so the
    bias is that of the
    predictor: over one step of order ``drop^2`` for DDIM, against a move of order ``drop``. Restart sampling
    (Xu et al. 2023) does so over long intervals, resampling by jumps (RePaint, Lugmayr et al. 2022) over
    single steps.

    The reported step size is that of the Langevin step with as much noise, half the variance of the kernel.

    Args:
        drop: of the log-SNR; positive.
        predictor: of one step without memory, such as ``DDIM()`` (default), ``Ancestral()``.
        steps: how often the step is applied at each time.
    """

    drop: float = 0.3
    steps: int = 1
    predictor: Predictor = field(default_factory=DDIM)

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_positive("the drop of the log-SNR", self.drop)
        if not callable(getattr(self.predictor, "step", None)):
            raise ValueError(f"the way back must be a predictor, got {self.predictor!r}")

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step; as many evaluations as the predictor's."""
        noise = draw()
        u = torch.maximum(sde.time_of_log_snr(sde.log_snr(t) - self.drop), t)
        ratio, var = sde.transition(t, u)
        if not bool((var > 0).any()):
            still = torch.zeros_like(x)
            return Advance(x, batched_time(var, x), still, noise)
        up = expand(ratio, x) * x + expand(var.sqrt(), x) * noise
        back_noise = draw() if is_stochastic(self.predictor) else torch.zeros_like(x)
        down = self.predictor.step(sde, score, up, u, t, back_noise)
        # Where a time of the batch has no room above it, its sample stays.
        moved = expand(var > 0, x).bool()
        eta = var / 2
        drift = torch.where(moved, down - x - expand(var.sqrt(), x) * noise, 0)
        gradient = drift / expand(eta.clamp_min(torch.finfo(eta.dtype).tiny), x)
        return Advance(torch.where(moved, down, x), eta, gradient, noise)
