"""Step sizes ``eta`` of Langevin-like chains: separate objects, which any corrector takes.

A step of size ``eta`` moves by ``eta score`` and adds noise of variance ``2 eta``. Each policy has

* ``size(sde, t, gradient, noise, memory) -> eta``, () or (B,): never a function of other samples, unless asked
  for by name;
* ``learn(sde, outcome, memory) -> memory`` after every step, None for policies that do not;
* ``follows_state``: whether ``eta`` depends on where the chain is, which an exact acceptance does not allow;
* ``needs_acceptance``: whether it can only serve a chain that accepts and rejects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, squared_norm


@dataclass(frozen=True)
class Outcome:
    """What came of a step: from ``before`` to ``after`` at time ``t``, accepted with probability ``acceptance``."""

    t: Tensor
    before: Tensor
    after: Tensor
    acceptance: Tensor | None


class StepSize(Protocol):
    """Chooses the step size of a chain; see the module."""

    @property
    def follows_state(self) -> bool:
        """Whether ``eta`` depends on the state."""
        ...

    @property
    def needs_acceptance(self) -> bool:
        """Whether the chain must have an acceptance."""
        ...

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: Any) -> Tensor:
        """``eta``, () or (B,)."""
        ...

    def learn(self, sde: SDE, outcome: Outcome, memory: Any) -> Any:
        """The memory after a step."""
        ...


class _Forgetful:
    """A policy that learns nothing and looks at no state."""

    follows_state = False
    needs_acceptance = False

    def learn(self, sde: SDE, outcome: Outcome, memory: Any) -> Any:
        """Nothing."""
        return None


def check_positive(name: str, value: float) -> None:
    """A clear error for a number that is not positive and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive, got {value!r}")


@dataclass(frozen=True)
class Fixed(_Forgetful):
    """``eta``, the same at all times, in squared units of the state."""

    eta: float

    def __post_init__(self) -> None:
        check_positive("the step size", self.eta)

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: Any) -> Tensor:
        """``eta``, ()."""
        return torch.tensor(self.eta, dtype=torch.float64)


@dataclass(frozen=True)
class SigmaScaled(_Forgetful):
    """``eta = ratio variance(t)``: the step in units of the smallest variance that ``p_t`` can have in a direction.

    ``ratio = 2 snr^2`` is annealed Langevin dynamics (Song and Ermon 2019, algorithm 1, as parametrised by
    Song et al. 2021). An unadjusted step is stable for ratios below 2, and small for ratios far below 1.
    """

    ratio: float

    def __post_init__(self) -> None:
        check_positive("the ratio of the step size to the variance of the noise", self.ratio)

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: Any) -> Tensor:
        """``ratio variance(t)``, of the shape of ``t``."""
        return self.ratio * sde.variance(t)


@dataclass(frozen=True)
class SNR(_Forgetful):
    """``eta = 2 snr^2 (||z||^2 + k) variance / (variance ||score||^2 + k)``: a signal-to-noise ratio of ``snr``.

    Song et al. (2021), algorithms 4 and 5, for ``k = 0``; see
    :class:`~sde_diffusion.correctors.langevin.Langevin` for what ``shrinkage = k`` is about.

    Args:
        snr: the ratio of signal to noise in a step.
        norm: ``"sample"``: the norms are those of one sample. ``"batch"``: they are averaged over the
            batch, as in the authors' code, so that a sample depends on its batch-mates.
        shrinkage: the number ``k`` of further dimensions in which the score is all noise; 0 for the plain rule.
        cap: the largest step in units of ``variance(t)``, or None. Without a cap the plain rule has no answer where
            the score vanishes; the step is then ``2 snr^2 variance``, which it gives for a score that is all noise.
    """

    snr: float = 0.16
    norm: str = "sample"
    shrinkage: float = 256.0
    cap: float | None = 1.0

    follows_state = True

    def __post_init__(self) -> None:
        if isinstance(self.snr, bool) or not 0 < self.snr < math.inf:
            raise ValueError(f"the signal-to-noise ratio must be positive, got {self.snr!r}")
        if self.norm not in ("sample", "batch"):
            raise unknown_name("norm", self.norm, ("sample", "batch"))
        if not 0 <= self.shrinkage < math.inf:
            raise ValueError(f"the shrinkage must be at least 0, got {self.shrinkage!r}")
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"the cap must be positive, or None for no cap, got {self.cap!r}")

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: Any = None) -> Tensor:
        """``eta`` of each sample, (B,)."""
        signal, disturbance = squared_norm(gradient), squared_norm(noise)
        if self.norm == "batch":
            signal = signal.sqrt().mean().square().expand_as(signal)
            disturbance = disturbance.sqrt().mean().square().expand_as(disturbance)
        variance = sde.variance(batched_time(t, gradient)).to(signal.dtype)
        eta = 2 * self.snr**2 * (disturbance + self.shrinkage) / (signal + self.shrinkage / variance)
        if self.cap is not None:
            return torch.minimum(eta, self.cap * variance)
        return torch.where(torch.isfinite(eta), eta, 2 * self.snr**2 * variance)


