"""A published model as a run: what is read of its source, and the folder it is kept in.

The folder has three files beside ``metrics.json``: ``model.safetensors``, which says all about the model;
``imported.json`` with the shape of the data and where all came from; and ``config.json``, whose names of data,
SDE and network are ``imported`` (until a name of data is given), for these are not built from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sde_diffusion import build, pretrained
from sde_diffusion.build import DataInfo
from sde_diffusion.checkpoint import CheckpointError, config_differences
from sde_diffusion.config import UsageError, changed
from sde_diffusion.data import DataSet
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.pretrained import PretrainedError, native
from sde_diffusion.pretrained.image_size import stored_image_size
from sde_diffusion.score import ScoreModel
from sde_diffusion.workdir import Workdir

__all__ = [
    "IMPORTED",
    "Imported",
    "fitting_data",
    "import_config",
    "read_imported",
    "read_source",
    "write_imported",
]

IMPORTED = "imported"
"""The name, in a config, of what an imported model brings with it."""

_LEVELS = 256
_HASHED = (".safetensors", ".bin", ".pth", ".pt", ".pkl", ".json")


@dataclass(frozen=True)
class Imported:
    """A model, what its data are like, and where it came from, as plain values."""

    model: ScoreModel
    info: DataInfo
    record: dict[str, Any]


def import_config(conditional: bool = False) -> ConfigDict:
    """The config of an imported model before any key is changed."""
    return changed(
        {"data.name": IMPORTED, "sde.name": IMPORTED, "model.name": IMPORTED}
        | {"model.class_conditional": conditional}
    )


def read_source(
    source: str, config: ConfigDict, *, format: str | None, model_config: str | None, ema: bool
) -> Imported:
    """Reads a published model.

    Args:
        source: a file, a folder, or the name of a model on the Hugging Face hub.
        config: its ``data.image_size`` and ``data.levels`` say what the source does not.
        format, model_config, ema: as in :func:`~sde_diffusion.pretrained.load_pretrained`.

    Raises:
        UsageError: the source is not there, of no known format, damaged or not of the architecture, or the size
            of its images is not known.
    """
    try:
        path = pretrained.locate(source)
        chosen = pretrained.choose_format(path, format)
        options = pretrained.read_config(model_config)
        model = pretrained.load_pretrained(path, format=chosen, config=options, ema=ema)
        native.describe(model)  # what cannot be kept is refused before anything is written
        net: Any = native.network_of(model)
        size = stored_image_size(path, options, net)
        record = {
            "source": source,
            "format": chosen,
            "model_config": model_config,
            "ema": ema,
            "sha256": dict(_digests(path)),
        }
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"{source}: {' '.join(str(error).split())}") from error
    name = path.resolve().stem if path.is_file() else path.resolve().name
    classes = net.condition.num_classes
    if isinstance(net, MLP):
        return Imported(model, DataInfo(name, (net.dim,), None, classes), record)
    levels = getattr(model, "levels", None) or config.data.levels or _LEVELS
    channels = net.in_channels // getattr(model, "inputs_per_channel", 1)
    return Imported(model, DataInfo(name, (channels, *_sides(config, size)), levels, classes), record)


def _sides(config: ConfigDict, stored: tuple[int, int] | None) -> tuple[int, int]:
    given = config.data.image_size
    size: Any = stored if given is None else given if isinstance(given, (tuple, list)) else (given, given)
    if size is None:
        raise UsageError(
            "the source does not say how large its images are: give --config.data.image_size=N or =(H,W)"
        )
    if len(size) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise UsageError(f"config.data.image_size must be N or (H,W), got {given!r}")
    return size[0], size[1]


def _digests(path: Path) -> Iterator[tuple[str, str]]:
    """The SHA-256 of the file, or of each file of weights or options in the folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _HASHED)
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
        yield (file.name if path.is_file() else str(file.relative_to(path))), digest.hexdigest()


def write_imported(place: Workdir, config: ConfigDict, found: Imported) -> None:
    """Makes a folder the run of an imported model; its config comes last.

    Raises:
        UsageError: the folder holds another run, or cannot be written.
    """
    content = {**found.record, "data_info": found.info.plain()}
    holds = place.config_file.is_file() or place.import_file.is_file() or bool(place.checkpoints.paths())
    if holds and place.read_import() != content:
        raise UsageError(f"{str(place.folder)!r} already holds another run: choose another --workdir")
    try:
        pretrained.save_pretrained(found.model, place.model_file)
        place.write_import(content)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write into {str(place.folder)!r}: {reason}") from error
    place.write_config(config)


def read_imported(place: Workdir, config: ConfigDict) -> tuple[ScoreModel, DataInfo]:
    """The model in the folder of :func:`write_imported`.

    Raises:
        UsageError: the config asks for another process or network.
        CheckpointError: a file is damaged.
    """
    try:
        content = place.read_import() or {}
        info = DataInfo.of_plain(content["data_info"])
        model = native.load(place.model_file, None, True)
    except (PretrainedError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"the imported model in {place.folder} cannot be read: {error}") from error
    own = import_config(info.num_classes is not None)
    differences = config_differences(
        *({name: c[name].to_dict() for name in ("sde", "model")} for c in (own, config))
    )
    if differences:
        raise UsageError(
            f"the process and the network of {place.folder} are those of {place.model_file.name}, and no config "
            f"changes them: {'; '.join(differences).replace(' in the checkpoint', '')}"
        )
    return model, info


def fitting_data(config: ConfigDict, info: DataInfo) -> DataSet:
    """The data set of the config, which may be any that an imported model is for.

    Raises:
        UsageError: none is named, it is not there, or its samples are of another kind; or, of a model of classes, it
            has others.
    """
    if config.data.name == IMPORTED:
        raise UsageError(
            "an imported model has no data of its own: name some, such as --config.data.name=cifar10 "
            "--config.data.path=FOLDER"
        )
    data = build.dataset(config)
    found = DataInfo.of(data)
    wanted = info if info.num_classes is not None else replace(info, num_classes=found.num_classes)
    if replace(found, name=info.name) != wanted:
        raise UsageError(f"the data do not fit the model: it is for {info}, and they are {found}")
    return data
