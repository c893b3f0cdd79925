"""Handwritten digits, a noise-predicting network fine-tuned for likelihood.

python -m sde_diffusion.run --mode train --config configs/digits_likelihood.py:first
python -m sde_diffusion.run --mode train --config configs/digits_likelihood.py
"""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config
from sde_diffusion.errors import unknown_name

VARIANTS = ("finetune", "first")


def get_config(variant: str = "finetune") -> ConfigDict:
    """``first`` trains with the simple weighting and uniform times (Ho et al. 2020); ``finetune`` goes on from it
    with the likelihood weighting and times drawn by its density (Song, Durkan, Murray, Ermon 2021)."""
    if variant not in VARIANTS:
        raise unknown_name("variant of this config", variant, VARIANTS)
    config = default_config()
    config.model.parametrization = "noise"
    if variant == "first":
        config.training.weighting = "simple"
        config.training.time_sampler = "uniform"
        config.training.steps = 800
    else:
        config.training.init_from = "runs/digits_likelihood_first"
        config.training.steps = 400
        config.training.learning_rate = 1e-3
        config.training.warmup_steps = 20
    return config
