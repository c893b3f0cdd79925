"""Samples and latents through the probability-flow ODE, by a solver of :mod:`sde_diffusion.ode` or by a predictor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sde_diffusion.noise import SampleNoise
from sde_diffusion.ode import DormandPrince, Field, Solver, probability_flow
from sde_diffusion.predictors import Predictor, is_stochastic, start_run
from sde_diffusion.sampling import CountedScore, SampleOutput, check_dtype, check_shape, device_of, sample
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand
from sde_diffusion.times import check_times, uniform_times


@contextmanager
def _shown(field: Field, t0: float, t1: float, what: str, progress: bool) -> Iterator[Field]:
    """The field with a progress bar: how far the slowest sample has come, whatever the solver."""
    if not progress:
        yield field
        return
    with tqdm(total=100, desc=what, unit="%", leave=False) as bar:

        def watched(t: Tensor, x: Tensor) -> Tensor:
            done = 100 * float(((t - t0) / (t1 - t0)).min())
            bar.update(max(0, int(min(done, 100)) - bar.n))
            return field(t, x)

        yield watched


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
    trajectory: Tensor | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SampleOutput:
    """Samples from the probability-flow ODE: ``N(0, sigma(t_max)^2 I)`` carried from ``t_max`` to ``t_end``.

    Sample ``i`` of a seed depends on ``(seed, first_index + i)`` only, given a solver that treats samples
    alone (the default).

    Args:
        sde, score, shape, seed, first_index, denoise, progress, dtype, device: as in
            :func:`sde_diffusion.sampling.sample`.
        solver: default ``DormandPrince(rtol=1e-5, atol=1e-5)``.
        x_init: latents of the given shape at ``t_max`` instead of the prior.
        t_end: where the ODE ends; default ``sde.t_min``.
        trajectory: falling times from ``t_max`` to ``t_end`` at which to keep the state; the solver stops at each.

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
    stops = _stops(sde, end, trajectory)
    device = device_of(score) if device is None else device
    if x_init is None:
        rows = range(first_index, first_index + shape[0])
        x_init = sde.prior_std * SampleNoise(seed, rows, shape[1:], dtype=dtype, device=device).normal()
    elif tuple(x_init.shape) != shape:
        raise ValueError(f"x_init must have shape {shape}, got {tuple(x_init.shape)}")
    x = x_init.to(device=device, dtype=dtype)
    chosen, spent, states = solver or DormandPrince(), torch.zeros(1, dtype=torch.int64, device=x.device), []
    with _shown(probability_flow(sde, score), sde.t_max, end, "sampling", progress) as field:
        for here, there in itertools.pairwise([sde.t_max, *stops, end]):
            solution = chosen.solve(field, x, here, there)
            x, spent = solution.x, spent + solution.evaluations
            states.append(x)
    nfe = int(spent.max())
    if denoise:
        counted = CountedScore(score)
        t = torch.tensor(end, dtype=torch.float64, device=x.device)
        x = sde.posterior_mean(x, counted(x, t), t)
        nfe += counted.evaluations
    return SampleOutput(x, nfe, torch.stack(states[:-1]) if stops else None)


def _stops(sde: SDE, end: float, trajectory: Tensor | None) -> list[float]:
    if trajectory is None:
        return []
    stops = [float(t) for t in torch.as_tensor(trajectory, dtype=torch.float64).flatten()]
    edges = [sde.t_max, *stops, end]
    if not stops or not all(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"the times of a trajectory must fall from t_max = {sde.t_max} to {end}, got {stops}"
        )
    return stops


