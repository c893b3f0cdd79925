"""Arrays in ``.npy`` and ``.npz`` files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.dataset import DataSet, split
from sde_diffusion.data.files import existing, reading
from sde_diffusion.data.levels import check_levels
from sde_diffusion.errors import unknown_name

LAYOUTS = ("NCHW", "NHWC")

# Names of (train, test, train labels, test labels), and of (samples, labels) for an array that is split here.
TWO_PARTS = (
    ("x_train", "x_test", "y_train", "y_test"),
    ("train", "test", "train_labels", "test_labels"),
    ("train_images", "test_images", "train_labels", "test_labels"),
)
ONE_PART = (("x", "y"), ("x", "labels"), ("data", "labels"), ("images", "labels"), ("arr_0", "arr_1"))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` by name, or that of an ``.npy`` as ``x``; never unpickles anything.

    Raises:
        ValueError: another kind of file, a truncated or damaged one, or one that holds Python objects.
    """
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise ValueError(f"an .npy or .npz file is needed, got {str(path)!r}")
    # Opened here, because numpy leaves a damaged archive open when it fails.
    with reading(path, zipfile.BadZipFile, ValueError, OSError), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}


def image_layout(shape: tuple[int, ...], where: str) -> str:
    """Where the channels of ``(N, ., ., .)`` are: at the axis 1 or 3 that has the size 1 or 3.

    Raises:
        ValueError: both or neither are; then the layout has to be said.
    """
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        problem = "either axis 1 or axis 3" if first else "neither axis 1 nor axis 3"
        raise ValueError(
            f"{where}: of the shape {shape}, {problem} can be the channels (1 or 3);"
            f" say layout='NCHW' or layout='NHWC'"
        )
    return "NCHW" if first else "NHWC"


def to_samples(array: np.ndarray, layout: str | None, where: str) -> Tensor:
    """Images to uint8 ``(N, C, H, W)``, vectors to float32 ``(N, D)``.

    Raises:
        ValueError: the array is neither uint8 of 3 or 4 dimensions nor floating-point of 2.
    """
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        if array.ndim == 3:
            array = array[:, None]
        elif (layout or image_layout(array.shape, where)) == "NHWC":
            array = np.moveaxis(array, 3, 1)
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind == "f" and array.ndim == 2:
        return torch.from_numpy(array.astype(np.float32))
    raise ValueError(
        f"{where}: needs uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), or floating-point vectors"
        f" (N, D); got {array.dtype} {array.shape}"
    )


def to_labels(array: np.ndarray | None, where: str) -> Tensor | None:
    """Integer labels ``(N,)`` or ``(N, 1)`` to int64 ``(N,)``.

    Raises:
        ValueError: not integers, or of another shape.
    """
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise ValueError(f"{where}: labels must be integers (N,), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def load_arrays(
    *,
    path: str | Path | None = None,
    levels: int | None = None,
    layout: str | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.1,
) -> DataSet:
    """Images or vectors from an ``.npy`` or ``.npz`` file.

    Images are uint8, ``(N, H, W)`` for grey, or of four dimensions, where the channels are the axis 1 or 3
    that has the size 1 or 3. Vectors are floating-point ``(N, D)``. An ``.npz`` has one of these sets of
    names, labels being optional: ``x_train, x_test, y_train, y_test``; ``train, test, train_labels,
    test_labels``; ``train_images, test_images, train_labels, test_labels``; or, to be split here, ``x`` with
    ``y`` or ``labels``, ``data`` or ``images`` with ``labels``, or a single array of any name.

    Args:
        path: the file.
        levels: grey levels of images, 256 by default.
        layout: ``"NCHW"`` or ``"NHWC"``; None finds out.
        split_seed, test_fraction: of the held-out part, where the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, unknown names in it, or arrays of another type or shape.
    """
    file = existing(path, "an array data set")
    if layout is not None and layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if levels is not None:
        check_levels(levels)
    arrays = read_arrays(file)
    where = str(file)
    names = _choose(arrays, where)
    first = arrays[names[0]]
    image = first.dtype == np.uint8
    if levels is not None and not image:
        raise ValueError(f"{where}: levels are for uint8 images, got {first.dtype} {first.shape}")
    depth = (levels or 256) if image else None
    blocks = [to_samples(arrays[n], layout, f"{where}, array {n!r}") for n in names[: len(names) // 2]]
    labels = [to_labels(arrays.get(n), f"{where}, array {n!r}") for n in names[len(names) // 2 :]]
    if len(blocks) == 2:
        return DataSet(file.stem, blocks[0], blocks[1], labels[0], labels[1], levels=depth)
    if labels[0] is not None and len(labels[0]) != len(blocks[0]):
        raise ValueError(f"{where}: there are {len(blocks[0])} samples but {len(labels[0])} labels")
    return split(file.stem, blocks[0], labels[0], levels=depth, fraction=test_fraction, seed=split_seed)


def _choose(arrays: Mapping[str, np.ndarray], where: str) -> tuple[str, ...]:
    """The row of the tables of names that fits the file best: samples all there, nothing left over."""
    rows: list[tuple[str, ...]] = [*TWO_PARTS, *ONE_PART]
    if len(arrays) == 1:
        rows.append((next(iter(arrays)), "no labels"))
    for row in rows:
        if set(row[: len(row) // 2]) <= set(arrays) <= set(row):
            return row
    known = "; ".join(", ".join(row) for row in (*TWO_PARTS, *ONE_PART))
    raise ValueError(f"{where} holds the arrays {sorted(arrays)}; the names understood are: {known}")
