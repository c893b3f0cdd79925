"""Checkpoints that survive a crash: written atomically, read without trusting them, compared before they are
used."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "config_differences",
    "describe",
    "load_weights",
    "plain",
    "read_checkpoint",
    "versions",
    "weights_hash",
    "write_checkpoint",
]

_NAME = re.compile(r"step-(\d+)\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or is not of this run; the message names the file and what is wrong."""


def versions() -> dict[str, str]:
    """The versions of what computed a checkpoint."""
    from sde_diffusion import __version__  # here, since the package's front is complete only later

    return {
        "sde_diffusion": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": str(np.__version__),
    }


def plain(value: Any, where: str = "config") -> Any:
    """``value`` as nested dicts, lists, strings, numbers, booleans and None: what ``weights_only`` loads.

    Mappings (such as a ConfigDict) become dicts, tuples become lists, paths become strings.

    Raises:
        TypeError: something else is inside; the message names where.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(
        f"{where} must be made of dicts, lists, strings, numbers, booleans and None, got {value!r}"
    )


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> Path:
    """Writes ``state`` to ``path`` atomically: whoever looks sees the old file or the new one, never a part.

    A temporary file in the same folder is written, flushed to the disk and renamed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; systems that cannot open folders do without."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint written by :func:`write_checkpoint`; nothing in it is executed
    (``weights_only=True``).

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        CheckpointError: the file is missing, truncated, damaged (checksums are verified), or holds something
            else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"checkpoint {path} is damaged: the checksum of its entry {damaged!r} is wrong"
            )
        state = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can fail in many ways, each with its own exception
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(state).__name__}, not a dict")
    return state


class Checkpoints:
    """The checkpoints of one run: ``step-00001000.pt`` ..., the last few of them, and ``latest.pt``, the
    newest.

    Args:
        folder: where they lie; made when the first is saved.
        keep: how many to keep, >= 1.

    Raises:
        ValueError: ``keep`` < 1.
    """

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep must be an integer >= 1, got {keep!r}")
        self.folder = Path(folder)
        self.keep = keep

    @property
    def latest(self) -> Path:
        """A link to the newest checkpoint (a copy where the file system has no hard links)."""
        return self.folder / "latest.pt"

    def paths(self) -> list[Path]:
        """The numbered checkpoints, newest first."""
        found = [(int(m[1]), p) for p in self.folder.glob("step-*.pt") if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of a step, points ``latest.pt`` at it and removes those beyond ``keep``."""
        path = write_checkpoint(self.folder / f"step-{step:08d}.pt", state)
        self._point_latest_at(path)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        for left_over in self.folder.glob(".*.pt.*.tmp"):  # of writers that were killed
            left_over.unlink(missing_ok=True)
        return path

    def _point_latest_at(self, path: Path) -> None:
        temporary = self.folder / f".{self.latest.name}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, self.latest)
        _sync_folder(self.folder)

    def load(self, device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its path; None when there is none at all.

        A newer one that cannot be read is named in a warning.

        Raises:
            CheckpointError: there are checkpoints, but none can be read; the message names each and why.
        """
        candidates = self.paths()
        if self.latest.is_file() and not any(self.latest.samefile(path) for path in candidates):
            candidates.append(self.latest)
        problems = []
        for path in candidates:
            try:
                state = read_checkpoint(path, device)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{'; '.join(problems)}; falling back to {path}", stacklevel=2)
            return path, state
        if problems:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read ({'; '.join(problems)}); "
                "remove them to start again from the beginning"
            )
        return None


def describe(differences: list[str], limit: int = 12) -> str:
    """The first few differences, one per line, for an error message."""
    more = f"\n  and {len(differences) - limit} more" if len(differences) > limit else ""
    return "".join(f"\n  {line}" for line in differences[:limit]) + more


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Loads ``weights`` into ``model``, which must have exactly these tensors in these shapes.

    Args:
        model: the model.
        weights: its state dict.
        source: where they are from, for the message.

    Raises:
        CheckpointError: missing or unexpected tensors, or other shapes; the message lists them. The model is
            unchanged.
    """
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    differences = [f"missing: {name} {here[name]}" for name in here if name not in there]
    differences += [f"unexpected: {name} {there[name]}" for name in there if name not in here]
    differences += [
        f"shape: {name} is {there[name]} in the checkpoint, {here[name]} in the model"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if differences:
        raise CheckpointError(f"the weights in {source} are of another model:{describe(differences)}")
    model.load_state_dict(weights)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all weights, by name: two models with the same are the same."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


_ABSENT = object()


def config_differences(
    saved: Any, current: Any, may_change: Iterable[str] = (), defaults: Any = None
) -> list[str]:
    """How two nested configs differ, one line per key: ``training.seed: 0 in the checkpoint, 1 now``.

    Args:
        saved: the config of the checkpoint.
        current: the config of this run.
        may_change: dotted keys, or sections, that do not count (``"training.log_every"``, ``"sampling"``).
        defaults: a nested config of what keys stand for that the version of the checkpoint did not have; None where
            it has none.
    """
    before, now = _flatten(plain(saved)), _flatten(plain(current))
    default = _flatten(plain(defaults or {}))
    free = tuple(may_change)

    def counts(key: str) -> bool:
        if key not in before and now[key] == default.get(key):
            return False  # newer than the checkpoint, and as it was then
        return not any(key == name or key.startswith(f"{name}.") for name in free)

    def text(value: Any) -> str:
        return "absent" if value is _ABSENT else repr(value)

    return [
        f"{key}: {text(before.get(key, _ABSENT))} in the checkpoint, {text(now.get(key, _ABSENT))} now"
        for key in dict.fromkeys((*before, *now))
        if counts(key) and before.get(key, _ABSENT) != now.get(key, _ABSENT)
    ]
