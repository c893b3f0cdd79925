"""Reading weight files without running what is in them, and putting weights into networks without a gap."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_ZIP = b"PK\x03\x04"
#: The first bytes of torch's format before 1.6: a pickle of its magic number.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_SHOWN = 8


class PretrainedError(ValueError):
    """A checkpoint that cannot be loaded; the message says which file, and what is wrong with it."""


def is_torch_file(path: Path) -> bool:
    """Whether ``torch.save`` wrote the file, by its first bytes (of a zip file, or of the older format)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    return start.startswith(_ZIP) or start == _LEGACY


def load_torch(path: Path, *, allowed: Sequence[tuple[Any, str]] = (), meta: bool = False) -> Any:
    """The contents of a file of ``torch.save``, by torch's restricted unpickler.

    Args:
        path: the file, in the zip container or the one before torch 1.6.
        allowed: what the unpickler admits besides tensors and plain containers, as pairs (object, full name).
        meta: read no weights, only names, shapes and plain values (tensors are on the "meta" device).

    Raises:
        PretrainedError: the file is empty, truncated or damaged, or holds anything else.
    """
    if path.stat().st_size == 0:
        raise PretrainedError(f"{path} is empty")
    if not is_torch_file(path):
        raise PretrainedError(f"{path} is no file of torch.save: it starts with {_start(path)}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="meta" if meta else "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _refused(str(error))
        if found is not None:
            raise PretrainedError(
                f"{path} holds an object of {found}, which is no tensor or plain container; it was not "
                "loaded, for unpickling it could run any code"
            ) from None
        raise _damaged(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, IndexError, KeyError) as error:
        raise _damaged(path, error) from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PretrainedError: the file is empty, truncated or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        PretrainedError: the file is no JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise PretrainedError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _start(path: Path) -> str:
    with path.open("rb") as file:
        return repr(file.read(16))


def _damaged(path: Path, error: Exception) -> PretrainedError:
    size = path.stat().st_size if path.exists() else 0
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PretrainedError(f"{path} ({size} bytes) is truncated or damaged: {reason}")


def _refused(message: str) -> str | None:
    """The name in torch's message about an object it does not admit, or None for other messages."""
    marker = "GLOBAL "
    if marker not in message:
        return None
    return message.split(marker, 1)[1].split()[0].rstrip(".,")


def _first(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where a weight comes from: ``combine(state[keys[0]], ...)``, by default the one tensor itself."""

    keys: tuple[str, ...]
    combine: Callable[..., Tensor] = _first


def load_mapped(
    net: nn.Module, state: Mapping[str, Tensor], sources: Mapping[str, Source], *, ignored: Iterable[str] = ()
) -> None:
    """Fills every weight of ``net`` from a checkpoint with other names and layouts: see :func:`mapped_state`."""
    load_state(net, mapped_state(net, state, sources, ignored=ignored))


def mapped_state(
    net: nn.Module, state: Mapping[str, Tensor], sources: Mapping[str, Source], *, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """A checkpoint with other names and layouts as ``net`` has them.

    Args:
        net: the network.
        state: the tensors of the checkpoint.
        sources: for each name in ``net.state_dict()``, which tensors of the checkpoint make it.
        ignored: names of the checkpoint that may be there and are not weights (such as constant buffers).

    Raises:
        PretrainedError: tensors are missing or left over, or shapes differ; the names in the message are
            those of the checkpoint.
    """
    needed = [key for source in sources.values() for key in source.keys]
    missing = [key for key in needed if key not in state]
    extra = sorted(set(state) - set(needed) - set(ignored))
    if missing or extra:
        raise _mismatch(missing, extra, [])
    mapped: dict[str, Tensor] = {}
    wrong: list[str] = []
    expected = net.state_dict()
    for name, source in sources.items():
        parts = [state[key] for key in source.keys]
        wanted = tuple(expected[name].shape) if name in expected else None
        try:
            value = source.combine(*parts)
        except (RuntimeError, IndexError, ValueError):  # parts that do not go together
            value = None
        if wanted is not None and (value is None or tuple(value.shape) != wanted):
            found = ", ".join(f"{key} {tuple(state[key].shape)}" for key in source.keys)
            wrong.append(f"{found} for {name} {wanted}")
        elif value is not None:
            mapped[name] = value
    if wrong:
        raise _mismatch([], [], wrong)
    return mapped


def load_state(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills ``net``; the error says which names are missing or left over, and which shapes differ.

    Raises:
        PretrainedError: names or shapes differ in any way; the network is then unchanged.
    """
    expected = net.state_dict()
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} where the network has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or extra or wrong:
        raise _mismatch(missing, extra, wrong)
    net.load_state_dict(state)


def _mismatch(missing: Sequence[str], extra: Sequence[str], wrong: Sequence[str]) -> PretrainedError:
    parts = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for names, what in ((missing, "missing"), (extra, "too many"), (wrong, "of another shape"))
        if names
    ]
    return PretrainedError("the weights do not fit the network: " + "; ".join(parts))
