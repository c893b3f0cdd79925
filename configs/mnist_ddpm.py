"""DDPM on MNIST, from a folder with its four IDX files: ``configs/mnist_ddpm.py:NAME`` (linear, cosine, or
learned_variance) and ``--config.data.path=FOLDER``."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config
from sde_diffusion.errors import unknown_name

VARIANTS = ("linear", "cosine", "learned_variance")


def get_config(variant: str = "linear") -> ConfigDict:
    """The chain of ``configs/digits_ddpm.py`` with a wider U-Net; for a GPU, or patience."""
    if variant not in VARIANTS:
        raise unknown_name("variant of this config", variant, VARIANTS)
    config = default_config()
    config.data.name = "idx"
    config.sde.name = "ddpm"
    config.sde.schedule = "linear" if variant == "linear" else "cosine"
    config.model.parametrization = "noise"
    config.model.learned_variance = variant == "learned_variance"
    config.model.channels = 64
    config.model.channel_multipliers = (1, 2, 2)
    config.model.attention_levels = (1, 2)
    config.training.objective = "hybrid" if variant == "learned_variance" else "simple"
    config.training.dequantize = False
    config.training.steps = 20_000
    config.training.learning_rate = 5e-4
    config.training.ema_decay = 0.9995
    config.training.eval_every = config.training.checkpoint_every = 1000
    config.sampling.predictor = "learned_variance" if variant == "learned_variance" else "ancestral"
    config.sampling.corrector = "none"
    config.sampling.steps = config.sde.steps - 1  # and the last, to the data, is the final denoising
    config.bound.test_images = 500
    config.bound.subset = 200
    config.bound.clip = True
    # A density of dequantized images is not what a model of the levels themselves has.
    config.report.likelihood = False
    return config
