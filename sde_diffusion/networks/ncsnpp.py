"""The networks of Song et al. (2021): NCSN++, DDPM++ and DDPM, which are one family.

Reference: Y. Song, J. Sohl-Dickstein, D. P. Kingma, A. Kumar, S. Ermon, B. Poole, "Score-based generative
modeling through stochastic differential equations", 2021, appendices G and H; for DDPM: J. Ho, A. Jain,
P. Abbeel, "Denoising diffusion probabilistic models", 2020, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.blocks import (
    AverageDownsample,
    FIRDownConv,
    FIRDownsample,
    FIRUpConv,
    FIRUpsample,
    RepeatUpsample,
    ResBlock,
    SelfAttention,
    StridedDownsample,
    StridedUpsample,
    checkpointed,
)
from sde_diffusion.networks.channels_last import fastest_layout
from sde_diffusion.networks.checks import check_input, constructor_arguments, positive_int
from sde_diffusion.networks.embeddings import (
    ConditionEmbedding,
    FourierEmbedding,
    Modulations,
    SinusoidalEmbedding,
)
from sde_diffusion.networks.levels import Stage
from sde_diffusion.networks.progressive import Head, InputSkip, OutputSkip, OutputStart, SideResidual
from sde_diffusion.networks.unet import level_indices, level_widths
from sde_diffusion.tensors import expand

EMBEDDINGS = ("fourier", "sinusoidal")
PROGRESSIVE = ("none", "skip", "residual")
COMBINATIONS = ("sum", "cat")
EPS = 1e-6


class Level(nn.Module):
    """One resolution of the encoder or the decoder, run in the order of the arguments.

    Args:
        stages: residual blocks with their attention.
        head: what the decoder does beside the main path before it leaves the level; None for nothing.
        resample: leads to the next level, a residual block or a plain module; None at the end.
        joint: what the encoder does beside the main path after it left the level; None for nothing.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        head: nn.Module | None,
        resample: nn.Module | None,
        joint: nn.Module | None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head
        self.resample = resample
        self.joint = joint


