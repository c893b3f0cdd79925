"""The config of a run without ``--config``: handwritten digits, VP. Usable as a config file itself."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config


def get_config() -> ConfigDict:
    """The default config; every key and what it means is in :data:`sde_diffusion.config.SCHEMA`."""
    return default_config()
