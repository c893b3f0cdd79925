"""The builders of :mod:`sde_diffusion.build`, a file for each block of a config."""