class NCSNpp(nn.Module):
    """The U-Net ``F(x, c, y)`` of NCSN++, DDPM++ and DDPM; the defaults are NCSN++ for CIFAR-10 and VE.

    As :class:`UNet`, with a shift by the noise level and attention of one head, which the decoder has after
    the last block of a level only. Residual branches and the last layer start at zero.

    What c is depends on the embedding: with "fourier" the standard deviation of the noise, whose logarithm is
    embedded; with "sinusoidal" the number of a step, such as 999 t.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result; None for as many as ``in_channels``.
        channels: base width.
        channel_multipliers: width of each level over ``channels``, finest level first.
        blocks_per_level: residual blocks per level of the encoder; the decoder has one more.
        attention_levels: levels with attention, as indices into ``channel_multipliers``.
        embedding: of c, "fourier" or "sinusoidal".
        embedding_scale: standard deviation of the Fourier frequencies.
        resample_in_block: change the resolution inside residual blocks (BigGAN), or by layers of their own
            (DDPM).
        resample_with_conv: these layers of their own have a convolution.
        fir: taps of the filter for all resampling, or None for averages and repetition.
        skip_rescale: divide residual sums by sqrt(2).
        progressive_input: what the encoder gets of the input at each size: "none", "skip" or "residual".
        combination: how "skip" joins it, "sum" or "cat".
        progressive_output: how the result comes about: "none" at the finest level, "skip" as a sum of one
            image per level, "residual" with features in place of images.
        scale_by_sigma: divide the result by the standard deviation of the noise.
        sigma_ladder: (sigma_min, sigma_max, n) for networks with scale_by_sigma whose c is the number of a
            step: the geometric sequence of which step 0 is sigma_max and step n - 1 sigma_min; else None.
        centered: x spans [-1, 1]; if not, it spans [0, 1], and the network begins with ``2 x - 1``.
        dropout: probability, before the second convolution of each residual block.
        min_group_size: of GroupNorm with at most 32 groups; 4, and 1 in DDPM.
        num_classes: number of classes for y, or None. Label ``num_classes`` is the null class.
        checkpointing: recompute activations in the backward pass in training mode.

    Attributes:
        config: the arguments above, so that ``NCSNpp(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        out_channels: int | None = None,
        channels: int = 128,
        channel_multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks_per_level: int = 4,
        attention_levels: Sequence[int] = (1,),
        embedding: str = "fourier",
        embedding_scale: float = 16.0,
        resample_in_block: bool = True,
        resample_with_conv: bool = True,
        fir: Sequence[float] | None = (1, 3, 3, 1),
        skip_rescale: bool = True,
        progressive_input: str = "residual",
        combination: str = "sum",
        progressive_output: str = "none",
        scale_by_sigma: bool = True,
        sigma_ladder: tuple[float, float, int] | None = None,
        centered: bool = False,
        dropout: float = 0.1,
        min_group_size: int = 4,
        num_classes: int | None = None,
        checkpointing: bool = False,
    ) -> None:
        config = constructor_arguments(NCSNpp, locals())
        super().__init__()
        self.config = config
        for kind, name, allowed in (
            ("embedding", embedding, EMBEDDINGS),
            ("progressive_input", progressive_input, PROGRESSIVE),
            ("combination", combination, COMBINATIONS),
            ("progressive_output", progressive_output, PROGRESSIVE),
        ):
            if name not in allowed:
                raise unknown_name(kind, name, allowed)
        self.in_channels = positive_int("in_channels", in_channels)
        image = in_channels if out_channels is None else positive_int("out_channels", out_channels)
        positive_int("channels", channels)
        positive_int("blocks_per_level", blocks_per_level)
        self.fourier = embedding == "fourier"
        self.scale_by_sigma = scale_by_sigma
        self.sigma_ladder = _checked_ladder(sigma_ladder, scale_by_sigma and not self.fourier)
        self.centered = centered
        self.checkpointing = checkpointing
        widths = level_widths(channels, channel_multipliers)
        attended = level_indices(attention_levels, len(widths))
        #: Sides must be multiples of this.
        self.multiple = 2 ** (len(widths) - 1)
        normalisation = {"eps": EPS, "min_group_size": min_group_size}

        def block(inputs: int, outputs: int, resampler: nn.Module | None = None) -> ResBlock:
            return ResBlock(
                inputs,
                outputs,
                scale_shift=False,
                dropout=dropout,
                skip_rescale=skip_rescale,
                resampler=resampler,
                project_skip=resampler is not None,
                **normalisation,  # type: ignore[arg-type]
            )

        def stage(inputs: int, outputs: int, attention: bool) -> Stage:
            if not attention:
                return Stage(block(inputs, outputs))
            attend = SelfAttention(outputs, skip_rescale=skip_rescale, **normalisation)  # type: ignore[arg-type]
            return Stage(block(inputs, outputs), attend)

        def head(inputs: int, outputs: int) -> Head:
            return Head(inputs, outputs, **normalisation)  # type: ignore[arg-type]

        def joint(side: int, width: int) -> InputSkip | SideResidual | None:
            if progressive_input == "skip":
                concatenate = combination == "cat"
                return InputSkip(side, width, _down(side, side, False, fir), concatenate=concatenate)
            if progressive_input == "residual":
                return SideResidual(width, _down(side, width, True, fir), skip_rescale=skip_rescale)
            return None

        def output(side: int | None, width: int) -> nn.Module | None:
            if progressive_output == "none":
                return None
            skip = progressive_output == "skip"
            if side is None:
                return OutputStart(head(width, image if skip else width))
            if skip:
                return OutputSkip(head(width, image), _up(side, side, False, fir))
            return SideResidual(width, _up(side, width, True, fir), skip_rescale=skip_rescale)

        last = len(widths) - 1
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.encoder = nn.ModuleList()
        h, skips, side = channels, [channels], in_channels
        for level, width in enumerate(widths):
            stages = []
            for _ in range(blocks_per_level):
                stages.append(stage(h, width, level in attended))
                h = width
                skips.append(h)
            resample: nn.Module | None = None
            joined: InputSkip | SideResidual | None = None
            if level < last:
                if resample_in_block:
                    resample = block(h, h, _down(h, h, False, fir))
                else:
                    resample = _down(h, h, resample_with_conv, fir)
                joined = joint(side, h)
                if joined is not None:
                    h = joined.out_channels
                    side = h if progressive_input == "residual" else side
                skips.append(h)
            self.encoder.append(Level(stages, None, resample, joined))
        self.middle = nn.ModuleList([stage(h, h, True), stage(h, h, False)])
        self.decoder = nn.ModuleList()
        grown: int | None = None
        for level, width in reversed(list(enumerate(widths))):
            stages = []
            for index in range(blocks_per_level + 1):
                attention = level in attended and index == blocks_per_level
                stages.append(stage(h + skips.pop(), width, attention))
                h = width
            beside = output(grown, h)
            grown = image if progressive_output == "skip" else h
            resample = None
            if level > 0 and resample_in_block:
                resample = block(h, h, _up(h, h, False, fir))
            elif level > 0:
                resample = _up(h, h, resample_with_conv, fir)
            self.decoder.append(Level(stages, beside, resample, None))
        #: None where the side path is the result.
        self.head = None if progressive_output == "skip" else head(h, image)

        features: FourierEmbedding | SinusoidalEmbedding
        if self.fourier:
            features = FourierEmbedding(2 * channels, embedding_scale)
        else:
            features = SinusoidalEmbedding(channels, 1.0, endpoint=True)
        self.condition = ConditionEmbedding(features, 4 * channels, num_classes)
        self.modulations = self._modulations(4 * channels)

    def _modulations(self, channels: int) -> Modulations:
        """For condition vectors of so many channels, in the order in which forward meets the blocks."""
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        return Modulations(channels, [block.modulation_features for block in blocks])

    @property
    def modulated(self) -> tuple[str, ...]:
        """Names of the residual blocks in the order of their modulations."""
        return tuple(name for name, module in self.named_modules() if isinstance(module, ResBlock))

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, H, W), sides multiples of ``2^(levels - 1)``.
            c: (B,), the standard deviation of the noise or the number of a step, see the class.
            y: (B,) int64 labels in [0, num_classes], num_classes meaning "no class"; None for no class at
                all.

        Returns:
            (B, out_channels, H, W), in the dtype of x.
        """
        check_input(x, 4, self.in_channels, "(B, C, H, W)", self.multiple)
        embedding = self.condition(c.log() if self.fourier else c, y, x.shape[0])
        out = self.through_levels(x if self.centered else 2 * x - 1, embedding)
        if self.scale_by_sigma:
            out = out / expand(self._sigma(c), out)
        return out.to(x.dtype)

    def through_levels(self, x: Tensor, embedding: Tensor) -> Tensor:
        """All layers, for x (B, in_channels, H, W) in [-1, 1] and condition vectors (B, channels)."""
        modulations = iter(self.modulations(embedding))
        side = x
        h = fastest_layout(self.stem(side))
        skips = [h]
        for level in self.encoder:
            for stage in level.stages:  # type: ignore[union-attr]
                h = self._run(stage, h, modulations)
                skips.append(h)
            if level.resample is not None:
                h = self._run(level.resample, h, modulations)  # type: ignore[arg-type]
                if level.joint is not None:
                    h, side = level.joint(h, side)  # type: ignore[operator]
                skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, modulations)
        for level in self.decoder:
            for stage in level.stages:  # type: ignore[union-attr]
                h = self._run(stage, torch.cat([h, skips.pop()], dim=1), modulations)
            if level.head is not None:
                h, side = level.head(h, side)  # type: ignore[operator]
            if level.resample is not None:
                h = self._run(level.resample, h, modulations)  # type: ignore[arg-type]
        return side if self.head is None else self.head(h)

    def _sigma(self, c: Tensor) -> Tensor:
        if self.sigma_ladder is None:
            return c
        low, high, steps = self.sigma_ladder
        slope = math.log(low / high) / (steps - 1)
        return high * (c.double() * slope).exp()

    def _run(self, module: nn.Module, h: Tensor, modulations: Iterator[Tensor]) -> Tensor:
        if isinstance(module, (Stage, ResBlock)):
            return checkpointed(self.checkpointing, module, h, next(modulations))
        return module(h)


