"""Correctors: Markov chain steps that leave ``p_t`` nearly invariant, for the loop of :mod:`sde_diffusion.sampling`.

=====================  ===========================================  ============  =====================
corrector              bias of the stationary law                   evaluations   memory
=====================  ===========================================  ============  =====================
Langevin, SGLD, ALD    O(eta)                                       1
PreconditionedSGLD     O(eta) once its averages have settled        1             mean squared score
TamedLangevin          O(eta)                                       1
ImplicitLangevin       O(eta^2) at theta = 1/2, 0 for Gaussians     1 + k
Underdamped (BAOAB)    O(eta), h^2 = 2 eta; 0 for Gaussians         1 (first: 2)  velocity, last score
SGHMC                  O(eta)                                       1             velocity
MALA, Barker           none                                         1 (first: 2)  last score
Renoise                that of its predictor                        predictor's
=====================  ===========================================  ============  =====================
"""

from sde_diffusion.correctors.energy import LogRatio
from sde_diffusion.correctors.langevin import SGLD, AnnealedLangevin, Langevin, langevin_step
from sde_diffusion.correctors.metropolis import MALA, Barker
from sde_diffusion.correctors.names import CORRECTORS, corrector_named
from sde_diffusion.correctors.preconditioned import PreconditionedSGLD
from sde_diffusion.correctors.protocol import (
    Chain,
    Corrector,
    Kernel,
    Memory,
    Recorder,
    Report,
    StartsChains,
    start_chain,
)
from sde_diffusion.correctors.renoise import Renoise
from sde_diffusion.correctors.step_sizes import (
    SNR,
    Decaying,
    DualAveraging,
    Fixed,
    SigmaScaled,
    StepSize,
)
from sde_diffusion.correctors.stiff import ImplicitLangevin, TamedLangevin
from sde_diffusion.correctors.underdamped import SGHMC, Underdamped
