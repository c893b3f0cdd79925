"""The probability-flow ODE and its solvers, on the device of the state.

``dx/dt = f(t) x - g(t)^2 score(x, t) / 2`` carries ``p_0`` to ``p_T`` and back (Song et al. 2021, eq. 13).
A solver is a small frozen dataclass with ``solve(field, x, t0, t1)``, in either direction of time;
``field(t, x)`` takes times of shape (B,).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torchdiffeq
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``field(t, x)``: (B,) and (B, *D) -> dx/dt, (B, *D)."""


class SolverError(RuntimeError):
    """A solver could not reach the end of the interval; the message names the samples."""


@dataclass(frozen=True)
class Solution:
    """The state at the end, (B, *D), the evaluations that each sample needed, (B,), and for solvers that do not stop
    at that, which samples did not arrive, (B,); their state is NaN."""

    x: Tensor
    evaluations: Tensor
    failed: Tensor | None = None


@runtime_checkable
class Selectable(Protocol):
    """A field or score that can be had for some samples of the batch alone, so that those that are finished need not
    be computed again and again. One that treats all samples alike returns itself."""

    def rows(self, index: Tensor) -> Any:
        """The same for the samples ``index`` of the whole batch, (b,) integers."""
        ...


@runtime_checkable
class Driven(Protocol):
    """A field some of whose components are driven by the others and drive none, such as the log-density along a
    flow, and are not to be had for nothing."""

    def driving(self, t: Tensor, x: Tensor) -> Tensor:
        """The field of the components that drive; the others are 0."""
        ...


class Solver(Protocol):
    """Integrates a field from ``t0`` to ``t1``."""

    def solve(self, field: Field, x: Tensor, t0: float, t1: float) -> Solution:
        """The state at ``t1`` given the state ``x`` at ``t0``."""
        ...


@dataclass(frozen=True)
class _ProbabilityFlow:
    sde: SDE
    score: Score

    def at(self, t: Tensor) -> Callable[[Tensor], Tensor]:
        """The field at a time, with all that depends on the time alone computed."""
        f, g2 = self.sde.f_and_g2(t)
        return lambda x: expand(f, x) * x - expand(0.5 * g2, x) * self.score(x, t)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.at(t)(x)


def probability_flow(sde: SDE, score: Score) -> Field:
    """The field ``(t, x) -> f(t) x - g(t)^2 score(x, t) / 2`` of the probability-flow ODE."""
    return _ProbabilityFlow(sde, score)


def check_tolerances(rtol: float, atol: float) -> None:
    """Raises ValueError for tolerances that no solver can use."""
    if not 0 < rtol < 1 or not 0 < atol < float("inf"):
        raise ValueError(f"tolerances must be positive, and rtol below 1, got rtol={rtol!r}, atol={atol!r}")


# The Butcher tableau of Dormand and Prince (1980), order 5 with an embedded order 4.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES: tuple[tuple[float, ...], ...] = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True)
class _Flattened:
    """A field over vectors (B, D) from one over (B, *D)."""

    field: Field
    shape: torch.Size

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.field(t, y.unflatten(1, self.shape)).flatten(1)


@dataclass(frozen=True)
class Step:
    """A step that was tried: where it ends, (B,), the states, the field at the end, and the estimate of its error,
    (B, D) each."""

    t: Tensor
    before: Tensor
    after: Tensor
    slope: Tensor
    error: Tensor

    def without_last(self) -> Step:
        """The step of all components but the last."""
        parts = (a[:, :-1] for a in (self.before, self.after, self.slope, self.error))
        return Step(self.t, *parts)


