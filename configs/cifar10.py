"""CIFAR-10 from its own archive: add ``--config.data.path=cifar-10-python.tar.gz``."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The network of Ho et al. (2020) in size: 32, 16, 8 and 4 pixels, attention at 16; for a GPU."""
    config = default_config()
    config.data.name = "cifar10"
    config.data.flip = True
    config.model.parametrization = "noise"
    config.model.dropout = 0.1
    config.model.sigma_data = 0.5
    config.model.channels = 128
    config.model.blocks_per_level = 2
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.attention_levels = (1,)
    config.training.steps = 200_000
    config.training.learning_rate = 2e-4
    config.training.warmup_steps = 5000
    config.training.ema_decay = 0.9999
    config.training.log_every = 200
    config.training.eval_every = config.training.checkpoint_every = 5000
    config.likelihood.test_images = 500
    return config
