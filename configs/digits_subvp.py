"""Handwritten digits with the sub-VP SDE."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The default with another SDE."""
    config = default_config()
    config.sde.name = "subvp"
    return config
