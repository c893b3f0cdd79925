"""How the weights of EDM's networks are called and laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sde_diffusion.networks.edm import DhariwalUNet, EDMUNet, SongUNet
from sde_diffusion.networks.embeddings import FourierEmbedding
from sde_diffusion.networks.levels import Stage
from sde_diffusion.networks.progressive import InputSkip
from sde_diffusion.pretrained.level_names import Names, level_sources, stage_places
from sde_diffusion.pretrained.state import Source


def edm_sources(net: EDMUNet, resolution: int) -> dict[str, Source]:
    """Where each weight of ``net`` is in the state_dict of EDM's network for images of this size.

    Besides names the layouts differ: EDM's queries, keys and values alternate within a head, and its one-hot
    labels are rows of a table here.
    """
    count = len(net.encoder)
    sizes = [f"{resolution >> level}x{resolution >> level}" for level in range(count)]
    find = _song_places if isinstance(net, SongUNet) else _dhariwal_places
    places = {
        "stem": f"enc.{sizes[0]}_conv",
        "condition.first": "map_layer0",
        "condition.second": "map_layer1",
    }
    for index in range(2):
        places |= _stage_places(net.middle[index], f"middle.{index}", f"dec.{sizes[-1]}_in{index}")
    sources = level_sources(net, _NAMES, places | find(net, sizes))
    if net.condition.augment is not None:
        sources["condition.augment.weight"] = Source(("map_augment.weight",))
    if isinstance(net.condition.features, FourierEmbedding):
        sources["condition.features.frequencies"] = Source(("map_noise.freqs",))
    if net.condition.classes is not None:
        song = isinstance(net, SongUNet)
        keys = ("map_label.weight", "map_label.bias") if song else ("map_label.weight",)
        sources["condition.classes.weight"] = Source(keys, _song_labels if song else torch.t)
    return sources


def _stage_places(stage: nn.Module, ours: str, theirs: str) -> dict[str, str]:
    assert isinstance(stage, Stage)
    return stage_places(stage, ours, theirs, theirs)


def _song_places(net: nn.Module, sizes: Sequence[str]) -> dict[str, str]:
    """The places of a SongUNet beside its ends, where the resampling into a level goes by the level's size."""
    assert isinstance(net, SongUNet)
    places: dict[str, str] = {}
    for i, level in enumerate(net.encoder.children()):
        for j, stage in enumerate(level.get_submodule("stages").children()):
            places |= _stage_places(stage, f"encoder.{i}.stages.{j}", f"enc.{sizes[i]}_block{j}")
        if i + 1 < len(sizes):
            places[f"encoder.{i}.resample"] = f"enc.{sizes[i + 1]}_down"
        if isinstance(joint := level.joint, InputSkip):
            places[f"encoder.{i}.joint.conv"] = f"enc.{sizes[i + 1]}_aux_skip"
        elif joint is not None:
            places[f"encoder.{i}.joint.resample.conv"] = f"enc.{sizes[i + 1]}_aux_residual"
    heads = {} if net.head is None else {"head": sizes[0]}
    for i, level in enumerate(net.decoder.children()):
        size = sizes[-1 - i]
        for j, stage in enumerate(level.get_submodule("stages").children()):
            places |= _stage_places(stage, f"decoder.{i}.stages.{j}", f"dec.{size}_block{j}")
        if i + 1 < len(sizes):
            places[f"decoder.{i}.resample"] = f"dec.{sizes[-2 - i]}_up"
        if level.head is not None:
            heads[f"decoder.{i}.head.head"] = size
    for ours, size in heads.items():
        places |= {f"{ours}.norm": f"dec.{size}_aux_norm", f"{ours}.conv": f"dec.{size}_aux_conv"}
    return places


def _dhariwal_places(net: nn.Module, sizes: Sequence[str]) -> dict[str, str]:
    """The same of a DhariwalUNet."""
    assert isinstance(net, DhariwalUNet)
    places = {"norm_out": "out_norm", "conv_out": "out_conv"}
    for side, stages_of, order in (("enc", "encoder", sizes), ("dec", "decoder", sizes[::-1])):
        for i, stages in enumerate(net.get_submodule(stages_of).children()):
            for j, stage in enumerate(stages.children()):
                places |= _stage_places(stage, f"{stages_of}.{i}.{j}", f"{side}.{order[i]}_block{j}")
    for i in range(len(sizes) - 1):
        places[f"downsamplers.{i}"] = f"enc.{sizes[i + 1]}_down"
        places[f"upsamplers.{i}"] = f"dec.{sizes[-2 - i]}_up"
    return places


def _attention(place: str, heads: int) -> dict[str, Source]:
    def separate(rows: Tensor) -> Tensor:
        """Rows in the order (head, channel, q/k/v) into the order (q/k/v, head, channel)."""
        return rows.flatten(1).unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)

    return {
        "norm.weight": Source((f"{place}.norm2.weight",)),
        "norm.bias": Source((f"{place}.norm2.bias",)),
        "qkv.weight": Source((f"{place}.qkv.weight",), separate),
        "qkv.bias": Source((f"{place}.qkv.bias",), lambda bias: separate(bias[:, None])[:, 0]),
        "out.weight": Source((f"{place}.proj.weight",), lambda weight: weight.flatten(1)),
        "out.bias": Source((f"{place}.proj.bias",)),
    }


_NAMES = Names(
    {
        "norm1": "norm0",
        "conv1": "conv0",
        "norm2": "norm1",
        "conv2": "conv1",
        "skip": "skip",
        "modulation": "affine",
    },
    _attention,
)


def _song_labels(weight: Tensor, bias: Tensor) -> Tensor:
    """The row of each class and of none: there one-hot labels are scaled by the root of their number."""
    rows = weight.T * weight.shape[1] ** 0.5
    return torch.cat([rows, torch.zeros_like(bias)[None]]) + bias
