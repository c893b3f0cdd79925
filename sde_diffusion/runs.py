"""A model in its folder: load it, sample from it, evaluate it, as its config says or otherwise."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from sde_diffusion import build
from sde_diffusion.build import DataInfo
from sde_diffusion.checkpoint import config_differences, load_weights, weights_hash
from sde_diffusion.config import UsageError, changed, set_key
from sde_diffusion.data import DataSet, rescale
from sde_diffusion.dequantization import Dequantization, combine, dequantized
from sde_diffusion.imported import IMPORTED, fitting_data, import_config, read_imported
from sde_diffusion.likelihood import bits_per_dim, log_likelihood
from sde_diffusion.networks.dequantization_flow import DequantizationFlow
from sde_diffusion.ode import SolverError
from sde_diffusion.score import Score, ScoreModel
from sde_diffusion.sdes import SDE
from sde_diffusion.workdir import Workdir

__all__ = ["LogLikelihoods", "Run", "Samples", "load"]

_CALIBRATION = 32
"""Samples behind a grid made for the model."""
_RANGE = (-1.0, 1.0)
"""What samples and densities are in, whatever the range of the model."""


@dataclass(frozen=True)
class Samples:
    """Samples and what they took.

    Attributes:
        x: (n, *D), images in [-1, 1] up to overshoot.
        y: the labels they were drawn for, (n,); None for a model without classes.
        nfe: network evaluations per sample (of the sample that needed most).
        seconds: of wall time.
    """

    x: Tensor
    y: Tensor | None
    nfe: int
    seconds: float


@dataclass(frozen=True)
class LogLikelihoods:
    """Log-likelihoods and what they took.

    Attributes:
        log_prob: ``log p(x)`` in nats, (B,); of grey levels the bound on it by dequantization, as a density on
            [-1, 1]; NaN where it failed.
        nfe: mean number of network evaluations per sample and likelihood.
        seconds: of wall time.
        nfe_per_sample: over all draws, (B,).
        failed: whose score was not finite, or whose tolerance could not be met within ``max_evaluations``, (B,).
    """

    log_prob: Tensor
    nfe: float
    seconds: float
    nfe_per_sample: Tensor
    failed: Tensor


class Run:
    """A trained model with its config.

    Attributes:
        folder: where it lies.
        config: its config; the blocks ``sampling`` and ``likelihood`` say how :meth:`sample` and
            :meth:`bits_per_dim` work.
        info: shape, levels and classes of its data.
        model: the :class:`~sde_diffusion.score.ScoreModel`, in evaluation mode and without gradients of the
            weights.
        step: training steps it has had; None for an imported model.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ConfigDict,
        info: DataInfo,
        model: ScoreModel,
        step: int | None,
        device: torch.device,
    ) -> None:
        self.folder = Path(folder)
        self.config = config
        self.info = info
        self.model = model.to(device).eval().requires_grad_(False)
        self.step = step
        self.device = device

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters())
        return f"Run({str(self.folder)!r}: {self.info.name}, {self.sde}, {size:,} parameters, {self.history})"

    @property
    def history(self) -> str:
        """How the model came to be: ``400 steps``, or ``imported``."""
        return IMPORTED if self.step is None else f"{self.step} steps"

    @property
    def sde(self) -> SDE:
        """The forward process."""
        return self.model.sde

    @cached_property
    def data(self) -> DataSet:
        """The data set, loaded when first asked for.

        Raises:
            UsageError: it is not there, or not what the model was trained on or is for.
        """
        if self.step is None:
            return fitting_data(self.config, self.info)
        data = build.dataset(self.config)
        if DataInfo.of(data) != self.info:
            raise UsageError(
                f"the data of {self.folder} have changed: trained on {self.info}, found {DataInfo.of(data)}"
            )
        return data

    @cached_property
    def flow(self) -> DequantizationFlow:
        """The flow of variational dequantization that ``--mode dequantize`` trained for this model.

        Raises:
            UsageError: there is none, or it is for other images.
        """
        place = Workdir(self.folder).dequantization
        found = place.checkpoints.load()
        if found is None:
            raise UsageError(
                f"variational dequantization needs a trained flow, and {str(self.folder)!r} has none: train it by "
                f"--mode dequantize --workdir {self.folder}"
            )
        path, state = found
        own = state["config"]
        made_for = (tuple(own["flow"]["shape"]), own["flow"]["levels"])
        if made_for != (self.info.shape, self.info.levels):
            raise UsageError(
                f"the flow in {place.folder} is for images of shape {made_for[0]} with {made_for[1]} levels, and "
                f"those of this model have {self.info.shape} with {self.info.levels}"
            )
        if own["model"] != weights_hash(self.model):
            warnings.warn(
                f"the flow in {place.folder} was trained for other weights of this model: the bound holds, and is "
                "looser than it could be",
                stacklevel=2,
            )
        flow = DequantizationFlow(**own["flow"])
        weights = {k.removeprefix("flow."): v for k, v in state["ema"]["model"].items()}
        load_weights(flow, weights, path)
        return flow.to(self.device).eval().requires_grad_(False)

    def score(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """``grad_x log p_t(x)``: (B, *D) and () or (B,) -> (B, *D); ``cond`` is such as ``y=labels``.

        In the model's own coordinates: at t = 0 images are in ``model.data_range``, which is not (-1, 1) for some
        imported models.
        """
        time = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        score: Tensor = self.model(x, time, **cond)
        return score

    # ----------------------------------------------------------------------------------------------- sampling

    def sample(self, n: int, seed: int = 0, **options: Any) -> Tensor:
        """``n`` samples, (n, *D); images in [-1, 1] up to overshoot (:func:`~sde_diffusion.data.from_model`
        gives grey levels).

        Sample ``i`` of a seed is the same whatever ``n`` and the batch size (up to rounding in the network).

        Args:
            n: how many.
            seed: of the noise.
            options: of :meth:`draw`, among them every key of the config's ``sampling`` block, such as
                ``method="ode"``.
        """
        return self.draw(n, seed, **options).x

    def draw(
        self,
        n: int,
        seed: int = 0,
        *,
        y: Tensor | Sequence[int] | int | None = None,
        first_index: int = 0,
        progress: bool = False,
        **sampling: Any,
    ) -> Samples:
        """:meth:`sample` with labels, evaluations and time.

        Args:
            n: how many.
            seed: of the noise.
            y: labels, (n,) or one for all, of a class-conditional model; its number of classes stands for "no
                class".
                Default: sample ``i`` is of class ``i`` modulo the number of classes.
            first_index: the index of the first sample.
            progress: show a progress bar.
            sampling: keys of the config's ``sampling`` block with other values.

        Raises:
            UsageError: a sampling key or value that does not exist.
            ValueError: a number of samples below 1, or labels that do not fit.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be an integer >= 1, got {n!r}")
        config = changed(self.config)
        for key, value in sampling.items():
            set_key(config, f"sampling.{key}", value)
        sampler = build.sampler(config, model=self.model)
        size = build.positive(config, "sampling.batch_size")
        labels = self._sampling_labels(n, y, first_index)
        precision = build.network_precision(config, "sampling", self.device)
        started = time.perf_counter()
        with self.model.computing_in(precision):
            sampler = self._calibrated(sampler)
        parts, nfe = [], 0
        for start in range(0, n, size):
            count = min(size, n - start)
            with self.model.computing_in(precision):
                out = sampler(
                    self.sde,
                    self._conditioned(labels, start, count),
                    (count, *self.info.shape),
                    seed=seed,
                    first_index=first_index + start,
                    device=self.device,
                    progress=progress,
                )
            parts.append(rescale(out.x, self.model.data_range, _RANGE))
            nfe = max(nfe, out.nfe)
        return Samples(torch.cat(parts), labels, nfe, time.perf_counter() - started)

    def _calibrated(self, sampler: build.PCSampler | build.ODESampler) -> build.PCSampler | build.ODESampler:
        """The sampler with the grid made for this model, where it wants one."""
        labels = self._sampling_labels(_CALIBRATION, None, 0)
        score = self._conditioned(labels, 0, _CALIBRATION)
        return sampler.calibrated(self.sde, score, (_CALIBRATION, *self.info.shape), device=self.device)

    @property
    def _conditional(self) -> bool:
        return bool(self.config.model.class_conditional)

    def _sampling_labels(
        self, n: int, y: Tensor | Sequence[int] | int | None, first_index: int
    ) -> Tensor | None:
        if y is None and self._conditional:
            assert self.info.num_classes is not None
            return torch.arange(first_index, first_index + n, device=self.device) % self.info.num_classes
        return self._labels(n, y)

    def _labels(self, n: int, y: Tensor | Sequence[int] | int | None) -> Tensor | None:
        if y is None:
            return None
        if not self._conditional:
            raise ValueError("this model was trained without labels and takes no y")
        labels = torch.as_tensor(y, device=self.device)
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if labels.shape != (n,) or labels.is_floating_point():
            raise ValueError(
                f"y must be {n} integer labels, or one, got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) <= (self.info.num_classes or 0):
            raise ValueError(
                f"labels must lie in 0 .. {self.info.num_classes}, the last meaning no class, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return labels.long()

    def _conditioned(self, labels: Tensor | None, start: int, count: int) -> Score:
        if labels is None:
            return self.model
        return _Conditioned(self.model, labels[start : start + count])

    # --------------------------------------------------------------------------------------------- likelihood

    def bits_per_dim(self, images: Tensor, seed: int = 0, **options: Any) -> Tensor:
        """Bits per dimension of images, (B,): an upper bound of the code length of their grey levels, by the
        config's dequantization.

        Args:
            images: grey levels 0 .. levels - 1, an integer tensor (B, C, H, W).
            seed: of the dequantization noise and of the probes; those of image ``i`` depend on ``(seed, i)``
                only.
            options: of :meth:`evaluate`, among them every key of the config's ``likelihood`` block.

        Raises:
            ValueError: the data of this run are no images, or ``images`` are no grey levels of the right
                shape.
        """
        return self.in_bits(self.evaluate(images, seed, **options).log_prob)

    def in_bits(self, log_prob: Tensor) -> Tensor:
        """Log-densities of this run's images in nats as bits per dimension."""
        if self.info.levels is None:
            raise ValueError(
                f"bits per dimension are for images, and data set {self.info.name!r} has vectors; use "
                "log_likelihood"
            )
        return bits_per_dim(log_prob, torch.Size(self.info.shape).numel(), self.info.levels)

    def log_likelihood(self, x: Tensor, seed: int = 0, **options: Any) -> Tensor:
        """``log p(x)`` in nats, (B,): of vectors (B, D), or of images given as grey levels, which are
        dequantized.

        Args and errors as in :meth:`bits_per_dim`.
        """
        return self.evaluate(x, seed, **options).log_prob

    def evaluate(
        self,
        x: Tensor,
        seed: int = 0,
        *,
        y: Tensor | Sequence[int] | int | None = None,
        first_index: int = 0,
        probe_seed: int | None = None,
        **likelihood: Any,
    ) -> LogLikelihoods:
        """:meth:`log_likelihood` with evaluations, time and failures.

        Args:
            x: grey levels (B, C, H, W), or vectors (B, D).
            seed: of dequantization noise and probes.
            y: labels of a class-conditional model, (B,) or one for all. Default: "no class", if it was
                trained for that.
            first_index: the index of the first sample.
            probe_seed: of the probes alone.
            likelihood: keys of the config's ``likelihood`` block with other values.
        """
        config = changed(self.config)
        for key, value in likelihood.items():
            set_key(config, f"likelihood.{key}", value)
        settings = build.likelihood(config, lambda: self.flow)
        precision = build.network_precision(config, "likelihood", self.device)
        if tuple(x.shape[1:]) != self.info.shape or len(x) < 1:
            raise ValueError(
                f"x must have the shape (B, {', '.join(map(str, self.info.shape))}), got {tuple(x.shape)}"
            )
        if self.info.is_image and x.is_floating_point():
            raise ValueError(
                f"images must be grey levels 0 .. {(self.info.levels or 0) - 1} in an integer tensor, got "
                f"{x.dtype}; "
                "for the density of a continuous x use sde_diffusion.log_likelihood(run.sde, run.score, x)"
            )
        if y is None and self._conditional and not self.config.training.label_dropout:
            raise ValueError(
                "this class-conditional model was trained without label_dropout, so it needs labels y"
            )
        labels = self._labels(len(x), y)
        low, high = self.model.data_range
        # The density of x in [-1, 1] from that of its image in the model's range.
        volume = math.log((high - low) / (_RANGE[1] - _RANGE[0])) * torch.Size(self.info.shape).numel()
        started = time.perf_counter()
        draws = torch.zeros(settings.dequantizations, len(x), dtype=torch.float64)
        evaluations = torch.zeros(len(x), dtype=torch.int64)
        failed = torch.zeros(len(x), dtype=torch.bool)
        probes = seed if probe_seed is None else probe_seed
        begin, dequantization = self.sde.t_min, None
        if self.info.levels is not None:
            dequantization = settings.dequantization()
            begin = dequantization.start(self.sde, self.info.levels)
        # The density of alpha v at that time, as one of v; at t_min alpha is that of the data themselves.
        log_alpha = 0.0 if begin == self.sde.t_min else float(self.sde.log_alpha(begin))
        volume += log_alpha * torch.Size(self.info.shape).numel()

        def evaluated(draw: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Log-ratios, evaluations and failures of a part of the samples in one draw."""
            piece, index = x[part].to(self.device), first_index + part.start
            continuous, log_q = self._continuous(piece, dequantization, seed, index, draw)
            try:
                out = log_likelihood(
                    self.sde,
                    self._conditioned(labels, part.start, len(piece)),
                    continuous * math.exp(log_alpha),
                    divergence=settings.divergence,
                    solver=settings.solver,
                    coordinates=settings.coordinates,
                    # Other draws of the same image need other probes.
                    seed=(probes + draw * 0x9E3779B97F4A7C15) % 2**64,
                    first_index=index,
                    t_start=begin,
                )
            except SolverError:  # of a solver that cannot say whose fault it was
                if len(piece) == 1:
                    return torch.full((1,), math.nan).double(), torch.zeros(1).long(), torch.ones(1).bool()
                middle = part.start + len(piece) // 2
                halves = (slice(part.start, middle), slice(middle, part.stop))
                both = zip(*(evaluated(draw, half) for half in halves), strict=True)
                found, spent, bad = (torch.cat(pair) for pair in both)
                return found, spent, bad
            value = (out.log_prob.double() - log_q).cpu() + volume
            return value, out.nfe_per_sample.cpu(), out.failed.cpu()

        with self.model.computing_in(precision):
            for draw in range(settings.dequantizations):
                for start in range(0, len(x), settings.batch_size):
                    part = slice(start, min(start + settings.batch_size, len(x)))
                    draws[draw, part], spent, bad = evaluated(draw, part)
                    evaluations[part] += spent
                    failed[part] |= bad
        if bool(failed.any()):
            names = ", ".join(str(first_index + i) for i in failed.nonzero().flatten().tolist()[:20])
            warnings.warn(f"the likelihood of sample {names} could not be computed and is NaN", stacklevel=2)
        seconds = time.perf_counter() - started
        mean = float(evaluations.double().mean()) / settings.dequantizations
        return LogLikelihoods(
            combine(draws, importance=settings.importance), mean, seconds, evaluations, failed
        )

    def _continuous(
        self, x: Tensor, dequantization: Dequantization | None, seed: int, index: int, draw: int
    ) -> tuple[Tensor, Tensor]:
        """Data in the model's range, and the log-density of their dequantization noise within a cell, (B,)."""
        if dequantization is None or self.info.levels is None:
            return rescale(x.float(), _RANGE, self.model.data_range), torch.zeros(len(x), device=x.device)
        v, log_q = dequantized(dequantization, x, self.info.levels, seed=seed, first_index=index, draw=draw)
        return rescale(v, _RANGE, self.model.data_range), log_q


@dataclass(frozen=True)
class _Conditioned:
    """The score given labels, (B,) for the samples of a batch."""

    model: ScoreModel
    y: Tensor

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, y=self.y)

    def rows(self, index: Tensor) -> _Conditioned:
        """The score of some samples of the batch."""
        return _Conditioned(self.model, self.y[index])


def load(
    workdir: str | Path,
    *,
    device: torch.device | str | None = None,
    ema: bool = True,
    config: ConfigDict | None = None,
) -> Run:
    """The model in a folder: a trained one from its newest checkpoint, or an imported one.

    Args:
        workdir: the folder of the run.
        device: default as its config says.
        ema: the averaged weights; False for the last ones. An imported model has those that it was imported with.
        config: instead of the stored one, for other blocks ``sampling`` and ``likelihood``.

    Raises:
        UsageError: the folder is no run, has no checkpoint yet, or the config is not that of the checkpoint.
        CheckpointError: no checkpoint can be read, or its weights are of another model.
    """
    place = Workdir(workdir)
    place.require_run()
    step: int | None = None
    if place.read_import() is None:
        config, info, model, step = _trained(place, config, ema)
    else:
        config = changed(config or place.read_config() or import_config())
        model, info = read_imported(place, config)
    chosen = build.device(config) if device is None else torch.device(device)
    return Run(place.folder, config, info, model, step, chosen)


def _trained(
    place: Workdir, config: ConfigDict | None, ema: bool
) -> tuple[ConfigDict, DataInfo, ScoreModel, int]:
    """The config, the data's shape and the model of the newest checkpoint, and its step."""
    found = place.checkpoints.load()
    assert found is not None
    path, state = found
    trained = dict(state["config"])
    try:
        info = DataInfo.of_plain(trained.pop("data_info"))
        trained_config = changed(trained)
    except (KeyError, UsageError) as error:
        raise UsageError(
            f"checkpoint {path} was not written by the train mode of this version: {error}"
        ) from None
    config = changed(config or place.read_config() or trained_config)
    differences = config_differences(
        {name: trained_config[name].to_dict() for name in _OF_THE_MODEL},
        {name: config[name].to_dict() for name in _OF_THE_MODEL},
    )
    if differences:
        raise UsageError(f"the config is not the one {path} was trained with: {'; '.join(differences)}")
    model = build.score_model(config, info)
    load_weights(model, state["ema"]["model"] if ema else state["model"], path)
    return config, info, model, int(state["step"])


_OF_THE_MODEL = ("data", "sde", "model")
