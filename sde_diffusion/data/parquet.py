"""Image data sets in parquet files, as Hugging Face stores them. Needs pyarrow, the extra ``data``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.data import images
from sde_diffusion.data.dataset import DataSet, split
from sde_diffusion.data.files import existing, reading
from sde_diffusion.errors import missing_package

IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
# Names of held-out parts: the first row that is there is the held-out part, the others are left out.
HELD_OUT = (("test",), ("validation", "valid", "val", "dev"))


def _pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_package("pyarrow", "reading parquet files", "data") from error
    return parquet


def choose_column(
    given: str | None, usual: Iterable[str], there: list[str], what: str, where: str
) -> str | None:
    """The column that was asked for, or the first of the usual names that is there, or None.

    Raises:
        ValueError: the column that was asked for is not there.
    """
    if given is not None and given not in there:
        raise ValueError(f"{where} has no {what} column {given!r}; its columns are: {', '.join(there)}")
    return given if given is not None else next((name for name in usual if name in there), None)


def check_limit(limit: int | None) -> int | None:
    """``limit`` itself when it is None or an integer >= 1.

    Raises:
        ValueError: it is something else.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be an integer >= 1, got {limit!r}")
    return limit


def image_bytes(cell: Any, where: str) -> bytes:
    """The encoded image in a cell: bytes, or a struct with a field ``bytes``.

    Raises:
        ValueError: there are no bytes in it, as when a data set stores paths only.
    """
    raw = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(raw, bytes) or not raw:
        raise ValueError(f"{where} holds no image bytes, but {type(cell).__name__}: {str(cell)[:60]}")
    return raw


def split_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sorts names of parts, or paths of files, into training and held-out ones (of which there may be none).

    A name belongs to the held-out part when it, or one of the folders in it, begins with ``test``; if there
    is none, with ``validation`` (``valid``, ``val``, ``dev``), which otherwise is left out.
    """
    rest, groups = list(names), []
    for words in HELD_OUT:
        groups.append([name for name in rest if any(part.startswith(words) for part in name.split("/"))])
        rest = [name for name in rest if name not in groups[-1]]
    return rest, next((group for group in groups if group), [])


def collect(
    rows: Iterator[tuple[str, Any, Any]],
    count: int,
    where: str,
    *,
    labelled: bool,
    image_size: images.ImageSize | None,
    channels: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Decodes rows of (name, image cell, label cell)."""
    labels: list[Any] = []

    def sources() -> Iterator[tuple[str, Any]]:
        for name, cell, label in rows:
            labels.append(label)
            yield name, partial(image_bytes, cell, name)

    x = images.stack(sources(), count, image_size=image_size, channels=channels, where=where)
    if not labelled:
        return x, None
    if not all(isinstance(label, int) for label in labels):
        odd = next(label for label in labels if not isinstance(label, int))
        raise ValueError(f"{where}: labels must be integers, got {odd!r}")
    return x, torch.tensor(labels)


def read_parquet(
    files: list[Path],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    image_size: images.ImageSize | None = None,
    channels: int | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The images, uint8 ``(N, C, H, W)``, and labels, if any, of parquet files, in order.

    Args:
        files: the files of one part.
        image_column, label_column: their columns; None finds them by the usual names.
        image_size, channels: see :func:`sde_diffusion.data.images.decode`.
        limit: reads only the first rows.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: damaged files, columns that are not there, cells that are no images, mixed sizes or kinds.
    """
    check_limit(limit)
    parquet = _pyarrow()
    where = ", ".join(repr(str(file)) for file in files[:2]) + (", .." if len(files) > 2 else "")
    opened = []
    for file in files:
        with reading(file, ValueError, OSError):  # pyarrow's errors are of these types
            opened.append(parquet.ParquetFile(file))
    columns = opened[0].schema_arrow.names
    image = choose_column(image_column, IMAGE_COLUMNS, columns, "image", where)
    label = choose_column(label_column, LABEL_COLUMNS, columns, "label", where)
    if image is None:
        raise ValueError(
            f"{where}: none of the columns {', '.join(columns)} is an image by name; give image_column"
        )
    wanted = [image] if label is None else [image, label]

    def rows() -> Iterator[tuple[str, Any, Any]]:
        for file, table in zip(files, opened, strict=True):
            choose_column(image, (), table.schema_arrow.names, "image", repr(str(file)))
            row = 0
            batches = table.iter_batches(batch_size=256, columns=wanted)
            while True:
                with reading(file, ValueError, OSError):
                    batch = next(batches, None)
                if batch is None:
                    break
                cells = batch.to_pydict()
                for i, cell in enumerate(cells[image]):
                    yield f"{file}, row {row}", cell, None if label is None else cells[label][i]
                    row += 1

    total = sum(table.metadata.num_rows for table in opened)
    count = total if limit is None else min(limit, total)
    if count == 0:
        raise ValueError(f"{where}: no rows")
    return collect(
        islice(rows(), count),
        count,
        where,
        labelled=label is not None,
        image_size=image_size,
        channels=channels,
    )


def _parts(path: Path) -> list[list[Path]]:
    """The parquet files of the training and of the held-out part, or of one part that is to be split."""
    if not path.is_dir():
        return [[path]]
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.parquet"))
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise ValueError(f"{str(path)!r} has no .parquet files in it or below")
    return [[path / name for name in part] for part in split_names(names) if part]


def load_parquet(
    *,
    path: str | Path | None = None,
    image_size: images.ImageSize | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.1,
) -> DataSet:
    """Images from a parquet file, or from a folder of them.

    In a folder, files are sorted into the two parts by their names, see :func:`split_names`. Where there is
    one part only, ``test_fraction`` of it is held out.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: there is no such file or folder.
        ValueError: see :func:`read_parquet`.
    """
    source = existing(path, "a parquet data set")
    parts = _parts(source)
    read = partial(
        read_parquet,
        image_column=image_column,
        label_column=label_column,
        image_size=image_size,
        channels=channels,
        limit=limit,
    )
    blocks = [read(files) for files in parts]
    if len(blocks) == 1:
        x, labels = blocks[0]
        return split(source.stem, x, labels, levels=256, fraction=test_fraction, seed=split_seed)
    (train, train_labels), (test, test_labels) = blocks
    return DataSet(source.name, train, test, train_labels, test_labels, levels=256)
