"""What every loader returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.data.levels import check_levels
from sde_diffusion.data.order import held_out


class Density(Protocol):
    """A density that is known: what toy sets carry beside their samples."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats: (B, D) -> (B,)."""
        ...

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` independent samples, (n, D)."""
        ...


def _which(wrong: Tensor) -> str:
    """``of samples 3, 17``: those with a value that is wrong, the first ten."""
    samples = wrong.flatten(1).any(1).nonzero().flatten().tolist()
    more = f" and {len(samples) - 10} more" if len(samples) > 10 else ""
    return f"of samples {', '.join(map(str, samples[:10]))}{more}"


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in memory, with a training and a held-out part.

    Attributes:
        name: what it is called.
        train, test: images, uint8 level indices ``(N, C, H, W)``; or vectors, float32 ``(N, D)``.
        train_labels, test_labels: int64 ``(N,)``, or None for both.
        levels: grey levels of images (17 for digits, usually 256); None for vectors.
        density: the true density, where it is known.
        class_names: name of each label, where they have names.

    Raises:
        ValueError: a part is empty, or shapes, dtypes, levels or labels do not fit together.
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    levels: int | None = None
    density: Density | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.train_labels is None) != (self.test_labels is None):
            raise ValueError(f"data set {self.name!r}: one part has labels and the other has none")
        if self.train.shape[1:] != self.test.shape[1:]:
            shapes = f"{tuple(self.train.shape[1:])} and {tuple(self.test.shape[1:])}"
            raise ValueError(f"data set {self.name!r}: training and test samples differ in shape: {shapes}")
        if self.levels is not None:
            check_levels(self.levels)
        for part, x, y in (("train", self.train, self.train_labels), ("test", self.test, self.test_labels)):
            where = f"data set {self.name!r}, {part} part"
            self._check_samples(where, x)
            if y is not None:
                self._check_labels(where, y, len(x))

    def _check_labels(self, where: str, y: Tensor, n: int) -> None:
        if y.dtype != torch.int64 or y.shape != (n,):
            raise ValueError(f"{where}: labels must be int64 ({n},), got {y.dtype} {tuple(y.shape)}")
        if int(y.min()) < 0:
            raise ValueError(f"{where}: labels must be >= 0, got {int(y.min())}")
        if self.class_names is not None and int(y.max()) >= len(self.class_names):
            raise ValueError(f"{where}: label {int(y.max())}, but {len(self.class_names)} class names")

    def _check_samples(self, where: str, x: Tensor) -> None:
        if x.numel() == 0:
            raise ValueError(f"{where}: no samples, its shape is {tuple(x.shape)}")
        if self.levels is None:
            if x.dtype != torch.float32 or x.dim() != 2:
                raise ValueError(f"{where}: vectors must be float32 (N, D), got {x.dtype} {tuple(x.shape)}")
            if not bool(torch.isfinite(x).all()):
                raise ValueError(f"{where}: some values are not finite, {_which(~torch.isfinite(x))}")
            return
        if x.dtype != torch.uint8 or x.dim() != 4:
            raise ValueError(f"{where}: images must be uint8 (N, C, H, W), got {x.dtype} {tuple(x.shape)}")
        if int(x.max()) >= self.levels:
            raise ValueError(
                f"{where}: levels must lie in 0 .. {self.levels - 1}, got {int(x.max())}, {_which(x >= self.levels)}"
            )

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, such as (1, 8, 8) or (2,)."""
        return tuple(self.train.shape[1:])

    @property
    def is_image(self) -> bool:
        """Whether samples are images of grey levels rather than vectors."""
        return self.levels is not None

    @property
    def num_classes(self) -> int | None:
        """Number of classes (largest label plus one, or the number of class names); None without labels."""
        if self.train_labels is None or self.test_labels is None:
            return None
        if self.class_names is not None:
            return len(self.class_names)
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


def split(
    name: str,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    levels: int | None,
    fraction: float,
    seed: int,
    class_names: tuple[str, ...] | None = None,
) -> DataSet:
    """A data set from one block of samples, of which a fixed part is held out (see :func:`held_out`)."""
    train, test = held_out(len(x), fraction, seed)
    return DataSet(
        name,
        x[train],
        x[test],
        None if labels is None else labels[train],
        None if labels is None else labels[test],
        levels=levels,
        class_names=class_names,
    )
