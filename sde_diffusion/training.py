"""The training loop: denoising score matching that can be interrupted at any time and continued to the same
bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sde_diffusion.checkpoint import (
    CheckpointError,
    Checkpoints,
    config_differences,
    describe,
    load_weights,
    plain,
    versions,
)
from sde_diffusion.data import Augmentation, Batches, DataSet
from sde_diffusion.devices import choose_device, choose_precision
from sde_diffusion.ema import EMA
from sde_diffusion.interrupts import StopSignals, TrainingInterrupted
from sde_diffusion.monitor import Monitor, NoiseLevels, Window
from sde_diffusion.networks.channels_last import preferred
from sde_diffusion.objective import Objective
from sde_diffusion.optimizers import follow_layout
from sde_diffusion.training_settings import MAY_CHANGE, TrainingSettings, learning_rate_factor

__all__ = [
    "SampleHook",
    "Trainer",
    "TrainingDiverged",
    "TrainingInterrupted",
    "TrainingResult",
    "TrainingSettings",
]

SampleHook = Callable[[int, nn.Module], Any]
"""``on_sample(step, averaged_model)``; a picture that it returns (or several, by name) goes to
TensorBoard."""

CONFIG_MAY_CHANGE = ("sampling", "likelihood", "bound", *(f"training.{key}" for key in MAY_CHANGE))
"""Sections and keys of a config that a resumed run may change, unless told otherwise."""

_FORMAT = 1  # of the checkpoints


class TrainingDiverged(RuntimeError):
    """Too many steps had a loss or gradient that is not finite."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run has to show.

    Attributes:
        step: steps done.
        loss: training loss averaged over the last report; NaN if nothing was trained.
        heldout_loss: loss of the averaged weights on held-out data, at fixed times and noise.
        train_loss: the same on training data, with the same times and noise; a gap is overfitting.
        skipped: steps skipped because something was not finite.
        seconds: spent in all, earlier attempts included.
        samples_per_second: training speed at the last report.
        checkpoint: the last one.
        model: the averaged model.
    """

    step: int
    loss: float
    heldout_loss: float
    train_loss: float
    skipped: int
    seconds: float
    samples_per_second: float
    checkpoint: Path
    model: nn.Module = field(repr=False)


class Trainer:
    """Trains a score model.

    :meth:`run` starts, or resumes from the newest checkpoint in ``workdir/checkpoints``. On a CPU a resumed
    run equals an uninterrupted one bit for bit. The caller's global random state is left as it was.

    Args:
        model: a ``ScoreModel``, or anything with ``sde`` and ``predict_noise(x, t, **cond)``. Trained in
            place.
        data: what to learn.
        settings: how.
        workdir: folder of ``checkpoints/`` and ``tensorboard/``.
        config: stored in every checkpoint (nested dicts of plain values), and compared on resuming.
        augmentation: of the training images.
        may_change: dotted keys or sections of ``config`` that a resumed run may change.
        defaults: of ``config``, for its keys that an older checkpoint does not have.
        progress: a progress bar, and a line for each evaluation.

    Raises:
        ValueError: settings that do not fit the data or the machine.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DataSet,
        settings: TrainingSettings,
        workdir: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        augmentation: Augmentation | None = None,
        may_change: Iterable[str] = CONFIG_MAY_CHANGE,
        defaults: Mapping[str, Any] | None = None,
        progress: bool = True,
    ) -> None:
        if settings.conditional and data.num_classes is None:
            raise ValueError(f"conditional training needs labels, and data set {data.name!r} has none")
        self.settings, self.data, self.workdir = settings, data, Path(workdir)
        self.config = plain({} if config is None else config)
        self.device = choose_device(settings.device)
        self.checkpoints = Checkpoints(self.workdir / "checkpoints", settings.keep_checkpoints)
        self._may_change, self._defaults = tuple(may_change), defaults
        self._progress = progress

        self.model = cast(Any, model.to(self.device))
        self.objective = Objective(settings, data, self.model.sde, self.device)
        precision = choose_precision(settings.precision, self.device)
        own = settings.channels_last is None and data.is_image and preferred(self.device, precision)
        if self.objective.channels_last or own:
            cast(Any, self.model).to(memory_format=torch.channels_last)
        self.ema = EMA(self.model, settings.ema_decay)
        # After the copy: the averaged model stays in full precision and uncompiled.
        if precision == torch.bfloat16:
            self.model.autocast = torch.bfloat16
        if settings.compile:
            self.model.net.compile()

        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = settings.build_optimizer(self.model)
        self.batches = Batches(
            data.train,
            settings.batch_size,
            labels=data.train_labels,
            seed=settings.seed,
            augmentation=augmentation,
        )
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        self.levels = NoiseLevels(self.model.sde, device=self.device)
        self.window = Window(self.levels, self.device)
        self.step = 0
        self.skipped = 0
        self._loss = math.nan
        self._speed = 0.0
        self._seconds_before = 0.0
        self._started = time.monotonic()

    # ------------------------------------------------------------ the whole run

    def run(self, on_sample: SampleHook | None = None) -> TrainingResult:
        """Trains to the end.

        Args:
            on_sample: called with the step and the averaged model every ``sample_every`` steps and at the
                end.

        Raises:
            TrainingInterrupted: Ctrl-C or SIGTERM; everything is saved.
            TrainingDiverged: more than ``max_skipped_steps`` steps were not finite.
            CheckpointError: the checkpoints of this folder are of another run, or none can be read.
        """
        steps = self.settings.steps
        with torch.random.fork_rng(self._cuda), StopSignals() as stop:
            torch.manual_seed(self.settings.seed)
            resumed = self._restore()
            self._started = time.monotonic()
            with Monitor(self.workdir / "tensorboard", self.step, steps, self._progress) as monitor:
                self.model.train()
                final, losses = self._finished(), (math.nan, math.nan)
                if resumed is not None:
                    monitor.say(f"resuming after step {self.step} of {steps} from {resumed}")
                    # A checkpoint is written before the reports of its step, which may therefore be missing.
                    losses = self._report(monitor, on_sample, final)
                while not final:
                    self._train_step(monitor)
                    final = self._finished()
                    if stop.received is None:
                        if self._due(self.settings.checkpoint_every, final):
                            self._save()
                        losses = self._report(monitor, on_sample, final)
                    if stop.received is not None:
                        raise TrainingInterrupted(stop.received, self.step, steps, self._save())
        if self.device.type == "cpu":  # in float32 that layout is slow there
            cast(Any, self.ema.module).to(memory_format=torch.contiguous_format)
        return TrainingResult(
            step=self.step,
            loss=self._loss,
            train_loss=losses[0],
            heldout_loss=losses[1],
            skipped=self.skipped,
            seconds=self.seconds,
            samples_per_second=self._speed,
            checkpoint=self.checkpoints.latest,
            model=self.ema.module,
        )

    @property
    def seconds(self) -> float:
        """Time spent on the run, earlier attempts included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def _cuda(self) -> list[torch.device]:
        """The devices whose global random state a run must leave alone, beside the CPU's."""
        return [self.device] if self.device.type == "cuda" else []

    def _finished(self) -> bool:
        minutes = self.settings.minutes
        return self.step >= self.settings.steps or (minutes is not None and self.seconds >= 60.0 * minutes)

    def _due(self, every: int, final: bool) -> bool:
        return final or (every > 0 and self.step % every == 0)

    # ------------------------------------------------------------ one step

    def _train_step(self, monitor: Monitor) -> None:
        settings, start = self.settings, time.perf_counter()
        rate = settings.learning_rate * learning_rate_factor(settings, self.step, self.seconds)
        batch = next(self.batches)
        draws = self.objective.draw(batch.x, batch.y, batch.augmentation, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        errors = []
        for part in draws.chunks(settings.accumulate):
            error = part.errors(self.model)
            ((part.weight * error).sum() / len(draws)).backward()
            errors.append(error.detach())
        error = torch.cat(errors)
        self.objective.observe(draws, error)
        loss = (draws.weight * error).mean()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])

        self.step += 1
        monitor.advance()
        if not math.isfinite(float(loss + norm)):
            self._skip(monitor, float(loss), float(norm))
            return
        if settings.gradient_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, settings.gradient_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.window.add(loss, norm, draws.t, error, time.perf_counter() - start)

    def _skip(self, monitor: Monitor, loss: float, norm: float) -> None:
        self.skipped += 1
        limit = self.settings.max_skipped_steps
        what = f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        monitor.say(f"skipped {what} ({self.skipped} skipped so far, at most {limit} allowed)")
        if self.skipped > limit:
            raise TrainingDiverged(
                f"stopped: {self.skipped} steps had a loss or gradient that is not finite, and "
                f"max_skipped_steps is {limit}. The last was {what}. "
                "Try a smaller learning_rate, or precision 'float32'."
            )

    # ------------------------------------------------------------ reports

    def _report(self, monitor: Monitor, on_sample: SampleHook | None, final: bool) -> tuple[float, float]:
        """What is due after this step; the averaged weights' losses on training and held-out data."""
        settings, step = self.settings, self.step
        if self._due(settings.log_every, final):
            averages = self.window.averages()
            self._loss = averages.get("train/loss", self._loss)
            self._speed = self.window.samples_per_second or self._speed
            averages["train/learning_rate"] = self.optimizer.param_groups[0]["lr"]
            averages["train/samples_per_second"] = self._speed
            averages["train/skipped_steps"] = self.skipped
            monitor.scalars(step, averages)
            monitor.postfix(loss=f"{self._loss:.4g}", speed=f"{self._speed:.0f}/s", skipped=str(self.skipped))
            self.window.clear()
        losses = (math.nan, math.nan)
        if self._due(settings.eval_every, final):
            values = self.evaluate()
            losses = values["eval/train_loss"], values["eval/heldout_loss"]
            monitor.scalars(step, values)
            monitor.say(
                f"step {step}/{settings.steps}, {self.seconds:.0f} s: loss {self._loss:.4f}; "
                f"averaged: training {losses[0]:.4f}, held-out {losses[1]:.4f}; {self._speed:.0f} samples/s"
            )
        if on_sample is not None and self._due(settings.sample_every, final):
            with torch.random.fork_rng(self._cuda):
                monitor.images(step, on_sample(step, self.ema.module))
        monitor.flush()
        return losses

    def evaluate(self) -> dict[str, float]:
        """The averaged weights on held-out and on training data, at fixed times and noise; disturbs nothing
        random."""
        data, model = self.data, self.ema.module
        with torch.random.fork_rng(self._cuda):
            heldout, t, error = self.objective.evaluate(model, data.test, data.test_labels)
            train, _, _ = self.objective.evaluate(
                model,
                data.train[: len(data.test)],
                None if data.train_labels is None else data.train_labels[: len(data.test)],
            )
        window = Window(self.levels, self.device)
        window.add_errors(t, error)
        by_level = {f"eval_heldout_error/{name}": value for name, value in window.level_averages().items()}
        return {"eval/train_loss": train, "eval/heldout_loss": heldout, **by_level}

    # ------------------------------------------------------------ checkpoints

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be of this run."""
        model = {
            name: getattr(value, "name", None) or repr(value)
            for name in ("sde", "parametrization", "conditioning", "sigma_data")
            if (value := getattr(self.model, name, None)) is not None
        }
        data = {"name": self.data.name, "shape": list(self.data.train.shape), "levels": self.data.levels}
        return {
            "config": self.config,
            "settings": self.settings.identity(),
            "model": model,
            "data": {**data, "augmentation": repr(self.batches.augmentation)},
        }

    def _save(self) -> Path:
        random = {"cpu": torch.get_rng_state(), "training": self.generator.get_state()}
        if self._cuda:
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        identity = self._identity()
        return self.checkpoints.save(
            self.step,
            {
                "format": _FORMAT,
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": {"model": self.ema.module.state_dict(), "updates": self.ema.updates},
                "optimizer": self.optimizer.state_dict(),
                "random": random,
                "batches": self.batches.state_dict(),
                "window": self.window.state_dict(),
                "objective": self.objective.state_dict(),
                "loss": self._loss,
                "skipped": self.skipped,
                "seconds": self.seconds,
                "config": identity.pop("config"),
                "identity": identity,
                "versions": versions(),
                "device": self.device.type,
            },
        )

    def _restore(self) -> Path | None:
        """Continues from the newest checkpoint, if there is one; returns its path."""
        found = self.checkpoints.load()
        if found is None:
            return None
        path, state = found
        if state.get("format") != _FORMAT:
            raise CheckpointError(
                f"checkpoint {path} has format {state.get('format')!r}, this version reads {_FORMAT}"
            )
        here = self._identity()
        config = here.pop("config")
        may_change = tuple(f"settings.{name}" for name in MAY_CHANGE)
        differences = config_differences(state["config"], config, self._may_change, self._defaults)
        differences += config_differences(state["identity"], here, may_change)
        if differences:
            raise CheckpointError(
                f"checkpoint {path} is of a run with another configuration; use that one, or another workdir:"
                + describe(differences)
            )
        load_weights(self.model, state["model"], path)
        load_weights(self.ema.module, state["ema"]["model"], path)
        self.ema.n_averaged.fill_(state["ema"]["updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        follow_layout(self.optimizer)
        self.batches.load_state_dict(state["batches"])
        self.window.load_state_dict(state["window"])
        self.objective.load_state_dict(state["objective"])
        self._restore_random(state["random"], state["device"])
        self.step, self.skipped = state["step"], state["skipped"]
        self._loss, self._seconds_before = state["loss"], state["seconds"]
        return path

    def _restore_random(self, random: Mapping[str, Tensor], device: str) -> None:
        torch.set_rng_state(random["cpu"])
        if device != self.device.type:
            # Generators of different devices have different states: go on with a fresh stream.
            self.generator.manual_seed(self.settings.seed + 1 + self.step)
            return
        self.generator.set_state(random["training"])
        if self._cuda:
            torch.cuda.set_rng_state(random["cuda"], self.device)
