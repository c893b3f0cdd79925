"""Data sets in memory, their grey levels, and the deterministic order in which training visits them."""

from __future__ import annotations

from sde_diffusion.data.augment import Augmentation
from sde_diffusion.data.catalog import LOADERS, load_dataset
from sde_diffusion.data.dataset import DataSet, Density
from sde_diffusion.data.levels import from_model, rescale, to_model
from sde_diffusion.data.order import Batch, Batches, epoch_order, held_out

__all__ = [
    "LOADERS",
    "Augmentation",
    "Batch",
    "Batches",
    "DataSet",
    "Density",
    "epoch_order",
    "from_model",
    "held_out",
    "load_dataset",
    "rescale",
    "to_model",
]
