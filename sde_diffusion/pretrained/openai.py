"""Checkpoints of improved-diffusion and guided-diffusion (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021).

The files are bare state dicts. They show nearly the whole architecture (:func:`infer`), but not how attention
splits into heads, nor anything of the chain. These come from flags: ``config=``, over a ``flags.json`` or
``config.json`` beside the file. Flags are the arguments of the repositories' scripts (``num_channels``,
``attention_resolutions`` in pixels, ...) or of their UNetModel (``model_channels``, ``attention_resolutions`` as
factors, ...; by themselves or under "unet").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import ADM, mean_of
from sde_diffusion.networks.blocks import ResBlock
from sde_diffusion.parametrization import DATA, NOISE
from sde_diffusion.presets import PRESETS, Preset, chain, chain_step, cosine_betas, rescaled_chain_step
from sde_diffusion.pretrained.level_names import Names, level_sources, stage_places
from sde_diffusion.pretrained.state import (
    PretrainedError,
    Source,
    is_torch_file,
    load_mapped,
    load_torch,
    read_json,
)
from sde_diffusion.score import UNSCALED, ScoreModel
from sde_diffusion.sdes import VP

_log = logging.getLogger(__name__)

_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "modulation": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_SIGNATURE = {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"}
_SCHEDULES = ("linear", "cosine")
#: Flags that the weights do not show, with the defaults of both repositories.
_DEFAULTS: dict[str, Any] = {
    "use_new_attention_order": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
}
_CHAIN = ("diffusion_steps", "noise_schedule")
#: Flags that the weights show as well, and how; they are compared.
_SHOWN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "in_channels": lambda found: found["in_channels"],
    "out_channels": lambda found: found["out_channels"],
    "num_channels": lambda found: found["channels"],
    "model_channels": lambda found: found["channels"],
    "num_res_blocks": lambda found: found["blocks_per_level"],
    "channel_mult": lambda found: list(found["channel_multipliers"]),
    "num_classes": lambda found: found["num_classes"],
    "class_cond": lambda found: found["num_classes"] is not None,
    "learn_sigma": lambda found: found["out_channels"] == 2 * found["in_channels"],
    "use_scale_shift_norm": lambda found: found["scale_shift"],
    "resblock_updown": lambda found: found["resampling"] == "block",
}
#: Further flags, which change nothing here, or are read on their own.
_OTHER = {
    *("num_heads", "num_head_channels", "num_heads_upsample", "attention_resolutions", "rescale_timesteps"),
    *("dropout", "image_size", "conv_resample", "dims", "use_checkpoint", "use_fp16", "timestep_respacing"),
    *("use_kl", "rescale_learned_sigmas", "sigma_small", "unet"),
}


def detect(path: Path) -> bool:
    """Whether ``path`` is a state dict of these repositories, or a folder with one in its only ``.pt`` file."""
    files = _files(path)
    if len(files) != 1 or not is_torch_file(files[0]):
        return False
    content = load_torch(files[0], meta=True)
    return isinstance(content, dict) and set(content) >= _SIGNATURE


def load(path: Path, config: Mapping[str, Any] | Preset | None, ema: bool) -> ScoreModel:
    """The score model of a checkpoint.

    Args:
        path: the ``.pt`` file, or a folder with one such file.
        config: flags, over those beside the file; or a preset.
        ema: of no effect: raw and averaged weights are files of their own here.

    Raises:
        PretrainedError: flags are missing or contradict the weights, or the file is damaged.
        ValueError: a flag in ``config`` of an unknown name.
    """
    files = _files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise PretrainedError(f"{path} must hold one .pt file, found {names}: name the file itself")
    state = load_torch(files[0])
    if not isinstance(state, dict) or not set(state) >= _SIGNATURE:
        lacking = sorted(_SIGNATURE - set(state)) if isinstance(state, dict) else sorted(_SIGNATURE)
        raise PretrainedError(f"{files[0]} is no UNetModel of OpenAI's: it lacks {', '.join(lacking)}")
    if isinstance(config, Preset):
        net = config.build_network()
        if not isinstance(net, ADM):
            raise PretrainedError(f"the preset is a {type(net).__name__}, but {files[0]} is an ADM")
        new_order = any(PRESETS.get(name) is config for name in NEW_ORDER_PRESETS)
        load_mapped(net, state, sources(net, new_order=new_order))
        return config.build(net)
    flags = _flags(files[0], config)
    found = infer(state)
    _compare(flags, found, files[0])
    heads = _heads(flags, files[0])
    silent = ", ".join(f"{name}={_DEFAULTS[name]!r}" for name in _CHAIN if name not in flags)
    if silent:
        _log.warning(
            "the flags of %s say nothing of the chain; took %s, as the original code does", files[0], silent
        )
    flags = _DEFAULTS | flags
    net = ADM(**found, **heads, dropout=flags.get("dropout", 0.0))
    load_mapped(net, state, sources(net, new_order=bool(flags["use_new_attention_order"])))
    return _score(net, flags, files[0])


#: Presets whose published weights have the newer order of queries, keys and values.
NEW_ORDER_PRESETS = frozenset({"adm_imagenet64"})


def betas(schedule: str, steps: int) -> Tensor:
    """The chain of the flags ``noise_schedule`` and ``diffusion_steps``, float64.

    "linear" goes from 1e-4 to 0.02 for 1000 steps, and proportionally faster for fewer; "cosine" is
    :func:`~sde_diffusion.presets.cosine_betas`.
    """
    if schedule not in _SCHEDULES:
        raise unknown_name("noise_schedule", schedule, _SCHEDULES)
    if schedule == "linear":
        return VP().discretize(steps)
    return cosine_betas(steps)


def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`ADM` that names and shapes of the weights show: all but the heads.

    Raises:
        PretrainedError: the names are not those of a whole UNetModel for images.
    """
    try:
        return _infer(state)
    except KeyError as error:
        raise PretrainedError(f"the weights are not those of a whole UNetModel: {error} is missing") from None


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    stem = state["input_blocks.0.0.weight"]
    if stem.ndim != 4:
        raise PretrainedError(f"only networks for images are known here, got a stem of {tuple(stem.shape)}")
    last = max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
    plain = [i for i in range(1, last + 1) if f"input_blocks.{i}.0.in_layers.0.weight" not in state]
    # Blocks that halve the resolution look like all others; those that double it come second or third.
    doubling = [
        key
        for key in state
        if key.startswith("output_blocks.")
        and key.endswith(".in_layers.0.weight")
        and key.split(".")[2] != "0"
    ]
    levels = 1 + (len(doubling) or len(plain))
    if (last + 1) % levels:
        raise PretrainedError(
            f"the weights are not those of a UNetModel: {last} input blocks on {levels} levels"
        )
    blocks = (last + 1) // levels - 1
    channels = state["time_embed.0.weight"].shape[1]
    first = [1 + level * (blocks + 1) for level in range(levels)]  # input block that begins the level
    widths = [len(state[f"input_blocks.{i}.0.out_layers.0.weight"]) for i in first]
    strided = any(f"input_blocks.{i}.0.op.weight" in state for i in plain)
    classes = state.get("label_emb.weight")
    return {
        "in_channels": stem.shape[1],
        "out_channels": len(state["out.2.weight"]),
        "channels": channels,
        "channel_multipliers": tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        "blocks_per_level": blocks,
        "attention_levels": tuple(
            level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in state
        ),
        "scale_shift": len(state["input_blocks.1.0.emb_layers.1.weight"]) == 2 * widths[0],
        "resampling": "block" if doubling else "strided" if strided or levels == 1 else "resampled",
        "num_classes": None if classes is None else len(classes),
    }


