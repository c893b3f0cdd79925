"""A score with a say in the variance of the reverse steps: networks with twice as many outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.score import ScoreModel
from sde_diffusion.tensors import batched_time
from sde_diffusion.variances import LearnedRange, ReverseVariance

__all__ = ["LearnedVarianceModel"]


class LearnedVarianceModel(ScoreModel):
    """A :class:`~sde_diffusion.score.ScoreModel` whose network gives 2 C channels: C as ever, and C for the
    variance.

    The latter, the *values*, interpolate between the logs of the smallest and largest variance of a reverse
    step (Nichol & Dhariwal 2021, eq. 15), or whatever ``variance`` makes of them. The score is that of any
    other model: to samplers and likelihoods that want nothing else the variance does not exist.

    Args:
        variance: the reverse variance that a function ``values(x, t)`` gives, such as
            :class:`~sde_diffusion.variances.LearnedRange` (the default) or ``LearnedLog``.
        others: as for ``ScoreModel``.

    Raises:
        ValueError: (when called) a network output that has not twice as many channels as the state.
    """

    def __init__(
        self,
        *args: Any,
        variance: Callable[[Callable[[Tensor, Tensor], Tensor]], ReverseVariance] = LearnedRange,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.variance = variance
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def _expected(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], 2 * x.shape[1], *x.shape[2:])

    def _both(
        self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        predicted, values = super()._output(x, t, alpha, sigma, cond).chunk(2, dim=1)
        return predicted, values

    def _output(self, x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        predicted, values = self._both(x, t, alpha, sigma, cond)
        # A sampler asks for the score and then for the variance, at the same state: one evaluation serves both.
        self._last = None if torch.is_grad_enabled() else (x, t, values)
        return predicted

    def predict_noise_and_values(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """The expected noise and the values for the variance, (B, *D) each, by one evaluation."""
        t = batched_time(t, x).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        predicted, values = self._both(x, t, alpha, sigma, cond)
        return self.parametrization.to_noise(predicted, x, alpha, sigma), values

    def values(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The values for the variance, (B, *D): those of the last evaluation, where it was of the same state
        and time (without gradients)."""
        last, self._last = self._last, None
        if last is not None and last[0] is x and torch.equal(last[1], batched_time(t, x).double()):
            return last[2]
        return self.predict_noise_and_values(x, t, **cond)[1]

    def reverse_variance(self, **cond: Any) -> ReverseVariance:
        """``(x, t, limits) -> log variance`` for samplers and bounds.

        Args:
            cond: conditions for the network; of no effect right after the score was asked for at the same
                state.
        """
        return self.variance(partial(self.values, **cond))
