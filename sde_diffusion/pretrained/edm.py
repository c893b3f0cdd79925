"""Networks of EDM (Karras et al. 2022, NVlabs/edm): ``network-snapshot-*.pkl``, or safetensors with flags.

The architecture is told in the terms of EDM's own code, the arguments of its preconditioning class:

    class_name (EDMPrecond, VPPrecond, VEPrecond or iDDPMPrecond), img_resolution, img_channels, label_dim,
    model_type (SongUNet or DhariwalUNet), sigma_data, ..., model_channels, channel_mult, ...

A snapshot says all that itself; ``flags.json`` does beside ``model.safetensors``; and what is given as
``config`` overrides either. The networks hold averaged weights only, so ``ema`` makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import MeanChannels
from sde_diffusion.networks.edm import DhariwalUNet, EDMUNet, SongUNet
from sde_diffusion.preconditioning import (
    Preconditioning,
    edm_preconditioning,
    iddpm_preconditioning,
    ve_preconditioning,
    vp_preconditioning,
)
from sde_diffusion.presets import Preset
from sde_diffusion.pretrained.edm_names import edm_sources
from sde_diffusion.pretrained.state import (
    PretrainedError,
    is_torch_file,
    load_mapped,
    load_safetensors,
    read_json,
)
from sde_diffusion.pretrained.unpickle import PERSISTENT, Recorded, read_pickle
from sde_diffusion.score import ScoreModel

#: The arguments of EDM's classes that have other names here, and their defaults there.
_SHARED = {
    "augment_dim": ("augment_dim", 0),
    "channel_mult_emb": ("condition_multiplier", 4),
    "dropout": ("dropout", 0.1),
}
_SONG = _SHARED | {
    "model_channels": ("channels", 128),
    "channel_mult": ("channel_multipliers", (1, 2, 2, 2)),
    "num_blocks": ("blocks_per_level", 4),
    "embedding_type": ("embedding", "positional"),
    "channel_mult_noise": ("feature_multiplier", 1),
    "encoder_type": ("progressive_input", "standard"),
    "decoder_type": ("progressive_output", "standard"),
    "resample_filter": ("fir", (1, 1)),
}
#: Values of these arguments that have other names here.
_VALUES = {"positional": "sinusoidal", "standard": "none"}
_DHARIWAL = _SHARED | {
    "model_channels": ("channels", 192),
    "channel_mult": ("channel_multipliers", (1, 2, 3, 4)),
    "num_blocks": ("blocks_per_level", 3),
}
#: For each type of network: the class, its arguments, and the default of attn_resolutions.
_NETWORKS: dict[str, tuple[type[EDMUNet], Mapping[str, tuple[str, Any]], Sequence[int]]] = {
    "SongUNet": (SongUNet, _SONG, (16,)),
    "DhariwalUNet": (DhariwalUNet, _DHARIWAL, (32, 16, 8)),
}
#: For each class: the default type of network, and what its arguments are called here.
_PRECONDITIONINGS: dict[str, tuple[str, Callable[..., Preconditioning], Mapping[str, str]]] = {
    "EDMPrecond": (
        "DhariwalUNet",
        edm_preconditioning,
        {"sigma_data": "sigma_data", "sigma_min": "sigma_min", "sigma_max": "sigma_max"},
    ),
    "VPPrecond": (
        "SongUNet",
        vp_preconditioning,
        {"beta_d": "beta_d", "beta_min": "beta_min", "M": "steps", "epsilon_t": "epsilon_t"},
    ),
    "VEPrecond": ("SongUNet", ve_preconditioning, {"sigma_min": "sigma_min", "sigma_max": "sigma_max"}),
    "iDDPMPrecond": (
        "DhariwalUNet",
        iddpm_preconditioning,
        {"C_1": "ratio_min", "C_2": "offset", "M": "steps"},
    ),
}
#: Arguments in the order of EDM's constructors, for snapshots that were made without their names.
_POSITIONS = ("img_resolution", "img_channels", "label_dim", "use_fp16")
#: Arguments without bearing on the function that the network computes.
_IRRELEVANT = {"use_fp16", "label_dropout"}
_WEIGHTS, _FLAGS = "model.safetensors", "flags.json"
#: The first bytes of a pickle, by its protocol.
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def detect(path: Path) -> bool:
    """Whether ``path`` is a pickle (no file of torch.save), safetensors beside EDM's flags, or their folder."""
    if path.is_dir():
        return _snapshot_in(path) is not None or ((path / _WEIGHTS).is_file() and _is_edm(path / _FLAGS))
    if path.suffix == ".safetensors":
        return _is_edm(path.parent / _FLAGS)
    if is_torch_file(path):
        return False
    with path.open("rb") as file:
        start = file.read(2)
    return path.suffix == ".pkl" or start in _PICKLES


