"""The U-Nets of improved DDPM (Nichol & Dhariwal 2021) and of ADM (Dhariwal & Nichol 2021)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.blocks import AverageDownsample, RepeatUpsample, ResBlock, SelfAttention
from sde_diffusion.networks.checks import constructor_arguments, positive_int
from sde_diffusion.networks.embeddings import ConditionEmbedding, SinusoidalEmbedding
from sde_diffusion.networks.levels import Level, LevelUNet, Stage
from sde_diffusion.networks.unet import RESAMPLINGS, head_count, level_indices, level_widths


class ADM(LevelUNet):
    """U-Net ``F(x, c, y)`` of improved DDPM and ADM, which differ in their arguments only.

    References: Nichol & Dhariwal (2021), "Improved denoising diffusion probabilistic models", app. A;
    Dhariwal & Nichol (2021), "Diffusion models beat GANs on image synthesis", sec. 3.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result; ``2 * in_channels`` where the variance is learned too; None for
            ``in_channels``.
        channels, channel_multipliers, blocks_per_level, attention_levels: as in :class:`UNet`.
        heads: attention heads; or give ``head_channels``, the width of one.
        decoder_heads: heads in the decoder, where they differ; goes with ``heads`` only.
        head_channels: see ``heads``.
        dropout: probability, before the second convolution of each residual block.
        scale_shift: modulate by scale and shift ("AdaGN"), or by a shift alone.
        resampling: "strided" (convolution of stride 2; repetition and convolution), "resampled" (2x2 average;
            repetition) or "block" (the same inside a residual block, "BigGAN up/downsampling").
        num_classes: number of classes for y, which must then be given; or None.
        null_class: labels may also be ``num_classes`` or None, meaning "no class", with an embedding of their
            own. The published models have none.
        groups: groups of GroupNorm, dividing every level's width.
        checkpointing: recompute activations in the backward pass in training mode.

    c is the number of the step, 0 to 999 (or times 1000 / n for a chain of n steps, see the conditioning
    "rescaled_step").

    Attributes:
        config: the arguments above.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        channels: int = 128,
        channel_multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks_per_level: int = 3,
        attention_levels: Sequence[int] = (1, 2, 3),
        heads: int | None = None,
        decoder_heads: int | None = None,
        head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resampling: str = "strided",
        num_classes: int | None = None,
        null_class: bool = False,
        groups: int = 32,
        checkpointing: bool = False,
    ) -> None:
        config = constructor_arguments(ADM, locals())
        widths = level_widths(positive_int("channels", channels), channel_multipliers)
        attended = level_indices(attention_levels, len(widths))
        if decoder_heads is not None and heads is None:
            raise ValueError(f"decoder_heads goes with heads, got {decoder_heads!r} without them")
        block = partial(ResBlock, scale_shift=scale_shift, dropout=dropout, groups=groups, min_group_size=1)

        def stage(inputs: int, outputs: int, attention: bool, heads: int | None) -> Stage:
            if not attention:
                return Stage(block(inputs, outputs))
            count = head_count(outputs, heads, head_channels)
            attend = SelfAttention(outputs, heads=count, groups=groups, min_group_size=1)
            return Stage(block(inputs, outputs), attend)

        down, up = resamplers(resampling, block)
        decoder_heads = heads if decoder_heads is None else decoder_heads
        levels = [
            Level(
                width,
                partial(stage, attention=i in attended, heads=heads),
                partial(stage, attention=i in attended, heads=decoder_heads),
                down,
                up,
            )
            for i, width in enumerate(widths)
        ]
        deepest = widths[-1]
        super().__init__(
            in_channels=positive_int("in_channels", in_channels),
            out_channels=in_channels if out_channels is None else positive_int("out_channels", out_channels),
            stem_channels=widths[0],
            levels=levels,
            blocks_per_level=blocks_per_level,
            middle=[stage(deepest, deepest, True, heads), stage(deepest, deepest, False, heads)],
            condition=ConditionEmbedding(
                SinusoidalEmbedding(channels, 1.0, cosine_first=True),
                4 * channels,
                num_classes,
                null_row=null_class,
            ),
            groups=groups,
            min_group_size=1,
            checkpointing=checkpointing,
            labels_needed=num_classes is not None and not null_class,
        )
        self.config = config


class MeanChannels(nn.Module):
    """The first ``channels`` of a network's output: the part of a network with learned variances that is a score.

    ``net`` is the whole network; its other channels say where the reverse variance lies between its bounds
    (Nichol & Dhariwal 2021, eq. 15).
    """

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        self.net = net
        self.channels = positive_int("channels", channels)

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """As ``net``, without the channels from ``channels`` on."""
        output: Tensor = self.net(x, c) if y is None else self.net(x, c, y)
        return output[:, : self.channels]


def mean_of(net: nn.Module) -> nn.Module:
    """``net`` itself, or for an :class:`ADM` with learned variances its channels for the mean."""
    if isinstance(net, ADM) and net.out_channels == 2 * net.in_channels:
        return MeanChannels(net, net.in_channels)
    return net


def resamplers(
    name: str, block: Callable[..., ResBlock]
) -> tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]:
    """What halves and what doubles the resolution, made from the number of channels.

    Args:
        name: "strided", "resampled" or "block", see :class:`ADM`.
        block: makes the residual block of "block" from its channels and its ``resampler``.
    """
    if name == "block":
        return (
            lambda width: block(width, resampler=AverageDownsample(width)),
            lambda width: block(width, resampler=RepeatUpsample(width)),
        )
    if name not in RESAMPLINGS:
        raise unknown_name("resampling", name, (*RESAMPLINGS, "block"))
    return RESAMPLINGS[name]
