"""Exact log-likelihoods through the probability-flow ODE, and bits per dimension.

With ``dx/dt = v(t, x)``, ``log p_0(x_0) = log p_T(x_T) + int_0^T div v(t, x_t) dt`` (Chen et al. 2018; Song
et al. 2021, eq. 39). The divergence is exact, or estimated by ``z^T (dv/dx) z`` with random ``z``
(Hutchinson 1990; Grathwohl et al. 2019); value and derivative share one evaluation of the network. Nats
inside; bits/dim is a conversion at the edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import DEQUANTIZATION, DIVERGENCE, SampleNoise
from sde_diffusion.ode import DormandPrince, Field, Solver, probability_flow
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

_SAFETY = 0.1


class Divergence(Protocol):
    """The value and divergence of a field from one evaluation."""

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor | None:
        """What stays fixed along the path, such as random probes."""
        ...

    def __call__(self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v(t, x)``, (B, *D), and its divergence, (B,)."""
        ...


def _value_and_vjps(field: Field, t: Tensor, x: Tensor, rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``v(t, x)`` and ``J^T r`` for stacks ``r`` of rows, each (k, B, *D), from one evaluation of the
    field."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = field(t, x)
        products = [
            torch.autograd.grad(value, x, r, retain_graph=i + 1 < len(rows), is_grads_batched=True)[0]
            for i, r in enumerate(rows)
        ]
    return value.detach(), products


@dataclass(frozen=True)
class ExactDivergence:
    """The trace of the Jacobian by D vector-Jacobian products, vectorised in chunks that bound the memory.

    Args:
        chunk: how many products are taken at once; memory grows with ``chunk * B``.
    """

    chunk: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise ValueError(f"chunk must be an integer >= 1, got {self.chunk!r}")

    def prepare(self, x: Tensor, seed: int, first_index: int) -> None:
        """Nothing: the trace is exact."""
        return None

    def __call__(
        self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``v(t, x)`` and ``sum_i d v_i / d x_i``."""
        batch, dims = x.shape[0], x[0].numel()
        basis = torch.eye(dims, dtype=x.dtype, device=x.device)
        rows = [part[:, None].expand(-1, batch, -1).reshape(-1, *x.shape) for part in basis.split(self.chunk)]
        value, products = _value_and_vjps(field, t, x, rows)
        jacobian = torch.cat([p.flatten(2) for p in products])
        return value, jacobian.diagonal(dim1=0, dim2=2).sum(1)


@dataclass(frozen=True)
class HutchinsonDivergence:
    """The unbiased estimate ``mean_k z_k^T J z_k`` with random probes of unit covariance, fixed along the
    path.

    Args:
        probes: how many probes are averaged.
        distribution: ``"rademacher"`` (the least variance among independent entries) or ``"gaussian"``.
    """

    probes: int = 1
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        if not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"probes must be an integer >= 1, got {self.probes!r}")
        if self.distribution not in ("rademacher", "gaussian"):
            raise unknown_name("probe distribution", self.distribution, ("rademacher", "gaussian"))

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor:
        """The probes, (K, B, *D); those of a sample depend on ``(seed, first_index + i)`` only."""
        rows = range(first_index, first_index + x.shape[0])
        noise = SampleNoise(seed, rows, x.shape[1:], dtype=x.dtype, device=x.device, stream=DIVERGENCE)
        draw = noise.rademacher if self.distribution == "rademacher" else noise.normal
        return torch.stack([draw() for _ in range(self.probes)])

    def __call__(self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v(t, x)`` and ``mean_k z_k^T J z_k``."""
        assert prepared is not None
        value, (products,) = _value_and_vjps(field, t, x, [prepared])
        return value, (products * prepared).flatten(2).sum(2).mean(0)


def make_divergence(name: str, probes: int = 1) -> Divergence:
    """The divergence of a name: ``exact``, ``hutchinson`` (Rademacher probes) or ``gaussian``."""
    if name == "exact":
        return ExactDivergence()
    if name not in ("hutchinson", "gaussian"):
        raise unknown_name("divergence", name, ("exact", "hutchinson", "gaussian"))
    return HutchinsonDivergence(probes, "rademacher" if name == "hutchinson" else "gaussian")


@dataclass(frozen=True)
class Likelihood:
    """The result of :func:`log_likelihood`.

    Attributes:
        log_prob: ``log p(x)`` in nats, (B,).
        nfe: network evaluations of the sample that needed most.
        nfe_per_sample: of each sample, (B,).
        latent: ``x_T``, (B, *D).
    """

    log_prob: Tensor
    nfe: int
    nfe_per_sample: Tensor
    latent: Tensor


def log_likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    divergence: str | Divergence = "exact",
    probes: int = 1,
    solver: Solver | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    seed: int = 0,
    first_index: int = 0,
    prior_log_prob: Callable[[Tensor], Tensor] | None = None,
) -> Likelihood:
    """``log p(x)`` of data ``x`` through the probability-flow ODE from ``t_min`` to ``t_max``.

    The density is that of the flow's start, ``p_{t_min}``, and at ``t_max`` that of the prior ``N(0,
    sigma(t_max)^2 I)``. Both ends differ a little from the data's ``p_0`` and its ``p_T``; where ``p_T`` is
    known, ``prior_log_prob`` takes it.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``, differentiable in ``x``.
        x: (B, *D), float32 or float64; the state is integrated in this type, its log-density in the same ODE.
        divergence: ``"exact"`` (D vector-Jacobian products each evaluation; small D), ``"hutchinson"``
            (Rademacher probes), ``"gaussian"``, or an object of this module.
        probes: random probes averaged by the estimators.
        solver: default :class:`DormandPrince`, whose error control is per sample.
        rtol, atol: the accuracy wanted of the result, relative and in nats; the default solver takes its
            steps ten times tighter, because the errors of its steps add up.
        seed, first_index: the probes of sample ``i`` depend on ``(seed, first_index + i)`` only.
        prior_log_prob: ``log p_T`` in nats, (B, *D) -> (B,), instead of the prior's.

    Raises:
        ValueError: data that are not a batch of finite floats.
        SolverError: samples for which the tolerance cannot be met.
    """
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64 of shape (B, *D), got {x.dtype} {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds values that are not finite")
    estimator = make_divergence(divergence, probes) if isinstance(divergence, str) else divergence
    prepared = estimator.prepare(x, seed, first_index)
    flow = probability_flow(sde, score)
    shape, dims = x.shape, x[0].numel()

    def augmented(t: Tensor, state: Tensor) -> Tensor:
        value, trace = estimator(flow, t, state[:, :dims].reshape(shape), prepared)
        return torch.cat([value.flatten(1), trace[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(shape[0], 1)], dim=1)
    with torch.no_grad():
        solution = (solver or DormandPrince(rtol * _SAFETY, atol * _SAFETY)).solve(
            augmented, start, sde.t_min, sde.t_max
        )
    latent = solution.x[:, :dims].reshape(shape)
    log_prior = (prior_log_prob or sde.prior_log_prob)(latent)
    return Likelihood(
        log_prob=log_prior + solution.x[:, dims],
        nfe=int(solution.evaluations.max()),
        nfe_per_sample=solution.evaluations,
        latent=latent,
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