def load(path: Path, config: Mapping[str, Any] | Preset | None, ema: bool) -> ScoreModel:
    """The score model of a snapshot, or of safetensors with the weights of EDM's preconditioning class.

    Raises:
        PretrainedError: options are missing or unknown, weights do not fit, the file is damaged or not of EDM.
    """
    if path.is_dir():
        path = _snapshot_in(path) or path / _WEIGHTS
    if path.suffix == ".safetensors":
        flags = path.parent / _FLAGS
        found, state = read_json(flags) if flags.is_file() else {}, load_safetensors(path)
    else:
        found, state = _snapshot(path)
    if isinstance(config, Preset):
        net, resolution, preset = config.build_network(), config.image_size, config
    else:
        options = _flat({**found, **(config or {})})
        net, resolution, preset = _network(options), options["img_resolution"], None
    if not isinstance(net, (SongUNet, DhariwalUNet)):
        raise PretrainedError(f"a {type(net).__name__} is no network of EDM")
    weights = {name.removeprefix("model."): tensor for name, tensor in state.items() if name != "u"}
    filters = [name for name in weights if name.endswith(".resample_filter")]
    load_mapped(net, weights, edm_sources(net, resolution), ignored=filters)
    return preset.build(net) if preset is not None else _score(net, options)


# -------------------------------------------------------------------------------------------- what a file says


def snapshot_resolution(path: Path) -> Any:
    """The ``img_resolution`` that a snapshot (or the last one of a folder) states; None for other files."""
    file = _snapshot_in(path) if path.is_dir() else path
    if file is None or file.suffix != ".pkl":
        return None
    return _snapshot(file)[0].get("img_resolution")


def _snapshot_in(folder: Path) -> Path | None:
    """The last snapshot of a folder; their names hold the length of training."""
    return max(folder.glob("network-snapshot-*.pkl"), default=None)


def _is_edm(flags: Path) -> bool:
    return flags.is_file() and _flat(read_json(flags)).get("model_type") in _NETWORKS


