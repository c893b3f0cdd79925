"""A folder of images."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sde_diffusion.data import images
from sde_diffusion.data.dataset import DataSet, split
from sde_diffusion.data.files import existing_folder

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(folder: Path) -> list[str]:
    """The image files in a folder and below, sorted, as relative paths with ``/``; without hidden ones."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def load_folder(
    *,
    path: str | Path | None = None,
    image_size: images.ImageSize | None = None,
    channels: int | None = None,
    split_seed: int = 0,
    test_fraction: float = 0.1,
) -> DataSet:
    """Images of a folder and the folders below, in the sorted order of their relative paths.

    Where there are folders ``train`` and ``test`` in it, they are the two parts and all else is left alone;
    otherwise ``test_fraction`` of the images is held out, the same ones each time. When every image of a part
    lies in one of two or more sub-folders, the first-level sub-folders are the classes, numbered in sorted
    order.

    Args:
        path: the folder.
        image_size: a side, or (height, width), to crop and resize to; None needs images of one size.
        channels: 1 or 3 to convert to grey or colour; None needs images of one kind.
        split_seed: seed of the held-out part.
        test_fraction: size of the held-out part.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: no images in it, mixed sizes or kinds, damaged images, or classes that differ between the
        parts.
    """
    folder = existing_folder(path, "an image folder")
    read = partial(_read, image_size=image_size, channels=channels)
    parts = [folder / "train", folder / "test"]
    if not all(part.is_dir() for part in parts):
        x, labels, classes = read(folder)
        return split(
            folder.name, x, labels, levels=256, fraction=test_fraction, seed=split_seed, class_names=classes
        )
    (train, train_labels, classes), (test, test_labels, test_classes) = (read(part) for part in parts)
    if classes != test_classes:
        raise ValueError(f"the classes in {str(folder)!r} differ: {classes} in train, {test_classes} in test")
    return DataSet(folder.name, train, test, train_labels, test_labels, levels=256, class_names=classes)


def _read(
    folder: Path, *, image_size: images.ImageSize | None, channels: int | None
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None]:
    names = find_images(folder)
    where = f"image folder {str(folder)!r}"
    if not names:
        raise ValueError(f"{where} has no images ({', '.join(SUFFIXES)}) in it or below")
    sources = ((name, partial(Path, folder, name)) for name in names)
    x = images.stack(sources, len(names), image_size=image_size, channels=channels, where=where)
    tops = [name.split("/")[0] for name in names if "/" in name]
    classes = tuple(sorted(set(tops)))
    if len(tops) < len(names) or len(classes) < 2:
        return x, None, None
    number = {name: i for i, name in enumerate(classes)}
    return x, torch.tensor([number[top] for top in tops]), classes
