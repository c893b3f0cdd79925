"""The blocks of U-Nets: residual block, self-attention, down- and up-sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sde_diffusion.networks.attention import attend_channels, attend_tokens
from sde_diffusion.networks.channels_last import fused, is_channels_last, norm_silu, transformed
from sde_diffusion.networks.checks import positive_int, probability
from sde_diffusion.networks.convolution import Conv3x3
from sde_diffusion.networks.narrow_attention import is_narrow, narrow_attention


def zero_init(module: nn.Module) -> nn.Module:
    """Sets all parameters of ``module`` to zero and returns it: a residual branch then starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_count(channels: int, groups: int, min_size: int = 4) -> int:
    """The number of groups for GroupNorm: the largest divisor of ``channels`` that is at most ``groups``.

    Groups also keep at least ``min_size`` channels (as far as there are that many): a group of one or two
    channels would normalise away what these channels have to say.
    """
    positive_int("channels", channels)
    limit = max(1, min(positive_int("groups", groups), channels // min_size))
    return max(n for n in range(1, limit + 1) if channels % n == 0)


def group_norm(channels: int, groups: int, eps: float = 1e-5, min_size: int = 4) -> nn.GroupNorm:
    """GroupNorm with :func:`group_count` groups (Wu & He 2018)."""
    return nn.GroupNorm(group_count(channels, groups, min_size), channels, eps)


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, each after GroupNorm and SiLU, modulated in between.

    ``h = conv1(silu(norm1(x)))``; then with ``scale_shift``: ``h = norm2(h) * (1 + scale) + shift`` (Dhariwal
    & Nichol 2021, "AdaGN"), else ``h = norm2(h + shift)`` (Ho et al. 2020); the result is
    ``skip(x) + conv2(dropout(silu(h)))``, where skip is the identity, or a 1x1 convolution if channels
    change. conv2 starts at zero. With a ``resampler`` R the block changes the resolution too (Brock et al.
    2019): ``h = conv1(R(silu(norm1(x))))`` and ``skip(R(x))``.

    Args:
        in_channels, out_channels: of the input and the result.
        scale_shift: modulate by scale and shift, or by a shift alone.
        dropout: probability, in [0, 1).
        groups: at most so many groups in GroupNorm, see :func:`group_count`.
        skip_rescale: divide the sum by sqrt(2), which keeps its variance (Song et al. 2021, app. H).
        resampler: a module without parameters that halves or doubles the sides; None for neither.
        project_skip: make skip a 1x1 convolution even if channels do not change.
        eps, min_group_size: of GroupNorm, see :func:`group_norm`.
        out_scale: multiply the sum by this number.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        scale_shift: bool = True,
        dropout: float = 0.0,
        groups: int = 32,
        skip_rescale: bool = False,
        resampler: nn.Module | None = None,
        project_skip: bool = False,
        eps: float = 1e-5,
        min_group_size: int = 4,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.scale_shift = scale_shift
        self.dropout = probability("dropout", dropout)
        self.out_scale = out_scale * math.sqrt(0.5) if skip_rescale else out_scale
        #: Number of modulation features forward takes.
        self.modulation_features = 2 * out_channels if scale_shift else out_channels
        self.resampler = resampler
        self.norm1 = group_norm(in_channels, groups, eps, min_group_size)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, groups, eps, min_group_size)
        self.conv2 = zero_init(Conv3x3(out_channels, out_channels))
        plain_skip = in_channels == out_channels and not project_skip
        self.skip = nn.Identity() if plain_skip else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: (B, in_channels, H, W), modulation: (B, modulation_features) -> (B, out_channels, H, W)."""
        h = normalized(self.norm1, x, silu=True)
        if isinstance(self.resampler, RepeatUpsample):
            h, x = repeat_and_convolve(h, self.conv1), self.resampler(x)
        elif self.resampler is not None:
            h, x = self.conv1(self.resampler(h)), self.resampler(x)
        else:
            h = self.conv1(h)
        scale = shift = offset = None
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
        else:
            offset = modulation
        dropped = self.dropout if self.training else 0.0
        h = normalized(self.norm2, h, scale, shift, offset=offset, silu=True, dropped=dropped)
        h = self.conv2(h)
        skip = self.skip
        kept = pointwise(x, skip.weight, skip.bias) if isinstance(skip, nn.Conv2d) else x
        return _residual(kept, h, self.out_scale)


def expand_channels(features: Tensor, x: Tensor) -> Tensor:
    """features (B, C) in the dtype of the images x, (B, C, 1, 1)."""
    return features.to(x.dtype)[:, :, None, None]


def normalized(
    norm: nn.GroupNorm,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    offset: Tensor | None = None,
    silu: bool = False,
    dropped: float = 0.0,
) -> Tensor:
    """``f(norm(x + offset) (1 + scale) + shift)``, f being SiLU or nothing, by the fastest way there is for x.

    Args:
        norm: with weight and bias.
        x: (B, C, H, W).
        scale, shift: both (B, C), or both None for neither.
        offset: (B, C), or None for zero.
        silu: whether to apply SiLU.
        dropped: with SiLU, the probability of dropout after it.
    """
    if fused(x):
        weight, bias = norm.weight.float()[None], norm.bias.float()[None]
        if scale is not None and shift is not None:
            factor = 1 + scale.float()
            weight, bias = weight * factor, torch.addcmul(shift.float(), bias, factor)
        offset = None if offset is None else offset.float()
        return norm_silu(x, weight, bias, norm.num_groups, norm.eps, silu, offset=offset, dropout=dropped)
    if offset is not None:
        x = x + expand_channels(offset, x)
    # With channels last torch's GroupNorm is many times slower on CPUs, and has no forward-mode derivative at all.
    if x.device.type == "cpu" or transformed():
        x = x.contiguous()
    h = norm(x) if scale is None or shift is None else modulated_norm(norm, x, scale, shift)
    return dropout(F.silu(h), dropped) if silu else h


def modulated_norm(norm: nn.GroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` for x (B, C, H, W), scale and shift (B, C).

    On CPUs by one kernel: a batch of B images is one image of B C channels in B times as many groups, whose
    affine map is then one per image: ``w (1 + scale)`` and ``b (1 + scale) + shift``.
    """
    plain = x.device.type != "cpu" or torch.compiler.is_compiling()
    if plain or not x.is_contiguous() or not len(x):
        return torch.addcmul(expand_channels(shift, x), norm(x), 1 + expand_channels(scale, x))
    scale = 1 + scale.to(norm.weight.dtype)
    weight = (norm.weight * scale).flatten()
    bias = torch.addcmul(shift.to(norm.weight.dtype), norm.bias, scale).flatten()
    images = x.reshape(1, -1, *x.shape[2:])
    return F.group_norm(images, len(x) * norm.num_groups, weight, bias, norm.eps).view(x.shape)


class SelfAttention(nn.Module):
    """Self-attention over all positions of an image, as a residual block.

    ``x + out(attend(q, k, v))`` with (q, k, v) a linear map of GroupNorm(x) at each pixel, in ``heads`` heads
    (Vaswani et al. 2017; Ho et al. 2020). ``out`` starts at zero.

    Args:
        channels: of the input and the result.
        heads: number of heads, dividing channels.
        groups: as in :class:`ResBlock`; None for no normalisation at all.
        skip_rescale, eps, min_group_size, out_scale: as in :class:`ResBlock`.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        groups: int | None = 32,
        skip_rescale: bool = False,
        eps: float = 1e-5,
        min_group_size: int = 4,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if channels % positive_int("heads", heads):
            raise ValueError(f"heads must divide the {channels} channels of the attention, got {heads}")
        self.heads = heads
        self.out_scale = out_scale * math.sqrt(0.5) if skip_rescale else out_scale
        self.norm = nn.Identity() if groups is None else group_norm(channels, groups, eps, min_group_size)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        zero_init(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, channels, H, W) -> the same shape."""
        h = normalized(self.norm, x) if isinstance(self.norm, nn.GroupNorm) else self.norm(x)
        if is_channels_last(h) and h.device.type == "cpu":
            return self._of_rows(x, h)
        if in_rows(h):
            qkv = pointwise(h, self.qkv.weight, self.qkv.bias).flatten(2)
            h = attend_channels(qkv, self.heads, self.training).unflatten(2, x.shape[2:])
            return _residual(x, pointwise(h, self.out.weight, self.out.bias), self.out_scale)
        h = self.out(attend_tokens(self.qkv(h.flatten(2).transpose(1, 2)), self.heads, self.training))
        return _residual(x, h.transpose(1, 2).unflatten(2, x.shape[2:]), self.out_scale)

    def _of_rows(self, x: Tensor, h: Tensor) -> Tensor:
        """The same for images whose channels are last in memory: tokens as they are."""
        qkv = self.qkv(h.permute(0, 2, 3, 1).flatten(1, 2))
        if is_narrow(qkv, self.heads):
            h = narrow_attention(qkv, self.heads)
        else:
            h = attend_tokens(qkv, self.heads, self.training)
        return _residual(x, self.out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2), self.out_scale)


