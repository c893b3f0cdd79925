"""From the name of a data set to the data set: the one table of loaders."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sde_diffusion.data.arrays import load_arrays
from sde_diffusion.data.cifar import load_cifar10
from sde_diffusion.data.dataset import DataSet
from sde_diffusion.data.digits import load_digits
from sde_diffusion.data.folder import load_folder
from sde_diffusion.data.hub import PREFIX, load_hub
from sde_diffusion.data.idx import load_idx
from sde_diffusion.data.images import ImageSize
from sde_diffusion.data.parquet import load_parquet
from sde_diffusion.data.toy import load_checkerboard, load_grid, load_moons, load_ring
from sde_diffusion.errors import unknown_name

LOADERS: dict[str, Callable[..., DataSet]] = {
    "digits": load_digits,
    "gaussians8": load_ring,
    "gaussians25": load_grid,
    "moons": load_moons,
    "checkerboard": load_checkerboard,
    "folder": load_folder,
    "arrays": load_arrays,
    "idx": load_idx,
    "cifar10": load_cifar10,
    "parquet": load_parquet,
}


def find_loader(name: str) -> Callable[..., DataSet]:
    """The loader of a name of the table, or of ``hf:owner/name``.

    Raises:
        ValueError: there is no such name; the message has the nearest one.
    """
    if isinstance(name, str) and name.startswith(PREFIX):
        return partial(load_hub, name[len(PREFIX) :])
    if name not in LOADERS:
        raise unknown_name("data set", name, [*LOADERS, f"{PREFIX}<owner>/<name>"])
    return LOADERS[name]


def load_dataset(
    name: str,
    *,
    path: str | Path | None = None,
    image_size: ImageSize | None = None,
    channels: int | None = None,
    levels: int | None = None,
    layout: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    size: int | None = None,
    split_seed: int | None = None,
    test_fraction: float | None = None,
) -> DataSet:
    """Loads a data set by name.

    =================  =====================================================================================
    name               what, and the options it takes
    =================  =====================================================================================
    ``digits``         1,797 handwritten digits 8x8, 17 grey levels, fixed split 1,437 / 360; no options
    ``gaussians8``     eight Gaussians on a circle; ``size, split_seed, test_fraction``, like the next three
    ``gaussians25``    twenty-five Gaussians on a grid
    ``moons``          two interlocking half circles
    ``checkerboard``   the dark squares of a 4 x 4 board
    ``folder``         images in a folder; ``path, image_size, channels, split_seed, test_fraction``
    ``arrays``         an .npy or .npz file; ``path, levels, layout, split_seed, test_fraction``
    ``idx``            a folder with MNIST's files, or files like them; ``path``
    ``cifar10``        CIFAR-10's own archive, or the folder unpacked from it; ``path``
    ``parquet``        a parquet file or a folder of them; ``path, image_size, channels, image_column,
                       label_column, limit, split_seed, test_fraction``
    ``hf:owner/name``  a data set of the Hugging Face hub; the options of ``parquet`` but ``path``
    =================  =====================================================================================

    Args:
        name: see the table.
        path: file or folder.
        image_size: a side, or (height, width), to which images are cropped and resized.
        channels: 1 or 3, to convert images to grey or colour.
        levels: grey levels of the images.
        layout: ``"NCHW"`` or ``"NHWC"``, where the shape of an array does not tell.
        image_column, label_column: columns of a table, where their names are unusual.
        limit: only the first rows of each part.
        size: samples to draw.
        split_seed: seed of the held-out part, or of the draws.
        test_fraction: size of the held-out part.

    An option that is None counts as not given; the loader's own default then holds.

    Raises:
        ValueError: an unknown name; an option that this data set does not take; see the loaders for the rest.
    """
    options = {key: value for key, value in locals().items() if key != "name" and value is not None}
    loader = find_loader(name)
    allowed = [
        key
        for key, p in inspect.signature(loader).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for key, value in options.items():
        if key not in allowed:
            takes = f"it takes: {', '.join(allowed)}" if allowed else "it takes no options"
            raise ValueError(f"data set {name!r} does not take {key} (got {value!r}); {takes}")
    return loader(**options)
