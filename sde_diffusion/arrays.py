"""NumPy views of what metrics and pictures receive, checked once: not empty, finite, of matching shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]


def as_array(value: Any, name: str) -> Array:
    """``value`` (tensor on any device, array or nested list) as a float64 array.

    Raises:
        ValueError: it is empty, or holds a NaN or an infinity.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    array = np.asarray(value, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {array.size} values")
    return array


def as_vector(value: Any, name: str) -> Array:
    """``value`` as a float64 array (N,); any other number of dimensions is a ValueError."""
    array = as_array(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {array.shape}")
    return array


def as_matrix(value: Any, name: str) -> Array:
    """``value`` (N, *D) as a float64 matrix (N, prod D); (N,) is read as N scalars."""
    array = as_array(value, name)
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape (N, ...), got a scalar")
    return array.reshape(len(array), -1)


def as_labels(value: Any, name: str) -> Array:
    """``value`` as int64 class labels (N,)."""
    array = as_vector(value, name)
    if (array != np.round(array)).any():
        raise ValueError(f"{name} must be whole numbers, got {array[array != np.round(array)][0]!r}")
    return array.astype(np.int64)


def same_width(**matrices: Array) -> None:
    """A ValueError unless all matrices have the same number of columns."""
    widths = {name: matrix.shape[1] for name, matrix in matrices.items()}
    if len(set(widths.values())) > 1:
        got = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(f"all sets must have the same number of values per element, got {got}")


def same_length(**arrays: Array) -> None:
    """A ValueError unless all arrays have the same number of rows."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"lengths must be equal, got {got}")
