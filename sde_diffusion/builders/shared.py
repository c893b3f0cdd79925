"""What all builders share: errors that name the block of the config they come from, names looked up in tables."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from ml_collections import ConfigDict

from sde_diffusion.config import UsageError, config_keys
from sde_diffusion.devices import choose_device, choose_precision
from sde_diffusion.errors import unknown_name

__all__ = ["accepted", "block_errors", "device", "named", "network_precision", "options", "positive"]

T = TypeVar("T")


@contextlib.contextmanager
def block_errors(name: str) -> Iterator[None]:
    """Errors inside become a UsageError that begins with the config block they come from."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(f"config.{name}: {' '.join(str(error).split())}") from error


def named(key: str, name: str, table: Mapping[str, T]) -> T:
    """What a table holds under the name that a config has under ``key``, or a UsageError with the nearest."""
    if name not in table:
        raise UsageError(str(unknown_name(key, name, table)))
    return table[name]


def accepted(constructor: Callable[..., Any], block: ConfigDict) -> dict[str, Any]:
    """The keys of a block that a constructor takes; the others belong to other names."""
    return {name: block[name] for name in inspect.signature(constructor).parameters if name in block}


def options(
    config: ConfigDict, key: str, table: Mapping[str, Callable[..., Any]], keys: Mapping[str, str]
) -> dict[str, Any]:
    """The keyword arguments of the constructor that a config names, from keys of the same block.

    A key whose value is none leaves its argument at the constructor's own default.

    Args:
        config: the config.
        key: of the name, such as ``sampling.predictor``.
        table: of constructors by name.
        keys: the config's name (without its block) of every argument that one of them takes.

    Raises:
        UsageError: an unknown name, or a key that this name does not take has been set.
    """
    constructor, block = named(key, config[key], table), key.rpartition(".")[0]
    taken = set(inspect.signature(constructor).parameters)
    found = {}
    for argument, leaf in keys.items():
        value, default = config[block][leaf], config_keys()[f"{block}.{leaf}"].default
        if argument in taken:
            if value is not None:
                found[argument] = value
        elif value != default and leaf not in (keys[name] for name in taken & set(keys)):
            owners = sorted(
                name for name, other in table.items() if argument in inspect.signature(other).parameters
            )
            raise UsageError(
                f"config.{block}.{leaf}={value!r} is not for {key} {config[key]!r}, but for {', '.join(owners)}"
            )
    return found


def device(config: ConfigDict) -> torch.device:
    """The device of ``config.device``.

    Raises:
        UsageError: an unknown name, or a GPU is asked for and there is none.
    """
    try:
        return choose_device(config.device)
    except ValueError as error:
        raise UsageError(f"config.device: {error}") from error


def positive(config: ConfigDict, key: str, least: int = 1) -> int:
    """The integer of a dotted key, which must be at least ``least``.

    Raises:
        UsageError: it is not.
    """
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"config.{key} must be an integer >= {least}, got {value!r}")
    return value


def network_precision(config: ConfigDict, block: str, place: torch.device) -> torch.dtype:
    """The precision of the network on a device for a block with a key ``precision``, sampling or likelihood."""
    with block_errors(block):
        return choose_precision(config[block].precision, place)
