"""The two U-Nets of EDM (Karras et al. 2022), which follow NCSN++ and ADM.

To those they add augmentation labels, and class labels that may be absent; and what c means is left to the
preconditioning (it is embedded as it is).

Reference: T. Karras, M. Aittala, T. Aila, S. Laine, "Elucidating the design space of diffusion-based
generative models", 2022, appendix F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import resamplers
from sde_diffusion.networks.blocks import ResBlock, SelfAttention
from sde_diffusion.networks.checks import check_input, constructor_arguments, positive_int
from sde_diffusion.networks.embeddings import ConditionEmbedding, FourierEmbedding, SinusoidalEmbedding
from sde_diffusion.networks.levels import Level, LevelUNet, Stage
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.unet import level_indices, level_widths

EMBEDDINGS: dict[str, Callable[[int], SinusoidalEmbedding | FourierEmbedding]] = {
    "sinusoidal": lambda channels: SinusoidalEmbedding(channels, 1.0, endpoint=True),
    "fourier": FourierEmbedding,
}


class SongUNet(NCSNpp):
    """:class:`NCSNpp` as EDM has it: for images in [-1, 1], labels join the features of the noise level.

    Args:
        in_channels, out_channels, channels, channel_multipliers, blocks_per_level, attention_levels, dropout,
            progressive_input, num_classes, checkpointing: as in :class:`NCSNpp`.
        progressive_output: "none" or "skip", as in :class:`NCSNpp`.
        embedding: of c, "sinusoidal" (DDPM++) or "fourier" (NCSN++).
        feature_multiplier: number of its features over ``channels`` (1 for DDPM++, 2 for NCSN++).
        condition_multiplier: width of the condition vector over ``channels``.
        fir: taps of the filter for all resampling, (1, 1) for DDPM++ and (1, 3, 3, 1) for NCSN++.
        augment_dim: length of the augmentation labels, 9 for EDM's own pipeline; 0 for none.

    Attributes:
        config: the arguments above, so that ``SongUNet(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        channels: int = 128,
        channel_multipliers: Sequence[float] = (2, 2, 2),
        blocks_per_level: int = 4,
        attention_levels: Sequence[int] = (1,),
        embedding: str = "sinusoidal",
        feature_multiplier: int = 1,
        condition_multiplier: int = 4,
        progressive_input: str = "none",
        progressive_output: str = "none",
        fir: Sequence[float] = (1, 1),
        dropout: float = 0.1,
        num_classes: int | None = None,
        augment_dim: int = 0,
        checkpointing: bool = False,
    ) -> None:
        config = constructor_arguments(SongUNet, locals())
        if embedding not in EMBEDDINGS:
            raise unknown_name("embedding", embedding, EMBEDDINGS)
        super().__init__(
            in_channels,
            out_channels=out_channels,
            channels=channels,
            channel_multipliers=channel_multipliers,
            blocks_per_level=blocks_per_level,
            attention_levels=attention_levels,
            fir=fir,
            progressive_input=progressive_input,
            progressive_output=progressive_output,
            scale_by_sigma=False,
            centered=True,
            dropout=dropout,
            checkpointing=checkpointing,
        )
        self.config = config
        width = channels * positive_int("condition_multiplier", condition_multiplier)
        self.condition = ConditionEmbedding(
            EMBEDDINGS[embedding](channels * positive_int("feature_multiplier", feature_multiplier)),
            width,
            num_classes,
            labels_first=True,
            augment_dim=augment_dim,
        )
        self.modulations = self._modulations(width)

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, H, W), sides multiples of ``2^(levels - 1)``.
            c: (B,), the noise level; what it is depends on the preconditioning.
            y: (B,) int64 labels in [0, num_classes], num_classes meaning "no class", as does None.
            augment: (B, augment_dim), what an augmentation did to the images; None for nothing.

        Returns:
            (B, out_channels, H, W), in the dtype of x.
        """
        check_input(x, 4, self.in_channels, "(B, C, H, W)", self.multiple)
        return self.through_levels(x, self.condition(c, y, x.shape[0], augment)).to(x.dtype)


class DhariwalUNet(LevelUNet):
    """The U-Net of ADM as EDM has it.

    As :class:`ADM` with resampling inside residual blocks and ``head_channels``; blocks with fewer channels
    than that have no attention, wherever it is asked for. The null class is the vector zero.

    Args:
        in_channels, out_channels, channels, channel_multipliers, blocks_per_level, attention_levels,
            head_channels, dropout, num_classes, checkpointing: as in :class:`ADM`.
        condition_multiplier, augment_dim: as in :class:`SongUNet`.

    Attributes:
        config: the arguments above, so that ``DhariwalUNet(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        channels: int = 192,
        channel_multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks_per_level: int = 3,
        attention_levels: Sequence[int] = (1, 2, 3),
        condition_multiplier: int = 4,
        head_channels: int = 64,
        dropout: float = 0.1,
        num_classes: int | None = None,
        augment_dim: int = 0,
        checkpointing: bool = False,
    ) -> None:
        config = constructor_arguments(DhariwalUNet, locals())
        positive_int("in_channels", in_channels)
        positive_int("head_channels", head_channels)
        widths = level_widths(positive_int("channels", channels), channel_multipliers)
        attended = level_indices(attention_levels, len(widths))
        block = partial(ResBlock, dropout=dropout)

        def stage(inputs: int, outputs: int, attention: bool) -> Stage:
            heads = outputs // head_channels if attention else 0
            return Stage(block(inputs, outputs), SelfAttention(outputs, heads=heads) if heads else None)

        stages = [partial(stage, attention=level in attended) for level in range(len(widths))]
        down, up = resamplers("block", block)
        super().__init__(
            in_channels=in_channels,
            out_channels=in_channels if out_channels is None else positive_int("out_channels", out_channels),
            stem_channels=widths[0],
            levels=[Level(width, make, make, down, up) for width, make in zip(widths, stages, strict=True)],
            blocks_per_level=blocks_per_level,
            middle=[stage(widths[-1], widths[-1], True), stage(widths[-1], widths[-1], False)],
            condition=ConditionEmbedding(
                SinusoidalEmbedding(channels, 1.0, cosine_first=True),
                channels * positive_int("condition_multiplier", condition_multiplier),
                num_classes,
                null_row=False,
                augment_dim=augment_dim,
            ),
            groups=32,
            checkpointing=checkpointing,
        )
        self.config = config

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """As :meth:`SongUNet.forward`."""
        check_input(x, 4, self.in_channels, "(B, C, H, W)", self.multiple)
        return self.through_levels(x, self.condition(c, y, x.shape[0], augment)).to(x.dtype)


EDMUNet = SongUNet | DhariwalUNet
