"""Score models for others: a folder that the library diffusers loads, and ``torch.export``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sde_diffusion.networks.adm import ADM, MeanChannels
from sde_diffusion.networks.levels import LevelUNet
from sde_diffusion.networks.unet import head_count, level_indices, level_widths
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.presets import chain_step
from sde_diffusion.pretrained.diffusers import PREDICTIONS, WEIGHTS, scheduler_betas, sources
from sde_diffusion.pretrained.level_names import split_rows
from sde_diffusion.pretrained.native import ExportError
from sde_diffusion.score import ScoreModel


def save_diffusers(model: ScoreModel, folder: str | Path, *, image_size: int | None = None) -> Path:
    """Writes a folder that ``DDPMPipeline.from_pretrained`` loads, with ``unet/`` for ``UNet2DModel``.

    That library has one architecture for this (:class:`UNet2D`, and with it :class:`ADM`), one way to tell the
    time (the number of a chain's step) and data in [-1, 1]; other models are refused.

    Args:
        model: the score model.
        folder: made if it is not there.
        image_size: height and width of the samples that pipelines draw; None for what the network's
            ``sample_size`` says.

    Raises:
        ExportError: the model does not fit; the message says each reason.
    """
    net = model.net.net if isinstance(model.net, MeanChannels) else model.net
    reasons = []
    config: dict[str, Any] = {}
    try:
        config = unet2d_config(net)
    except ExportError as error:
        reasons.append(str(error))
    reasons += _process_reasons(model)
    size = image_size or config.get("sample_size")
    if config and size is None:
        reasons.append("the size of the images is not known: give image_size")
    if reasons:
        raise ExportError(f"diffusers has no such model: {'; '.join(reasons)}")
    assert isinstance(net, LevelUNet)  # or unet2d_config had refused it
    config["sample_size"] = size
    scheduler = {
        "_class_name": "DDPMScheduler",
        **_schedule(model.sde.betas),  # type: ignore[attr-defined]
        "prediction_type": next(name for name, p in PREDICTIONS.items() if p is model.parametrization),
        "variance_type": "learned_range" if isinstance(model.net, MeanChannels) else "fixed_small",
        "clip_sample": True,
    }
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    state = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    folder = Path(folder)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    weights = {name: part.clone() for name, part in split_rows(net, sources(net), state).items()}
    save_file(weights, folder / "unet" / WEIGHTS[0], metadata={"format": "pt"})
    _write(folder / "unet" / "config.json", {"_class_name": "UNet2DModel", **config})
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write(folder / "model_index.json", index)
    return folder


def unet2d_config(net: nn.Module) -> dict[str, Any]:
    """The options with which diffusers' UNet2DModel is the same function as ``net``.

    Raises:
        ExportError: there are none; the message says each reason.
    """
    if isinstance(net, UNet2D):
        return {name: value for name, value in net.config.items() if name != "checkpointing"}
    if not isinstance(net, ADM):
        raise ExportError(f"the network is a {type(net).__name__}, not a UNet2D or an ADM")
    return _adm_config(net)


def _adm_config(net: ADM) -> dict[str, Any]:
    options = net.config
    reasons = []
    widths = level_widths(options["channels"], options["channel_multipliers"])
    attended = level_indices(options["attention_levels"], len(widths))
    heads = {
        width // head_count(width, count, options["head_channels"])
        for count in {options["heads"], options["decoder_heads"] or options["heads"]}
        for width in {widths[-1], *(widths[level] for level in attended)}
    }
    if len(heads) > 1:
        reasons.append(f"its attention heads are of different widths, {sorted(heads)}")
    if widths[0] != options["channels"]:
        reasons.append(f"its first level is {widths[0]} wide and its embedding {options['channels']}")
    if options["resampling"] == "resampled":
        reasons.append("it resamples without weights between its blocks")
    if options["null_class"]:
        reasons.append("it has a null class")
    if any(width % options["groups"] for width in widths):
        reasons.append(f"{options['groups']} groups do not divide its widths {widths}")
    if reasons:
        raise ExportError("; ".join(reasons))
    inside = options["resampling"] == "block"
    down = [
        "AttnDownBlock2D" if level in attended else "ResnetDownsampleBlock2D" if inside else "DownBlock2D"
        for level in range(len(widths))
    ]
    up = [
        "AttnUpBlock2D" if level in attended else "ResnetUpsampleBlock2D" if inside else "UpBlock2D"
        for level in range(len(widths))
    ]
    kind = "resnet" if inside else "conv"
    return {
        "in_channels": net.in_channels,
        "out_channels": net.out_channels,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": widths,
        "layers_per_block": options["blocks_per_level"],
        "downsample_padding": 1,
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": options["dropout"],
        "attention_head_dim": heads.pop(),
        "norm_num_groups": options["groups"],
        "attn_norm_num_groups": options["groups"],
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
        "num_class_embeds": options["num_classes"],
    }


def _process_reasons(model: ScoreModel) -> list[str]:
    """Why the chain, the parametrization or the conditioning does not fit."""
    reasons = []
    betas = getattr(model.sde, "betas", None)
    if betas is None:
        reasons.append(f"its process is a {type(model.sde).__name__} and no chain of betas, DDPM")
    elif model.conditioning.name != chain_step(len(betas)).name:
        reasons.append(f"its network is told {model.conditioning.name!r} and not the number of the step")
    if not any(known is model.parametrization for known in PREDICTIONS.values()):
        reasons.append(
            f"its parametrization is {model.parametrization.name!r}, not one of {', '.join(PREDICTIONS)}"
        )
    if model.input_scaling.name != "unscaled" and (betas is None or model.sigma_data != 1):
        reasons.append(f"its input is scaled by {model.input_scaling.name!r}")
    if tuple(model.data_range) != (-1.0, 1.0):
        reasons.append(f"its data are in {model.data_range} and not in (-1, 1)")
    if hasattr(model, "levels"):
        reasons.append("its network gives logits of grey levels")
    return reasons


class _Labelled(nn.Module):
    """A score model with labels as a third argument, for programs have no keywords of free names."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.model(x, t, y=y)


def export_program(
    model: ScoreModel, shape: Sequence[int], *, labels: bool = False, device: str = "cpu"
) -> ExportedProgram:
    """The score as a program of ``torch.export``: ``program.module()(x, t)``, or ``(x, t, y)`` with labels.

    x is float32, t float64, y int64, and the batch size is free (2 or more). ``torch.export.save`` writes the
    program to a file that runs without this package.

    Args:
        model: the score model; it is set to evaluation mode.
        shape: of one sample, such as (3, 32, 32).
        labels: the program takes class labels y.
        device: where the program runs.
    """
    batch = Dim("batch", min=2)
    t = torch.linspace(model.sde.t_min, model.sde.t_max, 3, dtype=torch.float64, device=device)
    inputs: tuple[Tensor, ...] = (torch.zeros(3, *shape, device=device), t)
    called: nn.Module = model.to(device).eval()
    if labels:
        inputs += (torch.zeros(3, dtype=torch.int64, device=device),)
        called = _Labelled(model).eval()
    with torch.no_grad():
        return torch.export.export(called, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def _schedule(betas: tuple[float, ...]) -> dict[str, Any]:
    """The options of a scheduler for the chain: the name of its schedule where it has one, or all betas."""
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        options = {"beta_schedule": name, "num_train_timesteps": len(betas)}
        table = scheduler_betas(options)
        if torch.allclose(table, torch.tensor(betas, dtype=torch.float64), rtol=1e-5, atol=1e-7):
            return options
    return {"num_train_timesteps": len(betas), "trained_betas": list(betas)}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