def sources(net: ADM, *, new_order: bool) -> dict[str, Source]:
    """Where each weight of ``net`` comes from in a state dict of OpenAI's.

    Args:
        net: the network.
        new_order: the rows of ``qkv`` are first all queries, then all keys, then all values
            (``use_new_attention_order``); otherwise each head's queries, keys and values follow each other.
    """

    def attention(place: str, heads: int) -> dict[str, Source]:
        def rows(weight: Tensor) -> Tensor:
            weight = weight.flatten(1) if weight.ndim > 1 else weight
            return weight if new_order else weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

        found = {
            f"{ours}.{kind}": Source((f"{place}.{theirs}.{kind}",))
            for ours, theirs in (("norm", "norm"), ("out", "proj_out"))
            for kind in ("weight", "bias")
        }
        found["out.weight"] = Source(found["out.weight"].keys, lambda weight: weight.flatten(1))
        for kind in ("weight", "bias"):
            found[f"qkv.{kind}"] = Source((f"{place}.qkv.{kind}",), rows)
        return found

    return level_sources(net, Names(_BLOCK, attention), _places(net))


def _places(net: ADM) -> dict[str, str]:
    places = {
        "stem": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
        "condition.first": "time_embed.0",
        "condition.second": "time_embed.2",
    }
    if net.condition.classes is not None:
        places["condition.classes"] = "label_emb"
    position = 0
    for level, stages in enumerate(net.encoder):
        for i, stage in enumerate(stages.children()):
            position += 1
            theirs = f"input_blocks.{position}"
            places |= stage_places(stage, f"encoder.{level}.{i}", f"{theirs}.0", f"{theirs}.1")
        if level < len(net.downsamplers):
            position += 1
            places |= _resampler(net, f"downsamplers.{level}", f"input_blocks.{position}.0", "op")
    places |= stage_places(net.middle[0], "middle.0", "middle_block.0", "middle_block.1")
    places |= stage_places(net.middle[1], "middle.1", "middle_block.2", "")
    position = -1
    for level, stages in enumerate(net.decoder):
        for i, stage in enumerate(stages.children()):
            position += 1
            theirs = f"output_blocks.{position}"
            places |= stage_places(stage, f"decoder.{level}.{i}", f"{theirs}.0", f"{theirs}.1")
        if level < len(net.upsamplers):
            after = 2 if f"decoder.{level}.{i}.attention" in places else 1
            places |= _resampler(net, f"upsamplers.{level}", f"output_blocks.{position}.{after}", "conv")
    return places


