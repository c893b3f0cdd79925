"""Image data sets by name from the Hugging Face hub. Needs the package ``datasets``, the extra ``hub``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from sde_diffusion.data import images
from sde_diffusion.data.dataset import DataSet, split
from sde_diffusion.data.parquet import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    check_limit,
    choose_column,
    collect,
    split_names,
)
from sde_diffusion.errors import missing_package

PREFIX = "hf:"


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise missing_package("datasets", "data sets of the Hugging Face hub", "hub") from error
    return datasets


def _image_cell(cell: Any) -> Any:
    """A cell with its bytes, which ``datasets`` leaves in a file of its cache for some data sets."""
    if isinstance(cell, dict) and not cell.get("bytes") and cell.get("path"):
        return Path(cell["path"]).read_bytes()
    return cell


def _read_part(
    table: Any,
    where: str,
    *,
    image_column: str | None,
    label_column: str | None,
    image_size: images.ImageSize | None,
    channels: int | None,
    limit: int | None,
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None]:
    """Images, labels and class names of one part (a ``datasets.Dataset``)."""
    columns = list(table.column_names)
    typed = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
    image = choose_column(image_column, [*typed, *IMAGE_COLUMNS], columns, "image", where)
    label = choose_column(label_column, LABEL_COLUMNS, columns, "label", where)
    if image is None:
        raise ValueError(f"{where}: none of the columns {', '.join(columns)} is an image; give image_column")
    if image in typed:
        table = table.cast_column(image, _datasets().Image(decode=False))
    table = table.select_columns([image] if label is None else [image, label])

    def rows() -> Iterator[tuple[str, Any, Any]]:
        for i, row in enumerate(table):
            yield f"{where}, row {i}", _image_cell(row[image]), None if label is None else row[label]

    count = len(table) if limit is None else min(limit, len(table))
    x, labels = collect(
        islice(rows(), count),
        count,
        where,
        labelled=label is not None,
        image_size=image_size,
        channels=channels,
    )
    names = None if label is None else getattr(table.features[label], "names", None)
    return x, labels, None if names is None else tuple(names)


def load_hub(
    name: str,
    *,
    image_size: images.ImageSize | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.1,
) -> DataSet:
    """An image data set by name, ``owner/name`` or ``owner/name:configuration``; downloads it on first use.

    Its parts are sorted into training and held-out by their names, see
    :func:`sde_diffusion.data.parquet.split_names`. Where there is one part only, ``test_fraction`` of it is
    held out.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: no such columns, cells that are no images, mixed sizes or kinds.
    """
    repository, _, configuration = name.partition(":")
    if not repository:
        raise ValueError(
            f"a name is needed after {PREFIX!r}, such as 'hf:ylecun/mnist', got {PREFIX + name!r}"
        )
    check_limit(limit)
    tables = _datasets().load_dataset(repository, configuration or None)
    read = partial(
        _read_part,
        image_column=image_column,
        label_column=label_column,
        image_size=image_size,
        channels=channels,
        limit=limit,
    )
    train_names, test_names = split_names(tables)
    chosen = [part[0] for part in (train_names, test_names) if part]
    blocks = [read(tables[part], f"{PREFIX}{name}, part {part!r}") for part in chosen]
    if len(blocks) == 1:
        x, labels, classes = blocks[0]
        return split(
            name, x, labels, levels=256, fraction=test_fraction, seed=split_seed, class_names=classes
        )
    (train, train_labels, classes), (test, test_labels, _) = blocks
    return DataSet(name, train, test, train_labels, test_labels, levels=256, class_names=classes)
