"""The objectives of training by name: what each sets, and what it needs of the rest of a config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from sde_diffusion.chain_losses import (
    BoundLoss,
    ChainTime,
    HybridLoss,
    LadderTime,
    LossAwareTime,
    NoiseError,
    VariationalLoss,
)
from sde_diffusion.config import UsageError
from sde_diffusion.errors import unknown_name
from sde_diffusion.losses import SimpleWeighting, UniformTime

__all__ = ["LOSS_AWARE", "OBJECTIVES", "objective_settings"]


@dataclass(frozen=True)
class _Objective:
    """What a named objective sets, and what it needs: values of ``sde.name`` (None: any) and of other
    keys."""

    settings: Callable[[ConfigDict], dict[str, Any]]
    sdes: tuple[str, ...] | None
    needs: tuple[tuple[str, Any], ...] = ()


def _steps_of(config: ConfigDict) -> LossAwareTime | ChainTime:
    return LossAwareTime() if config.training.time_sampler == LOSS_AWARE else ChainTime()


LOSS_AWARE = "loss_aware"
"""The time sampler that learns from losses, for chains only."""

OBJECTIVES: dict[str, _Objective] = {
    "score_matching": _Objective(lambda config: {}, None),
    "simple": _Objective(lambda c: {"loss": NoiseError(), "time_sampler": _steps_of(c)}, ("ddpm",)),
    "bound": _Objective(lambda c: {"loss": BoundLoss(), "time_sampler": _steps_of(c)}, ("ddpm",)),
    "hybrid": _Objective(
        lambda c: {"loss": HybridLoss(), "time_sampler": _steps_of(c)},
        ("ddpm",),
        (("model.learned_variance", True),),
    ),
    "smld": _Objective(lambda c: {"loss": NoiseError(), "time_sampler": LadderTime(c.sde.steps)}, ("ve",)),
    "variational": _Objective(
        lambda c: {"loss": VariationalLoss(), "time_sampler": UniformTime()},
        ("vp", "subvp", "cosine", "learned"),
        (("model.conditioning", "log_noise"),),
    ),
}


def objective_settings(config: ConfigDict) -> dict[str, Any]:
    """The settings of the objective, over those of weighting and times; its weights are in the loss or 1.

    Raises:
        UsageError: an unknown name, or a config that lacks what the objective needs.
    """
    name = config.training.objective
    if name not in OBJECTIVES:
        raise UsageError(str(unknown_name("training.objective", name, OBJECTIVES)))
    objective = OBJECTIVES[name]
    if objective.sdes is not None and config.sde.name not in objective.sdes:
        raise UsageError(
            f"training.objective {name!r} needs sde.name {' or '.join(objective.sdes)}, got {config.sde.name!r}"
        )
    for key, wanted in objective.needs:
        if config[key] != wanted:
            raise UsageError(f"training.objective {name!r} needs {key}={wanted!r}, got {config[key]!r}")
    if config.sde.name == "learned" and name != "variational":
        raise UsageError(f"sde.name 'learned' needs training.objective 'variational', got {name!r}")
    chosen = objective.settings(config)
    return {"weighting": SimpleWeighting(), **chosen} if chosen else {}