@dataclass(frozen=True)
class DormandPrince:
    """Adaptive Runge-Kutta of order 5(4) with a step size and an error control for each sample.

    A step is accepted where the root mean square of ``error / (atol + rtol max(|x|, |x_new|))`` over that
    sample's elements is at most 1, so a sample's result does not depend on its batch-mates. The batch is
    evaluated together; samples that have arrived leave it where the field is :class:`Selectable`, else they wait.
    Step control and first step after Hairer, Norsett and Wanner (1993), II.4.

    Where ``x`` is differentiated, the result is differentiable with the steps taken as given; memory then grows
    with the number of evaluations.

    Args:
        rtol, atol: the tolerances.
        max_evaluations: per sample; a sample that needs more has failed.
        on_failure: ``"raise"`` :class:`SolverError`, or ``"nan"``: finish the other samples and say which failed.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_evaluations: int = 100_000
    on_failure: str = "raise"

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        if self.on_failure not in ("raise", "nan"):
            raise unknown_name("on_failure", self.on_failure, ("raise", "nan"))

    def _norm(self, error: Tensor, scale: Tensor) -> Tensor:
        return (error / scale).square().mean(1).sqrt()

    def _ratio(self, field: Field, step: Step) -> Tensor:
        """The error of a step over what is allowed, (B,)."""
        scale = self.atol + self.rtol * torch.maximum(step.before.abs(), step.after.abs())
        return self._norm(step.error, scale)

    def _longest(self, field: Field, t: Tensor, span: float) -> Tensor:
        """The longest step that is tried at ``t``, on an interval of length ``span``."""
        return torch.full_like(t, torch.inf)

    @torch.no_grad()
    def _first_step(self, field: Field, x: Tensor, k: Tensor, t: Tensor, span: Tensor) -> tuple[Tensor, int]:
        """The first step to try, (B,), and the evaluations that it took to choose it."""
        scale = self.atol + self.rtol * x.abs()
        d0, d1 = self._norm(x, scale), self._norm(k, scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
        h0 = torch.minimum(h0.double(), span.abs())
        ahead = field(t + span.sign() * h0, x + (span.sign() * h0).to(x.dtype)[:, None] * k)
        d2 = self._norm(ahead - k, scale).double() / h0
        slope = torch.maximum(d1.double(), d2)
        h1 = torch.where(slope <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / slope) ** 0.2)
        # Where the field ahead is not finite, h0 is the start of a search for a step that is.
        h1 = torch.where(torch.isfinite(h1), h1, h0)
        return torch.minimum(torch.minimum(100 * h0, h1), span.abs()), 1

    def solve(self, field: Field, x: Tensor, t0: float, t1: float) -> Solution:
        """The state at ``t1`` given the state ``x`` (B, *D) at ``t0``.

        Raises:
            SolverError: a sample needs more than ``max_evaluations``, or its field is not finite; not with
                ``on_failure="nan"``.
        """
        shape = x.shape
        if t0 == t1:
            return Solution(x, torch.zeros(shape[0], dtype=torch.int64, device=x.device))
        whole = field if len(shape) == 2 else _Flattened(field, shape[1:])
        live, flat = whole, x.flatten(1)
        t = torch.full((shape[0],), t0, dtype=torch.float64, device=x.device)
        end = torch.full_like(t, t1)
        sign = 1.0 if t1 >= t0 else -1.0
        active = torch.ones_like(t, dtype=torch.bool)
        k = live(t, flat)
        failed = ~torch.isfinite(k).all(1)
        if bool(failed.any()):
            if self.on_failure == "raise":
                raise SolverError(f"the field is not finite at the start for samples {_names(failed)}")
            active = ~failed
            k = torch.where(active[:, None], k, torch.zeros_like(k))
        h, needed = self._first_step(live, flat, k, t, end - t)
        evaluations = torch.full_like(t, 1 + needed, dtype=torch.int64)
        rejected = torch.zeros_like(active)
        smallest = 1e-13 * max(abs(t0), abs(t1))
        index = torch.arange(shape[0], device=x.device)
        arrived: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        while bool(active.any()):
            if isinstance(whole, Selectable) and not bool(active.all()):
                done = ~active
                arrived.append((index[done], flat[done], evaluations[done], failed[done]))
                index, flat, evaluations, failed = (a[active] for a in (index, flat, evaluations, failed))
                t, end, k, h, rejected = (a[active] for a in (t, end, k, h, rejected))
                live, active = whole.rows(index), active[active]
            h = torch.minimum(torch.minimum(h, (end - t).abs()), self._longest(live, t, abs(t1 - t0)))
            step = torch.where(active, sign * h, torch.zeros_like(h))
            stages = [k]
            for node, weights in zip(_NODES, _STAGES, strict=True):
                slope = sum(w * s for w, s in zip(weights, stages, strict=True) if w != 0)
                # The last stage is at the end point itself: its state is the new state (first same as last).
                new = flat + step.to(flat.dtype)[:, None] * slope
                # The second stage has no weight in the result; it is there for the stages after it alone.
                evaluate = live.driving if len(stages) == 1 and isinstance(live, Driven) else live
                stages.append(evaluate(t + node * step, new))
            error = sum(w * s for w, s in zip(_ERROR, stages, strict=True) if w != 0)
            with torch.no_grad():
                taken = Step(t + step, flat, new, stages[-1], step.to(flat.dtype)[:, None] * error)
                ratio = self._ratio(live, taken).double()
            accept = (ratio <= 1) & active
            evaluations = evaluations + 6 * active
            factor = (0.9 * ratio.clamp_min(1e-10) ** -0.2).clamp(0.2, 10.0).nan_to_num(0.2)
            # After a rejection a step must not grow at once, or the two would alternate.
            factor = torch.where(rejected & accept, factor.clamp_max(1.0), factor)
            last = h >= (end - t).abs() * (1 - 1e-12)
            t = torch.where(accept, torch.where(last, end, t + step), t)
            flat = torch.where(accept[:, None], new, flat)
            k = torch.where(accept[:, None], stages[-1], k)
            rejected = active & ~accept
            h = torch.where(active, h * factor, h)
            active = active & ~(accept & last)
            stuck = active & ((evaluations + 6 > self.max_evaluations) | (h < smallest))
            if bool(stuck.any()) and self.on_failure == "nan":
                failed, active = failed | stuck, active & ~stuck
            elif bool(stuck.any()):
                raise SolverError(
                    f"samples {_names(stuck, index)} did not reach t = {t1:g} within {self.max_evaluations} "
                    f"evaluations at rtol={self.rtol:g}, atol={self.atol:g} (stopped near t = "
                    f"{float(t[stuck][0]):.4g}); the score there may not be finite, or the tolerance is below the "
                    "rounding of the network"
                )
        arrived.append((index, flat, evaluations, failed))
        index, flat, evaluations, failed = (torch.cat(a) for a in zip(*arrived, strict=True))
        order = index.argsort()
        flat = torch.where(failed[:, None], torch.full_like(flat, torch.nan), flat)
        return Solution(flat[order].reshape(shape), evaluations[order], failed[order])


def _names(mask: Tensor, index: Tensor | None = None, most: int = 10) -> str:
    rows = (mask.nonzero().flatten() if index is None else index[mask]).tolist()
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")


@dataclass(frozen=True, eq=False)
class Heun:
    """Heun's method of order 2 on a fixed grid of times: two evaluations a step.

    ``x' = x + h v(t, x)``, ``x_new = x + h (v(t, x) + v(t + h, x')) / 2``. The grid may run either way; it
    is turned to run from ``t0`` to ``t1``, which must be its ends.

    Raises:
        ValueError: a grid that is no vector of at least 2 rising or falling times, or (by ``solve``) has
            other ends.
    """

    times: Tensor

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times).double()
        if times.ndim != 1 or len(times) < 2:
            raise ValueError(
                f"a time grid must be a vector of at least 2 times, got shape {tuple(times.shape)}"
            )
        if not (bool((times.diff() > 0).all()) or bool((times.diff() < 0).all())):
            raise ValueError("a time grid must rise or fall strictly")
        object.__setattr__(self, "times", times)

    def solve(self, field: Field, x: Tensor, t0: float, t1: float) -> Solution:
        """The state at ``t1`` given the state ``x`` at ``t0``."""
        times = self.times.to(x.device)
        if (float(times[0]) - float(times[-1])) * (t0 - t1) < 0:
            times = times.flip(0)
        if abs(float(times[0]) - t0) > 1e-9 or abs(float(times[-1]) - t1) > 1e-9:
            raise ValueError(
                f"the grid runs from {float(times[0])} to {float(times[-1])}, not from {t0} to {t1}"
            )
        batch = x.shape[0]
        for t, s in itertools.pairwise(times):
            h = expand(s - t, x)
            slope = field(t.expand(batch), x)
            ahead = field(s.expand(batch), x + h * slope)
            x = x + 0.5 * h * (slope + ahead)
        return Solution(x, torch.full((batch,), 2 * (len(times) - 1), device=x.device))


TORCHDIFFEQ_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
# Without explicit_adams, which is unstable there: dx/dt = -x over [0, 1] ends at 0.74 for a step of 0.01.
TORCHDIFFEQ_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")


@dataclass(frozen=True)
class TorchDiffEq:
    """Any method of torchdiffeq, with one step size for the batch.

    The error norm is the largest of the samples' own, so every sample meets the tolerance; but the steps,
    and so the last digits of a sample, depend on its batch-mates. :class:`DormandPrince` does not have that
    dependence.

    Args:
        method: adaptive (dopri5, dopri8, bosh3, fehlberg2, adaptive_heun) or of fixed step (euler, midpoint,
            heun2, heun3, rk4, implicit_adams), as in torchdiffeq.
        rtol, atol: the tolerances of adaptive methods.
        step_size: the step of fixed-step methods; these need it, the others do not take it.

    Raises:
        ValueError: an unknown method, or a step size missing or too many. (torchdiffeq itself would take the
            whole interval in one step, or ignore the step size and go beyond the interval.)
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    step_size: float | None = None

    def __post_init__(self) -> None:
        check_tolerances(self.rtol, self.atol)
        if self.method not in (*TORCHDIFFEQ_ADAPTIVE, *TORCHDIFFEQ_FIXED):
            raise unknown_name("method", self.method, (*TORCHDIFFEQ_ADAPTIVE, *TORCHDIFFEQ_FIXED))
        if self.method in TORCHDIFFEQ_ADAPTIVE and self.step_size is not None:
            raise ValueError(
                f"{self.method} chooses its own steps and takes no step_size, got {self.step_size!r}"
            )
        if self.method in TORCHDIFFEQ_FIXED and not (self.step_size is not None and self.step_size > 0):
            raise ValueError(f"{self.method} needs a step_size > 0, got {self.step_size!r}")

    def solve(self, field: Field, x: Tensor, t0: float, t1: float) -> Solution:
        """The state at ``t1`` given the state ``x`` at ``t0``."""
        evaluations = 0

        def counted(t: Tensor, y: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return field(t.expand(y.shape[0]), y)

        times = torch.tensor([t0, t1], dtype=torch.float64, device=x.device)
        options: dict[str, object]
        if self.step_size is not None:
            options = {"step_size": self.step_size}
        else:
            # torchdiffeq hands flat states to the norm. Left to itself it steps over the end and interpolates,
            # and beyond the ends of the interval there may be no schedule: "step_t" makes it stop there.
            options = {
                "norm": lambda y: y.reshape(x.shape[0], -1).square().mean(1).sqrt().max(),
                "step_t": times[1:],
            }
        path = torchdiffeq.odeint(
            counted, x, times, rtol=self.rtol, atol=self.atol, method=self.method, options=options
        )
        return Solution(path[-1], torch.full((x.shape[0],), evaluations, device=x.device))