def _down(inputs: int, outputs: int, conv: bool, fir: Sequence[float] | None) -> nn.Module:
    """Halves the sides, with a filter where there is one, with a convolution or without."""
    if fir is None:
        return StridedDownsample(inputs, outputs, asymmetric=True) if conv else AverageDownsample(inputs)
    return FIRDownConv(inputs, outputs, fir) if conv else FIRDownsample(inputs, fir)


def _up(inputs: int, outputs: int, conv: bool, fir: Sequence[float] | None) -> nn.Module:
    """Doubles the sides, with a filter where there is one, with a convolution or without."""
    if fir is None:
        return StridedUpsample(inputs, outputs) if conv else RepeatUpsample(inputs)
    return FIRUpConv(inputs, outputs, fir) if conv else FIRUpsample(inputs, fir)


def _checked_ladder(ladder: tuple[float, float, int] | None, needed: bool) -> tuple[float, float, int] | None:
    if not needed:
        if ladder is not None:
            raise ValueError(
                f"sigma_ladder is for a sinusoidal embedding with scale_by_sigma only, got {ladder!r}"
            )
        return None
    if ladder is None or len(tuple(ladder)) != 3 or not 0 < ladder[0] < ladder[1] or ladder[2] < 2:
        raise ValueError(
            "with scale_by_sigma and a sinusoidal embedding, sigma_ladder must be (sigma_min, sigma_max, n) "
            f"with 0 < sigma_min < sigma_max and n >= 2, got {ladder!r}"
        )
    return float(ladder[0]), float(ladder[1]), int(ladder[2])
