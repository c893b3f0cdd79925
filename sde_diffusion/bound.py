"""The variational bound on ``-log p(x_0)``, term by term, and its limit in continuous time.

A chain ``x_0, x_1, .., x_n`` of a forward process, its states at any times ``t_1 < .. < t_n``, is undone by
``p(x_{i-1} | x_i) = N(mu, v)`` with ``mu`` the mean of ``q(x_{i-1} | x_i, x_0)`` at the data the model
predicts. Then (Ho et al. 2020, eq. 5)

    -log p(x_0) <= L_T + sum_{i=2}^{n} L_{i-1} + L_0,
    L_T     = KL(q(x_n | x_0) || N(0, sigma(t_n)^2 I)),
    L_{i-1} = E_q KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i)),
    L_0     = E_q[-log p(x_0 | x_1)], by a decoder.

As the steps become short the sum tends to an integral over the log-SNR (Kingma et al. 2021, "Variational
diffusion models", eq. 17; Song, Durkan, Murray, Ermon 2021, theorem 1),

    L_inf = 1/2 int E |eps_hat - eps|^2 d log_snr,

whatever the schedule between the ends. The third function here replaces that bound by the density that the
probability-flow ODE gives ``x_1``. Everything takes any score, and any linear SDE: a chain is an SDE with a
grid. Nats; :meth:`Bound.bits_per_dim` converts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.decoders import Decoder, GaussianDecoder
from sde_diffusion.likelihood import bits_per_dim, log_likelihood
from sde_diffusion.noise import BOUND, SampleNoise
from sde_diffusion.reverse_steps import ReverseSteps, check_states, normal_kl, sum_dims
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand
from sde_diffusion.variances import FixedSmall, ReverseVariance

__all__ = [
    "Bound",
    "clipped_score",
    "continuous_bound",
    "ode_bound",
    "prior_kl",
    "variational_bound",
]


def prior_kl(sde: SDE, x0: Tensor, std: float | None = None) -> Tensor:
    """``L_T = KL(q(x_T | x_0) || N(0, std^2 I))`` in nats, (B,).

    ``std`` is by default ``sigma(t_max)``, where our samplers start; the DDPM papers take 1, which for a
    chain that ends in noise is the same to many digits.
    """
    end = torch.tensor(sde.t_max, dtype=torch.float64)
    log_p = 2 * math.log(sde.prior_std if std is None else std)
    kl = normal_kl(
        expand(sde.alpha(end), x0.double()) * x0.double(), sde.variance(end).log(), end.new_tensor(log_p)
    )
    return sum_dims(kl)


# ------------------------------------------------------------ results


@dataclass(frozen=True)
class Bound:
    """A bound on ``-log p(x_0)`` in nats and its parts.

    Attributes:
        prior: ``L_T`` (of :func:`ode_bound`, the part of the ODE), (B,).
        terms: what was evaluated of the middle, (B, m); with ``weights`` (m,) their sum is unbiased.
        decoder: ``L_0``, (B,).
        steps: of a chain, the step of each term, (B, m) from 2 to n.
        times: of a chain, ``t_1 .. t_n``, (n,); else those of each term, (B, m).
        dims: dimensions of the data.
        nfe: network evaluations per sample.
    """

    prior: Tensor
    terms: Tensor
    decoder: Tensor
    weights: Tensor
    dims: int
    nfe: float
    steps: Tensor | None = field(default=None, repr=False)
    times: Tensor | None = field(default=None, repr=False)

    @property
    def diffusion(self) -> Tensor:
        """The middle: the sum of ``L_1 .. L_{n-1}``, or ``L_inf``, (B,)."""
        return self.terms @ self.weights

    @property
    def total(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.diffusion + self.decoder

    def bits_per_dim(self, nats: Tensor | None = None, levels: int | None = None) -> Tensor:
        """Nats (default: the total) as bits per dimension.

        ``levels`` is for totals by a density (a :class:`~sde_diffusion.decoders.GaussianDecoder`) of
        dequantized levels in [-1, 1]; a discretized decoder gives probabilities, which need none.
        """
        nats = self.total if nats is None else nats
        return nats / (self.dims * math.log(2)) if levels is None else bits_per_dim(-nats, self.dims, levels)

    def by_step(self) -> Tensor:
        """Of a chain, the mean over samples of each term ``L_0 .. L_{n-1}, L_T``, (n + 1,) nats; NaN where a
        subset of the steps has none."""
        if self.steps is None or self.times is None:
            raise ValueError("only the terms of a chain belong to steps")
        n = len(self.times)
        total, count = torch.zeros(2, n, dtype=torch.float64).unbind()
        index, terms = self.steps.flatten() - 1, self.terms.cpu().flatten()
        total.index_add_(0, index, terms)
        count.index_add_(0, index, torch.ones_like(terms))
        mean = total / count
        mean[0] = self.decoder.mean()
        return torch.cat([mean, self.prior.mean()[None].cpu()])


def clipped_score(sde: SDE, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The score whose posterior mean of the data is that of ``score``, clipped to [-1, 1]: ``clip=True`` for whatever
    wants a score."""

    def clipped(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        data = sde.posterior_mean(x.double(), score(x, t, **cond).double(), t).clamp(-1, 1)
        result = -(x - expand(sde.alpha(t), data) * data) / expand(sde.variance(t), data)
        return result.to(x.dtype)

    return clipped


# ------------------------------------------------------------ the three bounds


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


class _Draws:
    """Standard normal noise for pairs of a sample and a number: that of a pair depends on nothing else."""

    def __init__(self, x: Tensor, seed: int, first_index: int) -> None:
        self._x, self._seed, self._first = x, seed, first_index

    def _source(self, shape: torch.Size | tuple[int, ...], rows: Tensor, number: int) -> SampleNoise:
        source = SampleNoise(
            self._seed, rows + self._first, shape, dtype=self._x.dtype, device=self._x.device, stream=BOUND
        )
        source.draws = number
        return source

    def normal(self, rows: Tensor, number: int) -> Tensor:
        """The noise of samples ``rows`` with a number."""
        return self._source(self._x.shape[1:], rows, number).normal()

    def normals(self, rows: Tensor, columns: Tensor, first: int) -> Tensor:
        """The noise of pairs of a sample and a number, ``first`` and those after it."""
        numbers, counts = columns.unique_consecutive(return_counts=True)
        parts = zip(rows.split(counts.tolist()), numbers.tolist(), strict=True)
        return torch.cat([self.normal(part, first + number) for part, number in parts])

    def uniforms(self, count: int, number: int) -> Tensor:
        """Uniform numbers for every sample, (B, count) float64."""
        rows = torch.arange(len(self._x), device=self._x.device)
        return self._source((count,), rows, number).uniform().double()


def _given(noise: Callable[[int], Tensor], index: Tensor, rows: Tensor) -> Tensor:
    """The rows of ``noise(step)`` for pairs of an index and a sample."""
    steps, counts = index.unique_consecutive(return_counts=True)
    parts = zip(steps.tolist(), rows.split(counts.tolist()), strict=True)
    return torch.cat([noise(i + 1)[part] for i, part in parts])


def _rows(cond: Mapping[str, Tensor] | None, rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in (cond or {}).items()}


def _strata(total: int, wanted: int | None) -> tuple[Tensor, Tensor]:
    """Where each of ``wanted`` strata of ``total`` begins, and how long it is."""
    wanted = total if wanted is None else min(wanted, total)
    edges = torch.arange(wanted + 1) * total // wanted
    return edges[:-1], edges.diff()


@torch.no_grad()
def variational_bound(
    sde: SDE,
    score: Callable[..., Tensor],
    x0: Tensor,
    *,
    times: Tensor | None = None,
    variance: ReverseVariance | None = None,
    decoder: Decoder | None = None,
    steps: int | None = None,
    clip: bool = False,
    prior_std: float | None = None,
    seed: int = 0,
    first_index: int = 0,
    noise: Callable[[int], Tensor] | None = None,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 1024,
    progress: Callable[[int], Any] | None = None,
) -> Bound:
    """The bound of a chain, each term with one draw of ``q(x_i | x_0)``.

    The draws of a sample depend on ``(seed, first_index + i)`` only, and those of different samples are
    independent: the spread of the total over samples gives its standard error, that of the draws included.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``; a network or analytic.
        x0: (B, *D). For a discretized decoder the levels, scaled to [-1, 1], without dequantization noise.
        times: the chain's times ``t_n .. t_1``, falling (``uniform_times`` for any SDE); default those of a
            :class:`~sde_diffusion.ddpm.DDPM`.
        variance: of the reverse steps, default :class:`~sde_diffusion.variances.FixedSmall`.
        decoder: default :class:`~sde_diffusion.decoders.GaussianDecoder`.
        steps: evaluate so many of the n - 1 inner terms only, for each sample its own, one at random from
            each of so many strata; None for all. The last step is always evaluated.
        clip: clip the predicted data to [-1, 1].
        prior_std: of ``p(x_T)``, default ``sigma(t_max)``.
        seed, first_index: of the draws.
        noise: instead of these, the noise (B, *D) of step i.
        cond: conditions of the samples for the score, such as ``{"y": labels}``, (B, ...) each.
        batch_size: states per network evaluation; bounds the memory, does not change the result.
        progress: called with the number of states after each evaluation.

    Raises:
        ValueError: data that are not finite floats, or do not suit the decoder; fewer than 2 steps; no chain
            and no times.
    """
    check_states(x0)
    _positive("batch_size", batch_size)
    if steps is not None:
        _positive("steps", steps)
    if times is None:
        if not hasattr(sde, "times"):
            raise ValueError(f"{sde!r} is no chain: give the times of one, such as uniform_times(sde, 1000)")
        times = sde.times()
    chain = ReverseSteps(sde, times, x0.device)
    variance, decoder = variance or FixedSmall(), decoder or GaussianDecoder()
    draws = _Draws(x0, seed, first_index)
    starts, lengths = (a.to(x0.device) for a in _strata(len(chain) - 1, steps))
    chosen = (draws.uniforms(len(starts), 0) * lengths).long() + starts + 1  # never the last step, at index 0
    chosen = torch.cat([chosen.new_zeros(len(x0), 1), chosen], 1)

    values = torch.empty(chosen.shape, dtype=torch.float64, device=x0.device)
    samples = torch.arange(len(x0), device=x0.device)
    pairs = torch.cartesian_prod(torch.arange(chosen.shape[1], device=x0.device), samples)
    for columns, rows in (part.unbind(1) for part in pairs.split(batch_size)):
        index = chosen[rows, columns]
        x, t = x0[rows], chain.times[index]
        z = draws.normals(rows, columns, 1) if noise is None else _given(noise, index, rows).to(x)
        state = sde.perturb(x, t, z)
        predicted = chain.predict(score(state, t, **_rows(cond, rows)), state, index, variance, clip=clip)
        values[rows, columns] = chain.term(x, predicted, index, decoder)
        if progress is not None:
            progress(len(rows))
    return Bound(
        prior=prior_kl(sde, x0, prior_std),
        terms=values[:, 1:],
        decoder=values[:, 0],
        weights=lengths.double(),
        dims=x0[0].numel(),
        nfe=float(chosen.shape[1]),
        steps=(chosen[:, 1:] + 1).cpu(),
        times=chain.times.cpu(),
    )


def _decoded(
    sde: SDE, score: Callable[..., Tensor], x0: Tensor, z: Tensor, decoder: Decoder, **cond: Tensor
) -> tuple[Tensor, Tensor]:
    """``x_{t_min}``, (B, *D), and ``-log p(x_0 | x_{t_min})``, (B,), with variance ``sigma^2 / alpha^2``:
    what data that are smooth at that scale have."""
    t = torch.tensor(sde.t_min, dtype=torch.float64, device=x0.device)
    x = sde.perturb(x0, t, z)
    mean = sde.posterior_mean(x.double(), score(x, t, **cond).double(), t)
    log_variance = -sde.log_snr(t).expand(x.shape)
    return x, -sum_dims(decoder(x0.double(), mean, log_variance))


@torch.no_grad()
def continuous_bound(
    sde: SDE,
    score: Callable[..., Tensor],
    x0: Tensor,
    *,
    decoder: Decoder | None = None,
    draws: int = 100,
    prior_std: float | None = None,
    seed: int = 0,
    first_index: int = 0,
    cond: Mapping[str, Tensor] | None = None,
    batch_size: int = 1024,
) -> Bound:
    """The bound in continuous time from ``t_min`` to ``t_max``: the limit of :func:`variational_bound` for
    short steps.

    ``L_inf = (log_snr(t_min) - log_snr(t_max)) / 2 E |eps_hat - eps|^2`` with the log-SNR uniform between its
    ends: importance sampling by the density ``g^2 / sigma^2`` (Kingma et al. 2021; Song, Durkan, Murray,
    Ermon 2021), here with one draw in each of ``draws`` equal parts, for each sample shifted by a random
    number of its own.

    Args:
        sde, score, x0, prior_std, seed, first_index, cond, batch_size: as for :func:`variational_bound`.
        decoder: of ``x_{t_min}``, with variance ``sigma^2 / alpha^2``; default
            :class:`~sde_diffusion.decoders.GaussianDecoder`.
        draws: of the time and noise, for each sample.

    Raises:
        ValueError: as for :func:`variational_bound`.
    """
    check_states(x0)
    _positive("batch_size", batch_size)
    _positive("draws", draws)
    source = _Draws(x0, seed, first_index)
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64, device=x0.device)
    low, high = sde.log_snr(ends).unbind()
    if not bool(torch.isfinite(high)):
        raise ValueError(
            f"the bound in continuous time needs a t_min at which the log-SNR is finite, got {sde!r}"
        )
    u = (torch.arange(draws, device=x0.device) + source.uniforms(1, 0)) / draws
    times = sde.time_of_log_snr(low + (high - low) * u).clamp(sde.t_min, sde.t_max)
    terms = torch.empty_like(times)
    samples = torch.arange(len(x0), device=x0.device)
    pairs = torch.cartesian_prod(torch.arange(draws, device=x0.device), samples)
    for columns, rows in (part.unbind(1) for part in pairs.split(batch_size)):
        t, z = times[rows, columns], source.normals(rows, columns, 2)
        x = sde.perturb(x0[rows], t, z)
        noise = -expand(sde.sigma(t), x.double()) * score(x, t, **_rows(cond, rows)).double()
        terms[rows, columns] = 0.5 * (high - low) * sum_dims((noise - z).square())
    decoded = [
        _decoded(
            sde, score, x0[part], source.normal(part, 1), decoder or GaussianDecoder(), **_rows(cond, part)
        )[1]
        for part in samples.split(batch_size)
    ]
    return Bound(
        prior=prior_kl(sde, x0, prior_std),
        terms=terms,
        decoder=torch.cat(decoded),
        weights=torch.full((draws,), 1 / draws, dtype=torch.float64, device=x0.device),
        dims=x0[0].numel(),
        nfe=float(draws + 1),
        times=times,
    )


