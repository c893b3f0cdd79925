"""Folders of the library diffusers: a ``UNet2DModel`` and its noise scheduler.

Both layouts are known: a pipeline (``model_index.json``, ``unet/``, ``scheduler/``), and a model by itself
(``config.json``, weights, ``scheduler_config.json``). The library is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import MeanChannels
from sde_diffusion.networks.levels import LevelUNet
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.parametrization import DATA, NOISE, Parametrization, V
from sde_diffusion.presets import Preset, chain, chain_step, cosine_betas
from sde_diffusion.pretrained.level_names import Names, level_sources, stack_rows, stage_places
from sde_diffusion.pretrained.state import (
    PretrainedError,
    Source,
    load_mapped,
    load_safetensors,
    load_torch,
    read_json,
)
from sde_diffusion.score import UNSCALED, ScoreModel

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PREDICTIONS: dict[str, Parametrization] = {"epsilon": NOISE, "sample": DATA, "v_prediction": V}
_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "modulation": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
#: The parts of attention, today and until diffusers 0.12.
_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass(frozen=True)
class _Files:
    """Where the parts of a model lie."""

    config: Path
    weights: Path
    scheduler: Path


def detect(path: Path) -> bool:
    """Whether ``path`` is a folder of diffusers, or the file of weights in one."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in WEIGHTS:
        return False
    if (folder / "model_index.json").is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and str(read_json(config).get("_class_name", "")).startswith("UNet")


def load(path: Path, config: Mapping[str, Any] | Preset | None, ema: bool) -> ScoreModel:
    """The score model of a folder.

    Args:
        path: the folder, or its file of weights.
        config: options of UNet2DModel and, under "scheduler", of the scheduler, over those in the folder; or a
            preset of a UNet2D.
        ema: of no effect: a folder has one set of weights.

    Raises:
        PretrainedError: another kind of network or scheduler, or weights that do not fit.
    """
    files = _find(path if path.is_dir() else path.parent)
    state = (
        load_safetensors(files.weights)
        if files.weights.suffix == ".safetensors"
        else load_torch(files.weights)
    )
    if isinstance(config, Preset):
        net = config.build_network()
        if not isinstance(net, UNet2D):
            raise PretrainedError(
                f"the preset is a {type(net).__name__}, but {files.weights} is a UNet2DModel"
            )
        _fill(net, state)
        return config.build(net)
    given = dict(config or {})
    scheduler = _options(files.scheduler, given.pop("scheduler", {}), "scheduler")
    options = _options(files.config, given.pop("unet", {}) | given, "unet")
    name = options.pop("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise PretrainedError(
            f"{files.config} is a {name}; of diffusers' networks only UNet2DModel is known here"
        )
    options = {key: value for key, value in options.items() if not key.startswith("_")}
    try:
        built = UNet2D(**options)
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"{files.config} is of no architecture known here: {error}") from error
    _fill(built, state)
    return scheduled(built, scheduler, str(files.scheduler))


def scheduled(net: UNet2D, scheduler: Mapping[str, Any], where: str) -> ScoreModel:
    """The score model of a network and the options of its scheduler; ``where`` names them in errors."""
    name = str(scheduler.get("_class_name", "DDPMScheduler"))
    if "beta_schedule" not in scheduler and scheduler.get("trained_betas") is None:
        raise PretrainedError(f"{where} ({name}) has neither beta_schedule nor trained_betas: it is no chain")
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise unknown_name("prediction_type", kind, PREDICTIONS)
    steps = scheduler_betas(scheduler)
    learned = str(scheduler.get("variance_type", "")).startswith("learned")
    whole = net.out_channels == 2 * net.in_channels and learned
    return ScoreModel(
        MeanChannels(net, net.in_channels) if whole else net,
        chain(steps),
        PREDICTIONS[kind],
        conditioning=chain_step(len(steps)),
        input_scaling=UNSCALED,
    )


def scheduler_betas(scheduler: Mapping[str, Any]) -> Tensor:
    """The chain of a scheduler's options, float64, with exactly the library's marginals.

    The library makes a table of ``abar_i = prod (1 - beta_j)`` in float32, from which both its training noise
    and its steps come; rounding changes ``1 - abar`` by 1e-4 of it at the first steps. Networks have learned
    with that table, so it is the table that counts here, and the betas are ``1 - abar_i / abar_{i-1}``.

    Raises:
        PretrainedError: a chain whose last step leaves nothing of the data (``rescale_betas_zero_snr``).
        ValueError: an unknown ``beta_schedule``.
    """
    kept = (1 - _scheduler_table(scheduler)).cumprod(0).double()
    return 1 - kept / torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])


