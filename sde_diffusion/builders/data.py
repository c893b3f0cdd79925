"""The data of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ml_collections import ConfigDict

from sde_diffusion.builders.shared import block_errors
from sde_diffusion.data import Augmentation, DataSet, load_dataset

__all__ = ["DataInfo", "augmentation", "dataset"]


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of its data, and what a run keeps of them.

    Attributes:
        name: of the data set.
        shape: of one sample.
        levels: grey levels of images; None for vectors.
        num_classes: None without labels.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    num_classes: int | None

    @property
    def is_image(self) -> bool:
        """Whether samples are images of grey levels rather than vectors."""
        return self.levels is not None

    def plain(self) -> dict[str, Any]:
        """As a dict of plain values, which ``DataInfo.of_plain`` reads back."""
        return asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def of_plain(values: Mapping[str, Any]) -> DataInfo:
        """The inverse of :meth:`plain`."""
        return DataInfo(values["name"], tuple(values["shape"]), values["levels"], values["num_classes"])

    @staticmethod
    def of(data: DataSet) -> DataInfo:
        """What is true of a data set."""
        return DataInfo(data.name, data.sample_shape, data.levels, data.num_classes)


_AUGMENTATION = ("flip", "shift", "augment_probability")


def dataset(config: ConfigDict) -> DataSet:
    """The data set; keys that are none are not passed on, any other must be one that this data set takes."""
    block = config.data
    with block_errors("data"):
        return load_dataset(block.name, **{k: block[k] for k in block if k not in ("name", *_AUGMENTATION)})


def augmentation(config: ConfigDict) -> Augmentation:
    """The augmentation of the training images."""
    with block_errors("data"):
        return Augmentation(config.data.flip, config.data.shift, config.data.augment_probability)
