"""Pictures of samples, training and likelihoods, written as PNG files (or whatever the path's suffix names).

Images are (N, C, H, W) in [-1, 1] with one channel (grey) or three (RGB); what overshoots is clipped. Figures
are drawn on their own ``matplotlib.figure.Figure``: no window, no backend switched, no global state, the same
bytes every time. Folders are made as needed, and every function returns the path it wrote.
"""

from sde_diffusion.pictures.curves import save_bits_per_dim_histogram, save_curves, save_histogram
from sde_diffusion.pictures.images import (
    image_grid,
    save_best_and_worst,
    save_image_grid,
    save_neighbours,
    save_trajectory_strip,
)
from sde_diffusion.pictures.points import save_scatter_2d, save_trajectory_2d

__all__ = [
    "image_grid",
    "save_best_and_worst",
    "save_bits_per_dim_histogram",
    "save_curves",
    "save_histogram",
    "save_image_grid",
    "save_neighbours",
    "save_scatter_2d",
    "save_trajectory_2d",
    "save_trajectory_strip",
]
