"""From a config to objects: the one place where each name becomes an object and each value is checked.

Every function takes the whole config, reads its own block, and is pure. What is wrong with a value is raised
as a :class:`~sde_diffusion.config.UsageError` that names the block and the value. The functions are in
:mod:`sde_diffusion.builders`.
"""

from __future__ import annotations

from sde_diffusion.builders.data import DataInfo, augmentation, dataset
from sde_diffusion.builders.dequantize import dequantization_flow, dequantization_training
from sde_diffusion.builders.evaluation import (
    VARIATIONAL,
    BoundSettings,
    LikelihoodSettings,
    bound,
    likelihood,
    reverse_variance,
)
from sde_diffusion.builders.model import LEVELS, NETWORKS, SDES, network, score_model, sde
from sde_diffusion.builders.sampling import (
    GRIDS,
    PREDICTORS,
    ODESampler,
    PCSampler,
    correctors,
    predictor,
    sampler,
    solver,
    times,
)
from sde_diffusion.builders.shared import device, network_precision, positive
from sde_diffusion.builders.training import training_settings
from sde_diffusion.config import UsageError

__all__ = [
    "GRIDS",
    "LEVELS",
    "NETWORKS",
    "PREDICTORS",
    "SDES",
    "VARIATIONAL",
    "BoundSettings",
    "DataInfo",
    "LikelihoodSettings",
    "ODESampler",
    "PCSampler",
    "UsageError",
    "augmentation",
    "bound",
    "correctors",
    "dataset",
    "dequantization_flow",
    "dequantization_training",
    "device",
    "likelihood",
    "network",
    "network_precision",
    "positive",
    "predictor",
    "reverse_variance",
    "sampler",
    "score_model",
    "sde",
    "solver",
    "times",
    "training_settings",
]
