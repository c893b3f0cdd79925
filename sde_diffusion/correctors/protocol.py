"""What a corrector is: one step of a Markov chain at a fixed time ``t``, pure in the noise.

A corrector is a frozen dataclass with ``steps`` (how often the sampling loop applies it at each time) and
``step(sde, score, x, t, noise) -> x``; ``x`` and ``noise`` have shape (B, *D), ``t`` shape () or (B,). It may have,
beside that, ``start(sde, draw, record)``, which the sampling loop calls once at the beginning of every run and which
returns the object whose ``step`` the run then calls. That object holds what a chain remembers (a velocity, a
preconditioner, the step size it has learned, the last score) and takes what further noise a step needs from ``draw``;
the corrector itself, which is a configuration, stays as it is and serves any number of runs.

Every corrector of this package is a :class:`Kernel`: it states ``advance``, and gets ``step``, ``start`` and the
reports on what it did from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from sde_diffusion.correctors.step_sizes import Outcome, StepSize
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, squared_norm


class Corrector(Protocol):
    """A Markov chain step at a fixed time."""

    @property
    def steps(self) -> int:
        """How often the step is applied at each time."""
        ...

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state of the chain at time ``t``."""
        ...


@dataclass(frozen=True)
class Report:
    """What one step of a chain did, for each sample.

    Attributes:
        t: the time, (B,).
        step_size: ``eta``, (B,).
        acceptance: the probability with which the proposal was accepted, (B,); None for a chain that accepts all.
        snr: the measured ratio of signal to noise, ``||eta score|| / ||sqrt(2 eta) z||``, (B,).
        displacement: ``||x' - x|| / (sigma(t) sqrt(D))``, (B,).
    """

    t: Tensor
    step_size: Tensor
    acceptance: Tensor | None
    snr: Tensor
    displacement: Tensor


Recorder: TypeAlias = Callable[[Report], None]
"""Takes the report of every step, such as ``reports.append``."""


@runtime_checkable
class StartsChains(Protocol):
    """A corrector whose chains have a memory, need more noise, or report."""

    def start(self, sde: SDE, draw: NoiseSource, record: Recorder | None = None) -> Corrector:
        """The corrector of one run; ``draw()`` gives noise of the shape of the state."""
        ...


def start_chain(
    corrector: Corrector, sde: SDE, draw: NoiseSource, record: Recorder | None = None
) -> Corrector:
    """What the sampling loop steps with: the corrector, or what it starts for one run."""
    return corrector.start(sde, draw, record) if isinstance(corrector, StartsChains) else corrector


@dataclass(frozen=True)
class Memory:
    """What a chain remembers: of its step size, and of itself (both None before the first step)."""

    step_size: Any = None
    chain: Any = None


@dataclass(frozen=True)
class Advance:
    """The next state of a chain, and what is known of the step.

    Attributes:
        x: (B, *D).
        eta: the step size, () or (B,).
        gradient, noise: of the step, (B, *D).
        acceptance: the probability of acceptance, (B,), or None.
        memory: what the chain is to remember.
    """

    x: Tensor
    eta: Tensor
    gradient: Tensor
    noise: Tensor
    acceptance: Tensor | None = None
    memory: Any = None


SizeOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(gradient, noise) -> eta``, () or (B,)."""


class Kernel:
    """The base of the correctors: all but ``advance`` follows from it."""

    steps: int

    @property
    def policy(self) -> StepSize | None:
        """What chooses the step size; None for a chain that has its own."""
        return getattr(self, "step_size", None)

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step from ``x``; ``memory`` is that of the last step, None at the first."""
        raise NotImplementedError

    def move(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, memory: Memory
    ) -> tuple[Advance, Memory]:
        """One step, and what the chain (and its step size) remembers after it."""
        policy = self.policy

        def size(gradient: Tensor, noise: Tensor) -> Tensor:
            assert policy is not None
            return policy.size(sde, t, gradient, noise, memory.step_size)

        done = self.advance(sde, score, x, t, draw, size, memory.chain)
        learned = None
        if policy is not None:
            outcome = Outcome(t, x, done.x, done.acceptance)
            learned = policy.learn(sde, outcome, memory.step_size)
        return done, Memory(learned, done.memory)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state of the chain at time ``t``, as the first step of a chain.

        Where a step needs several draws, ``noise`` is (draws, B, *D).
        """
        return self.move(sde, score, x, t, _given(noise, x, type(self).__name__), Memory())[0].x

    def start(self, sde: SDE, draw: NoiseSource, record: Recorder | None = None) -> Corrector:
        """One chain, with a memory."""
        return Chain(self, draw, record)


@dataclass
class Chain:
    """A run of a kernel, with a report on the first of every ``every`` steps."""

    kernel: Kernel
    draw: NoiseSource
    record: Recorder | None = None
    memory: Memory = field(default_factory=Memory)
    every: int = 1
    taken: int = 0

    @property
    def steps(self) -> int:
        """How often the step is applied at each time."""
        return self.kernel.steps

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The next state; ``noise`` is the first draw of the step."""
        first = [noise]
        done, self.memory = self.kernel.move(
            sde, score, x, t, lambda: first.pop() if first else self.draw(), self.memory
        )
        if self.record is not None and self.taken % self.every == 0:
            self.record(report(sde, x, t, done))
        self.taken += 1
        return done.x


def report(sde: SDE, x: Tensor, t: Tensor, done: Advance) -> Report:
    """The report on a step from ``x``."""
    time = batched_time(t, x)
    eta = done.eta.to(x.device, x.dtype).expand(len(x))
    ratio = squared_norm(done.gradient) / squared_norm(done.noise)
    moved = squared_norm(done.x - x) / (sde.variance(time).to(x.dtype) * x[0].numel())
    return Report(time, eta, done.acceptance, (eta * ratio / 2).sqrt(), moved.sqrt())


def _given(noise: Tensor, x: Tensor, name: str) -> NoiseSource:
    """The draws that are there, then an error."""
    draws: Iterator[Tensor] = iter([noise] if noise.ndim == x.ndim else noise.unbind())

    def draw() -> Tensor:
        z = next(draws, None)
        if z is None:
            raise ValueError(
                f"a step of {name} needs more draws: give it noise of shape (draws, B, *D), or a source by "
                f"start(sde, draw), as sample() does; got noise of shape {tuple(noise.shape)}"
            )
        return z

    return draw


def check_steps(steps: int) -> None:
    """A clear error for a number of steps that makes no sense."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"a corrector needs an integer number of steps >= 1, got {steps!r}")


def uniforms(noise: Tensor) -> Tensor:
    """Uniform numbers on (0, 1) from standard normal ones, elementwise: their distribution function.

    So chance of every kind comes from the one source of noise of a run, and belongs to its sample.
    """
    return torch.special.ndtr(noise.double())
