"""MNIST from a folder with its four IDX files: add ``--config.data.path=FOLDER``. Hours on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The default model of grey levels on three resolutions, 28, 14 and 7 pixels, with attention at the last."""
    config = default_config()
    config.data.name = "idx"
    # The noise at t_min must be small against a grey level, which is 1/15 as wide as one of the digits.
    config.sde.t_min = 1e-7
    config.model.dropout = 0.0
    config.model.channel_multipliers = (1, 2, 2)
    config.model.blocks_per_level = 1
    config.training.batch_size = 64
    config.training.steps = 6000
    config.training.eval_size = 1000
    config.training.eval_every = config.training.checkpoint_every = 500
    config.likelihood.test_images = 1000
    config.likelihood.train_images = 1000
    return config
