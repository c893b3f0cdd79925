"""How the weights of the U-Nets over levels are called elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde_diffusion.networks.blocks import ResBlock, SelfAttention
from sde_diffusion.networks.levels import LevelUNet
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.pretrained.state import Source


@dataclass(frozen=True)
class Names:
    """The names of a format.

    Attributes:
        block: parts of our residual block -> theirs ("modulation" being the projection of the condition).
        attention: for the name of an attention and its number of heads, where its weights come from.
    """

    block: Mapping[str, str]
    attention: Callable[[str, int], dict[str, Source]]


def level_sources(net: LevelUNet | NCSNpp, names: Names, places: Mapping[str, str]) -> dict[str, Source]:
    """Where each weight of ``net`` comes from.

    Args:
        net: the network.
        names: of the parts of blocks.
        places: names of modules of ``net`` (stages' blocks and attentions, convolutions, ...) -> names in the
            other format.
    """
    sources: dict[str, Source] = {}
    for name, place in places.items():
        module = net.get_submodule(name)
        if isinstance(module, ResBlock):
            parts = {part: Source((f"{place}.{theirs}",)) for part, theirs in names.block.items()}
            parts.pop("modulation")
            found = {
                f"{part}.{kind}": Source((f"{source.keys[0]}.{kind}",))
                for part, source in parts.items()
                for kind in ("weight", "bias")
                if not isinstance(module.get_submodule(part), nn.Identity)
            }
        elif isinstance(module, SelfAttention):
            bare = isinstance(module.norm, nn.Identity)
            found = names.attention(place, module.heads)
            found = {part: s for part, s in found.items() if not (bare and part.startswith("norm."))}
        else:
            found = {kind: Source((f"{place}.{kind}",)) for kind, _ in module.named_parameters()}
        sources.update({f"{name}.{part}": source for part, source in found.items()})
    for kind in ("weight", "bias"):
        keys = tuple(f"{places[name]}.{names.block['modulation']}.{kind}" for name in net.modulated)
        sources[f"modulations.linear.{kind}"] = Source(keys, stack_rows)
    return sources


def stage_places(stage: nn.Module, ours: str, block: str, attention: str) -> dict[str, str]:
    """The places of a stage's block and, if it has one, its attention."""
    places = {f"{ours}.block": block}
    if getattr(stage, "attention", None) is not None:
        places[f"{ours}.attention"] = attention
    return places


def stack_rows(*tensors: Tensor) -> Tensor:
    """The rows of all tensors as one tensor."""
    return torch.cat(tensors)


def split_rows(
    net: LevelUNet, sources: Mapping[str, Source], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state under the names of ``sources``: the inverse of loading where tensors were only stacked."""
    result: dict[str, Tensor] = {}
    for name, source in sources.items():
        stacked = name.startswith("modulations.")
        sizes = net.modulations.sizes if stacked else len(state[name]) // len(source.keys)
        pieces = state[name].split(sizes)
        result.update({key: piece.contiguous() for key, piece in zip(source.keys, pieces, strict=True)})
    return result
