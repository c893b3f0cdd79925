"""The wiring that U-Nets share: an encoder, a middle and a decoder over levels of halved resolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde_diffusion.networks.blocks import (
    ResBlock,
    SelfAttention,
    checkpointed,
    group_norm,
    normalized,
    zero_init,
)
from sde_diffusion.networks.channels_last import fastest_layout, usual_layout
from sde_diffusion.networks.checks import check_input, positive_int
from sde_diffusion.networks.convolution import Conv3x3
from sde_diffusion.networks.embeddings import ConditionEmbedding, Modulations


class Stage(nn.Module):
    """A residual block, then self-attention if there is one: the unit that is checkpointed."""

    def __init__(self, block: ResBlock, attention: SelfAttention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        h = self.block(x, modulation)
        return h if self.attention is None else self.attention(h)


@dataclass(frozen=True)
class Level:
    """One resolution.

    Attributes:
        encoder: makes a stage of the encoder from its numbers of input and output channels.
        decoder: the same for the decoder.
        width: channels of the level's stages.
        downsample: makes what leads to the next coarser level from ``width``; of no use on the coarsest.
        upsample: makes what leads to the next finer level from ``width``; of no use on the finest.
    """

    width: int
    encoder: Callable[[int, int], Stage]
    decoder: Callable[[int, int], Stage]
    downsample: Callable[[int], nn.Module]
    upsample: Callable[[int], nn.Module]


class LevelUNet(nn.Module):
    """U-Net over ``levels``, finest first: the wiring of :class:`UNet`, :class:`ADM` and :class:`UNet2D`.

    The encoder has ``blocks_per_level`` stages per level, the decoder one more, each of which also takes one
    of the encoder's results (Ho et al. 2020). Resamplers may be residual blocks, which then have modulations
    too.

    Args:
        in_channels, out_channels, stem_channels: of the input, the result, and after the first convolution.
        levels: see :class:`Level`.
        blocks_per_level: stages per level of the encoder.
        middle: the stages between encoder and decoder, of the coarsest level's width.
        condition: embeds the noise level and the class.
        groups, eps, min_group_size: of the last GroupNorm, see :func:`group_norm`.
        checkpointing: recompute activations in the backward pass in training mode.
        labels_needed: refuse calls without labels y: the network has no null class.
        out_kernel: side of the last convolution, 3 or 1.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        stem_channels: int,
        levels: Sequence[Level],
        blocks_per_level: int,
        middle: Sequence[Stage],
        condition: ConditionEmbedding,
        groups: int,
        eps: float = 1e-5,
        min_group_size: int = 4,
        checkpointing: bool = False,
        labels_needed: bool = False,
        out_kernel: int = 3,
    ) -> None:
        super().__init__()
        self.labels_needed = labels_needed
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.checkpointing = checkpointing
        #: Height and width are multiples of this.
        self.multiple = 2 ** (len(levels) - 1)
        positive_int("blocks_per_level", blocks_per_level)
        order: list[nn.Module] = []  # as forward meets them

        self.stem = nn.Conv2d(in_channels, stem_channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        self.downsamplers = nn.ModuleList()
        h, skips = stem_channels, [stem_channels]
        for i, level in enumerate(levels):
            stages = nn.ModuleList()
            for _ in range(blocks_per_level):
                stages.append(level.encoder(h, level.width))
                h = level.width
                skips.append(h)
            self.encoder.append(stages)
            order += stages
            if i < len(levels) - 1:
                self.downsamplers.append(level.downsample(h))
                order.append(self.downsamplers[-1])
                skips.append(h)
        self.middle = nn.ModuleList(middle)
        order += self.middle
        self.decoder = nn.ModuleList()
        self.upsamplers = nn.ModuleList()
        for i, level in reversed(list(enumerate(levels))):
            stages = nn.ModuleList()
            for _ in range(blocks_per_level + 1):
                stages.append(level.decoder(h + skips.pop(), level.width))
                h = level.width
            self.decoder.append(stages)
            order += stages
            if i > 0:
                self.upsamplers.append(level.upsample(h))
                order.append(self.upsamplers[-1])
        self.norm_out = group_norm(h, groups, eps, min_group_size)
        last = Conv3x3(h, out_channels) if out_kernel == 3 else nn.Conv2d(h, out_channels, out_kernel)
        self.conv_out = zero_init(last)

        self.condition = condition
        blocks = [m for part in order for m in part.modules() if isinstance(m, ResBlock)]
        names = {module: name for name, module in self.named_modules()}
        #: Names of the residual blocks in the order of their modulations.
        self.modulated = tuple(names[block] for block in blocks)
        self.modulations = Modulations(
            condition.second.out_features, [block.modulation_features for block in blocks]
        )

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, H, W), height and width multiples of ``2^(levels - 1)``.
            c: (B,), the noise level in the units the embedding was built for.
            y: (B,) int64 labels, for a network with classes, which may need them.

        Returns:
            (B, out_channels, H, W), in the dtype of x.
        """
        check_input(x, 4, self.in_channels, "(B, C, H, W)")
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(
                f"the network takes images whose sides are multiples of {self.multiple}, got {tuple(x.shape)}"
            )
        if self.labels_needed and y is None:
            raise ValueError(f"the network needs labels y in [0, {self.condition.num_classes}), got None")
        return self.through_levels(x, self.condition(c, y, x.shape[0])).to(x.dtype)

    def through_levels(self, x: Tensor, embedding: Tensor) -> Tensor:
        """All layers, for the input features x (B, in_channels, H, W) and condition vectors (B, channels)."""
        modulations = iter(self.modulations(embedding))
        h = fastest_layout(self.stem(x))
        skips = [h]
        for level, stages in enumerate(self.encoder):
            for stage in stages:  # type: ignore[attr-defined]
                h = checkpointed(self.checkpointing, stage, h, next(modulations))
                skips.append(h)
            if level < len(self.downsamplers):
                h = self._resample(self.downsamplers[level], h, modulations)
                skips.append(h)
        for stage in self.middle:
            h = checkpointed(self.checkpointing, stage, h, next(modulations))
        for level, stages in enumerate(self.decoder):
            for stage in stages:  # type: ignore[attr-defined]
                h = checkpointed(
                    self.checkpointing, stage, torch.cat([h, skips.pop()], dim=1), next(modulations)
                )
            if level < len(self.upsamplers):
                h = self._resample(self.upsamplers[level], h, modulations)
        return usual_layout(normalized(self.norm_out, h, silu=True), self.conv_out)

    def _resample(self, module: nn.Module, h: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        if isinstance(module, ResBlock):
            return checkpointed(self.checkpointing, module, h, next(modulations))
        return module(h)