def _flat(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options in one mapping, whether given so or as flags (network_kwargs, and preconds by class name).

    Weights that go with several preconditionings are read under EDM's own, unless another is asked for.
    """
    nested = ("repository", "network_kwargs", "preconds")
    options = dict(flags.get("network_kwargs", {}))
    options |= {key: value for key, value in flags.items() if key not in nested}
    preconds = flags.get("preconds", {})
    if "class_name" in options:
        options["class_name"] = str(options["class_name"]).rpartition(".")[2]
    elif preconds:
        options["class_name"] = "EDMPrecond" if "EDMPrecond" in preconds else next(iter(preconds))
    return preconds.get(options.get("class_name"), {}) | options


def _snapshot(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and weights of the averaged network in a pickle."""
    content = read_pickle(path)
    network = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(network, Recorded):
        kind = type(content).__name__
        found = f"a dict of {', '.join(map(str, content))}" if isinstance(content, dict) else f"a {kind}"
        raise PretrainedError(f"{path} is no snapshot of EDM: it holds {found}, and no network 'ema'")
    name, state = _described(network)
    if name not in _PRECONDITIONINGS:
        raise PretrainedError(
            f"{path} holds a network of class {name!r}; known: {', '.join(sorted(_PRECONDITIONINGS))}"
        )
    args, kwargs = state.get("_init_args") or (), state.get("_init_kwargs") or {}
    given = dict(zip(_POSITIONS, args, strict=False)) | dict(kwargs)
    return {"class_name": name} | given, dict(_tensors(network))


def _described(module: Recorded) -> tuple[str, Mapping[str, Any]]:
    """The class and the attributes of an object in a snapshot."""
    name, state = module.name.rpartition(".")[2], module.state
    if module.name == PERSISTENT and len(module.args) == 1 and isinstance(module.args[0], dict):
        name, state = str(module.args[0].get("class_name")), module.args[0].get("state")
    if not isinstance(state, Mapping):
        raise PretrainedError(f"the snapshot holds a {name} without attributes")
    return name, state


def _tensors(module: Recorded, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module and of those in it, by their names in a state_dict."""
    if depth > 20:
        raise PretrainedError(f"the modules of the snapshot are nested too deeply, at {prefix!r}")
    class_name, state = _described(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        values = state.get(kind, {})
        if not isinstance(values, Mapping):
            raise PretrainedError(
                f"the {class_name} at {prefix!r} of the snapshot has {kind} that are no dict"
            )
        for name, value in values.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Recorded):
                yield from _tensors(value, f"{prefix}{name}.", depth + 1)


# ------------------------------------------------------------------------------------------ what is built of it


def _network(options: Mapping[str, Any]) -> EDMUNet:
    missing = [key for key in ("class_name", "img_resolution", "img_channels") if key not in options]
    if missing:
        raise PretrainedError(
            f"the architecture is not known: give {', '.join(missing)} (and what differs from EDM's defaults) "
            "in config, or in a flags.json beside the weights"
        )
    class_name = options["class_name"]
    if class_name not in _PRECONDITIONINGS:
        raise unknown_name("class_name", class_name, _PRECONDITIONINGS)
    model_type = options.get("model_type", _PRECONDITIONINGS[class_name][0])
    if model_type not in _NETWORKS:
        raise unknown_name("model_type", model_type, _NETWORKS)
    network, names, default_attention = _NETWORKS[model_type]

    known = {"class_name", "model_type", "img_resolution", "img_channels", "label_dim", "attn_resolutions"}
    # Options of other preconditionings may be there, left from the file when config asks for another.
    known |= {name for _, _, table in _PRECONDITIONINGS.values() for name in table}
    unknown = sorted(set(options) - known - _IRRELEVANT - set(names))
    if unknown:
        raise PretrainedError(f"options that EDM's {model_type} does not have: {', '.join(unknown)}")
    recorded = [key for key, value in options.items() if isinstance(value, Recorded)]
    if recorded:
        raise PretrainedError(f"options that are no plain values: {', '.join(recorded)}; give them in config")

    resolution, channels = options["img_resolution"], options["img_channels"]
    given = {ours: options.get(theirs, default) for theirs, (ours, default) in names.items()}
    arguments: dict[str, Any] = {
        ours: _VALUES.get(value, value) if isinstance(value, str) else value for ours, value in given.items()
    }
    attended = options.get("attn_resolutions", default_attention)
    return network(
        channels,
        **arguments,
        out_channels=2 * channels if class_name == "iDDPMPrecond" else channels,
        num_classes=options.get("label_dim") or None,
        attention_levels=tuple(
            level for level in range(len(given["channel_multipliers"])) if resolution >> level in attended
        ),
    )


def _score(net: EDMUNet, options: Mapping[str, Any]) -> ScoreModel:
    _, preconditioning, names = _PRECONDITIONINGS[options["class_name"]]
    told = {ours: options[theirs] for theirs, ours in names.items() if theirs in options}
    # Of a network with learned variances the first half of the channels is the noise.
    learned = options["class_name"] == "iDDPMPrecond"
    return preconditioning(**told).score(MeanChannels(net, options["img_channels"]) if learned else net)
