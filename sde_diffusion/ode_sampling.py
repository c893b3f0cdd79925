"""Samples and latents through the probability-flow ODE, by a solver of :mod:`sde_diffusion.ode` or by a predictor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sde_diffusion.noise import SampleNoise
from sde_diffusion.ode import DormandPrince, Solver, probability_flow
from sde_diffusion.predictors import Predictor, is_stochastic, start_run
from sde_diffusion.sampling import CountedScore, SampleOutput, check_dtype, check_shape
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.times import check_times, uniform_times


@torch.no_grad()
def sample_ode(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    solver: Solver | None = None,
    seed: int = 0,
    first_index: int = 0,
    x_init: Tensor | None = None,
    t_end: float | None = None,
    denoise: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SampleOutput:
    """Samples from the probability-flow ODE: ``N(0, sigma(t_max)^2 I)`` carried from ``t_max`` to ``t_end``.

    Sample ``i`` of a seed depends on ``(seed, first_index + i)`` only, given a solver that treats samples
    alone (the default).

    Args:
        sde, score, shape, seed, first_index, denoise, dtype, device: as in
            :func:`sde_diffusion.sampling.sample`.
        solver: default ``DormandPrince(rtol=1e-5, atol=1e-5)``.
        x_init: latents of the given shape at ``t_max`` instead of the prior.
        t_end: where the ODE ends; default ``sde.t_min``.

    Returns:
        The samples, and the largest number of evaluations that a sample needed.

    Raises:
        ValueError: a shape, type, end or seed that makes no sense.
        SolverError: samples for which the tolerance cannot be met.
    """
    shape = check_shape(shape)
    check_dtype(dtype)
    end = sde.t_min if t_end is None else float(t_end)
    if not 0 <= end < sde.t_max:
        raise ValueError(f"t_end must lie between 0 and t_max = {sde.t_max}, got {end}")
    if x_init is None:
        rows = range(first_index, first_index + shape[0])
        x_init = sde.prior_std * SampleNoise(seed, rows, shape[1:], dtype=dtype, device=device).normal()
    elif tuple(x_init.shape) != shape:
        raise ValueError(f"x_init must have shape {shape}, got {tuple(x_init.shape)}")
    x = x_init.to(device=device, dtype=dtype)
    solution = (solver or DormandPrince()).solve(probability_flow(sde, score), x, sde.t_max, end)
    x, nfe = solution.x, int(solution.evaluations.max())
    if denoise:
        counted = CountedScore(score)
        t = torch.tensor(end, dtype=torch.float64, device=x.device)
        x = sde.posterior_mean(x, counted(x, t), t)
        nfe += counted.evaluations
    return SampleOutput(x, nfe)


@torch.no_grad()
def encode(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    solver: Solver | None = None,
    predictor: Predictor | None = None,
    times: Tensor | None = None,
) -> SampleOutput:
    """The latent at ``t_max`` of data ``x`` (B, *D) at ``t_min``, through the probability-flow ODE.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``.
        x: the data, (B, *D).
        solver: default ``DormandPrince(rtol=1e-5, atol=1e-5)``.
        predictor: a deterministic predictor instead, which goes along its grid the other way.
        times: the grid of the predictor, falling as that of a sampler (so that one grid serves both), and
            ending where there is noise; its ends take the place of ``t_max`` and ``t_min``. Default
            ``uniform_times(sde, 1000)``.

    Raises:
        ValueError: a solver and a predictor, times without a predictor, a predictor that adds noise, or a grid
            that begins at the data themselves.
    """
    check_shape(x.shape)
    check_dtype(x.dtype)
    if predictor is None:
        if times is not None:
            raise ValueError("times are the grid of a predictor; a solver chooses its own steps")
        solution = (solver or DormandPrince()).solve(probability_flow(sde, score), x, sde.t_min, sde.t_max)
        return SampleOutput(solution.x, int(solution.evaluations.max()))
    if solver is not None:
        raise ValueError("encode takes a solver or a predictor, not both")
    if is_stochastic(predictor):
        raise ValueError(f"encoding needs a deterministic predictor, and {predictor!r} adds noise")
    falling = check_times(sde, uniform_times(sde, 1000) if times is None else times).to(x.device)
    if not float(sde.variance(falling[-1])) > 0:
        raise ValueError(
            f"encoding must begin where there is noise, and there is none at {float(falling[-1]):g}"
        )
    rising = falling.flip(0)
    still = x.new_zeros(()).expand(x.shape)
    counted = CountedScore(score)
    run = start_run(predictor, sde, rising, lambda: still)
    for t, s in zip(rising[:-1].unbind(), rising[1:].unbind(), strict=True):
        x = run.step(sde, counted, x, t, s, still)
    return SampleOutput(x, counted.evaluations)