def _resampler(net: ADM, ours: str, theirs: str, convolution: str) -> dict[str, str]:
    module = net.get_submodule(ours)
    if isinstance(module, ResBlock):
        return {ours: theirs}
    return {f"{ours}.conv": f"{theirs}.{convolution}"} if hasattr(module, "conv") else {}


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.pt"))


def _flags(file: Path, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags beside the file, and over them those of ``config``."""
    flags: dict[str, Any] = {}
    for name in ("config.json", "flags.json"):
        if (file.parent / name).is_file():
            flags |= _flat(read_json(file.parent / name))
    given = _flat(config or {})
    for name in given:
        if name not in (allowed := {*_DEFAULTS, *_SHOWN, *_OTHER}):
            raise unknown_name("flag", name, allowed)
    return {
        name: value for name, value in (flags | given).items() if value is not None or name == "num_classes"
    }


def _flat(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {**flags, **flags["unet"]} if isinstance(flags.get("unet"), Mapping) else dict(flags)


def _numbers(value: Any) -> list[float]:
    parts = (
        value.split(",") if isinstance(value, str) else [value] if isinstance(value, (int, float)) else value
    )
    return [float(part) for part in parts if str(part).strip()]


def _compare(flags: Mapping[str, Any], found: dict[str, Any], file: Path) -> None:
    """Refuses flags that say something else than the weights."""
    wrong = []
    for name, shown in _SHOWN.items():
        stated = flags.get(name, "")
        if name == "channel_mult" and stated != "":
            stated = _numbers(stated)
        if stated != "" and name in flags and stated != shown(found):
            wrong.append(f"{name} is {flags[name]!r} in the flags and {shown(found)!r} in the weights")
    attended = {2**level for level in found["attention_levels"]}
    possible = {2**level for level in range(len(found["channel_multipliers"]))}
    stated = flags.get("attention_resolutions")
    # The scripts' flag is in pixels, the network's own in factors.
    size = flags.get("image_size") if "num_channels" in flags else None
    if stated is not None and ("model_channels" in flags or size):
        factors = {size / number if size else number for number in _numbers(stated)}
        if factors & possible != attended:
            wrong.append(
                f"attention_resolutions is {stated!r} in the flags, and the weights have attention at the "
                f"factors {sorted(attended)}"
            )
    if wrong:
        raise PretrainedError(f"the flags do not fit {file}: {'; '.join(wrong)}")


def _heads(flags: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The heads as arguments of :class:`ADM`."""
    width, count, decoder = (
        flags[name] if flags.get(name, -1) != -1 else None
        for name in ("num_head_channels", "num_heads", "num_heads_upsample")
    )
    if width is not None:
        return {"head_channels": width}
    if count is None:
        defaults = ", ".join(f"{name}={value!r}" for name, value in _DEFAULTS.items())
        raise PretrainedError(
            f"{file} does not show num_heads or num_head_channels: give one of them with config={{...}} or in a "
            f"flags.json beside it. The same holds for {defaults}, with these values where nothing is said"
        )
    return {"heads": count} if decoder is None else {"heads": count, "decoder_heads": decoder}


def _score(net: ADM, flags: Mapping[str, Any], file: Path) -> ScoreModel:
    steps = flags["diffusion_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"diffusion_steps must be an integer >= 2, got {steps!r}")
    rescaled = flags.get("rescale_timesteps", False)
    if steps != 1000 and "rescale_timesteps" not in flags:
        raise PretrainedError(
            f"{file} was trained on {steps} steps: say by the flag rescale_timesteps whether the network was told "
            "their numbers times 1000 / steps (improved-diffusion's default is True, guided-diffusion's False)"
        )
    return ScoreModel(
        mean_of(net),
        chain(betas(flags["noise_schedule"], steps)),
        DATA if flags["predict_xstart"] else NOISE,
        conditioning=rescaled_chain_step(steps) if rescaled else chain_step(steps),
        input_scaling=UNSCALED,
    )
