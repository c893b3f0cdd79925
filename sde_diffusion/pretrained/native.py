"""This package's own file: the weights as safetensors, and in its header all that makes them a score."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sde_diffusion import networks
from sde_diffusion.ddpm import DDPM
from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import ADM, MeanChannels
from sde_diffusion.networks.edm import DhariwalUNet, SongUNet
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.parametrization import Parametrization, parametrization
from sde_diffusion.preconditioning import iddpm_preconditioning, ve_preconditioning, vp_preconditioning
from sde_diffusion.presets import SIGMA, TIME_999, Preset, chain_step, ladder_step, rescaled_chain_step
from sde_diffusion.pretrained.state import PretrainedError, load_safetensors, load_state
from sde_diffusion.quantized import QuantizedScoreModel
from sde_diffusion.score import LOG_NOISE, TIME, UNIT_VARIANCE, UNSCALED, Conditioning, ScoreModel
from sde_diffusion.sdes import EDM, SDE, VE, VP, CosineVP, SubVP

#: The key of the description in the header of the file.
HEADER = "sde_diffusion"
#: Networks that a file may name: those the package offers, and those of published models.
NETWORKS: dict[str, type[nn.Module]] = {name: getattr(networks, name) for name in networks.__all__}
NETWORKS |= {network.__name__: network for network in (ADM, DhariwalUNet, NCSNpp, SongUNet, UNet2D)}
SDES: dict[str, type[SDE]] = {sde.__name__: sde for sde in (CosineVP, DDPM, EDM, SubVP, VE, VP)}
_SCALINGS = {scaling.name: scaling for scaling in (UNIT_VARIANCE, UNSCALED)}
_CONDITIONINGS = {c.name: c for c in (LOG_NOISE, TIME, TIME_999, SIGMA)}
_CONDITIONINGS |= {
    made.conditioning.name: made.conditioning
    for made in (iddpm_preconditioning(), ve_preconditioning(), vp_preconditioning())
}
_STEPS: dict[str, Callable[[int], Conditioning]] = {
    "chain_step": chain_step,
    "rescaled_chain_step": rescaled_chain_step,
    "ladder_step": ladder_step,
}


class ExportError(ValueError):
    """A model that the format cannot hold; the message says what does not fit."""


def save_pretrained(model: ScoreModel, path: str | Path) -> Path:
    """Writes a score model to one safetensors file that :func:`load_pretrained` reads back to the bit.

    The header holds, as JSON under "sde_diffusion", the network's class and arguments, the forward process, the
    parametrization, the conditioning and the scaling. The file is replaced atomically.

    Args:
        model: a :class:`ScoreModel` or :class:`QuantizedScoreModel` of one of :data:`NETWORKS`.
        path: the file, named ``*.safetensors``.

    Raises:
        ValueError: another suffix.
        ExportError: a part of the model that the header cannot describe, such as a conditioning of one's own.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"the file must be named *.safetensors, got {path.name!r}")
    description = describe(model)
    # Clones, for safetensors takes no tensors that share memory.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in network_of(model).state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(state, partial, metadata={"format": "pt", HEADER: json.dumps(description)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def detect(path: Path) -> bool:
    """Whether ``path`` is a file of :func:`save_pretrained`, or a folder whose only such file it is."""
    file = _file(path)
    return file is not None and HEADER in _metadata(file)


def load(path: Path, config: Mapping[str, Any] | Preset | None, ema: bool) -> ScoreModel:
    """The score model of a file.

    Args:
        path: the file, or a folder with one.
        config: must be None: the file says everything.
        ema: of no effect: the file has one set of weights.

    Raises:
        PretrainedError: the file is damaged, or of a version that knows more than this one.
    """
    file = _file(path)
    if file is None:
        raise PretrainedError(f"{path} must hold one file *.safetensors")
    if config is not None:
        raise PretrainedError(f"{file} has its own description: give no config")
    try:
        description = json.loads(_metadata(file)[HEADER])
        model = build(description)
    except (KeyError, TypeError, ValueError) as error:
        raise PretrainedError(f"the header of {file} describes no model of this version: {error}") from error
    load_state(network_of(model), load_safetensors(file))
    return model