def in_rows(x: Tensor) -> bool:
    """Whether x (B, C, H, W) is best computed with as a matrix (C, H W) per image: on CPUs."""
    fitting = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32)
    here = fitting and not torch.compiler.is_compiling()
    return here and x.is_contiguous() and x.shape[2] * x.shape[3] >= 64


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear map of the channels at each pixel: x (B, C, H, W), weight (C', C) or (C', C, 1, 1) -> (B, C', H, W).

    As a product of matrices, with nothing transposed, it is twice as fast as the convolution in bfloat16 on CPUs
    and as fast or up to a third faster in float32 (torch 2.13), unless the pixels are so few that the weights'
    gradients, one per image, outweigh it.
    """
    weight = weight.flatten(1)
    if fused(x):
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    if not in_rows(x) or bias is None:
        return F.conv2d(x, weight.unflatten(1, (-1, 1, 1)), bias)
    batch, _, height, width = x.shape
    # Converted before they are expanded: autocast would do it for each image.
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    shift = bias[:, None].expand(batch, -1, 1)
    return torch.baddbmm(shift, weight.expand(batch, -1, -1), x.flatten(2)).unflatten(2, (height, width))


class StridedDownsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2.

    ``asymmetric`` pads by one row at the bottom and one column at the right, as Ho et al. (2020) did, in
    place of one on every side. ``out_channels`` is None for as many as there are.
    """

    def __init__(self, channels: int, out_channels: int | None = None, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        padding = 0 if asymmetric else 1
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class StridedUpsample(nn.Module):
    """Doubles height and width by repetition, followed by a 3x3 convolution."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, out_channels or channels)

    def forward(self, x: Tensor) -> Tensor:
        return repeat_and_convolve(x, self.conv)


def repeat_and_convolve(x: Tensor, conv: Conv3x3) -> Tensor:
    """A 3x3 convolution (padding 1) of x (B, C, H, W) with every pixel doubled -> (B, C', 2 H, 2 W).

    One result depends on 2x2 of the pixels before doubling: the same map is a transposed convolution of
    stride 2 with 4x4 weights, at 4 products per result in place of 9. On CPUs that is twice as fast from some
    hundred pixels on, unless the 3x3 convolution :meth:`~Conv3x3.is_fast`.
    """
    plain = torch.compiler.is_compiling() or x.device.type != "cpu"
    few = x.shape[0] * x.shape[2] * x.shape[3] < 256
    if plain or few or conv.is_fast(x):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return F.conv_transpose2d(x, repetition_folded(conv.weight), conv.bias, stride=2, padding=1)


def repetition_folded(weight: Tensor) -> Tensor:
    """The weights (in, out, 4, 4) of :func:`repeat_and_convolve`, from those (out, in, 3, 3) of the convolution.

    Each is the sum of the 3x3 taps that meet the same pixel: ``M w M^T`` with the 4x3 matrix M of rows 001,
    011, 110, 100.
    """
    line = weight.new_tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    # One product of matrices: much faster here than sums of strided slices.
    taps = weight.transpose(0, 1).flatten(2) @ torch.kron(line, line).T.contiguous()
    return taps.unflatten(2, (4, 4))


class AverageDownsample(nn.Module):
    """Halves height and width by averaging 2x2 pixels; nothing is learned."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class RepeatUpsample(nn.Module):
    """Doubles height and width by repetition; nothing is learned."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class FIRDownsample(nn.Module):
    """Halves height and width after the low-pass filter ``taps x taps`` (Zhang 2019; Song et al. 2021).

    Args:
        channels: of the input; any number, nothing is learned.
        taps: an even number of filter taps; they are normalised to sum one. (1, 1) is a 2x2 average.
    """

    kernel: Tensor

    def __init__(self, channels: int, taps: Sequence[float] = (1, 3, 3, 1)) -> None:
        super().__init__()
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)
        self.padding = len(taps) // 2 - 1
        self.average = len(taps) == 2 and taps[0] == taps[1]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, 2 h, 2 w) -> (B, C, h, w)."""
        if self.average:  # the same, faster
            return F.avg_pool2d(x, 2)
        return F.conv2d(x, _per_channel(self.kernel, x), stride=2, padding=self.padding, groups=x.shape[1])


class FIRUpsample(nn.Module):
    """Doubles height and width by the transpose of :class:`FIRDownsample`, times 4 to keep the mean.

    Args:
        channels, taps: as in :class:`FIRDownsample`. (1, 1) is a repetition.
    """

    kernel: Tensor

    def __init__(self, channels: int, taps: Sequence[float] = (1, 3, 3, 1)) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * fir_kernel(taps), persistent=False)
        self.padding = len(taps) // 2 - 1
        self.repeat = len(taps) == 2 and taps[0] == taps[1]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) -> (B, C, 2 h, 2 w)."""
        if self.repeat:  # the same, faster
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        kernel = _per_channel(self.kernel, x)
        return F.conv_transpose2d(x, kernel, stride=2, padding=self.padding, groups=x.shape[1])


class FIRDownConv(nn.Module):
    """A low-pass filter, then a 3x3 convolution of stride 2 (Song et al. 2021, progressive input).

    Args:
        in_channels, out_channels: of the convolution.
        taps: as in :class:`FIRDownsample`.
    """

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float] = (1, 3, 3, 1)) -> None:
        super().__init__()
        self.register_buffer("kernel", fir_kernel(taps), persistent=False)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2)
        self.padding = len(taps) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, 2 h, 2 w) -> (B, out_channels, h, w)."""
        return self.conv(F.conv2d(x, _per_channel(self.kernel, x), padding=self.padding, groups=x.shape[1]))


class FIRUpConv(nn.Module):
    """Zeros put between pixels, a 3x3 convolution, a low-pass filter (Song et al. 2021, progressive output).

    Args:
        in_channels, out_channels: of the convolution.
        taps: as in :class:`FIRDownsample`; the filter is times 4 to keep the mean.
    """

    kernel: Tensor

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float] = (1, 3, 3, 1)) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * fir_kernel(taps), persistent=False)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.padding = len(taps) // 2 - 1

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, h, w) -> (B, out_channels, 2 h, 2 w)."""
        # The transposed convolution skips the products with zeros; its kernel runs backwards.
        h = F.conv_transpose2d(x, self.conv.weight.flip(2, 3).transpose(0, 1), stride=2)
        h = F.conv2d(h, _per_channel(self.kernel, h), padding=self.padding, groups=h.shape[1])
        return h + self.conv.bias[:, None, None]  # type: ignore[index]


def fir_kernel(taps: Sequence[float]) -> Tensor:
    """The separable filter of symmetric ``taps``, normalised to sum one, (1, 1, n, n)."""
    if len(taps) < 2 or len(taps) % 2 or not sum(taps) > 0 or list(taps) != list(taps)[::-1]:
        raise ValueError(
            f"taps must be an even number of weights, symmetric and with a positive sum, got {taps!r}"
        )
    line = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    return torch.outer(line, line).float()[None, None]


def _per_channel(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)


def dropout(x: Tensor, probability: float) -> Tensor:
    """Dropout (Srivastava et al. 2014), on CPUs with random bits of its own making, at a third of the time.

    torch draws a number per element there; here one of 64 bits makes four decisions, each to one part in
    32,768. In bfloat16 the factor 1 / (1 - probability) itself is put together from bits.
    """
    if probability == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(probability * 2**15) - 2**14  # of the numbers -2^14 to 2^14 - 1, those below this
    bits = bits[: x.numel()].__irshift__(1)
    if x.dtype != torch.bfloat16:
        return x * (bits >= dropped).view(x.shape).to(x.dtype).mul_(1 / (1 - probability))
    factor = int(torch.tensor(1 / (1 - probability), dtype=x.dtype).view(torch.int16))
    kept = torch.rsub(bits, dropped - 1).__irshift__(15)  # the sign: all bits set, or none
    return x * kept.__iand__(factor).view(x.dtype).view(x.shape)


def checkpointed(enabled: bool, block: nn.Module, *inputs: Tensor) -> Tensor:
    """``block(*inputs)``; if ``enabled``, in training, activations are recomputed in the backward pass."""
    if enabled and block.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def _residual(x: Tensor, h: Tensor, scale: float) -> Tensor:
    total = x + h
    return total if scale == 1.0 else total * scale
