"""The training settings of a config."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sde_diffusion.builders.objective import LOSS_AWARE, objective_settings
from sde_diffusion.builders.shared import accepted, block_errors, named
from sde_diffusion.chain_losses import LossAwareTime
from sde_diffusion.config import UsageError
from sde_diffusion.losses import (
    TIME_DRAWS,
    TIME_SAMPLERS,
    WEIGHTINGS,
    AntitheticDraw,
)
from sde_diffusion.training_settings import TrainingSettings

__all__ = ["training_settings"]


def training_settings(config: ConfigDict) -> TrainingSettings:
    """What a training run is told."""
    block = config.training
    chosen = objective_settings(config)
    weighting = named("training.weighting", block.weighting, WEIGHTINGS)
    samplers = {**TIME_SAMPLERS, LOSS_AWARE: LossAwareTime}
    time_sampler = named("training.time_sampler", block.time_sampler, samplers)
    if block.time_sampler == LOSS_AWARE and config.sde.name != "ddpm":
        raise UsageError(
            f"config.training.time_sampler {LOSS_AWARE!r} needs sde.name 'ddpm', got {config.sde.name!r}"
        )
    time_draw = named("training.time_draw", block.time_draw, TIME_DRAWS)
    parameters = ConfigDict(
        {
            "gamma": block.min_snr_gamma,
            "sigma_data": config.model.sigma_data,
            "mean": block.log_normal_mean,
            "std": block.log_normal_std,
        }
    )
    objects = ("loss", "weighting", "time_sampler", "time_draw", "conditional", "seed", "device")
    plain = {k: v for k, v in accepted(TrainingSettings, block).items() if k not in objects}
    with block_errors("training"):
        draw = time_draw()
        objectives: dict[str, Any] = {
            "weighting": weighting(**accepted(weighting, parameters)),
            "time_sampler": time_sampler(**accepted(time_sampler, parameters)),
        }
        return TrainingSettings(
            **objectives | chosen,
            time_draw=AntitheticDraw(draw) if block.antithetic else draw,
            conditional=config.model.class_conditional,
            seed=config.seed,
            device=config.device,
            **plain,
        )
