"""From encoded images to one uint8 block ``(N, C, H, W)``."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageSize = int | tuple[int, int]  # a square side, or (height, width)

_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY, _COLOUR = ("1", "L"), ("RGB", "P", "CMYK", "YCbCr")


def check_image_size(image_size: ImageSize | None) -> tuple[int, int] | None:
    """``image_size`` as (height, width), or None.

    Raises:
        ValueError: it is neither a positive integer nor a pair of them.
    """
    if image_size is None:
        return None
    pair = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise ValueError(f"image_size must be a positive integer or (height, width), got {image_size!r}")
    return pair[0], pair[1]


def check_channels(channels: int | None) -> int | None:
    """``channels`` itself when it is 1, 3 or None.

    Raises:
        ValueError: it is something else.
    """
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")
    return channels


def decode(source: Path | bytes, name: str, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """One image as uint8 ``(C, H, W)``.

    Of an animation it is the first frame. It is turned as its EXIF tag says; palettes and CMYK become RGB; an
    alpha channel is dropped if it is opaque throughout. ``channels`` 1 or 3 converts to grey (ITU-R 601 luma)
    or colour. ``size`` crops the largest centred part with the wanted proportions and resamples it (Lanczos,
    with a low-pass filter when it shrinks).

    Raises:
        ValueError: the image is damaged, has more than 8 bits per channel, or is in part transparent.
    """
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, EOFError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {name!r} is truncated, damaged or no image: {error}") from error
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            raise ValueError(f"image {name!r} is in part transparent; flatten it onto a background first")
        image = rgba.convert("L" if image.mode in ("LA", "La", "L", "1") else "RGB")
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(
            f"image {name!r} has the mode {image.mode!r}; 8-bit grey or colour images are needed"
        )
    grey = image.mode in _GREY if channels is None else channels == 1
    image = image.convert("L" if grey else "RGB")
    if size is not None and size != (image.height, image.width):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[None] if grey else np.moveaxis(array, 2, 0)


def stack(
    sources: Iterable[tuple[str, Callable[[], Path | bytes]]],
    count: int,
    *,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    where: str,
) -> Tensor:
    """Decodes ``count`` images one after the other into one uint8 tensor ``(count, C, H, W)``.

    Args:
        sources: a name and a function that gives the file or its bytes, for each image.
        count: how many there are.
        image_size, channels: see :func:`decode`; None takes the images as they are.
        where: the data set, for messages.

    Raises:
        ValueError: no images; sizes or numbers of channels differ and no ``image_size`` or ``channels`` was
        given;
            an image is damaged.
    """
    size, channels = check_image_size(image_size), check_channels(channels)
    block, first_name, filled = np.empty((0, 0, 0, 0), np.uint8), "", 0
    for name, source in sources:
        array = decode(source(), name, channels, size)
        if filled == 0:
            block, first_name = np.empty((count, *array.shape), np.uint8), name
        _check_alike(where, first_name, block.shape[1:], name, array.shape)
        block[filled] = array
        filled += 1
    if filled == 0 or filled != count:
        raise ValueError(
            f"{where}: expected {count} images, found {filled}" if count else f"{where}: no images"
        )
    return torch.from_numpy(block)


def _check_alike(where: str, first: str, shape: tuple[int, ...], name: str, other: tuple[int, ...]) -> None:
    if shape[1:] != other[1:]:
        sizes = f"{first!r} is {shape[2]}x{shape[1]} and {name!r} is {other[2]}x{other[1]} (width x height)"
        raise ValueError(
            f"{where}: sizes are mixed: {sizes}; use image_size=N to crop and resize all to N x N"
        )
    if shape[0] != other[0]:
        grey, colour = (first, name) if shape[0] == 1 else (name, first)
        raise ValueError(
            f"{where}: grey and colour are mixed: {grey!r} is grey and {colour!r} is in colour;"
            " use channels=1 or channels=3 to convert all"
        )
