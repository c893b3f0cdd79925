"""Correctors by name, all with the same dial: the step size in units of the noise, ``eta = ratio variance(t)``."""

from __future__ import annotations

import math
from collections.abc import Callable

from sde_diffusion.correctors.langevin import SGLD, AnnealedLangevin, Langevin
from sde_diffusion.correctors.metropolis import MALA, Barker
from sde_diffusion.correctors.preconditioned import PreconditionedSGLD
from sde_diffusion.correctors.protocol import Kernel
from sde_diffusion.correctors.renoise import Renoise
from sde_diffusion.correctors.step_sizes import SigmaScaled
from sde_diffusion.correctors.stiff import ImplicitLangevin, TamedLangevin
from sde_diffusion.correctors.underdamped import SGHMC, Underdamped
from sde_diffusion.errors import unknown_name


def _snr(ratio: float) -> float:
    return math.sqrt(ratio / 2)


CORRECTORS: dict[str, Callable[[float, int], Kernel]] = {
    "langevin": lambda ratio, steps: Langevin(_snr(ratio), steps),
    "langevin_original": lambda ratio, steps: Langevin.original(_snr(ratio), steps),
    "annealed_langevin": lambda ratio, steps: AnnealedLangevin(_snr(ratio), steps),
    "sgld": lambda ratio, steps: SGLD(SigmaScaled(ratio), steps),
    "sgld_decaying": lambda ratio, steps: SGLD.decaying(ratio, steps=steps),
    "psgld": lambda ratio, steps: PreconditionedSGLD(SigmaScaled(ratio), steps),
    "underdamped": lambda ratio, steps: Underdamped(SigmaScaled(ratio), steps),
    "sghmc": lambda ratio, steps: SGHMC(SigmaScaled(ratio), steps),
    "mala": lambda ratio, steps: MALA(SigmaScaled(ratio), steps),
    "barker": lambda ratio, steps: Barker(SigmaScaled(ratio), steps),
    "tamed": lambda ratio, steps: TamedLangevin(SigmaScaled(ratio), steps),
    "implicit": lambda ratio, steps: ImplicitLangevin(SigmaScaled(ratio), steps, iterations=1),
    # The noise of a small step up is of variance drop sigma^2, and a Langevin step's 2 eta.
    "renoise": lambda ratio, steps: Renoise(2 * ratio, steps),
}


def corrector_named(name: str, ratio: float, steps: int = 1) -> Kernel:
    """The corrector of a name with ``eta = ratio variance(t)``, or for Song's rule the signal-to-noise ratio
    ``sqrt(ratio / 2)``, which for a score that is all noise is the same step.

    Raises:
        ValueError: a name that is not one, or a ratio that is not positive.
    """
    if name not in CORRECTORS:
        raise unknown_name("corrector", name, CORRECTORS)
    if not ratio > 0:
        raise ValueError(
            f"the ratio of the step size to the variance of the noise must be positive, got {ratio!r}"
        )
    return CORRECTORS[name](ratio, steps)
