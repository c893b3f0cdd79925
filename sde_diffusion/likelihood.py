"""Exact log-likelihoods through the probability-flow ODE, and bits per dimension.

With ``dx/dt = v(t, x)``, ``log p_0(x_0) = log p_T(x_T) + int_0^T div v(t, x_t) dt`` (Chen et al. 2018; Song
et al. 2021, eq. 39). The divergence is exact, or estimated by ``z^T (dv/dx) z`` with random ``z``
(Hutchinson 1990; Grathwohl et al. 2019); value and derivative share one evaluation of the network. Nats
inside; bits/dim is a conversion at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sde_diffusion.coordinates import Coordinates, LogSNRCoordinates, TimeCoordinates
from sde_diffusion.divergence import Divergence, make_divergence
from sde_diffusion.noise import DEQUANTIZATION, SampleNoise
from sde_diffusion.ode import DormandPrince, Field, Selectable, Solver, Step
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

_SAFETY = 0.1
_GROWTH, _LARGEST = 4.0, 0.25


@dataclass(frozen=True)
class Likelihood:
    """The result of :func:`log_likelihood`.

    Attributes:
        log_prob: ``log p(x)`` in nats, (B,); NaN where it failed.
        nfe: network evaluations of the sample that needed most.
        nfe_per_sample: of each sample, (B,).
        latent: ``x_T``, (B, *D).
        failed: the samples whose score was not finite or whose tolerance could not be met, (B,) bool.
    """

    log_prob: Tensor
    nfe: int
    nfe_per_sample: Tensor
    latent: Tensor
    failed: Tensor


@dataclass(frozen=True)
class _Augmented:
    """The flow and the divergence along it, as one field over ``(z, log-density)``, (B, D + 1)."""

    estimator: Divergence
    coordinates: Coordinates
    sde: SDE
    score: Score
    prepared: Tensor | None
    shape: torch.Size
    flow: Field

    def __call__(self, u: Tensor, state: Tensor) -> Tensor:
        z = state[:, :-1].unflatten(1, self.shape)
        value, trace = self.estimator(self.flow, u, z, self.prepared)
        return torch.cat([value.flatten(1), trace[:, None]], dim=1)

    def driving(self, u: Tensor, state: Tensor) -> Tensor:
        """The flow alone, without the divergence: the log-density drives nothing."""
        z = state[:, :-1].unflatten(1, self.shape)
        return torch.cat([self.flow(u, z).flatten(1), torch.zeros_like(state[:, -1:])], dim=1)

    def error_of_the_log_density(self, u: Tensor, state: Tensor, slope: Tensor, error: Tensor) -> Tensor:
        """What an error of the state at ``u`` makes of the result, nats (B,).

        From here on the flow would add ``log p_u(z)`` to the log-density, so an error ``e`` in z changes the result
        by ``e . grad log p_u``: the adjoint of the flow is the score, and that the field has at hand. The two parts
        are not allowed to cancel: they are estimates.
        """
        weights = self.coordinates.score(self.sde, u, state[:, :-1], slope[:, :-1])
        return error[:, -1].abs() + (weights * error[:, :-1]).sum(1).abs()


class _SelectableAugmented(_Augmented):
    def rows(self, index: Tensor) -> _Augmented:
        """The field of some samples of the batch."""
        assert isinstance(self.score, Selectable)
        score = self.score.rows(index)
        return replace(
            self,
            score=score,
            flow=self.coordinates.field(self.sde, score),
            prepared=None if self.prepared is None else self.prepared[:, index],
        )


@dataclass(frozen=True)
class LikelihoodSolver(DormandPrince):
    """Dormand and Prince's method with an error control for what is wanted, the log-density.

    The error that counts is that of the log-density of the data: of its own component, and of the state times the
    score there, by which it changes what is still to come. A step is accepted where this is at most a tenth of
    ``atol + rtol D`` nats, for the errors of the steps add up; and the state itself is within its tolerances.

    Args:
        rtol, atol: the accuracy wanted of the result, nats per dimension and nats; and of the latent, relative and
            absolute, a step.
    """

    def _longest(self, field: Field, t: Tensor, span: float) -> Tensor:
        # The noise grows by a factor of four at most, the variable by a quarter of the way. An estimate made of a
        # few evaluations does not see what happens between them: sharp features of the density come at every scale
        # of the noise, and on a trained network longer steps were off by ten times the estimate.
        assert isinstance(field, _Augmented)
        return field.coordinates.reach(field.sde, t, _GROWTH).clamp_max(_LARGEST * span)

    def _first_step(self, field: Field, x: Tensor, k: Tensor, t: Tensor, span: Tensor) -> tuple[Tensor, int]:
        # The noise of the data's end says what is short there; no evaluation is needed to find out.
        return self._longest(field, t, float(span.abs().max())), 0

    def _ratio(self, field: Field, step: Step) -> Tensor:
        assert isinstance(field, _Augmented)
        ratio = super()._ratio(field, step.without_last())
        error = field.error_of_the_log_density(step.t, step.after, step.slope, step.error)
        allowed = _SAFETY * (self.atol + self.rtol * (step.after.shape[1] - 1))
        return torch.maximum(ratio, error / allowed)


def likelihood_solver(
    rtol: float, atol: float, max_evaluations: int = 100_000, on_failure: str = "raise"
) -> DormandPrince:
    """The default solver of :func:`log_likelihood` for a wanted accuracy of the result."""
    return LikelihoodSolver(rtol, atol, max_evaluations, on_failure)


def log_likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    divergence: str | Divergence = "exact",
    probes: int = 1,
    solver: Solver | None = None,
    coordinates: Coordinates | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int = 100_000,
    on_failure: str = "raise",
    seed: int = 0,
    first_index: int = 0,
    t_start: float | None = None,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
) -> Likelihood:
    """``log p(x)`` of data ``x`` through the probability-flow ODE from ``t_min`` to ``t_max``.

    The density is that of the flow's start, ``p_{t_min}``, and at ``t_max`` that of the prior ``N(0,
    sigma(t_max)^2 I)``. Both ends differ a little from the data's ``p_0`` and its ``p_T``
    (:mod:`sde_diffusion.ends` measures by how much); where ``p_T`` is known, ``prior_log_prob`` takes it.

    Differentiable in ``x`` (and then in the weights): gradients flow where ``x.requires_grad``, by
    backpropagation through the steps of the solver.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``, differentiable in ``x``.
        x: (B, *D), float32 or float64; the state is integrated in this type, its log-density in the same ODE.
        divergence: ``"exact"`` (D vector-Jacobian products each evaluation; small D), ``"hutchinson"``
            (Rademacher probes), ``"gaussian"``, ``"sphere"``, ``"orthogonal"``, ``"hutch++"``, or an object of
            :mod:`sde_diffusion.divergence`.
        probes: random probes averaged by the estimators.
        solver: default :class:`LikelihoodSolver`, whose error control is per sample. Samples that have arrived leave
            the batch, where the score is :class:`~sde_diffusion.ode.Selectable`.
        coordinates: default :class:`~sde_diffusion.coordinates.LogSNRCoordinates`, in which the linear part is
            solved exactly; with a solver of your own the time itself.
        rtol, atol: the accuracy wanted of the result, ``atol + rtol D`` nats; see :class:`LikelihoodSolver`.
        max_evaluations: of the default solver, per sample.
        on_failure: of the default solver, ``"raise"``, or ``"nan"``: samples that fail have NaN and are marked, the
            others are finished.
        seed, first_index: the probes of sample ``i`` depend on ``(seed, first_index + i)`` only.
        t_start: where the data are, instead of ``t_min``.
        prior_log_prob: ``log p_T`` in nats, (B, *D) -> (B,), instead of the prior's.

    Raises:
        ValueError: data that are not a batch of finite floats, a start outside of the interval.
        SolverError: samples for which the tolerance cannot be met.
    """
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 of shape (B, *D), got {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")
    start = sde.t_min if t_start is None else float(t_start)
    if not sde.t_min <= start < sde.t_max:
        raise ValueError(f"t_start must lie in [{sde.t_min}, {sde.t_max}), got {start}")
    if solver is None:
        solver = likelihood_solver(rtol, atol, max_evaluations, on_failure)
        coordinates = coordinates or LogSNRCoordinates()
    coordinates = coordinates or TimeCoordinates()
    estimator = make_divergence(divergence, probes) if isinstance(divergence, str) else divergence
    shape, dims = x.shape, x[0].numel()
    kind = _SelectableAugmented if isinstance(score, Selectable) else _Augmented
    differentiable = torch.is_grad_enabled() and x.requires_grad
    prepared = estimator.prepare(x.detach(), seed, first_index)
    field = kind(estimator, coordinates, sde, score, prepared, shape[1:], coordinates.field(sde, score))
    scales = [coordinates.scale(sde, t) for t in (start, sde.t_max)]

    with torch.set_grad_enabled(differentiable):
        state = torch.cat([(x / scales[0]).flatten(1), x.new_zeros(shape[0], 1)], dim=1)
        solution = solver.solve(
            field, state, coordinates.variable(sde, start), coordinates.variable(sde, sde.t_max)
        )
        latent = solution.x[:, :dims].reshape(shape) * scales[1]
        log_prior = (prior_log_prob or sde.prior_log_prob)(latent)
    volume = dims * (math.log(scales[1]) - math.log(scales[0]))
    failed = torch.zeros(shape[0], dtype=torch.bool, device=x.device)
    return Likelihood(
        log_prob=log_prior + solution.x[:, dims] + volume,
        nfe=int(solution.evaluations.max()),
        nfe_per_sample=solution.evaluations,
        latent=latent,
        failed=failed if solution.failed is None else solution.failed,
    )


def bits_per_dim(log_prob: Tensor, num_dims: int, levels: int = 256) -> Tensor:
    """Bits per dimension of grey-level data from the log-density of the data scaled to [-1, 1].

    ``-log_prob / (D log 2) + log2(levels / 2)``: each grey level is a cell of width ``2 / levels``, so with
    uniform dequantization this bounds the code length of the discrete data from above (Theis et al. 2016,
    section 3.1).

    Args:
        log_prob: in nats, any shape, of data ``2 (k + u) / levels - 1`` with ``k`` in 0..levels-1 and ``u``
            in [0, 1).
        num_dims: D.
        levels: the number of grey levels.
    """
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
    if not isinstance(num_dims, int) or num_dims < 1:
        raise ValueError(f"num_dims must be an integer >= 1, got {num_dims!r}")
    return -log_prob / (num_dims * math.log(2)) + math.log2(levels / 2)


def dequantization_noise(
    shape: torch.Size | tuple[int, ...],
    *,
    seed: int = 0,
    first_index: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise on [0, 1) for dequantization, (B, *D): that of an image depends on ``(seed, draw,
    first_index + i)`` only."""
    rows = range(first_index, first_index + shape[0])
    noise = SampleNoise(seed, rows, shape[1:], dtype=dtype, device=device, stream=DEQUANTIZATION)
    noise.draws = draw
    return noise.uniform()
