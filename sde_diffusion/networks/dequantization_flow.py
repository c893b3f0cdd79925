"""A normalizing flow of the unit cube, given an image: where in its cell each grey level lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.blocks import zero_init
from sde_diffusion.networks.checks import constructor_arguments, positive_int
from sde_diffusion.networks.splines import parameter_count, spline, spline_inverse

__all__ = ["DequantizationFlow"]


class _Block(nn.Module):
    """``x + conv2(silu(conv1(silu(x))))``, conv2 starting at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class _Coupling(nn.Module):
    """The parameters of a spline for each pixel of one colour of the chessboard, from the image and the others."""

    def __init__(self, inputs: int, outputs: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(channels) for _ in range(blocks)))
        self.out = zero_init(nn.Conv2d(channels, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.blocks(self.stem(x))))


class DequantizationFlow(nn.Module):
    """``q(u | k)``: the density of the place ``u`` in (0, 1)^D of an image in the cell of its grey levels ``k``.

    Uniform numbers go through coupling layers (Dinh et al. 2017): in each, the pixels of one colour of a chessboard
    move by the inverse of a distribution function, a spline (:mod:`~sde_diffusion.networks.splines`) whose parameters
    are the result of a small convolutional network of ``k`` and of the other colour's ``u``; ``log q`` is the sum of
    the log-densities of the splines. So the flow stays on the cube without a squashing function, any density is near,
    and a new flow is uniform dequantization exactly. The use is that of Ho et al. (2019), "Flow++", section 3.1; the
    flow is our own.

    Args:
        shape: of an image, (C, H, W).
        levels: the number of its grey levels.
        layers: coupling layers.
        channels: width of their networks.
        blocks: residual blocks in each.
        bins: of each spline.

    Attributes:
        config: the arguments above.

    Raises:
        ValueError: an argument that is not as said here; when called, images or places of another shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        *,
        layers: int = 4,
        channels: int = 32,
        blocks: int = 1,
        bins: int = 8,
    ) -> None:
        config = constructor_arguments(DequantizationFlow, locals())
        super().__init__()
        self.config = config
        self.shape = tuple(shape)
        if len(self.shape) != 3:
            raise ValueError(f"the flow is for images (C, H, W), got the shape {self.shape}")
        if positive_int("levels", levels) < 2:
            raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
        self.levels = levels
        self.bins = positive_int("bins", bins)
        positive_int("channels", channels)
        # Of each channel: the level, whether it is the lowest or highest, and the places of the other colour.
        inputs, outputs = 4 * self.shape[0] + 1, self.shape[0] * parameter_count(bins)
        self.layers = nn.ModuleList(
            _Coupling(inputs, outputs, channels, blocks) for _ in range(positive_int("layers", layers))
        )
        grid = torch.meshgrid(*(torch.arange(n) for n in self.shape), indexing="ij")
        self.register_buffer("colour", torch.stack(grid).sum(0) % 2, persistent=False)

    colour: Tensor

    def _moving(self, layer: int) -> Tensor:
        """Which pixels move in a layer, (C, H, W) bool."""
        return self.colour == layer % 2

    def _told(self, image: Tensor) -> Tensor:
        """What the networks are told of the image, (B, 3 C, H, W)."""
        last = self.levels - 1
        found = torch.cat([2 * image.double() / last - 1, image == 0, image == last], 1)
        return found.to(next(self.parameters()).dtype)

    def _splines(self, layer: int, told: Tensor, u: Tensor) -> Tensor:
        """Of the splines of a layer, float64 (B, C, H, W, n)."""
        still = (~self._moving(layer)).to(told.dtype)
        places = (2 * u.to(told.dtype) - 1) * still
        colour = still[:1].expand(len(u), 1, *self.shape[1:])
        found = self.layers[layer](torch.cat([told, places, colour], 1))
        return found.unflatten(1, (self.shape[0], -1)).movedim(2, -1).double()

    def _check(self, u: Tensor, image: Tensor) -> None:
        if tuple(image.shape[1:]) != self.shape or u.shape != image.shape:
            raise ValueError(
                f"this flow is for images of shape (B, {', '.join(map(str, self.shape))}), got images "
                f"{tuple(image.shape)} and places {tuple(u.shape)}"
            )

    def forward(self, uniforms: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Places ``u ~ q(. | k)`` from uniform numbers, float64 (B, C, H, W), and ``log q(u | k)`` in nats, (B,).

        Args:
            uniforms: in (0, 1), (B, C, H, W).
            image: the grey levels ``k``, (B, C, H, W).
        """
        self._check(uniforms, image)
        u, told = uniforms.double(), self._told(image)
        log_q = torch.zeros(len(u), dtype=torch.float64, device=u.device)
        for layer in range(len(self.layers)):
            moving = self._moving(layer)
            moved, log_density = spline_inverse(u, self._splines(layer, told, u))
            u = torch.where(moving, moved, u)
            log_q = log_q + (log_density * moving).flatten(1).sum(1)
        return u, log_q

    def log_prob(self, u: Tensor, image: Tensor) -> Tensor:
        """``log q(u | k)`` in nats of given places, (B, C, H, W) -> (B,) float64."""
        self._check(u, image)
        u, told = u.double(), self._told(image)
        log_q = torch.zeros(len(u), dtype=torch.float64, device=u.device)
        for layer in reversed(range(len(self.layers))):
            moving = self._moving(layer)
            moved, log_density = spline(u, self._splines(layer, told, u))
            u = torch.where(moving, moved, u)
            log_q = log_q + (log_density * moving).flatten(1).sum(1)
        return log_q
