"""The U-Net that the library diffusers calls ``UNet2DModel``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import resamplers
from sde_diffusion.networks.blocks import ResBlock, SelfAttention, StridedDownsample
from sde_diffusion.networks.checks import constructor_arguments, positive_int
from sde_diffusion.networks.embeddings import ConditionEmbedding, SinusoidalEmbedding
from sde_diffusion.networks.levels import Level, LevelUNet, Stage

#: Name of a block -> (has attention, the way of its resampling or None for what ``*sample_type`` says).
DOWN_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "DownBlock2D": (False, "conv"),
    "ResnetDownsampleBlock2D": (False, "resnet"),
    "AttnDownBlock2D": (True, None),
}
UP_BLOCKS: dict[str, tuple[bool, str | None]] = {
    "UpBlock2D": (False, "conv"),
    "ResnetUpsampleBlock2D": (False, "resnet"),
    "AttnUpBlock2D": (True, None),
}
_RESAMPLINGS = {"conv": "strided", "resnet": "block"}
_INJECTIONS = {"default": False, "scale_shift": True}


class UNet2D(LevelUNet):
    """U-Net ``F(x, c, y)`` with the arguments of diffusers' UNet2DModel, under their own names and defaults.

    It is the U-Net of Ho et al. (2020) and, with ``resnet_time_scale_shift="scale_shift"``, of Dhariwal &
    Nichol (2021). c is the number of the step.

    Args:
        sample_size: height and width of the images; a note that changes nothing.
        in_channels, out_channels: of x and of the result.
        center_input_sample: map the input by ``2 x - 1`` first.
        time_embedding_dim: width of the condition vector; None for four times the first width.
        freq_shift: 0 or 1: 1 ends the frequencies exactly at 1 / 10000 (as Ho et al. 2020).
        flip_sin_to_cos: cosines before sines.
        down_block_types: for each level, finest first, one of :data:`DOWN_BLOCKS`.
        mid_block_type: "UNetMidBlock2D", or None for no middle.
        up_block_types: for each level, coarsest first, one of :data:`UP_BLOCKS`.
        block_out_channels: width of each level, finest first.
        layers_per_block: stages per level of the encoder.
        mid_block_scale_factor: residual sums in the middle are divided by it.
        downsample_padding: of the strided convolutions: 1, or 0 for one row at the bottom and one column at
            the right.
        downsample_type, upsample_type: "conv" or "resnet" (inside a residual block), for blocks with
            attention.
        dropout: probability, before the second convolution of each residual block.
        attention_head_dim: channels of one head, dividing the widths of levels with attention; None for one
            head.
        norm_num_groups, norm_eps: of GroupNorm. The groups must divide all widths.
        attn_norm_num_groups: groups of the middle attention's norm; None for ``norm_num_groups``, or for no
            norm at all with "scale_shift".
        resnet_time_scale_shift: "default" (a shift) or "scale_shift".
        add_attention: attention in the middle.
        num_class_embeds: number of classes for y, which must then be given; or None.
        checkpointing: recompute activations in the backward pass in training mode.
        time_embedding_type, act_fn, class_embed_type, num_train_timesteps: "positional", "silu" (or "swish"),
            None and None; there is nothing else here.

    Attributes:
        config: the arguments above.

    Raises:
        ValueError: for a value that is not among these.
    """

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", *["AttnDownBlock2D"] * 3),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        config = constructor_arguments(UNet2D, locals())
        _only("time_embedding_type", time_embedding_type, ("positional",))
        _only("act_fn", act_fn, ("silu", "swish"))
        _only("class_embed_type", class_embed_type, (None,))
        _only("num_train_timesteps", num_train_timesteps, (None,))
        _only("mid_block_type", mid_block_type, ("UNetMidBlock2D", None))
        _only("freq_shift", freq_shift, (0, 1))
        _only("downsample_padding", downsample_padding, (0, 1))
        _only("resnet_time_scale_shift", resnet_time_scale_shift, tuple(_INJECTIONS))
        _only("downsample_type", downsample_type, tuple(_RESAMPLINGS))
        _only("upsample_type", upsample_type, tuple(_RESAMPLINGS))
        widths = [positive_int("block_out_channels", width) for width in block_out_channels]
        down_types = _block_types("down_block_types", down_block_types, DOWN_BLOCKS, len(widths))
        up_types = _block_types("up_block_types", up_block_types, UP_BLOCKS, len(widths))[::-1]
        groups = positive_int("norm_num_groups", norm_num_groups)
        for width in widths:
            if width % groups:
                raise ValueError(f"norm_num_groups must divide block_out_channels, got {groups} and {widths}")

        scale_shift = _INJECTIONS[resnet_time_scale_shift]
        norm: dict[str, Any] = {"eps": norm_eps, "min_group_size": 1}
        block: Callable[..., ResBlock] = partial(
            ResBlock, scale_shift=scale_shift, dropout=dropout, groups=groups, **norm
        )

        def attention(width: int, groups: int | None, **options: Any) -> SelfAttention:
            head = (
                width
                if attention_head_dim is None
                else positive_int("attention_head_dim", attention_head_dim)
            )
            if width % head:
                raise ValueError(
                    f"attention_head_dim must divide the {width} channels of attention, got {head}"
                )
            return SelfAttention(width, heads=width // head, groups=groups, **norm, **options)

        def stage(inputs: int, outputs: int, attended: bool) -> Stage:
            return Stage(block(inputs, outputs), attention(outputs, groups) if attended else None)

        def downsampler(kind: str) -> Callable[[int], nn.Module]:
            if kind == "conv" and downsample_padding == 0:
                return partial(StridedDownsample, asymmetric=True)
            return resamplers(_RESAMPLINGS[kind], block)[0]

        levels = []
        for width, down_type, up_type in zip(widths, down_types, up_types, strict=True):
            down_attended, down = DOWN_BLOCKS[down_type]
            up_attended, up = UP_BLOCKS[up_type]
            levels.append(
                Level(
                    width,
                    partial(stage, attended=down_attended),
                    partial(stage, attended=up_attended),
                    downsampler(down or downsample_type),
                    resamplers(_RESAMPLINGS[up or upsample_type], block)[1],
                )
            )

        middle: list[Stage] = []
        if mid_block_type is not None:
            scale = 1 / mid_block_scale_factor
            middle_groups = (
                groups if attn_norm_num_groups is None and not scale_shift else attn_norm_num_groups
            )
            middle = [Stage(block(widths[-1], out_scale=scale)) for _ in range(2)]
            if add_attention:
                middle[0].attention = attention(widths[-1], middle_groups, out_scale=scale)
        embedding_channels = 4 * widths[0] if time_embedding_dim is None else time_embedding_dim
        features = SinusoidalEmbedding(widths[0], 1.0, endpoint=freq_shift == 1, cosine_first=flip_sin_to_cos)
        super().__init__(
            in_channels=positive_int("in_channels", in_channels),
            out_channels=positive_int("out_channels", out_channels),
            stem_channels=widths[0],
            levels=levels,
            blocks_per_level=layers_per_block,
            middle=middle,
            condition=ConditionEmbedding(features, embedding_channels, num_class_embeds, null_row=False),
            groups=groups,
            checkpointing=checkpointing,
            labels_needed=num_class_embeds is not None,
            **norm,
        )
        self.config = config
        self.centered = center_input_sample

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (B, in_channels, H, W), c: (B,), y: (B,) int64 -> (B, out_channels, H, W) in the dtype of x."""
        return super().forward(2 * x - 1 if self.centered else x, c, y)


def _only(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))} here, got {value!r}")


def _block_types(name: str, got: Sequence[str], known: dict[str, Any], count: int) -> list[str]:
    if len(got) != count:
        raise ValueError(f"{name} must be as many as block_out_channels, {count}, got {tuple(got)!r}")
    for block in got:
        if block not in known:
            raise unknown_name(name, block, known)
    return list(got)