@torch.no_grad()
def encode(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    solver: Solver | None = None,
    predictor: Predictor | None = None,
    times: Tensor | None = None,
    progress: bool = False,
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
        progress: whether to show a progress bar.

    Raises:
        ValueError: a solver and a predictor, times without a predictor, a predictor that adds noise, or a grid
            that begins at the data themselves.
    """
    check_shape(x.shape)
    check_dtype(x.dtype)
    if predictor is None:
        if times is not None:
            raise ValueError("times are the grid of a predictor; a solver chooses its own steps")
        with _shown(probability_flow(sde, score), sde.t_min, sde.t_max, "encoding", progress) as field:
            solution = (solver or DormandPrince()).solve(field, x, sde.t_min, sde.t_max)
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
    steps = list(zip(rising[:-1].unbind(), rising[1:].unbind(), strict=True))
    for t, s in tqdm(steps, desc="encoding", disable=not progress, leave=False):
        x = run.step(sde, counted, x, t, s, still)
    return SampleOutput(x, counted.evaluations)


@torch.no_grad()
def decode(
    sde: SDE,
    score: Score,
    z: Tensor,
    *,
    solver: Solver | None = None,
    predictor: Predictor | None = None,
    times: Tensor | None = None,
    denoise: bool = False,
    progress: bool = False,
) -> SampleOutput:
    """The data at ``t_min`` of latents ``z`` (B, *D) at ``t_max``: the inverse of :func:`encode`.

    Args:
        sde, score, solver, predictor, times, progress: as there.
        z: the latents.
        denoise: whether to end with the posterior mean of the data, which for new data is what one wants, and of
            encoded data makes a small change.

    Raises:
        ValueError: as by :func:`encode`.
    """
    check_shape(z.shape)
    check_dtype(z.dtype)
    shape = tuple(z.shape)
    if predictor is None:
        if times is not None:
            raise ValueError("times are the grid of a predictor; a solver chooses its own steps")
        return sample_ode(
            sde,
            score,
            shape,
            solver=solver,
            x_init=z,
            denoise=denoise,
            progress=progress,
            dtype=z.dtype,
            device=z.device,
        )
    if solver is not None:
        raise ValueError("decode takes a solver or a predictor, not both")
    if is_stochastic(predictor):
        raise ValueError(f"decoding needs a deterministic predictor, and {predictor!r} adds noise")
    return sample(
        sde, score, shape, predictor=predictor, times=times, x_init=z, denoise=denoise, progress=progress,
        dtype=z.dtype, device=z.device,
    )  # fmt: skip


def round_trip_error(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    solver: Solver | None = None,
    predictor: Predictor | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """How far data come back from where they were encoded to: the root mean square of ``decode(encode(x)) - x`` over
    the elements of each sample, (B,).

    The flow itself comes back exactly, so this is the error of the solver, there and back.
    """
    options: dict[str, Any] = {"solver": solver, "predictor": predictor, "times": times}
    back = decode(sde, score, encode(sde, score, x, **options).x, **options).x
    return (back - x).flatten(1).square().mean(1).sqrt()


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of each sample, (B, *D): ``(sin((1 - w) phi) a + sin(w phi) b) / sin(phi)``.

    ``phi`` is the angle between the two. Between independent Gaussian latents, nearly at right angles, the result is
    as long as they are, where a mean would be shorter by ``sqrt(2)`` and so unlike any latent (Shoemake 1985; for
    diffusion models Song et al. 2020, DDIM, appendix D.5). Along one line it is linear interpolation.
    """
    if a.shape != b.shape:
        raise ValueError(f"latents must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    u, v = a.flatten(1).double(), b.flatten(1).double()
    u, v = u / u.norm(dim=1, keepdim=True), v / v.norm(dim=1, keepdim=True)
    phi = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))  # to the last digit for small angles too
    sine = phi.sin()
    line = ~(sine > 1e-6)
    safe = torch.where(line, torch.ones_like(sine), sine)
    on_a = torch.where(line, torch.full_like(phi, 1 - weight), ((1 - weight) * phi).sin() / safe)
    on_b = torch.where(line, torch.full_like(phi, weight), (weight * phi).sin() / safe)
    return expand(on_a, a) * a + expand(on_b, b) * b


@torch.no_grad()
def interpolate(
    sde: SDE,
    score: Score,
    a: Tensor,
    b: Tensor,
    n: int,
    *,
    solver: Solver | None = None,
    predictor: Predictor | None = None,
    times: Tensor | None = None,
    progress: bool = False,
) -> SampleOutput:
    """Data between data: ``a`` and ``b`` (B, *D) are encoded, their latents interpolated by :func:`slerp`, decoded.

    Args:
        sde, score, solver, predictor, times, progress: as in :func:`encode`.
        a, b: data at ``t_min``.
        n: how many for each pair, the two ends included, at equal distances; at least 2.

    Returns:
        ``x`` of shape (n, B, *D), whose first and last are ``a`` and ``b`` after a round trip; and the evaluations,
        those of one way there and one back.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"an interpolation needs an integer number of points n >= 2, got {n!r}")
    if a.shape != b.shape:
        raise ValueError(f"data must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    options: dict[str, Any] = {"solver": solver, "predictor": predictor, "times": times, "progress": progress}
    ends = encode(sde, score, torch.cat([a, b]), **options)
    first, last = ends.x.chunk(2)
    between = torch.cat([slerp(first, last, i / (n - 1)) for i in range(n)])
    out = decode(sde, score, between, **options)
    return SampleOutput(out.x.reshape(n, *a.shape), ends.nfe + out.nfe)
