"""What runs beside the main path of a U-Net: the input at every size, and the result grown size by size.

T. Karras et al. (2020), "Analyzing and improving the image quality of StyleGAN", figure 7; Y. Song et al.
(2021), appendix H.1. A joint takes the main path h and the side path, and returns both as they go on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sde_diffusion.networks.blocks import group_norm, normalized, zero_init
from sde_diffusion.networks.channels_last import usual_layout


class InputSkip(nn.Module):
    """Joins the input, reduced to the size of h, by a 1x1 convolution: ``h + conv(side)``, or both stacked.

    Args:
        image_channels: of the input.
        channels: of h.
        shrink: a module without parameters that halves the sides.
        concatenate: stack the two in place of adding them, which doubles the channels.
    """

    def __init__(
        self, image_channels: int, channels: int, shrink: nn.Module, *, concatenate: bool = False
    ) -> None:
        super().__init__()
        self.shrink = shrink
        self.conv = nn.Conv2d(image_channels, channels, 1)
        self.concatenate = concatenate
        #: Of the main path from here on.
        self.out_channels = 2 * channels if concatenate else channels

    def forward(self, h: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The main path and the reduced input; h has half the sides of ``side``."""
        side = self.shrink(side)
        projected = self.conv(side)
        return torch.cat([projected, h], dim=1) if self.concatenate else h + projected, side


class SideResidual(nn.Module):
    """Adds a convolution of the side path, at the new size, to h, and is the side path from then on.

    ``h = scale (h + resample(side))``.

    Args:
        channels: of h.
        resample: halves or doubles the sides, and gives ``channels``.
        skip_rescale: scale by 1 / sqrt(2) and not by 1.
    """

    def __init__(self, channels: int, resample: nn.Module, *, skip_rescale: bool = True) -> None:
        super().__init__()
        self.resample = resample
        self.scale = math.sqrt(0.5) if skip_rescale else 1.0
        self.out_channels = channels

    def forward(self, h: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The main path, twice."""
        h = (h + self.resample(side)) * self.scale
        return h, h


class Head(nn.Module):
    """``conv(silu(norm(h)))``, with a 3x3 convolution that starts at zero.

    Args:
        channels, out_channels: of h and of the result.
        groups, eps, min_group_size: of GroupNorm, see :func:`group_norm`.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        min_group_size: int = 4,
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups, eps, min_group_size)
        self.conv = zero_init(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, channels, H, W) -> (B, out_channels, H, W)."""
        return usual_layout(normalized(self.norm, h, silu=True), self.conv)


class OutputSkip(nn.Module):
    """Adds the image of this level to the enlarged image of the coarser ones: ``grow(side) + head(h)``.

    Args:
        head: makes the image of this level.
        grow: a module without parameters that doubles the sides.
    """

    def __init__(self, head: Head, grow: nn.Module) -> None:
        super().__init__()
        self.grow = grow
        self.head = head

    def forward(self, h: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        """The main path, unchanged, and the sum of images; h has twice the sides of ``side``."""
        return h, self.grow(side) + self.head(h)


class OutputStart(nn.Module):
    """Begins a side path on the coarsest level, from the main path alone.

    Args:
        head: makes the side path.
    """

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, h: Tensor, side: Tensor | None) -> tuple[Tensor, Tensor]:
        """The main path, unchanged, and the new side path."""
        return h, self.head(h)
