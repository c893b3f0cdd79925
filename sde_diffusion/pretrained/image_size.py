"""How large the images of a published model are, which its network does not say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sde_diffusion.presets import PRESETS, Preset
from sde_diffusion.pretrained import edm
from sde_diffusion.pretrained.state import read_json

_BESIDE = ("config.json", "flags.json")
#: Where the formats state it, as dotted keys.
_KEYS = (
    "data.image_size",
    "unet.sample_size",
    "sample_size",
    "unet.image_size",
    "image_size",
    "img_resolution",
)


def stored_image_size(
    path: Path, config: Mapping[str, Any] | Preset | None, net: nn.Module
) -> tuple[int, int] | None:
    """Height and width as the given config, the network, the files or a preset of this network state them.

    Args:
        path: the file or folder of the model.
        config: what was given to :func:`~sde_diffusion.pretrained.load_pretrained`.
        net: the network that was loaded.

    Returns:
        None where nothing states them.
    """
    if isinstance(config, Preset):
        return _pair(config.image_size)
    options: Mapping[str, Any] = getattr(net, "config", {})
    folder = path if path.is_dir() else path.parent
    stated = [config or {}, options, *(read_json(folder / n) for n in _BESIDE if (folder / n).is_file())]
    sizes = [_pair(_at(mapping, key)) for mapping in stated for key in _KEYS]
    found = next((size for size in sizes if size is not None), None)
    return found or _pair(edm.snapshot_resolution(path)) or _of_preset(net, options)


def _at(mapping: Mapping[str, Any], key: str) -> Any:
    block, _, leaf = key.rpartition(".")
    inner = mapping.get(block) if block else mapping
    return inner.get(leaf) if isinstance(inner, Mapping) else None


def _pair(size: Any) -> tuple[int, int] | None:
    sides = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        return None
    return sides[0], sides[1]


def _of_preset(net: nn.Module, options: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of the presets that have this very network, if they agree."""
    sizes = set()
    for preset in PRESETS.values():
        if preset.network is type(net):
            bound = inspect.signature(preset.network).bind(**preset.arguments)
            bound.apply_defaults()
            if bound.arguments == options:
                sizes.add(preset.image_size)
    return _pair(sizes.pop()) if len(sizes) == 1 else None
