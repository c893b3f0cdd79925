"""Checks of constructor arguments and inputs, shared by the networks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def positive_int(name: str, value: object) -> int:
    """``value`` if it is an integer >= 1, else a ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def probability(name: str, value: object) -> float:
    """``value`` if it is a number in [0, 1), else a ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def fourier_range(value: tuple[int, int] | None) -> tuple[int, int] | None:
    """The exponents (n_min, n_max) of the input features, checked."""
    if value is None:
        return None
    exponents = tuple(value)
    if len(exponents) != 2 or any(not isinstance(n, int) for n in exponents) or exponents[0] > exponents[1]:
        raise ValueError(
            f"input_fourier must be None or integers (n_min, n_max) with n_min <= n_max, got {value!r}"
        )
    return exponents[0], exponents[1]


def constructor_arguments(network: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments a constructor was called with, ready to be stored and passed again.

    Call it as ``constructor_arguments(Class, locals())`` on a constructor's first line. Sequences come out as
    tuples, so the result holds plain values only.
    """
    names = [name for name in inspect.signature(network).parameters]
    return {name: tuple(values[name]) if isinstance(values[name], list) else values[name] for name in names}


def check_input(x: Tensor, dims: int, channels: int, layout: str, multiple: int = 1) -> None:
    """Refuses an input whose number of dimensions, channels or dtype is not the network's, or whose sides are
    no multiples of a number."""
    if x.ndim != dims or x.shape[1] != channels:
        expected = layout.replace("C", str(channels))
        raise ValueError(f"the network takes x of shape {expected}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"the network takes x of a floating-point dtype, got {x.dtype}")
    if any(size == 0 for size in x.shape[2:]):
        raise ValueError(f"the network takes x with at least one pixel, got {tuple(x.shape)}")
    if any(size % multiple for size in x.shape[2:]):
        raise ValueError(
            f"the network takes images whose sides are multiples of {multiple}, got {tuple(x.shape)}"
        )
