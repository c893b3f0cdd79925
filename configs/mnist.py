"""MNIST, or a set like it, from a folder with its four IDX files: add ``--config.data.path=FOLDER``."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """Three levels, 28, 14 and 7 pixels, with attention at the coarser two; for a GPU, or patience."""
    config = default_config()
    config.data.name = "idx"
    config.model.parametrization = "noise"
    config.model.dropout = 0.1
    config.model.channels = 64
    config.model.channel_multipliers = (1, 2, 2)
    config.model.attention_levels = (1, 2)
    config.training.steps = 20_000
    config.training.learning_rate = 5e-4
    config.training.ema_decay = 0.9995
    config.training.eval_every = config.training.checkpoint_every = 1000
    config.likelihood.test_images = 500
    return config
