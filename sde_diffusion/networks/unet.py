"""The U-Net of the literature (Ho et al. 2020; Dhariwal & Nichol 2021), for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.blocks import (
    AverageDownsample,
    RepeatUpsample,
    ResBlock,
    SelfAttention,
    StridedDownsample,
    StridedUpsample,
)
from sde_diffusion.networks.checks import check_input, constructor_arguments, fourier_range, positive_int
from sde_diffusion.networks.embeddings import (
    ConditionEmbedding,
    coordinate_channels,
    fourier_features,
    make_embedding,
)
from sde_diffusion.networks.levels import Level, LevelUNet, Stage

TIME_INJECTIONS = {"scale_shift": True, "shift": False}
RESAMPLINGS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "strided": (StridedDownsample, StridedUpsample),
    "resampled": (AverageDownsample, RepeatUpsample),
}


class UNet(LevelUNet):
    """U-Net ``F(x, c, y)`` with residual blocks, self-attention and skip connections.

    Level l of the encoder has ``blocks_per_level`` residual blocks of ``channels * channel_multipliers[l]``
    channels at ``1 / 2^l`` of the resolution, the middle has two with attention between them, the decoder has
    ``blocks_per_level + 1`` per level, each of which also takes one of the encoder's results. The last layer
    starts at zero, and so does each residual branch, so a new network computes zero.

    Any height and width: an image whose sides are not multiples of ``2^(levels - 1) unshuffle`` is padded by zeros
    at the bottom and right, and the result cut back.

    In evaluation mode the network may be differentiated in any way (``torch.func.jvp``, batched vjps, twice);
    in training mode attention uses the fused kernels, which have first derivatives only.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result; None for as many as ``in_channels``.
        channels: base width.
        channel_multipliers: width of each level over ``channels``, finest level first; their number is the
            depth.
        blocks_per_level: residual blocks per level of the encoder.
        attention_levels: levels whose blocks are followed by attention, as indices into
            ``channel_multipliers``: 0 is the full resolution, -1 the coarsest level. Levels and not pixel
            sizes, so it means the same at any image size.
        middle_attention: attention between the two middle blocks.
        heads: attention heads; or give ``head_channels``, the width of one head. With neither, heads are 64
            channels wide or somewhat wider.
        head_channels: see ``heads``.
        dropout: probability, before the second convolution of each residual block.
        embedding: of c, "sinusoidal" or "fourier".
        embedding_scale: its scale: :class:`SinusoidalEmbedding` or :class:`FourierEmbedding` say what it
            means and which value suits which c; None for 1000 (sinusoidal, for times in [0, 1]) and 16
            (fourier).
        embedding_channels: width of the condition vector; None for ``4 * channels``.
        time_injection: "scale_shift" or "shift", see :class:`ResBlock`.
        resampling: "strided" (convolution of stride 2; repetition and convolution) or "resampled" (2x2
            average; repetition).
        num_classes: number of classes for y, or None. Label ``num_classes`` is the null class.
        groups: at most so many groups in GroupNorm; the largest number is taken that divides the channels and
            leaves groups of at least 4.
        input_fourier: (n_min, n_max) to append :func:`fourier_features` of x as channels (Kingma et al.
            2021).
        coordinates: append the pixel coordinates as two channels, for images that are aligned.
        checkpointing: recompute activations in the backward pass in training mode: less memory, one more
            forward pass.
        skip_rescale: divide residual sums by sqrt(2) (Song et al. 2021).
        context_dim: length of a vector ``context``, of which a linear map is added to the condition vector; 0 for
            none.
        unshuffle: squares of so many pixels become the channels of one position, and the last layer, then a 1x1
            convolution, gives all of theirs (Hoogeboom et al. 2023, "simple diffusion", sec. 3.3): the finest
            level has ``1 / unshuffle^2`` of the positions, at as much of the cost. 1 for none.

    Attributes:
        config: the arguments above, so that ``UNet(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        channels: int = 64,
        channel_multipliers: Sequence[float] = (1, 2),
        blocks_per_level: int = 2,
        attention_levels: Sequence[int] = (-1,),
        middle_attention: bool = True,
        heads: int | None = None,
        head_channels: int | None = None,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        embedding_scale: float | None = None,
        embedding_channels: int | None = None,
        time_injection: str = "scale_shift",
        resampling: str = "strided",
        num_classes: int | None = None,
        groups: int = 32,
        input_fourier: tuple[int, int] | None = None,
        coordinates: bool = False,
        checkpointing: bool = False,
        skip_rescale: bool = False,
        unshuffle: int = 1,
        context_dim: int = 0,
    ) -> None:
        config = constructor_arguments(UNet, locals())
        positive_int("channels", channels)
        positive_int("in_channels", in_channels)
        if time_injection not in TIME_INJECTIONS:
            raise unknown_name("time_injection", time_injection, TIME_INJECTIONS)
        if resampling not in RESAMPLINGS:
            raise unknown_name("resampling", resampling, RESAMPLINGS)
        fourier = fourier_range(input_fourier)
        widths = level_widths(channels, channel_multipliers)
        attended = level_indices(attention_levels, len(widths))

        def stage(inputs: int, outputs: int, attention: bool) -> Stage:
            block = ResBlock(
                inputs,
                outputs,
                scale_shift=TIME_INJECTIONS[time_injection],
                dropout=dropout,
                groups=groups,
                skip_rescale=skip_rescale,
            )
            if not attention:
                return Stage(block)
            count = head_count(outputs, heads, head_channels)
            return Stage(block, SelfAttention(outputs, heads=count, groups=groups, skip_rescale=skip_rescale))

        levels = []
        for i, width in enumerate(widths):
            make = partial(stage, attention=i in attended)
            levels.append(Level(width, make, make, *RESAMPLINGS[resampling]))
        condition = 4 * channels if embedding_channels is None else embedding_channels
        features = make_embedding(embedding, channels + channels % 2, embedding_scale)
        outputs = in_channels if out_channels is None else positive_int("out_channels", out_channels)
        area = positive_int("unshuffle", unshuffle) ** 2
        super().__init__(
            in_channels=feature_channels(in_channels, fourier, coordinates) * area,
            out_channels=outputs * area,
            stem_channels=channels,
            levels=levels,
            blocks_per_level=blocks_per_level,
            middle=[stage(widths[-1], widths[-1], middle_attention), stage(widths[-1], widths[-1], False)],
            condition=ConditionEmbedding(features, condition, num_classes, context_dim=context_dim),
            groups=groups,
            checkpointing=checkpointing,
            out_kernel=3 if unshuffle == 1 else 1,
        )
        self.multiple *= unshuffle
        self.config = config
        self.unshuffle = unshuffle
        self.in_channels = in_channels
        self.input_fourier = fourier
        self.coordinates = coordinates

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, H, W), scaled to about unit variance.
            c: (B,), the noise level in the units the embedding was built for.
            y: (B,) int64 labels in [0, num_classes], num_classes meaning "no class"; None for no class at
                all.
            context: (B, context_dim), if there is one.

        Returns:
            (B, out_channels, H, W), in the dtype of x.
        """
        check_input(x, 4, self.in_channels, "(B, C, H, W)")
        height, width = x.shape[2:]
        features = self._features(x)
        if self.unshuffle > 1:
            features = pixel_unshuffle(features, self.unshuffle)
        h = self.through_levels(features, self.condition(c, y, x.shape[0], context=context))
        if self.unshuffle > 1:
            h = pixel_shuffle(h, self.unshuffle)
        return h[:, :, :height, :width].to(x.dtype)

    def _features(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        parts = [x]
        if self.input_fourier is not None:
            parts.append(fourier_features(x, *self.input_fourier))
        if self.coordinates:
            parts.append(coordinate_channels(x, height, width))
        return torch.cat(parts, dim=1) if len(parts) > 1 else x


def feature_channels(channels: int, input_fourier: tuple[int, int] | None, coordinates: bool) -> int:
    """Channels of the input and what is appended to it."""
    copies = 1 if input_fourier is None else 3 + 2 * (input_fourier[1] - input_fourier[0])
    return channels * copies + (2 if coordinates else 0)


def level_widths(channels: int, multipliers: Sequence[float]) -> list[int]:
    """``channels * m`` for each multiplier, which must be whole numbers >= 1."""
    multipliers = tuple(multipliers)
    if not multipliers or any(channels * m < 1 or channels * m != int(channels * m) for m in multipliers):
        raise ValueError(
            "channel_multipliers must be one or more positive numbers whose products with "
            f"channels={channels} are whole, got {multipliers!r}"
        )
    return [int(channels * m) for m in multipliers]


def level_indices(levels: Sequence[int], count: int) -> set[int]:
    """The levels as indices 0 .. count - 1; negative ones count from the end."""
    levels = tuple(levels)
    for level in levels:
        if not isinstance(level, int) or not -count <= level < count:
            raise ValueError(
                f"attention_levels must be integers from {-count} to {count - 1} for {count} levels, "
                f"got {levels!r}"
            )
    return {level % count for level in levels}


def head_count(channels: int, heads: int | None, head_channels: int | None) -> int:
    """Attention heads for ``channels``, from their number or width; with neither, one per 64 channels."""
    if heads is not None and head_channels is not None:
        raise ValueError(f"give heads or head_channels, not both, got {heads!r} and {head_channels!r}")
    if heads is not None:
        return positive_int("heads", heads)
    if head_channels is not None:
        if channels % positive_int("head_channels", head_channels):
            raise ValueError(f"head_channels must divide the {channels} channels, got {head_channels}")
        return channels // head_channels
    return max(n for n in range(1, max(1, channels // 64) + 1) if channels % n == 0)


def pixel_unshuffle(x: Tensor, side: int) -> Tensor:
    """``torch.nn.functional.pixel_unshuffle`` by one copy with strides, which is faster on CPUs."""
    b, c, h, w = x.shape
    squares = x.reshape(b, c, h // side, side, w // side, side).permute(0, 1, 3, 5, 2, 4)
    return squares.reshape(b, c * side**2, h // side, w // side)


def pixel_shuffle(x: Tensor, side: int) -> Tensor:
    """``torch.nn.functional.pixel_shuffle``, likewise."""
    b, c, h, w = x.shape
    squares = x.reshape(b, c // side**2, side, side, h, w).permute(0, 1, 4, 2, 5, 3)
    return squares.reshape(b, c // side**2, h * side, w * side)
