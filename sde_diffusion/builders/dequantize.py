"""The dequantization flow of a config, and how it is trained for a model."""

from __future__ import annotations

from typing import Any

import torch
from ml_collections import ConfigDict

from sde_diffusion.builders.data import DataInfo
from sde_diffusion.builders.shared import block_errors, positive
from sde_diffusion.config import UsageError
from sde_diffusion.dequantization_loss import CellTime, DequantizationLoss
from sde_diffusion.losses import SimpleWeighting
from sde_diffusion.networks.dequantization_flow import DequantizationFlow
from sde_diffusion.score import ScoreModel
from sde_diffusion.training_settings import TrainingSettings

__all__ = ["dequantization_flow", "dequantization_training"]

_FLOW = ("layers", "channels", "blocks", "bins")


def dequantization_flow(config: ConfigDict, info: DataInfo) -> DequantizationFlow:
    """A new flow, which is uniform; the global random state is left as it was.

    Raises:
        UsageError: the data are vectors, or a size of the flow is wrong.
    """
    if info.levels is None:
        raise UsageError(f"dequantization is for images, and data set {info.name!r} has vectors")
    sizes = {key: positive(config, f"dequantize.{key}") for key in _FLOW}
    with block_errors("dequantize"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DequantizationFlow(info.shape, info.levels, **sizes)


def dequantization_training(config: ConfigDict, model: ScoreModel, levels: int) -> TrainingSettings:
    """How the flow is trained for a model."""
    low, high = model.data_range
    times = CellTime((high - low) / levels)
    block: dict[str, Any] = {k: v for k, v in config.dequantize.items() if k not in _FLOW}
    with block_errors("dequantize"):
        return TrainingSettings(
            **block,
            loss=DequantizationLoss(model, levels, times, (low, high)),
            weighting=SimpleWeighting(),
            time_sampler=times,
            density_correction=False,  # the loss has the weights of the times
            ema_decay=0.99,
            gradient_clip=1.0,
            conditional=config.model.class_conditional,
            precision="float32",
            seed=config.seed,
            device=config.device,
        )
