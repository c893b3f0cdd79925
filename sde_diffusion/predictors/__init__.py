"""Predictors: steps of the reverse process between two times, for the loop of :mod:`sde_diffusion.sampling`."""

from sde_diffusion.predictors.adaptive import AdaptiveSDE
from sde_diffusion.predictors.deis import DEIS, IPNDM
from sde_diffusion.predictors.dpm_solver import DPMSolverPP
from sde_diffusion.predictors.flow import FlowSolver
from sde_diffusion.predictors.one_step import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LearnedVariance,
    ReverseDiffusion,
)
from sde_diffusion.predictors.protocol import Predictor, StartsRuns, is_stochastic, start_run
from sde_diffusion.predictors.restart import Restart, RestartInterval
from sde_diffusion.predictors.runge_kutta import RK4, EDMHeun
from sde_diffusion.predictors.stochastic import SASolver, SDEDPMSolverPP
from sde_diffusion.predictors.torch_sde import TorchSDE
from sde_diffusion.predictors.unipc import UniPC