def ode_bound(
    sde: SDE,
    score: Score,
    x0: Tensor,
    *,
    decoder: Decoder | None = None,
    seed: int = 0,
    first_index: int = 0,
    **likelihood: Any,
) -> Bound:
    """The same bound with the exact density of the probability-flow ODE in place of the bound on it.

    ``-log p(x_0) <= E_q[log q(z | x_0) - log p_ODE(z) - log p(x_0 | z)]`` with ``z = x_{t_min}``, the state
    and decoder that :func:`continuous_bound` has: for discrete data the ODE has no other likelihood, for the
    score of their smoothed distribution says nothing of the data themselves. One draw of z for each sample.

    Args:
        sde, score, x0, decoder, seed, first_index: as for :func:`continuous_bound`, with the same z.
        likelihood: of :func:`~sde_diffusion.likelihood.log_likelihood`: divergence, rtol, ...

    Returns:
        As ``prior`` the part of the ODE, ``log q(z | x_0) - log p_ODE(z)``; no terms.
    """
    check_states(x0)
    source = _Draws(x0, seed, first_index)
    noise = source.normal(torch.arange(len(x0), device=x0.device), 1)
    with torch.no_grad():
        z, decoded = _decoded(sde, score, x0, noise, decoder or GaussianDecoder())
    out = log_likelihood(sde, score, z, seed=seed, first_index=first_index, **likelihood)
    log_variance = float(sde.variance(sde.t_min).detach().log())
    log_q = -0.5 * sum_dims(noise.double().square() + log_variance + math.log(2 * math.pi))
    nothing = torch.zeros(len(x0), 0, dtype=torch.float64, device=x0.device)
    return Bound(
        prior=log_q - out.log_prob.double(),
        terms=nothing,
        decoder=decoded,
        weights=nothing[0],
        dims=x0[0].numel(),
        nfe=float(out.nfe_per_sample.double().mean()) + 1,
    )
