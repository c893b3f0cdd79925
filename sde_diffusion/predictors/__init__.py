"""Predictors: steps of the reverse process between two times, for the loop of :mod:`sde_diffusion.sampling`."""

from sde_diffusion.predictors.one_step import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LearnedVariance,
    ReverseDiffusion,
)
from sde_diffusion.predictors.protocol import Predictor, StartsRuns, is_stochastic, start_run
