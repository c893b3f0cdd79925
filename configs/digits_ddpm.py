"""DDPM on handwritten digits; ``configs/digits_ddpm.py:NAME``: linear, cosine, or learned_variance."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config
from sde_diffusion.errors import unknown_name

VARIANTS = ("linear", "cosine", "learned_variance")


def get_config(variant: str = "linear") -> ConfigDict:
    """A chain of 1000 steps on the 17 grey levels themselves, and ancestral sampling.

    ``linear`` and ``cosine`` are Ho et al. (2020) and the schedule of Nichol & Dhariwal (2021), with L_simple and
    fixed variances; ``learned_variance`` is the latter's hybrid objective on the cosine schedule. Evaluate with
    ``--mode bound``.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant of this config", variant, VARIANTS)
    config = default_config()
    config.sde.name = "ddpm"
    config.sde.schedule = "linear" if variant == "linear" else "cosine"
    config.model.parametrization = "noise"
    config.model.blocks_per_level = 2
    config.model.learned_variance = variant == "learned_variance"
    config.training.objective = "hybrid" if variant == "learned_variance" else "simple"
    config.training.dequantize = False
    config.sampling.predictor = "learned_variance" if variant == "learned_variance" else "ancestral"
    config.sampling.corrector = "none"
    config.sampling.steps = config.sde.steps - 1  # and the last, to the data, is the final denoising
    config.bound.clip = True
    # A density of dequantized images is not what a model of the levels themselves has.
    config.report.likelihood = False
    return config
