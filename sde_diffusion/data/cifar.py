"""CIFAR-10 (Krizhevsky, 2009) as its author distributes it: Python or binary version, packed or unpacked."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.dataset import DataSet
from sde_diffusion.data.files import existing, reading

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"


class _DType:
    """What the pickle says of a dtype."""

    def __init__(self, name: str | bytes, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        """The rest (byte order, alignment) says nothing about unsigned bytes."""


class _Array:
    """What the pickle says of an array: its shape, its dtype and its bytes."""

    def __init__(self, *_: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def bytes_of_rows(self) -> np.ndarray:
        """The array, if it is uint8 of two dimensions."""
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _DType) or dtype.name not in ("u1", "|u1", "uint8") or len(shape) != 2:
            raise ValueError("its 'data' is not an array of unsigned bytes with two dimensions")
        raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", data)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 written by Python 3 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    """Admits the few names that an array of bytes needs, and puts inert stand-ins of ours in their place.

    So nothing outside this file is ever called, whatever the pickle asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name, or a refusal."""
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no CIFAR-10 file needs"
            ) from None


def read_python_batch(raw: bytes, where: str) -> tuple[Tensor, Tensor]:
    """One file of the Python version: uint8 ``(N, 3, 32, 32)`` and int64 ``(N,)``. Runs no code it contains.

    Raises:
        ValueError: the pickle asks for anything but arrays of bytes, is damaged, or has another content.
    """
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="bytes").load()
        entries = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        pixels, labels = entries["data"].bytes_of_rows(), np.asarray(entries["labels"], dtype=np.int64)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{where} was refused or is damaged: {error}") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"{where} is not a CIFAR-10 batch, or is damaged: {error!r}") from error
    return _check(pixels, labels, where)


def read_binary_batch(raw: bytes, where: str) -> tuple[Tensor, Tensor]:
    """One file of the binary version: records of a label byte and 3,072 pixel bytes.

    Raises:
        ValueError: the size is not a whole number of records.
    """
    if len(raw) % (1 + _PIXELS):
        raise ValueError(
            f"{where} is truncated: {len(raw)} bytes are not a whole number of {1 + _PIXELS}-byte records"
        )
    records = np.frombuffer(raw, np.uint8).reshape(-1, 1 + _PIXELS)
    return _check(records[:, 1:], records[:, 0].astype(np.int64), where)


def _check(pixels: np.ndarray, labels: np.ndarray, where: str) -> tuple[Tensor, Tensor]:
    if pixels.shape != (len(labels), _PIXELS) or labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"{where} has pixels {pixels.shape} and labels {labels.shape}; (N, {_PIXELS}) and (N,) are needed"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{where} has labels from {labels.min()} to {labels.max()}; CIFAR-10 has 0 to 9")
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels.copy())


def _batch_files(path: Path) -> dict[str, bytes]:
    """The batch files of an archive, or of a folder or the folder in it, by name."""
    wanted = {f"{name}{end}" for name in (*_TRAIN, _TEST) for end in ("", ".bin")}
    if path.is_dir():
        inside = [path, *(path / f"cifar-10-batches-{version}" for version in ("py", "bin"))]
        return {name: (f / name).read_bytes() for f in inside for name in wanted if (f / name).is_file()}
    with reading(path, tarfile.TarError, OSError), tarfile.open(path) as archive:
        found = {}
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is not None and Path(member.name).name in wanted:
                found[Path(member.name).name] = stream.read()
        return found


def load_cifar10(*, path: str | Path | None = None) -> DataSet:
    """CIFAR-10: 50,000 and 10,000 colour images of 32x32, ten classes, in the author's order.

    Args:
        path: ``cifar-10-python.tar.gz`` or ``cifar-10-binary.tar.gz``, or the folder unpacked from either.
            Nothing is written to disk, and the pickles of the Python version are read without running code.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: batches are missing, truncated, damaged, or hold something else.
    """
    source = existing(path, "CIFAR-10")
    files = _batch_files(source)
    binary = f"{_TEST}.bin" in files
    end, read = (".bin", read_binary_batch) if binary else ("", read_python_batch)
    missing = [name + end for name in (*_TRAIN, _TEST) if name + end not in files]
    if missing:
        raise ValueError(
            f"{str(source)!r} is not CIFAR-10's archive or folder: it has no {', '.join(missing)}"
        )
    parts = [read(files[name + end], f"{str(source)!r}, {name + end}") for name in (*_TRAIN, _TEST)]
    train, train_labels = (torch.cat(blocks) for blocks in zip(*parts[:-1], strict=True))
    test, test_labels = parts[-1]
    return DataSet("cifar10", train, test, train_labels, test_labels, levels=256, class_names=CLASSES)
