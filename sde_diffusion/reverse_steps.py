"""The reverse steps of a chain over any grid of times, and the Kullback-Leibler divergences between them.

For a grid ``t_1 < .. < t_n`` the step i goes from ``x_i`` to ``x_{i-1}``, the first to the data ``x_0``
themselves: ``p(x_{i-1} | x_i) = N(mu, v)`` with ``mu`` the mean of ``q(x_{i-1} | x_i, x_0)`` at the data that
a model predicts (Ho et al. 2020, section 3.2). What the bound reports and what training minimises is computed
here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.decoders import Decoder
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand
from sde_diffusion.times import check_times
from sde_diffusion.variances import Limits, ReverseVariance

__all__ = ["Prediction", "ReverseSteps", "check_states", "normal_kl", "sum_dims"]


def check_states(x: Tensor) -> None:
    """Raises ValueError for what is not a batch of finite float32 or float64 data."""
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64) or len(x) < 1:
        raise ValueError(f"x must be float32 or float64 of shape (B, *D), got {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")


def sum_dims(x: Tensor) -> Tensor:
    """The sum over all dimensions of each sample, (B, *D) -> (B,)."""
    return x.flatten(1).sum(1)


def normal_kl(difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """``KL(N(m_q, v_q) || N(m_p, v_p))`` in nats, elementwise, with ``difference = m_q - m_p``."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (torch.expm1(ratio) - ratio + difference.square() * (-log_variance_p).exp())


@dataclass(frozen=True)
class Prediction:
    """What a model makes of ``p(x_{i-1} | x_i)``: the data it predicts, and the mean and log-variance that
    follow.

    All broadcast to (B, *D), float64.
    """

    data: Tensor
    mean: Tensor
    log_variance: Tensor


class ReverseSteps:
    """The reverse steps along a grid of times ``t_1 < .. < t_n``, the first of them to the data.

    Step i is at index ``i - 1`` of all tables, as the "t" of published code.

    Args:
        sde: the forward process.
        times: ``t_n .. t_1``, falling, at least 2; a time without noise at the end stands for the data and is
            left out.
        device: of the tables.

    Attributes:
        times: rising, (n,) float64.
        small, large: log of beta-tilde, with that of the second step for the first, and of beta, (n,).
    """

    @torch.no_grad()
    def __init__(self, sde: SDE, times: Tensor, device: torch.device | str | None = None) -> None:
        rising = check_times(sde, times).flip(0).to(device)
        self.times = rising if float(sde.variance(rising[0])) > 0 else rising[1:]
        if len(self.times) < 2:
            raise ValueError(f"a bound needs a chain of at least 2 steps, got {len(self.times)}")
        on_data, on_state, small = sde.posterior(self.times[:-1], self.times[1:])
        large = sde.transition(self.times[:-1], self.times[1:])[1]
        first = self.times[:1]
        self._on_data = torch.cat([torch.ones_like(first), on_data])
        self._on_state = torch.cat([torch.zeros_like(first), on_state])
        self.small = torch.cat([small[:1], small]).log()
        self.large = torch.cat([sde.variance(first), large]).log()
        self._sde = sde

    def __len__(self) -> int:
        return len(self.times)

    def limits(self, index: Tensor) -> Limits:
        """The limits of the variance at the steps of an index (B,)."""
        return Limits(self.small[index], self.large[index], index == 0)

    def posterior(self, x0: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of ``q(x_{i-1} | x_i, x_0)``, the latter () or (B,) expanded."""
        mean = expand(self._on_data[index], x) * x0 + expand(self._on_state[index], x) * x
        return mean, expand(self.small[index], x)

    def predict(
        self, score: Tensor, x: Tensor, index: Tensor, variance: ReverseVariance, *, clip: bool = False
    ) -> Prediction:
        """The reverse step that a score stands for.

        Args:
            score: at ``x`` and the times of the steps, (B, *D).
            x: ``x_i``, (B, *D).
            index: of the steps, (B,).
            variance: see :mod:`sde_diffusion.variances`.
            clip: clip the predicted data to [-1, 1].
        """
        t, x64 = self.times[index], x.double()
        data = self._sde.posterior_mean(x64, score.double(), t)
        data = data.clamp(-1, 1) if clip else data
        mean, _ = self.posterior(data, x64, index)
        return Prediction(data, mean, variance(x, t, self.limits(index)).double())

    def mean_error(self, x0: Tensor, prediction: Prediction, index: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of ``q(x_{i-1} | x_i, x_0)`` minus that of ``p(x_{i-1} | x_i)``, and the log-variance of q."""
        # The means differ by what the predicted data do; their own difference would lose digits.
        difference = expand(self._on_data[index], x0) * (x0 - prediction.data)
        return difference, expand(self.small[index], x0)

    def term(self, x0: Tensor, prediction: Prediction, index: Tensor, decoder: Decoder) -> Tensor:
        """``L_{i-1}`` of each sample in nats, (B,): the decoder's where the step is the last, a KL elsewhere.

        Differentiable in the prediction.
        """
        x64 = x0.double()
        difference, log_variance = self.mean_error(x64, prediction, index)
        kl = normal_kl(difference, log_variance, prediction.log_variance)
        last = index == 0
        if not bool(last.any()):
            return sum_dims(kl)
        rows = last.nonzero().flatten()
        log_variance = prediction.log_variance.expand(x64.shape)[rows]
        coded = -decoder(x64[rows], prediction.mean[rows], log_variance)
        return sum_dims(kl).index_put((rows,), sum_dims(coded.double()))
