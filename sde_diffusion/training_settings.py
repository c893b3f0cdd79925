"""What a training run is told, checked before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from sde_diffusion.chain_losses import Loss, NoiseError
from sde_diffusion.devices import DEVICES, PRECISIONS
from sde_diffusion.errors import unknown_name
from sde_diffusion.losses import (
    LikelihoodWeighting,
    LogSNRUniformTime,
    StratifiedDraw,
    TimeDraw,
    TimeSampler,
    Weighting,
)
from sde_diffusion.optimizers import Adam, AdamW, Muon, Together, layer_matrices

__all__ = [
    "MAY_CHANGE",
    "OPTIMIZERS",
    "SCHEDULES",
    "TrainingSettings",
    "learning_rate_factor",
]

OPTIMIZERS = ("adam", "adamw", "muon")

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))),
}
"""The factor on the learning rate as a function of the progress of the run, 0 to 1."""

MAY_CHANGE = (
    "steps",
    "minutes",
    "log_every",
    "eval_every",
    "eval_size",
    "checkpoint_every",
    "sample_every",
    "keep_checkpoints",
    "max_skipped_steps",
    "device",
    "compile",
    "channels_last",
)
"""Settings that a resumed run may change: they do not alter the meaning of the steps already taken."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train; every value is checked at construction.

    Attributes:
        steps: optimizer steps.
        batch_size: samples per step.
        accumulate: micro-batches into which each batch is cut; the gradient is that of the whole batch.
        learning_rate: peak learning rate.
        schedule: "constant", or "cosine": decay to 0 at the end of the run.
        warmup_steps: linear warm-up from 0.
        optimizer: "adam", "adamw", or "muon" (see :mod:`sde_diffusion.optimizers`; learning rates of about 1e-2).
        weight_decay: decoupled for adamw and for the matrices of muon, L2 for adam.
        beta1, beta2: of Adam, also that for what is no matrix beside muon.
        gradient_clip: largest gradient norm; None for no clipping.
        ema_decay: largest decay of the averaged weights (they warm up, see
            :func:`sde_diffusion.ema.ema_decay`).
        loss: what is computed of each sample: the noise-prediction error, or a loss of
            :mod:`sde_diffusion.chain_losses`.
        weighting: ``w(sde, t)``, a factor on the loss.
        time_sampler: how ``u`` becomes a time.
        time_draw: how ``u`` is drawn.
        density_correction: divide by the density of the times, so that the loss estimates the integral of the
            weighting whatever the sampler. False: the density is part of the objective (EDM; or "simple" with
            log-SNR times, which is the likelihood objective up to a constant factor).
        dequantize: images are uniform within their grey levels; False: they are the centres, for chains that
            end with a discretized decoder.
        conditional: give labels to the network, as ``y``.
        condition_on_augmentation: give what the augmentation did to the network, as ``augment`` (nothing when
            evaluating).
        label_dropout: probability of replacing a label by the null label ``num_classes`` (classifier-free
            guidance).
        precision: of the network: "float32", "bfloat16" (autocast), or "auto": bfloat16 on GPUs and
            CPUs that compute in it, else float32.
        compile: compile the network.
        channels_last: memory format for images and weights; None: on GPUs, and for weights in bfloat16 on CPUs
            that compute in it, where networks have that format (see :mod:`sde_diffusion.networks.channels_last`).
        minutes: wall-clock budget; the run (and its schedule) ends at the earlier of ``steps`` and this. Such
            a run is not repeatable bit for bit. None for no limit.
        log_every, eval_every, checkpoint_every, sample_every: in steps; 0 for only at the end.
        eval_size: draws of (sample, time, noise) in an evaluation; None for each held-out sample once, and at
            least 1,024.
        keep_checkpoints: how many to keep.
        max_skipped_steps: skipped (non-finite) steps after which the run stops.
        seed: of everything random.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
    """

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    optimizer: str = "adam"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    gradient_clip: float | None = 10.0
    ema_decay: float = 0.999
    loss: Loss = field(default_factory=NoiseError)
    weighting: Weighting = field(default_factory=LikelihoodWeighting)
    time_sampler: TimeSampler = field(default_factory=LogSNRUniformTime)
    time_draw: TimeDraw = field(default_factory=StratifiedDraw)
    density_correction: bool = True
    dequantize: bool = True
    conditional: bool = False
    condition_on_augmentation: bool = False
    label_dropout: float = 0.0
    precision: str = "auto"
    compile: bool = False
    channels_last: bool | None = None
    minutes: float | None = None
    log_every: int = 50
    eval_every: int = 500
    eval_size: int | None = None
    checkpoint_every: int = 500
    sample_every: int = 0
    keep_checkpoints: int = 2
    max_skipped_steps: int = 20
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "keep_checkpoints"):
            _integer(name, getattr(self, name), 1)
        for name in (
            "warmup_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "sample_every",
            "max_skipped_steps",
            "seed",
        ):
            _integer(name, getattr(self, name), 0)
        if self.eval_size is not None:
            _integer("eval_size", self.eval_size, 1)
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate must be at most batch_size, {self.batch_size}, got {self.accumulate!r}"
            )
        _number("learning_rate", self.learning_rate, above=0.0)
        _number("weight_decay", self.weight_decay, least=0.0)
        for name in ("beta1", "beta2", "ema_decay"):
            _number(name, getattr(self, name), least=0.0, below=1.0)
        _number("label_dropout", self.label_dropout, least=0.0, below=1.0)
        if self.gradient_clip is not None:
            _number("gradient_clip", self.gradient_clip, above=0.0)
        if self.minutes is not None:
            _number("minutes", self.minutes, above=0.0)
        for name in (
            "density_correction",
            "dequantize",
            "conditional",
            "condition_on_augmentation",
            "compile",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("loss", "weighting", "time_sampler", "time_draw"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} must be an object of sde_diffusion.losses, got {getattr(self, name)!r}"
                )
        if self.channels_last is not None and not isinstance(self.channels_last, bool):
            raise ValueError(f"channels_last must be True, False or None, got {self.channels_last!r}")
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("precision", self.precision, PRECISIONS)
        _choice("device", self.device, DEVICES)
        if self.label_dropout and not self.conditional:
            raise ValueError(
                f"label_dropout is {self.label_dropout}, but conditional is False: no labels to drop"
            )

    def identity(self) -> dict[str, bool | int | float | str | None]:
        """The settings as plain values, objects by their ``repr``: what a checkpoint remembers of them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items()}

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer | Together:
        """The optimizer of all parameters of ``model`` that need a gradient.

        Adam is fused, that is, one kernel for all parameters, on GPUs and CPUs. "muon" is :class:`Muon` for
        :func:`layer_matrices` and Adam for the others.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        matrices = layer_matrices(model) if self.optimizer == "muon" else []
        chosen = set(matrices)
        rest = [p for p in parameters if p not in chosen]
        adam: list[torch.optim.Optimizer] = []
        if rest:
            kind = Adam if self.optimizer == "adam" else AdamW
            betas = self.beta1, self.beta2
            decay = 0.0 if self.optimizer == "muon" else self.weight_decay
            adam = [kind(rest, lr=self.learning_rate, betas=betas, weight_decay=decay, fused=True)]
        if not matrices:
            return adam[0]
        return Together(Muon(matrices, lr=self.learning_rate, weight_decay=self.weight_decay), *adam)


def learning_rate_factor(settings: TrainingSettings, step: int, elapsed: float = 0.0) -> float:
    """The factor on the learning rate of step ``step`` (from 0): linear warm-up times the schedule.

    Args:
        settings: the run's settings.
        step: steps taken before this one.
        elapsed: seconds spent, which count only under a wall-clock budget.
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    # The end of warm-up is the start of the decay, unless there is nothing but warm-up.
    decaying = max(settings.steps - settings.warmup_steps, 1)
    progress = (step - settings.warmup_steps) / decaying
    if settings.minutes is not None:
        progress = max(progress, elapsed / (60.0 * settings.minutes))
    return warmup * SCHEDULES[settings.schedule](progress)


def _choice(name: str, value: object, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise unknown_name(name, value, allowed)


def _integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def _number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
) -> None:
    number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    good = math.isfinite(number)
    good = good and (above is None or number > above) and (least is None or number >= least)
    good = good and (below is None or number < below)
    if not good:
        limits = [f"> {above:g}" if above is not None else "", f">= {least:g}" if least is not None else ""]
        limits.append(f"< {below:g}" if below is not None else "")
        raise ValueError(f"{name} must be a number {' and '.join(filter(None, limits))}, got {value!r}")
