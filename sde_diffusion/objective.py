"""From samples of a data set to the weighted denoising errors that training minimises and evaluation
reports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.chain_losses import Loss
from sde_diffusion.data import DataSet, to_model
from sde_diffusion.losses import StratifiedDraw, TimeSampler
from sde_diffusion.training_settings import TrainingSettings

__all__ = ["Draws", "Objective"]

_EVALUATION_SEED = 0  # fixed, so that evaluations compare across steps, runs and devices
_LEAST_EVALUATION = 1024


@dataclass(frozen=True, eq=False)
class Draws:
    """One batch with everything random about it drawn.

    Attributes:
        x0: data, (B, *D).
        t: times, float64 (B,).
        weight: of the error of each sample, (B,).
        noise: standard normal, (B, *D).
        cond: conditions for the network, each (B, ...).
        loss: what the errors are.
    """

    x0: Tensor
    t: Tensor
    weight: Tensor
    noise: Tensor
    cond: dict[str, Tensor]
    loss: Loss

    def __len__(self) -> int:
        return len(self.x0)

    def chunks(self, parts: int) -> Iterator[Draws]:
        """The batch cut into at most ``parts`` pieces."""
        size = -(-len(self) // parts)
        for i in range(0, len(self), size):
            piece = slice(i, i + size)
            cond = {name: value[piece] for name, value in self.cond.items()}
            yield Draws(self.x0[piece], self.t[piece], self.weight[piece], self.noise[piece], cond, self.loss)

    def errors(self, model: Any) -> Tensor:
        """The unweighted losses, usually noise-prediction errors, (B,)."""
        return self.loss(model, self.x0, self.t, self.noise, **self.cond)


class Objective:
    """What is minimised: the settings' loss, weighting, times and conditions, for one data set and SDE.

    Args:
        settings: of the run.
        data: what is learned.
        sde: the forward process.
        device: where the network is.
    """

    def __init__(self, settings: TrainingSettings, data: DataSet, sde: Any, device: torch.device) -> None:
        self.settings, self.data, self.sde, self.device = settings, data, sde, device
        on_gpu = device.type == "cuda"
        self.channels_last = data.is_image and (
            on_gpu if settings.channels_last is None else settings.channels_last
        )
        self.loss = settings.loss.for_data(data.levels, settings.dequantize)
        # Most time samplers are functions; one that learns from losses is started for each run.
        start = getattr(settings.time_sampler, "start", None)
        self.times: Any = settings.time_sampler if start is None else start(sde)

    def observe(self, draws: Draws, errors: Tensor) -> None:
        """Tells the losses (B,) of a training batch to a time sampler that learns from them."""
        if hasattr(self.times, "observe"):
            self.times.observe(self.sde, draws.t, errors)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: the memory of its time sampler."""
        return self.times.state_dict() if hasattr(self.times, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        if hasattr(self.times, "load_state_dict"):
            self.times.load_state_dict(state)

    def draw(
        self, x: Tensor, labels: Tensor | None, augmentation: Tensor, generator: torch.Generator
    ) -> Draws:
        """A training batch: fresh dequantization, times, noise and label dropout, in this order, from
        ``generator``."""
        x0 = self._dequantize(x, generator)
        cond = {}
        if labels is not None and self.settings.conditional:
            y = labels.to(self.device)
            if self.settings.label_dropout:
                drop = torch.rand(y.shape, generator=generator, device=generator.device).to(self.device)
                y = torch.where(drop < self.settings.label_dropout, y.new_tensor(self.data.num_classes), y)
            cond["y"] = y
        if self.settings.condition_on_augmentation and augmentation.shape[1]:
            cond["augment"] = augmentation.to(self.device)
        u = self.settings.time_draw(len(x0), generator, generator.device)
        return self._with_times(x0, u, cond, generator, self.times)

    @torch.no_grad()
    def evaluate(self, model: Any, x: Tensor, labels: Tensor | None) -> tuple[float, Tensor, Tensor]:
        """The loss of a model on given samples, at times and noise that are always the same.

        The samples are gone through cyclically, the times stratified over all draws. Global and training
        randomness are not touched.

        Args:
            model: in evaluation mode.
            x: samples as the data set holds them.
            labels: theirs, or None.

        Returns:
            The weighted loss; times (N,) and unweighted errors (N,) of all draws.
        """
        size = self.settings.eval_size
        n = max(len(x), _LEAST_EVALUATION) if size is None else size
        generator = torch.Generator().manual_seed(_EVALUATION_SEED)
        u = StratifiedDraw()(n, generator)
        total, times, errors = 0.0, [], []
        for start in range(0, n, self.settings.batch_size):
            index = torch.arange(start, min(start + self.settings.batch_size, n)) % len(x)
            cond = {}
            if labels is not None and self.settings.conditional:
                cond["y"] = labels[index].to(self.device)
            x0 = self._dequantize(x[index], generator)
            # Not the sampler that learns from losses, whose weights change.
            sampler = self.settings.time_sampler
            draws = self._with_times(x0, u[start : start + len(index)], cond, generator, sampler)
            error = draws.errors(model)
            total += float((draws.weight * error).double().sum())
            times.append(draws.t)
            errors.append(error)
        return total / n, torch.cat(times), torch.cat(errors)

    def _dequantize(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Grey levels to [-1, 1], uniform within each level or at their centres; vectors as they are."""
        x = x.to(self.device, non_blocking=True)
        if self.data.levels is None:
            return x
        uniforms = None
        if self.settings.dequantize:
            uniforms = torch.rand(x.shape, generator=generator, device=generator.device).to(self.device)
        x = to_model(x, self.data.levels, uniforms)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _with_times(
        self,
        x0: Tensor,
        u: Tensor,
        cond: dict[str, Tensor],
        generator: torch.Generator,
        sampler: TimeSampler,
    ) -> Draws:
        t, inverse_density = sampler(self.sde, u.to(self.device))
        weight = self.settings.weighting(self.sde, t)
        if self.settings.density_correction:
            weight = weight * inverse_density
        noise = torch.randn(x0.shape, generator=generator, device=generator.device, dtype=x0.dtype).to(
            self.device
        )
        return Draws(x0, t, weight.float(), noise, cond, self.loss)
