"""The folder of a run: which file is what, what is written into it and how, and what a run found there must
agree with.

config.json       the config; ``--config FOLDER/config.json`` uses it again
checkpoints/      everything needed to go on, or to load the model
model.safetensors, imported.json   instead of checkpoints: an imported model, and where it came from
dequantization/   the flow of variational dequantization: its checkpoints and curves
tensorboard/      curves of the training
metrics.json      every number, one section for each thing computed
*.png, *.npz, *.csv   pictures, samples, values per image
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from sde_diffusion.checkpoint import Checkpoints, config_differences, plain, versions
from sde_diffusion.config import UsageError, changed
from sde_diffusion.training_settings import MAY_CHANGE

__all__ = ["RESUMABLE_CHANGES", "Workdir", "environment"]

_BLOCKS = ("sampling", "likelihood", "dequantize", "bound", "report", "compare", "device")
RESUMABLE_CHANGES = (*_BLOCKS, *(f"training.{key}" for key in MAY_CHANGE))
"""Blocks and keys of a config that may differ when a run is resumed."""


class Workdir:
    """The folder of a run, which need not exist yet."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def config_file(self) -> Path:
        """The config, as JSON."""
        return self.folder / "config.json"

    @property
    def metrics_file(self) -> Path:
        """Every number, as JSON."""
        return self.folder / "metrics.json"

    @property
    def model_file(self) -> Path:
        """The model, where it was imported."""
        return self.folder / "model.safetensors"

    @property
    def import_file(self) -> Path:
        """Where an imported model came from and what its data are like, as JSON."""
        return self.folder / "imported.json"

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints."""
        return Checkpoints(self.folder / "checkpoints")

    @property
    def dequantization(self) -> Workdir:
        """The folder of the dequantization flow that was trained for the model."""
        return Workdir(self.folder / "dequantization")

    def require_run(self) -> None:
        """Refuses a folder from which no model can be loaded.

        Raises:
            UsageError: there is no such folder, it is no run, or it has no checkpoint yet.
        """
        folder = self.folder
        if not folder.is_dir():
            siblings = [str(p.parent) for p in folder.parent.glob("*/config.json")]
            near = difflib.get_close_matches(str(folder), siblings, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; train one first: --mode train"
            raise UsageError(f"there is no run in {str(folder)!r}: no such folder{hint}")
        if self.checkpoints.paths() or self.checkpoints.latest.is_file() or self.import_file.is_file():
            return
        if self.config_file.is_file():
            raise UsageError(
                f"the run in {str(folder)!r} has no checkpoint yet; train it first: --mode train --workdir "
                f"{folder}"
            )
        raise UsageError(
            f"{str(folder)!r} is not the folder of a run: it has no config.json and no checkpoints"
        )

    def read_config(self) -> ConfigDict | None:
        """The stored config; None where there is none.

        Raises:
            UsageError: it cannot be read, or has keys that do not exist.
        """
        if not self.config_file.is_file():
            return None
        try:
            return changed(json.loads(self.config_file.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.config_file}: {error}") from None

    def require_same_run(self, config: ConfigDict) -> None:
        """Refuses a config that could not go on from the checkpoints that are here.

        Raises:
            UsageError: it differs in more than :data:`RESUMABLE_CHANGES`, and the message names each key; or the
                model that is here was imported.
        """
        if self.import_file.is_file():
            raise UsageError(f"{str(self.folder)!r} holds an imported model: choose another --workdir")
        stored = self.read_config()
        if stored is None or not self.checkpoints.paths():
            return
        differences = config_differences(stored.to_dict(), config.to_dict(), RESUMABLE_CHANGES)
        if differences:
            raise UsageError(
                f"the run in {str(self.folder)!r} has another config ({'; '.join(differences)}): use that "
                "one "
                f"(--config {self.config_file}), or another --workdir"
            )

    def write_config(self, config: ConfigDict) -> None:
        """Stores the config.

        Raises:
            UsageError: the folder cannot be written.
        """
        try:
            _write_json(self.config_file, plain(config.to_dict()))
        except OSError as error:
            raise UsageError(f"cannot write into {str(self.folder)!r}: {error.strerror or error}") from error

    def write_import(self, content: Mapping[str, Any]) -> None:
        """Stores what is known of an imported model besides itself."""
        _write_json(self.import_file, content)

    def read_import(self) -> dict[str, Any] | None:
        """What :meth:`write_import` stored; None where the model was not imported.

        Raises:
            UsageError: the file cannot be read.
        """
        if not self.import_file.is_file():
            return None
        try:
            return dict(json.loads(self.import_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.import_file}: {error}") from None

    def read_metrics(self) -> dict[str, Any]:
        """The sections of ``metrics.json``; empty where there is none."""
        if not self.metrics_file.is_file():
            return {}
        try:
            content = json.loads(self.metrics_file.read_text(encoding="utf-8"))
        except ValueError:  # damaged by hand: the old file is kept aside, not lost
            os.replace(self.metrics_file, self.metrics_file.with_suffix(".json.damaged"))
            return {}
        return content if isinstance(content, dict) else {}

    def merge_metrics(self, **sections: Mapping[str, Any]) -> dict[str, Any]:
        """Replaces sections of ``metrics.json``, leaves the others, and returns all; atomic."""
        metrics = self.read_metrics() | {
            name: _finite(plain(value, name)) for name, value in sections.items()
        }
        _write_json(self.metrics_file, metrics)
        return metrics

    def drop_metrics(self, *names: str) -> None:
        """Removes sections of ``metrics.json``, those that there are."""
        metrics = self.read_metrics()
        if any(name in metrics for name in names):
            _write_json(self.metrics_file, {k: v for k, v in metrics.items() if k not in names})


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's files are for their owner only
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def environment(device: torch.device) -> dict[str, Any]:
    """What computed a result: versions, machine, threads."""
    try:
        package = metadata.version("sde_diffusion")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        package = "not installed"
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"sde_diffusion": package, **versions()},
        "machine": machine,
    }
