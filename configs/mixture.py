"""Points in the plane whose density is known; ``configs/mixture.py:NAME`` for another set than gaussians8."""

from __future__ import annotations

from ml_collections import ConfigDict

from sde_diffusion.config import default_config
from sde_diffusion.errors import unknown_name

DATA = ("gaussians8", "gaussians25", "moons", "checkerboard")


def get_config(data: str = "gaussians8") -> ConfigDict:
    """A small network for vectors, and exact divergences."""
    if data not in DATA:
        raise unknown_name("2-D data set", data, DATA)
    config = default_config()
    config.data.name = data
    config.model.name = "mlp"
    config.model.parametrization = "edm"
    config.model.sigma_data = 1.0
    config.model.dropout = 0.0
    # In the plane what matters is the third digit of a coordinate, which bfloat16 does not have.
    config.training.precision = "float32"
    config.training.steps = 4000
    config.training.batch_size = 512
    config.likelihood.divergence = "exact"
    config.likelihood.rtol = config.likelihood.atol = 1e-4
    config.sampling.rtol = config.sampling.atol = 1e-4
    config.likelihood.batch_size = 1000
    config.report.quality_samples = 2000
    return config
