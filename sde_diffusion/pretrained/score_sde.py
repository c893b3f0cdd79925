"""Checkpoints of the PyTorch score-SDE code (Song et al. 2021, github.com/yang-song/score_sde_pytorch).

A file holds ``{"optimizer", "model", "ema": {"shadow_params", ...}, "step"}``. Names of weights carry the prefix
``module.`` of DataParallel and the position of a layer in one flat list. The averages have no names: they are
in the order of the parameters that are trained, which leaves out the Fourier frequencies. The configuration
(sections training, model and data) lies beside the file as config.json, or is given.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.networks.blocks import (
    FIRDownConv,
    FIRUpConv,
    ResBlock,
    SelfAttention,
    StridedDownsample,
    StridedUpsample,
)
from sde_diffusion.networks.embeddings import FourierEmbedding
from sde_diffusion.networks.ncsnpp import Level, NCSNpp
from sde_diffusion.networks.progressive import InputSkip, OutputSkip, OutputStart, SideResidual
from sde_diffusion.parametrization import NOISE, RAW_SCORE
from sde_diffusion.presets import PRESETS, SIGMA, TIME_999, Preset, Process, chain, chain_step, ladder_step
from sde_diffusion.pretrained.state import (
    PretrainedError,
    Source,
    is_torch_file,
    load_mapped,
    load_torch,
    mapped_state,
    read_json,
)
from sde_diffusion.score import UNSCALED, ScoreModel
from sde_diffusion.sdes import VE, VP, SubVP


class _Float64:
    """Stands in for ``numpy.dtype`` while a file is read: float64, and nothing else."""

    def __init__(self, kind: str, *options: object) -> None:
        if kind != "f8":
            raise ValueError(f"a NumPy scalar of type {kind!r}, where only float64 is admitted")
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">"):
            raise ValueError(f"a NumPy scalar of byte order {state[1]!r}")
        self.order = state[1]


def _float64_scalar(dtype: _Float64, data: bytes) -> float:
    """Stands in for ``numpy.core.multiarray.scalar``: the number as a Python float."""
    (value,) = struct.unpack(f"{dtype.order}d", data)
    return float(value)


#: The learning rate is a numpy.float64 in files of the original training loop (its warm-up uses np.minimum).
#: These names make up that one type; they are read by what stands above, so none of NumPy's own code runs.
_FLOAT64 = (
    (_Float64, "numpy.dtype"),
    (_float64_scalar, "numpy.core.multiarray.scalar"),
    (_float64_scalar, "numpy._core.multiarray.scalar"),
)
#: The noise levels are stored beside the weights; they follow from the configuration.
_BUFFERS = ("sigmas",)


def detect(path: Path) -> bool:
    """Whether ``path`` is a file with the ``model`` and ``ema`` of score-SDE, or a folder with one such file."""
    file = _file(path)
    if file is None or not is_torch_file(file):
        return False
    content = load_torch(file, allowed=_FLOAT64, meta=True)
    return isinstance(content, dict) and {"model", "ema"} <= set(content)


def load(path: Path, config: Mapping[str, Any] | Preset | None, ema: bool) -> ScoreModel:
    """The score model of a checkpoint.

    Args:
        path: the file, or a folder with one such file.
        config: the configuration, as its ``ConfigDict.to_dict()``, or a preset; None for the config.json beside
            the file, or else the one preset that the weights fit.
        ema: the averaged weights, or those of the last step.

    Raises:
        PretrainedError: the file is damaged or something else, the configuration is missing or of a network that
            is not known here, or the weights do not fit it.
    """
    file = _file(path)
    if file is None:
        raise PretrainedError(f"{path} holds no checkpoint, or several: name one file")
    content = load_torch(file, allowed=_FLOAT64)
    state = _weights(content, file, ema)
    beside = file.parent / "config.json"
    if config is None:
        config = read_json(beside) if beside.is_file() else _fitting_preset(state, file)
    model = config.build() if isinstance(config, Preset) else from_config(config)
    if not isinstance(model.net, NCSNpp):
        raise PretrainedError(f"{file} is a checkpoint of score-SDE, and the preset one of another format")
    load_mapped(model.net, state, sources(model.net), ignored=_BUFFERS)
    return model


def from_config(config: Mapping[str, Any]) -> ScoreModel:
    """The score model that a configuration of score-SDE describes, with new weights.

    Raises:
        PretrainedError: an option is missing, or has a value that is not known here.
    """
    try:
        training, data, model = config["training"], config["data"], config["model"]
        arguments = _network_arguments(model, data, bool(training["continuous"]))
        sde, parametrization, told = _process(
            str(training["sde"]).lower(), bool(training["continuous"]), model
        )
    except KeyError as error:
        raise PretrainedError(f"the configuration of a score-SDE model lacks {error}") from error
    return ScoreModel(
        NCSNpp(**arguments),
        sde,
        parametrization,
        conditioning=told,
        input_scaling=UNSCALED,
        data_range=(-1.0, 1.0) if arguments["centered"] else (0.0, 1.0),
    )


def sources(net: NCSNpp) -> dict[str, Source]:
    """For each weight of ``net``, the names in a checkpoint (without ``module.``) that make it."""
    names = {module: f"{name}." for name, module in net.named_modules()}
    found: dict[str, Source] = {}
    projections: list[str] = []
    for index, layer in enumerate(_layers(net)):
        theirs = f"all_modules.{index}."
        if isinstance(layer, ResBlock):
            projections.append(theirs + "Dense_0.")
        for name, source in _layer_sources(layer, theirs, bool(net.config["resample_in_block"])):
            found[names[layer] + name] = source
    for kind in ("weight", "bias"):
        keys = tuple(prefix + kind for prefix in projections)
        found[f"modulations.linear.{kind}"] = Source(keys, _stack)
    return found


def _layers(net: NCSNpp) -> Iterator[nn.Module]:
    """The parts of ``net`` in the order of the flat list of the original."""
    if net.fourier:
        yield net.condition.features
    yield net.condition.first
    yield net.condition.second
    yield net.stem
    for part in (*net.encoder, net.middle, *net.decoder):
        stages = part.stages if isinstance(part, Level) else part
        for stage in stages:
            yield from stage.children()
        if isinstance(part, Level):
            yield from _beside(part.head)
            yield from [] if part.resample is None else [part.resample]
            yield from _beside(part.joint)
    yield from _beside(net.head)


def _beside(part: nn.Module | None) -> Iterator[nn.Module]:
    """The same for what stands beside the main path."""
    if isinstance(part, InputSkip):
        yield part
    elif isinstance(part, SideResidual):
        yield part.resample
    elif isinstance(part, (OutputStart, OutputSkip)):
        yield from (part.head.norm, part.head.conv)
    elif part is not None:
        yield from (part.norm, part.conv)  # type: ignore[misc]


def _layer_sources(layer: nn.Module, theirs: str, in_block: bool) -> Iterator[tuple[str, Source]]:
    """The weights of one layer: our names within it, and where they come from."""
    renamed: dict[str, str] = {}
    if isinstance(layer, FourierEmbedding):
        yield "frequencies", Source((theirs + "W",))
    elif isinstance(layer, ResBlock):
        renamed = {
            "norm1.": "GroupNorm_0.",
            "conv1.": "Conv_0.",
            "norm2.": "GroupNorm_1.",
            "conv2.": "Conv_1.",
        }
        if isinstance(layer.skip, nn.Conv2d) and in_block:
            renamed["skip."] = "Conv_2."
        elif isinstance(layer.skip, nn.Conv2d):
            yield "skip.weight", Source((theirs + "NIN_0.W",), _pixelwise)
            yield "skip.bias", Source((theirs + "NIN_0.b",))
    elif isinstance(layer, SelfAttention):
        renamed = {"norm.": "GroupNorm_0."}
        parts = [f"{theirs}NIN_{i}." for i in range(3)]
        yield "qkv.weight", Source(tuple(part + "W" for part in parts), _stack_transposed)
        yield "qkv.bias", Source(tuple(part + "b" for part in parts), _stack)
        yield "out.weight", Source((theirs + "NIN_3.W",), _stack_transposed)
        yield "out.bias", Source((theirs + "NIN_3.b",))
    elif isinstance(layer, (StridedDownsample, StridedUpsample, InputSkip)):
        renamed = {"conv.": "Conv_0."}
    elif isinstance(layer, (FIRDownConv, FIRUpConv)):
        renamed = {"conv.": "Conv2d_0."}
    elif isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
        renamed = {"": ""}
    for ours, original in renamed.items():
        for kind in ("weight", "bias"):
            yield ours + kind, Source((theirs + original + kind,))


def _stack(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _stack_transposed(*parts: Tensor) -> Tensor:
    return torch.cat([part.T for part in parts])


def _pixelwise(weight: Tensor) -> Tensor:
    return weight.T[:, :, None, None]


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    files = sorted(path.glob("*.pth"))
    return files[0] if len(files) == 1 else None


def _weights(content: Any, file: Path, ema: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint by their names without ``module.``, averaged ones if ``ema``."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise PretrainedError(f"{file} is no checkpoint of score-SDE: it has no weights under 'model'")
    state = {str(name).removeprefix("module."): tensor for name, tensor in content["model"].items()}
    if not ema:
        return state
    trained = [name for name in state if name not in _BUFFERS and not _is_frozen(name, state[name])]
    averages = content.get("ema", {}).get("shadow_params")
    if not isinstance(averages, list):
        raise PretrainedError(f"{file} has no averaged weights (load it with ema=False for the last ones)")
    if len(averages) != len(trained):
        raise PretrainedError(f"{file} has {len(averages)} averaged weights for {len(trained)} trained ones")
    for name, average in zip(trained, averages, strict=True):
        if average.shape != state[name].shape:
            raise PretrainedError(
                f"{file}: the averaged weight in the place of {name} has shape {tuple(average.shape)}, "
                f"and {name} has {tuple(state[name].shape)}"
            )
    return state | dict(zip(trained, averages, strict=True))


def _is_frozen(name: str, tensor: Tensor) -> bool:
    """Whether this is the vector of Fourier frequencies, always the first layer."""
    return name == "all_modules.0.W" and tensor.ndim == 1


def _fitting_preset(state: Mapping[str, Tensor], file: Path) -> Preset:
    """The one preset whose network has the shapes of ``state``."""
    shapes = {name: tensor.to("meta") for name, tensor in state.items()}
    fitting = []
    for name, preset in PRESETS.items():
        if preset.format == "score_sde" and _fits(preset, shapes):
            fitting.append(name)
    if len(fitting) == 1:
        return PRESETS[fitting[0]]
    fits = f"fit {len(fitting)} presets, {', '.join(fitting)}" if fitting else "fit no preset"
    raise PretrainedError(
        f"there is no config.json beside {file}, and its weights {fits}: give config=, the configuration it was "
        "trained with or the name of a preset"
    )


def _fits(preset: Preset, state: Mapping[str, Tensor]) -> bool:
    net = preset.build_network("meta")
    assert isinstance(net, NCSNpp)
    try:
        mapped_state(net, state, sources(net), ignored=_BUFFERS)
    except PretrainedError:
        return False
    return True


def _network_arguments(model: Mapping[str, Any], data: Mapping[str, Any], continuous: bool) -> dict[str, Any]:
    name = _allowed("model.name", model["name"], ("ncsnpp", "ddpm"))
    _allowed("model.nonlinearity", model.get("nonlinearity", "swish"), ("swish",))
    _allowed("model.conditional", model.get("conditional", True), (True,))
    widths = tuple(model["ch_mult"])
    sizes = [int(data["image_size"]) // 2**level for level in range(len(widths))]
    attended = tuple(level for level, size in enumerate(sizes) if size in tuple(model["attn_resolutions"]))
    scaled = bool(model["scale_by_sigma"])
    arguments: dict[str, Any] = {
        "in_channels": int(data["num_channels"]),
        "channels": int(model["nf"]),
        "channel_multipliers": widths,
        "blocks_per_level": int(model["num_res_blocks"]),
        "attention_levels": attended,
        "resample_with_conv": bool(model["resamp_with_conv"]),
        "scale_by_sigma": scaled,
        "centered": bool(data["centered"]),
        "dropout": float(model["dropout"]),
    }
    fourier = False
    if name == "ddpm":
        arguments |= {
            "resample_in_block": False,
            "fir": None,
            "skip_rescale": False,
            "progressive_input": "none",
            "min_group_size": 1,
        }
    else:
        blocks = _allowed("model.resblock_type", str(model["resblock_type"]).lower(), ("biggan", "ddpm"))
        kind = _allowed("model.embedding_type", model["embedding_type"].lower(), ("fourier", "positional"))
        fourier = kind == "fourier"
        combination = _allowed(
            "model.progressive_combine", model["progressive_combine"].lower(), ("sum", "cat")
        )
        arguments |= {
            "resample_in_block": blocks == "biggan",
            "fir": tuple(model["fir_kernel"]) if model["fir"] else None,
            "skip_rescale": bool(model["skip_rescale"]),
            "progressive_input": _progressive(model, "progressive_input", "input_skip"),
            "progressive_output": _progressive(model, "progressive", "output_skip"),
            "combination": combination,
            "embedding_scale": float(model.get("fourier_scale", 16)),
        }
    if fourier and not continuous:
        raise PretrainedError("model.embedding_type 'fourier' goes with training.continuous only")
    arguments["embedding"] = "fourier" if fourier else "sinusoidal"
    if scaled and not fourier:
        arguments["sigma_ladder"] = (model["sigma_min"], model["sigma_max"], int(model["num_scales"]))
    return arguments


def _progressive(model: Mapping[str, Any], option: str, skip: str) -> str:
    value = _allowed(f"model.{option}", str(model[option]).lower(), ("none", skip, "residual"))
    return "skip" if value == skip else str(value)


def _process(kind: str, continuous: bool, model: Mapping[str, Any]) -> Process:
    """The forward process, what the network predicts, and what it is told of the time."""
    _allowed("training.sde", kind, ("vpsde", "subvpsde", "vesde"))
    steps = int(model["num_scales"])
    if kind == "vesde":
        ve = VE(sigma_min=float(model["sigma_min"]), sigma_max=float(model["sigma_max"]))
        return ve, RAW_SCORE, SIGMA if continuous else ladder_step(steps)
    betas = {"beta_min": float(model["beta_min"]), "beta_max": float(model["beta_max"])}
    if kind == "subvpsde":
        return SubVP(**betas), NOISE, TIME_999
    vp = VP(**betas)
    return (vp, NOISE, TIME_999) if continuous else (chain(vp.discretize(steps)), NOISE, chain_step(steps))


def _allowed(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise PretrainedError(
            f"{option} of the configuration is {value!r}; known here: {', '.join(map(repr, allowed))}"
        )
    return value
