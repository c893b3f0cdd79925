"""MNIST from its four IDX files: add ``--config.data.path=FOLDER``. Training takes an hour on two cores with AMX."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """Three resolutions, 28, 14 and 7 pixels, with attention at the last; levels seen sharply and counted; Muon."""
    config = default_config()
    config.data.name = "idx"
    # The noise at t_min must be small against a grey level, which is 1/15 as wide as one of the digits.
    config.sde.t_min = 1e-7
    config.model.dropout = 0.0
    config.model.level_features = config.model.level_counts = True
    config.model.channels = 48
    config.model.channel_multipliers = (1, 2, 2)
    config.training.batch_size = 64
    config.training.steps = 4200
    config.training.optimizer = "muon"
    config.training.learning_rate = 0.01
    # More of the times where the loss can still fall, between noise of a level and of the range.
    config.training.time_sampler = "log_normal"
    config.training.log_normal_mean = -1.75
    config.training.log_normal_std = 2.5
    config.training.eval_size = 1000
    config.training.eval_every = config.training.checkpoint_every = 500
    config.likelihood.test_images = 1000
    config.likelihood.train_images = 1000
    return config
