"""MNIST-style IDX files (LeCun, Cortes and Burges, 1998), packed by gzip or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.dataset import DataSet
from sde_diffusion.data.files import existing_folder, read_bytes

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """One IDX file of unsigned bytes with ``ndim`` dimensions, as a uint8 tensor.

    The file is: two zero bytes, the type (8 for unsigned bytes), the number of dimensions, one big-endian
    32-bit size per dimension, the values.

    Raises:
        ValueError: the header is not that of such a file, or the file is shorter or longer than the header
        says.
    """
    raw = read_bytes(path)
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0:
        raise ValueError(f"{str(path)!r} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}")
    if raw[2] != _UNSIGNED_BYTE:
        raise ValueError(
            f"{str(path)!r} holds values of the IDX type 0x{raw[2]:02x}; unsigned bytes (0x08) are needed"
        )
    if raw[3] != ndim:
        raise ValueError(f"{str(path)!r} has {raw[3]} dimensions; {ndim} are needed")
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise ValueError(f"{str(path)!r} is truncated: {len(raw)} bytes, its header alone has {header}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", ndim, 4))
    expected = header + math.prod(shape)
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise ValueError(f"{str(path)!r} is {state}: {len(raw)} bytes, the shape {shape} needs {expected}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _find(folder: Path, stem: str, dimensions: int) -> Path | None:
    """The file, whose name is ``<stem>-idx3-ubyte`` or ``<stem>.idx3-ubyte``, with or without ``.gz``."""
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor | None]:
    images_at = _find(folder, f"{part}-images", 3)
    if images_at is None:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{str(folder)!r} has no '{part}-images-idx3-ubyte' (or '.idx3-ubyte', or either with '.gz');"
            f" it has: {there}"
        )
    x = read_idx(images_at, 3)[:, None]
    labels_at = _find(folder, f"{part}-labels", 1)
    if labels_at is None:
        return x, None
    labels = read_idx(labels_at, 1).long()
    if len(labels) != len(x):
        raise ValueError(
            f"{str(images_at)!r} has {len(x)} images but {str(labels_at)!r} has {len(labels)} labels"
        )
    return x, labels


def load_idx(*, path: str | Path | None = None) -> DataSet:
    """A folder with MNIST's files, or those of a set in the same format: grey images, 256 levels.

    The names are ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, and ``labels-idx1`` for the
    labels, which may be absent in both parts; a dot instead of the second hyphen and a final ``.gz`` are
    accepted.

    Raises:
        FileNotFoundError, NotADirectoryError: no such folder, or an image file is not in it.
        ValueError: a file is truncated, or not of the format, or the number of labels is wrong.
    """
    folder = existing_folder(path, "an IDX data set")
    train, train_labels = _read_part(folder, "train")
    test, test_labels = _read_part(folder, "t10k")
    return DataSet(folder.name, train, test, train_labels, test_labels, levels=256)
