"""The importance-weighted bound on ``log p(x_0)``: several paths of the chain for each sample, by their weights.

A chain ``x_0, x_1, .., x_n`` at times ``t_1 < .. < t_n`` models the data by its reverse steps ``p(x_{i-1} | x_i)``
(:mod:`sde_diffusion.bound`). A path drawn from the forward process weighs

    log w = log p(x_n) / q(x_n | x_0) + sum_{i=2}^{n} log p(x_{i-1} | x_i) / q(x_{i-1} | x_i, x_0) + log p(x_0 | x_1),

as short steps turn it into what Girsanov's theorem gives for the two diffusions. ``E w = p(x_0)``, the likelihood of
the chain itself, hence (Burda, Grosse, Salakhutdinov 2016)

    L_K = E log mean_{k <= K} w_k,    L_1 <= L_2 <= .. <= log p(x_0):

``-L_1`` is the bound of :func:`~sde_diffusion.bound.variational_bound`, and L_K rises to the truth with K. The
spread of the weights is the error of the score and of the steps: with the exact score and short steps every path
weighs ``p(x_0)``.

What is bounded is the likelihood of the *stochastic* model: of the chain, and for short steps of the reverse SDE. The
probability-flow ODE of the same score is another model unless the score is that of its own density, and its
likelihood may lie on either side (Song, Durkan, Murray, Ermon 2021, "Maximum likelihood training of score-based
diffusion models", section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.decoders import Decoder, GaussianDecoder
from sde_diffusion.noise import PATHS, SampleNoise
from sde_diffusion.reverse_steps import Prediction, ReverseSteps, check_states, sum_dims
from sde_diffusion.sdes import SDE
from sde_diffusion.variances import FixedDensity, ReverseVariance

__all__ = ["PathWeights", "importance_bound", "log_normal_ratio"]


def log_normal_ratio(
    noise: Tensor, difference: Tensor, log_variance_q: Tensor, log_variance_p: Tensor
) -> Tensor:
    """``log N(x; m_p, v_p) - log N(x; m_q, v_q)`` at ``x = m_q + sqrt(v_q) noise``, in nats, elementwise, with
    ``difference = m_q - m_p``; its mean over the noise is minus the divergence from q to p."""
    ratio = log_variance_q - log_variance_p
    # (difference + sqrt(v_q) noise)^2 / v_p - noise^2, without the digits lost by subtracting
    scaled = difference * (-0.5 * log_variance_p).exp()
    return 0.5 * (ratio - torch.expm1(ratio) * noise.square() - 2 * scaled * (0.5 * ratio).exp() * noise) - (
        0.5 * scaled.square()
    )


@dataclass(frozen=True)
class PathWeights:
    """The weights of the paths of each sample.

    Attributes:
        log_weights: ``log w`` in nats, (B, K).
        dims: dimensions of the data.
        nfe: network evaluations per sample.
    """

    log_weights: Tensor
    dims: int
    nfe: float

    def bound(self, paths: int | None = None) -> Tensor:
        """An unbiased estimate of ``L_paths`` in nats, (B,): the mean over all groups of so many that K can be cut
        into; default K. For divisors of one another it rises for every sample, not only on average (by concavity).

        Raises:
            ValueError: K is no multiple of ``paths``.
        """
        total = self.log_weights.shape[1]
        size = total if paths is None else paths
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or total % size:
            raise ValueError(f"paths must divide the {total} that there are, got {paths!r}")
        grouped = self.log_weights.unflatten(1, (total // size, size))
        return grouped.logsumexp(2).mean(1) - math.log(size)

    @property
    def effective_paths(self) -> Tensor:
        """``(sum w)^2 / sum w^2``, from 1 to K, (B,): how many paths count (Kong 1992)."""
        return (2 * self.log_weights.logsumexp(1) - (2 * self.log_weights).logsumexp(1)).exp()


@torch.no_grad()
def importance_bound(
    sde: SDE,
    score: Callable[..., Tensor],
    x0: Tensor,
    *,
    times: Tensor,
    paths: int = 4,
    variance: ReverseVariance | None = None,
    decoder: Decoder | None = None,
    clip: bool = False,
    prior_std: float | None = None,
    seed: int = 0,
    first_index: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 1024,
    progress: Callable[[int], Any] | None = None,
) -> PathWeights:
    """The weights of ``paths`` paths of each sample; those of a sample depend on ``(seed, first_index + i)`` only.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``; a network or analytic.
        x0: (B, *D). For a discretized decoder the levels, scaled to [-1, 1], without dequantization noise.
        times: the chain's times ``t_n .. t_1``, falling. Equal steps in log-SNR lose least
            (:func:`~sde_diffusion.times.log_snr_times`).
        paths: K. Each costs as many evaluations as the chain has steps.
        variance: of the reverse steps, default :class:`~sde_diffusion.variances.FixedDensity`.
        decoder: default :class:`~sde_diffusion.decoders.GaussianDecoder`.
        clip: clip the predicted data to [-1, 1].
        prior_std: of ``p(x_n)``, default ``sigma(t_max)``.
        seed, first_index: of the paths.
        cond: conditions of the samples for the score, such as ``{"y": labels}``, (B, ...) each.
        batch_size: states per network evaluation; bounds the memory, does not change the result.
        progress: called with the number of states after each evaluation.

    Raises:
        ValueError: data that are not finite floats, or do not suit the decoder; fewer than 2 steps or 1 path.
    """
    check_states(x0)
    for name, value in {"paths": paths, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    chain = ReverseSteps(sde, times, x0.device)
    variance, decoder = variance or FixedDensity(), decoder or GaussianDecoder()
    std = sde.prior_std if prior_std is None else prior_std
    samples = torch.arange(len(x0), device=x0.device)
    pairs = torch.cartesian_prod(samples, torch.arange(paths, device=x0.device))
    parts = []
    for rows, numbers in (part.unbind(1) for part in pairs.split(batch_size)):
        given = {name: value[rows] for name, value in (cond or {}).items()}
        noise = _path_noise(x0, seed, first_index + rows, numbers)
        data, index = x0[rows].double(), torch.full_like(rows, len(chain) - 1)
        x, total = _start(sde, chain.times[-1], data, noise(0), std)
        for step in range(len(chain) - 1, -1, -1):
            index.fill_(step)
            state = x.to(x0.dtype)
            predicted = chain.predict(
                score(state, chain.times[index], **given), state, index, variance, clip=clip
            )
            if step == 0:
                coded = decoder(data, predicted.mean, predicted.log_variance.expand(data.shape))
                total = total + sum_dims(coded.double())
            else:
                z = noise(len(chain) - step)
                total = total + _ratio(chain, data, predicted, index, z)
                mean, log_variance = chain.posterior(data, state.double(), index)
                x = mean + (0.5 * log_variance).exp() * z
            if progress is not None:
                progress(len(rows))
        parts.append(total)
    return PathWeights(torch.cat(parts).reshape(len(x0), paths), x0[0].numel(), float(paths * len(chain)))


def _path_noise(x0: Tensor, seed: int, samples: Tensor, numbers: Tensor) -> Callable[[int], Tensor]:
    """``noise(step)`` of pairs of a sample and the number of its path, (N, *D) float64: path k of a sample has a
    seed of its own."""
    order = torch.argsort(numbers, stable=True)
    back, counts = torch.argsort(order), torch.unique_consecutive(numbers[order], return_counts=True)
    groups = list(zip(counts[0].tolist(), samples[order].split(counts[1].tolist()), strict=True))

    def noise(step: int) -> Tensor:
        drawn = []
        for number, rows in groups:
            source = SampleNoise(
                (seed + number * 0x9E3779B97F4A7C15) % 2**64,
                rows,
                x0.shape[1:],
                dtype=torch.float64,
                device=x0.device,
                stream=PATHS,
            )
            source.draws = step
            drawn.append(source.normal())
        return torch.cat(drawn)[back]

    return noise


def _start(sde: SDE, t: Tensor, data: Tensor, z: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """``x_n ~ q(x_n | x_0)``, and ``log p(x_n) / q(x_n | x_0)``, (B,)."""
    ratio = log_normal_ratio(
        z, sde.alpha(t) * data, sde.variance(t).log(), torch.as_tensor(2 * math.log(std)).to(data)
    )
    return sde.perturb(data, t, z), sum_dims(ratio)


def _ratio(chain: ReverseSteps, data: Tensor, predicted: Prediction, index: Tensor, z: Tensor) -> Tensor:
    """``log p(x_{i-1} | x_i) / q(x_{i-1} | x_i, x_0)`` at the draw that the noise ``z`` makes, (B,)."""
    difference, log_variance = chain.mean_error(data, predicted, index)
    return sum_dims(log_normal_ratio(z, difference, log_variance, predicted.log_variance))
