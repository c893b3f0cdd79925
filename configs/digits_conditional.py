"""Handwritten digits by class: the network is told the label, and one time in ten that there is none."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The default with labels; ``run.sample(10, y=7)`` draws sevens."""
    config = default_config()
    config.model.class_conditional = True
    config.training.label_dropout = 0.1
    return config
