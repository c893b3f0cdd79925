"""Overdamped Langevin steps without acceptance: by Song's rule, annealed, and SGLD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sde_diffusion.correctors.protocol import Advance, Kernel, SizeOf, check_steps
from sde_diffusion.correctors.step_sizes import SNR, Decaying, SigmaScaled, StepSize
from sde_diffusion.noise import NoiseSource
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand


def langevin_step(x: Tensor, gradient: Tensor, noise: Tensor, eta: Tensor) -> Tensor:
    """``x + eta gradient + sqrt(2 eta) noise``, with ``eta`` of shape () or (B,)."""
    return x + expand(eta, x) * gradient + expand((2 * eta).sqrt(), x) * noise


class _Overdamped(Kernel):
    """``x <- x + eta score(x, t) + sqrt(2 eta) z``: bias of order ``eta`` in the stationary law."""

    def advance(
        self, sde: SDE, score: Score, x: Tensor, t: Tensor, draw: NoiseSource, size: SizeOf, memory: Any
    ) -> Advance:
        """One step, one evaluation."""
        noise, gradient = draw(), score(x, t)
        eta = size(gradient, noise)
        return Advance(langevin_step(x, gradient, noise, eta), eta, gradient, noise)


@dataclass(frozen=True)
class SGLD(_Overdamped):
    """``x <- x + eta score + sqrt(2 eta) z`` with any step size: stochastic gradient Langevin dynamics.

    (Welling and Teh 2011, with ``eta`` for their ``epsilon / 2``.) The unadjusted Langevin algorithm where
    the score is exact; with a score of a random subset, such as
    :class:`~sde_diffusion.minibatch.MinibatchScore`, what the name says. The bias is of order ``eta``: for a
    Gaussian of variance ``v`` the stationary variance is ``v / (1 - eta / (2 v))``.

    Args:
        step_size: ``SigmaScaled`` (default), ``Fixed``, ``Decaying``, ...
        steps: how often the step is applied at each time.
    """

    step_size: StepSize = field(default_factory=lambda: SigmaScaled(0.05))
    steps: int = 1

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_without_acceptance(self, self.step_size)

    @classmethod
    def decaying(
        cls, ratio: float = 0.1, *, power: float = 0.55, offset: float = 10.0, steps: int = 1
    ) -> SGLD:
        """Steps of ``ratio variance(t) (1 + k / offset)^-power``."""
        return cls(Decaying(SigmaScaled(ratio), power, offset), steps)


@dataclass(frozen=True)
class Langevin(_Overdamped):
    """Langevin steps whose size follows the signal-to-noise rule, ``eta = 2 (snr ||z|| / ||score||)^2``.

    (Song et al. 2021, algorithms 4 and 5.) Three departures from the original, all undone by
    :meth:`original`:

    * The norms are those of one sample. The authors' code averages them over the batch (``norm="batch"``),
      which makes a sample depend on its batch-mates.
    * The norms are shrunk towards those of pure noise, as if the data had ``shrinkage`` more dimensions in
      which the score is all noise, ``-z / sigma``:  ``eta = 2 snr^2 variance (||z||^2 + k) / (variance
      ||score||^2 + k)``. A step size that depends on the state bends the stationary density from ``p``
      towards ``p / eta``. For images the norms hardly vary and nothing changes; in few dimensions the plain
      rule empties the modes, where ``||score||`` goes to 0 and ``eta`` grows without bound.
    * ``eta <= cap * variance(t)``, beyond which an unadjusted step is no longer a small one.

    The authors' factor ``alpha_i = 1 - beta_i`` for VP belongs to a chain of given length, and is 1 in
    continuous time. Where the score is 0, see :class:`~sde_diffusion.correctors.step_sizes.SNR`.

    Args:
        snr: the signal-to-noise ratio of a step.
        steps: how often the step is applied at each time.
        norm: ``"sample"`` or ``"batch"``.
        shrinkage: the number ``k`` of dimensions above; 0 for the plain rule.
        cap: the largest step in units of ``variance(t)``, or None.
    """

    snr: float = 0.16
    steps: int = 1
    norm: str = "sample"
    shrinkage: float = 256.0
    cap: float | None = 1.0

    def __post_init__(self) -> None:
        check_steps(self.steps)
        _ = self.policy  # which says what is wrong

    @classmethod
    def original(cls, snr: float = 0.16, steps: int = 1) -> Langevin:
        """The rule of the authors' code: norms averaged over the batch, neither shrunk nor capped."""
        return cls(snr, steps, norm="batch", shrinkage=0.0, cap=None)

    @property
    def policy(self) -> SNR:
        """The rule."""
        return SNR(self.snr, self.norm, self.shrinkage, self.cap)

    def step_size(self, sde: SDE, gradient: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``eta`` of each sample, (B,)."""
        return self.policy.size(sde, t, gradient, noise)


@dataclass(frozen=True)
class AnnealedLangevin(_Overdamped):
    """Langevin steps of size ``eta = 2 snr^2 variance(t)``, annealed with the noise level (ALD).

    Song and Ermon (2019), algorithm 1; as in Song et al. (2021), appendix G, the step is set by the
    signal-to-noise ratio. It is the same for every sample and depends on no norm.
    """

    snr: float = 0.16
    steps: int = 1

    def __post_init__(self) -> None:
        check_steps(self.steps)
        SNR(self.snr)  # which says what is wrong

    @property
    def policy(self) -> SigmaScaled:
        """The rule."""
        return SigmaScaled(2 * self.snr**2)

    def step_size(self, sde: SDE, t: Tensor) -> Tensor:
        """``eta = 2 snr^2 variance(t)``, of the shape of ``t``."""
        return 2 * self.snr**2 * sde.variance(t)


def check_without_acceptance(kernel: Kernel, policy: StepSize) -> None:
    """A clear error for a step size that adapts to an acceptance there is not."""
    if policy.needs_acceptance:
        raise ValueError(
            f"{type(kernel).__name__} accepts every step: a step size cannot adapt to its acceptance; use "
            "DualAveraging(of='displacement', target=...)"
        )