def describe(model: ScoreModel) -> dict[str, Any]:
    """All of a score model but its weights, as plain values; :func:`build` is the inverse.

    Raises:
        ExportError: a part has no such description.
    """
    if type(model) not in (ScoreModel, QuantizedScoreModel):
        raise ExportError(
            f"only a ScoreModel or a QuantizedScoreModel can be described, got {type(model).__name__}"
        )
    net = network_of(model)
    if NETWORKS.get(type(net).__name__) is not type(net):
        raise ExportError(f"the network is a {type(net).__name__}; known are {', '.join(NETWORKS)}")
    if SDES.get(type(model.sde).__name__) is not type(model.sde):
        raise ExportError(f"the process is a {type(model.sde).__name__}; known are {', '.join(SDES)}")
    description = {
        "version": 1,
        "network": {"name": type(net).__name__, "arguments": net.config},
        "mean_channels": model.net.channels if isinstance(model.net, MeanChannels) else None,
        "sde": {
            "name": type(model.sde).__name__,
            "arguments": {
                field.name: getattr(model.sde, field.name)
                for field in dataclasses.fields(model.sde)
                if field.init
            },
        },
        "levels": model.levels if isinstance(model, QuantizedScoreModel) else None,
        "level_features": isinstance(model, QuantizedScoreModel) and model.level_features,
        "level_counts": isinstance(model, QuantizedScoreModel) and model.level_counts,
        "parametrization": model.parametrization.name,
        "conditioning": model.conditioning.name,
        "input_scaling": model.input_scaling.name,
        "sigma_data": model.sigma_data,
        "data_range": model.data_range,
    }
    try:
        description = json.loads(json.dumps(description))
        again = build(description, "meta")
    except (TypeError, ValueError) as error:
        raise ExportError(f"the model cannot be described: {error}") from error
    _same_meaning(model, again)
    return description


def build(description: Mapping[str, Any], device: str = "cpu") -> ScoreModel:
    """The score model of :func:`describe`, with random weights on ``device``."""
    with torch.device(device):
        net: nn.Module = _named(NETWORKS, description["network"])
    if description["mean_channels"] is not None:
        net = MeanChannels(net, description["mean_channels"])
    sde: SDE = _named(SDES, description["sde"])
    told = _conditioning(description["conditioning"])
    sigma_data = description["sigma_data"]
    if description["levels"] is not None:
        return QuantizedScoreModel(
            net,
            sde,
            description["levels"],
            conditioning=told,
            sigma_data=sigma_data,
            # Files of earlier versions do not say.
            level_features=description.get("level_features", False),
            level_counts=description.get("level_counts", False),
        )
    if description["input_scaling"] not in _SCALINGS:
        raise unknown_name("input_scaling", description["input_scaling"], _SCALINGS)
    low, high = description["data_range"]
    return ScoreModel(
        net,
        sde,
        parametrization(description["parametrization"], sigma_data),
        conditioning=told,
        input_scaling=_SCALINGS[description["input_scaling"]],
        sigma_data=sigma_data,
        data_range=(low, high),
    )


def _named(known: Mapping[str, Callable[..., Any]], value: Mapping[str, Any]) -> Any:
    if value["name"] not in known:
        raise unknown_name("class", value["name"], known)
    arguments = {key: tuple(v) if isinstance(v, list) else v for key, v in value["arguments"].items()}
    return known[value["name"]](**arguments)


def _conditioning(name: str) -> Conditioning:
    steps = re.fullmatch(r"(\w+)_(\d+)", name)
    if name not in _CONDITIONINGS and steps and steps[1] in _STEPS:
        return _STEPS[steps[1]](int(steps[2]))
    if name not in _CONDITIONINGS:
        raise unknown_name("conditioning", name, (*_CONDITIONINGS, *(f"{kind}_<steps>" for kind in _STEPS)))
    return _CONDITIONINGS[name]


def _same_meaning(model: ScoreModel, again: ScoreModel) -> None:
    """Names are not enough: what they stand for must give the same numbers at times over the whole range."""
    sde = model.sde
    t = torch.linspace(sde.t_min, sde.t_max, 64, dtype=torch.float64, device="cpu")
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    given, read = model.conditioning, again.conditioning
    if not torch.equal(given.function(sde, t), read.function(again.sde, t)):
        raise ExportError(f"the conditioning {given.name!r} is not the one this name stands for: {read!r}")
    if any(
        not torch.equal(a, b)
        for a, b in zip(
            _targets(model.parametrization, alpha, sigma),
            _targets(again.parametrization, alpha, sigma),
            strict=True,
        )
    ):
        raise ExportError(
            f"the parametrization {model.parametrization.name!r} is not the one this name stands for"
        )


def _targets(what: Parametrization, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return what.coefficients(alpha, sigma)


def network_of(model: ScoreModel) -> nn.Module:
    """The network itself, without what chooses among its channels."""
    return model.net.net if isinstance(model.net, MeanChannels) else model.net


def _file(path: Path) -> Path | None:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 and files[0].suffix == ".safetensors" else None


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise PretrainedError(
            f"{file} ({file.stat().st_size} bytes) is truncated or damaged: {error}"
        ) from error
