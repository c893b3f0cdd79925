"""Trained runs as targets: their score, their test data, features of a classifier where there are labels."""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion.compare.targets import Target
from sde_diffusion.data import to_model
from sde_diffusion.metrics import ClassifierFeatures
from sde_diffusion.runs import load


def trained_target(folder: str) -> Target:
    """The run in a folder. Its "exact" samples are test data, drawn with replacement where there are too few:
    a floor of distances to them is that of drawing test data again."""
    run = load(folder)
    data = run.data
    test = torch.as_tensor(to_model(data.test, data.levels)).float() if data.levels else data.test.float()

    def draw(n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return test[torch.randint(len(test), (n,), generator=generator)]

    features = None
    if data.levels and data.train_labels is not None:
        train = to_model(data.train, data.levels).float()
        features = ClassifierFeatures.fit(train.flatten(1), data.train_labels)
    scale = float(test.square().mean().sqrt())
    return Target(
        folder,
        f"trained: {folder}",
        run.sde,
        tuple(test.shape[1:]),
        run.score,
        draw,
        features=features,
        scale=scale,
    )