def _scheduler_table(scheduler: Mapping[str, Any]) -> Tensor:
    """The library's betas, float32."""
    steps = int(scheduler.get("num_train_timesteps", 1000))
    first, last = float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02))
    if scheduler.get("rescale_betas_zero_snr"):
        raise PretrainedError(
            "rescale_betas_zero_snr=True ends at a signal of zero, where noise says nothing of the data"
        )
    if scheduler.get("trained_betas") is not None:
        return torch.as_tensor(scheduler["trained_betas"], dtype=torch.float32)
    tables = {
        "linear": lambda: torch.linspace(first, last, steps),
        "scaled_linear": lambda: torch.linspace(first**0.5, last**0.5, steps).square(),
        "squaredcos_cap_v2": lambda: cosine_betas(steps),
        "sigmoid": lambda: torch.linspace(-6, 6, steps).sigmoid() * (last - first) + first,
    }
    name = scheduler["beta_schedule"]
    if name not in tables:
        raise unknown_name("beta_schedule", name, tables)
    return tables[name]().float()


def sources(net: LevelUNet) -> dict[str, Source]:
    """Where each weight of a :class:`UNet2D` (or an :class:`ADM`, which has the same parts) comes from."""
    return level_sources(net, Names(_BLOCK, _attention), _places(net))


def _attention(place: str, heads: int) -> dict[str, Source]:
    found = {}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = Source((f"{place}.group_norm.{kind}",))
        found[f"qkv.{kind}"] = Source(
            tuple(f"{place}.{part}.{kind}" for part in ("to_q", "to_k", "to_v")), stack_rows
        )
        found[f"out.{kind}"] = Source((f"{place}.to_out.0.{kind}",))
    return found


def _places(net: LevelUNet) -> dict[str, str]:
    places = {
        "stem": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
        "condition.first": "time_embedding.linear_1",
        "condition.second": "time_embedding.linear_2",
    }
    if net.condition.classes is not None:
        places["condition.classes"] = "class_embedding"
    for ours, theirs in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        for level, stages in enumerate(net.get_submodule(ours).children()):
            for i, stage in enumerate(stages.children()):
                block, attention = (f"{theirs}.{level}.{part}.{i}" for part in ("resnets", "attentions"))
                places |= stage_places(stage, f"{ours}.{level}.{i}", block, attention)
    for i, stage in enumerate(net.middle):
        places |= stage_places(stage, f"middle.{i}", f"mid_block.resnets.{i}", "mid_block.attentions.0")
    for ours, theirs in (
        ("downsamplers", "down_blocks.{}.downsamplers.0"),
        ("upsamplers", "up_blocks.{}.upsamplers.0"),
    ):
        for level, module in enumerate(net.get_submodule(ours).children()):
            conv = ".conv" if hasattr(module, "conv") else ""
            places[f"{ours}.{level}{conv}"] = theirs.format(level) + conv
    return places


def _fill(net: UNet2D, state: Mapping[str, Tensor]) -> None:
    load_mapped(net, {_today(key): value for key, value in state.items()}, sources(net))


def _today(key: str) -> str:
    """The name that a weight has today."""
    if ".attentions." not in key:
        return key
    for new, old in _ATTENTION.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def _find(folder: Path) -> _Files:
    index = folder / "model_index.json"
    unet, scheduler = folder, folder
    if index.is_file():
        parts = {name: part for name, part in read_json(index).items() if isinstance(part, list)}
        others = sorted(set(parts) - {"unet", "scheduler"})
        if "unet" not in parts or others:
            raise PretrainedError(
                f"{index} is a pipeline of {', '.join(sorted(parts))}; only a unet and a scheduler are known here"
            )
        unet, scheduler = folder / "unet", folder / "scheduler"
    weights = [unet / name for name in WEIGHTS if (unet / name).is_file()]
    if not (unet / "config.json").is_file() or not weights:
        raise PretrainedError(
            f"{unet} must hold config.json and one of {', '.join(WEIGHTS)}; it holds {_names(unet)}"
        )
    return _Files(unet / "config.json", weights[0], scheduler / "scheduler_config.json")


def _names(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"


def _options(file: Path, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if not file.is_file() and not given:
        raise PretrainedError(f"{file} is missing; give its contents as config={{{kind!r}: {{...}}}}")
    return {**(read_json(file) if file.is_file() else {}), **given}