@dataclass(frozen=True)
class Decaying:
    """``eta_k = base (1 + k / offset)^-power`` after ``k`` steps at the same time: the decay of SGLD.

    With ``1/2 < power <= 1`` the steps sum to infinity and their squares do not, which is what makes stochastic
    gradients, and the bias of a finite step, vanish in the end (Welling and Teh 2011, eq. 2). Counting begins anew at
    every time of the grid.

    Args:
        base: the policy of the first step.
        power: in (1/2, 1].
        offset: after so many steps the decay sets in.
    """

    base: StepSize = field(default_factory=lambda: SigmaScaled(0.1))
    power: float = 0.55
    offset: float = 10.0

    def __post_init__(self) -> None:
        if not 0.5 < self.power <= 1:
            raise ValueError(f"the power of the decay must lie in (1/2, 1], got {self.power!r}")
        check_positive("the offset of the decay", self.offset)

    @property
    def follows_state(self) -> bool:
        """As its base."""
        return self.base.follows_state

    @property
    def needs_acceptance(self) -> bool:
        """As its base."""
        return self.base.needs_acceptance

    def _count(self, t: Tensor, memory: Any) -> tuple[int, Any]:
        """How many steps there were at this time, and what the base remembers."""
        if memory is None:
            return 0, None
        last, count, base = memory
        return (count if last is t or torch.equal(last, t) else 0), base

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: Any) -> Tensor:
        """The base's, made smaller."""
        count, base = self._count(t, memory)
        return self.base.size(sde, t, gradient, noise, base) * (1 + count / self.offset) ** -self.power

    def learn(self, sde: SDE, outcome: Outcome, memory: Any) -> Any:
        """``(t, count, memory of the base)``."""
        count, base = self._count(outcome.t, memory)
        return outcome.t, count + 1, self.base.learn(sde, outcome, base)


@dataclass(frozen=True)
class _Averages:
    """The memory of dual averaging, each (B,): steps, mean error, log step in use, averaged log step."""

    count: int
    error: Tensor
    log_ratio: Tensor
    averaged: Tensor


@dataclass(frozen=True)
class DualAveraging:
    """``eta = ratio variance(t)`` with a ratio for each sample that is learned, by dual averaging.

    After step ``m`` with the error ``H_m``: ``log ratio = mu - sqrt(m) / gamma  mean_{t0}(H)`` (Nesterov
    2009; Hoffman and Gelman 2014, eq. 6 and section 3.2). The error is ``target - acceptance``, or for a
    target displacement ``clip(displacement / target - 1, -1, 1)`` with the displacement ``||x' - x|| / (sigma
    sqrt(D))``. A chain that adapts for ever is not quite a Markov chain; after ``adapt`` steps the averaged
    ratio is kept.

    Args:
        target: of the mean acceptance, in (0, 1) (0.574 is best for MALA in many dimensions, Roberts and Rosenthal
            1998), or of the displacement.
        of: ``"acceptance"`` or ``"displacement"``.
        initial: the first ratio; ``mu = log(10 initial)`` draws towards larger ones.
        adapt: the number of steps that adapt.
        largest: the largest ratio.
        gamma, offset, power: of the method; its authors' values.
    """

    target: float = 0.574
    of: str = "acceptance"
    initial: float = 0.1
    adapt: int = 100
    largest: float = 10.0
    gamma: float = 0.05
    offset: float = 10.0
    power: float = 0.75

    follows_state = False

    def __post_init__(self) -> None:
        if self.of not in ("acceptance", "displacement"):
            raise unknown_name("target of the step size", self.of, ("acceptance", "displacement"))
        check_positive("the target", self.target)
        if self.of == "acceptance" and self.target >= 1:
            raise ValueError(f"the target acceptance must lie in (0, 1), got {self.target!r}")
        check_positive("the first ratio", self.initial)
        check_positive("the largest ratio", self.largest)
        check_positive("gamma", self.gamma)
        if isinstance(self.adapt, bool) or not isinstance(self.adapt, int) or self.adapt < 1:
            raise ValueError(f"the number of adapting steps must be an integer >= 1, got {self.adapt!r}")

    @property
    def needs_acceptance(self) -> bool:
        """Whether acceptance is what it adapts to."""
        return self.of == "acceptance"

    def size(self, sde: SDE, t: Tensor, gradient: Tensor, noise: Tensor, memory: _Averages | None) -> Tensor:
        """``ratio variance(t)``, (B,) or, before anything is learned, of the shape of ``t``."""
        variance = sde.variance(t)
        if memory is None:
            return self.initial * variance
        log_ratio = memory.log_ratio if memory.count < self.adapt else memory.averaged
        return log_ratio.exp().to(variance.device) * variance

    def learn(self, sde: SDE, outcome: Outcome, memory: _Averages | None) -> _Averages:
        """One step of the method."""
        if memory is None:
            start = torch.full_like(outcome.before.flatten(1)[:, 0], math.log(self.initial)).double()
            memory = _Averages(0, torch.zeros_like(start), start, start)
        if memory.count >= self.adapt:
            return memory
        count = memory.count + 1
        weight = 1 / (count + self.offset)
        error = (1 - weight) * memory.error + weight * self._error(sde, outcome).double()
        log_ratio = math.log(10 * self.initial) - math.sqrt(count) / self.gamma * error
        log_ratio = log_ratio.clamp(math.log(1e-6), math.log(self.largest))
        share = count**-self.power
        averaged = share * log_ratio + (1 - share) * memory.averaged
        return _Averages(count, error, log_ratio, averaged)

    def _error(self, sde: SDE, outcome: Outcome) -> Tensor:
        if self.of == "acceptance":
            assert outcome.acceptance is not None
            return self.target - outcome.acceptance
        x = outcome.before
        variance = sde.variance(batched_time(outcome.t, x)).to(x.dtype)
        moved = (squared_norm(outcome.after - x) / (variance * x[0].numel())).sqrt()
        return (moved / self.target - 1).clamp(-1, 1)
