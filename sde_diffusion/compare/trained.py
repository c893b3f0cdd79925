"""Trained runs as targets: their score, their test data, features of a classifier where there are labels."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.arrays import Array
from sde_diffusion.checkpoint import weights_hash
from sde_diffusion.compare.targets import Target
from sde_diffusion.data import DataSet, from_model, rescale, to_model
from sde_diffusion.metrics import ClassifierFeatures
from sde_diffusion.runs import Run, load

BATCH = 256
"""States that the network sees at a time: more are no faster on a CPU, and take memory."""
LEARNED_FROM = 10_000
"""Training images that the classifier sees at most: the rest is real data that it has not seen."""
_RANGE = (-1.0, 1.0)


def trained_target(folder: str) -> Target:
    """The run in a folder.

    It is measured in the coordinates of its data, images in [-1, 1] and at their grey levels, against
    distinct test samples; its ``fresh`` real samples are training data.

    Raises:
        UsageError: the folder is no run, or its data are not there.
    """
    run = load(folder)
    data = run.data
    train, test = (_continuous(x, data.levels) for x in (data.train, data.test))

    def observe(x: Tensor) -> Tensor:
        seen = rescale(x, run.model.data_range, _RANGE)
        return seen if data.levels is None else to_model(from_model(seen, data.levels), data.levels)

    @functools.cache
    def classifier() -> ClassifierFeatures:
        assert data.train_labels is not None
        return ClassifierFeatures.fit(train[:LEARNED_FROM].flatten(1), data.train_labels[:LEARNED_FROM])

    def features(x: Tensor) -> Array:
        return classifier()(x.flatten(1))

    def fresh(n: int, seed: int) -> Tensor:
        unseen = train[LEARNED_FROM:]
        return _some(unseen if len(unseen) >= n else train, n, seed)

    return Target(
        name=folder,
        title=f"{data.name}, {run.history} ({Path(folder).name})",
        sde=run.sde,
        shape=tuple(test.shape[1:]),
        score=_score(run),
        sample=lambda n, seed: _some(test, n, seed),
        features=features if _has_classes(data) else None,
        scale=float(test.square().mean().sqrt()),
        observe=observe,
        fresh=fresh,
        version=weights_hash(run.model)[:16],
    )


def _has_classes(data: DataSet) -> bool:
    return data.levels is not None and data.train_labels is not None


def _continuous(x: Tensor, levels: int | None) -> Tensor:
    return x.float() if levels is None else to_model(x, levels).float()


def _some(x: Tensor, n: int, seed: int) -> Tensor:
    """Distinct rows at random: ``n``, or all where there are fewer."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]]


def _score(run: Run) -> _InBatches:
    classes = run.info.num_classes if run.config.model.class_conditional else None
    return _InBatches(run, classes)


class _InBatches:
    """The score of a run, so many states at a time; of a class-conditional model that of the classes in turn."""

    def __init__(self, run: Run, classes: int | None) -> None:
        self.run, self.classes = run, classes

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.expand(len(x)) if t.ndim == 0 else t
        given = {} if self.classes is None else {"y": torch.arange(len(x)) % self.classes}
        parts = [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]
        return torch.cat(
            [self.run.score(x[p], time[p], **{k: v[p] for k, v in given.items()}) for p in parts]
        )
