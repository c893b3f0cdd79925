"""The forward process, the network and the score of a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import nn

from sde_diffusion.builders.data import DataInfo, augmentation
from sde_diffusion.builders.shared import accepted, block_errors, named
from sde_diffusion.config import UsageError
from sde_diffusion.ddpm import DDPM
from sde_diffusion.learned_schedule import LearnedSchedule
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.networks import MLP, DiT, UNet
from sde_diffusion.parametrization import NOISE, parametrization
from sde_diffusion.quantized import QuantizedScoreModel, inputs_per_channel, outputs_per_channel
from sde_diffusion.schedules import SCHEDULES
from sde_diffusion.score import ScoreModel, conditioning
from sde_diffusion.sdes import SDE, VE, VP, CosineVP, SubVP

__all__ = ["NETWORKS", "SDES", "network", "score_model", "sde"]

LEVELS = "levels"
"""The parametrization of :class:`~sde_diffusion.quantized.QuantizedScoreModel`, a model of its own."""


def _chain(schedule: str, steps: int) -> DDPM:
    """A chain as a continuous process that ends at its first step, below which no network is trained."""
    return DDPM(named("sde.schedule", schedule, SCHEDULES)(steps), t_min=1 / max(steps, 1))


def _learned(log_snr_max: float, log_snr_min: float) -> LearnedSchedule:
    return LearnedSchedule(log_snr_max=log_snr_max, log_snr_min=log_snr_min)


SDES: dict[str, Callable[..., SDE]] = {
    "vp": VP,
    "subvp": SubVP,
    "ve": VE,
    "cosine": CosineVP,
    "ddpm": _chain,
    "learned": _learned,
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT, "mlp": MLP}


def sde(config: ConfigDict) -> SDE:
    """The forward process."""
    constructor = named("sde.name", config.sde.name, SDES)
    with block_errors("sde"):
        return constructor(**accepted(constructor, config.sde))


def network(config: ConfigDict, info: DataInfo) -> nn.Module:
    """The network, with initial weights from ``config.seed``; the global random state is left as it was."""
    block = config.model
    constructor = named("model.name", block.name, NETWORKS)
    for key, value in block.items():
        if isinstance(value, tuple) and any(not isinstance(n, (int, float)) for n in value):
            raise UsageError(f"config.model.{key} must be a tuple of numbers, such as (1,2), got {value!r}")
    dimensions, kind = (1, "vectors") if constructor is MLP else (3, "images")
    with block_errors("model"):
        if len(info.shape) != dimensions:
            fitting = "mlp" if len(info.shape) == 1 else "unet"
            raise ValueError(
                f"name {block.name!r} is for {kind}, but samples of data set {info.name!r} have the shape "
                f"{info.shape}; "
                f"use name {fitting!r}"
            )
        if block.class_conditional and info.num_classes is None:
            raise ValueError(f"class_conditional is True, but data set {info.name!r} has no labels")
        classes = info.num_classes if block.class_conditional else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return constructor(
                num_classes=classes,
                **_channels(config, info, dimensions),
                **_augmented(constructor, config),
                **accepted(constructor, block),
            )


def _channels(config: ConfigDict, info: DataInfo, dimensions: int) -> dict[str, int]:
    """How many channels the network gets and gives, and the length of its context, where they are not the data's."""
    channels = info.shape[0]
    inputs, outputs = ("dim", "out_dim") if dimensions == 1 else ("in_channels", "out_channels")
    if config.model.learned_variance:
        return {inputs: channels, outputs: 2 * channels}
    if config.model.parametrization != LEVELS:
        return {inputs: channels}
    if info.levels is None:
        raise ValueError(
            f"parametrization {LEVELS!r} is for images, not for data set {info.name!r}; use 'noise'"
        )
    features, counts = config.model.level_features, config.model.level_counts
    if features and config.model.input_fourier is not None:
        raise ValueError(
            f"level_features takes the place of input_fourier, got both: True and {config.model.input_fourier!r}"
        )
    return {
        inputs: channels * inputs_per_channel(info.levels, features),
        outputs: channels * outputs_per_channel(info.levels, counts),
        "context_dim": channels * info.levels if counts else 0,
    }


def _augmented(constructor: Callable[..., nn.Module], config: ConfigDict) -> dict[str, int]:
    """What a network must know to be told of the augmentation."""
    if not config.training.condition_on_augmentation:
        return {}
    if "augment_dim" not in inspect.signature(constructor).parameters:
        raise ValueError(f"name {config.model.name!r} cannot be told of the augmentation")
    return {"augment_dim": augmentation(config).size}


def score_model(config: ConfigDict, info: DataInfo) -> ScoreModel:
    """The network, the SDE and the parametrization together."""
    block = config.model
    predicted = NOISE
    with block_errors("model"):
        told = conditioning(block.conditioning)
        if block.learned_variance and block.parametrization == LEVELS:
            raise ValueError(
                f"learned_variance goes with any parametrization but {LEVELS!r}, such as 'noise'"
            )
        if block.parametrization != LEVELS:
            predicted = parametrization(block.parametrization, block.sigma_data, others=(LEVELS,))
    net = network(config, info)
    with block_errors("model"):
        if block.parametrization == LEVELS:
            assert info.levels is not None
            return QuantizedScoreModel(
                net,
                sde(config),
                info.levels,
                conditioning=told,
                sigma_data=block.sigma_data,
                level_features=block.level_features,
                level_counts=block.level_counts,
            )
        kind = LearnedVarianceModel if block.learned_variance else ScoreModel
        return kind(net, sde(config), predicted, conditioning=told, sigma_data=block.sigma_data)
