"""Handwritten digits with the VE SDE, the continuous limit of SMLD."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The default with another SDE."""
    config = default_config()
    config.sde.name = "ve"
    return config
