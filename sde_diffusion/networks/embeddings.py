"""Embeddings: noise levels, class labels, and extra features of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.checks import positive_int


class SinusoidalEmbedding(nn.Module):
    """sin and cos of geometrically spaced frequencies (Vaswani et al. 2017, sec. 3.5).

    With half = channels / 2 and k = 0 .. half - 1 the angles are ``scale * c * max_period ** (-k / half)``,
    so the frequencies go from ``scale`` down to about ``scale / max_period`` radians per unit of c.

    Args:
        channels: number of features, even.
        scale: the highest frequency. 1000 suits a time in [0, 1] (the thousand steps of DDPM). For a quarter
            of log(sigma / alpha), about [-5, 5], some 30 to 100 is enough, and a lower scale makes a score
            that is smoother in time, which adaptive ODE solvers like.
        max_period: ratio of the highest to the lowest frequency.
        endpoint: divide by half - 1 in place of half, so that the lowest frequency is scale / max_period
            exactly (as in DDPM and NCSN++).
        cosine_first: cosines before sines (as in improved DDPM and ADM).
    """

    default_scale = 1000.0

    def __init__(
        self,
        channels: int,
        scale: float = default_scale,
        *,
        max_period: float = 10_000.0,
        endpoint: bool = False,
        cosine_first: bool = False,
    ) -> None:
        super().__init__()
        self.channels = _even(channels)
        self.scale = _positive("scale", scale)
        self.cosine_first = cosine_first
        half = channels // 2
        steps = torch.arange(half, dtype=torch.float64) / max(half - int(endpoint), 1)
        frequencies = scale * torch.exp(-math.log(_positive("max_period", max_period)) * steps)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    frequencies: Tensor

    def forward(self, c: Tensor) -> Tensor:
        """c: (B,) -> (B, channels), in float32 or the dtype of c if that is wider."""
        features = _sin_cos(c, self.frequencies)
        return features.roll(self.channels // 2, dims=1) if self.cosine_first else features


class FourierEmbedding(nn.Module):
    """Random Fourier features ``[sin(2 pi w c), cos(2 pi w c)]`` with w ~ N(0, scale^2).

    The frequencies are drawn once and never trained (Tancik et al. 2020). They are a frozen parameter, so
    checkpoints keep them.

    Args:
        channels: number of features, even.
        scale: standard deviation of the frequencies, in cycles per unit of c. Song et al. (2021) use 16.
    """

    default_scale = 16.0

    def __init__(self, channels: int, scale: float = default_scale) -> None:
        super().__init__()
        self.channels = _even(channels)
        self.scale = _positive("scale", scale)
        self.frequencies = nn.Parameter(torch.randn(channels // 2) * scale, requires_grad=False)

    def forward(self, c: Tensor) -> Tensor:
        """c: (B,) -> (B, channels), in float32 or the dtype of c if that is wider."""
        return _sin_cos(c, self.frequencies * (2 * math.pi))


EMBEDDINGS: dict[str, type[SinusoidalEmbedding] | type[FourierEmbedding]] = {
    "sinusoidal": SinusoidalEmbedding,
    "fourier": FourierEmbedding,
}


def make_embedding(
    name: str, channels: int, scale: float | None = None
) -> SinusoidalEmbedding | FourierEmbedding:
    """The embedding called ``name``; ``scale=None`` is its own default (1000 sinusoidal, 16 fourier)."""
    if name not in EMBEDDINGS:
        raise unknown_name("embedding", name, EMBEDDINGS)
    embedding = EMBEDDINGS[name]
    return embedding(channels, embedding.default_scale if scale is None else scale)


class ConditionEmbedding(nn.Module):
    """One vector per sample from its noise level and class: ``Linear(SiLU(Linear(features(c)))) + table[y]``.

    The table has ``num_classes + 1`` rows; the last is the null class, for unconditional use and label
    dropout.

    Args:
        features: maps c (B,) to (B, features.channels).
        channels: width of the vector.
        num_classes: number of classes, or None for a network that takes no labels.
        null_row: without it the table has ``num_classes`` rows, and the null class is the vector zero.
        labels_first: add ``table[y]`` to the features, before the two layers (Karras et al. 2022, SongUNet).
        augment_dim: length of the augmentation labels, of which a linear map is added to the features
            (Karras et al. 2022, app. F); 0 for none.
        context_dim: length of a vector of anything else that is known of a sample, of which a linear map, which
            starts at zero, is added; 0 for none.
    """

    def __init__(
        self,
        features: SinusoidalEmbedding | FourierEmbedding,
        channels: int,
        num_classes: int | None = None,
        *,
        null_row: bool = True,
        labels_first: bool = False,
        augment_dim: int = 0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.features = features
        self.first = nn.Linear(features.channels, positive_int("embedding_channels", channels))
        self.second = nn.Linear(channels, channels)
        self.num_classes = num_classes
        self.labels_first = labels_first
        self.classes: nn.Embedding | None = None
        if num_classes is not None:
            rows = positive_int("num_classes", num_classes) + int(null_row)
            self.classes = nn.Embedding(rows, features.channels if labels_first else channels)
        self.augment: nn.Linear | None = None
        if augment_dim:
            size = positive_int("augment_dim", augment_dim)
            self.augment = nn.Linear(size, features.channels, bias=False)
        self.context: nn.Linear | None = None
        if context_dim:
            self.context = nn.Linear(positive_int("context_dim", context_dim), channels, bias=False)
            nn.init.zeros_(self.context.weight)

    def forward(
        self,
        c: Tensor,
        y: Tensor | None,
        batch: int,
        augment: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The vectors.

        Args:
            c: (B,).
            y: (B,) in [0, num_classes], the last meaning "no class", or None.
            batch: the batch size B.
            augment: (B, augment_dim), or None for images that are not augmented.
            context: (B, context_dim), which a network that has it needs.

        Returns:
            (B, channels).
        """
        if c.shape != (batch,) or not c.is_floating_point():
            raise ValueError(
                f"c must be floating point of shape ({batch},), got {c.dtype} of shape {tuple(c.shape)}"
            )
        features = self.features(c).to(self.first.weight.dtype)
        if augment is not None:
            features = features + self._augmentation(augment, batch)
        label = self._label(y, batch)
        if label is not None and self.labels_first:
            features = features + label
        embedded = self.second(F.silu(self.first(features)))
        if context is not None or self.context is not None:
            embedded = embedded + self._context(context, batch)
        return embedded if label is None or self.labels_first else embedded + label

    def _context(self, context: Tensor | None, batch: int) -> Tensor:
        size = 0 if self.context is None else self.context.in_features
        if self.context is None or context is None or context.shape != (batch, size):
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context must be {f'of shape {(batch, size)}' if size else None}, got {got}")
        return self.context(context.to(self.context.weight.dtype))

    def _augmentation(self, augment: Tensor, batch: int) -> Tensor:
        if self.augment is None:
            raise ValueError("got augmentation labels, but the network was built with augment_dim=0")
        if augment.shape != (batch, self.augment.in_features):
            expected = (batch, self.augment.in_features)
            raise ValueError(f"augmentation labels must have shape {expected}, got {tuple(augment.shape)}")
        return self.augment(augment.to(self.augment.weight.dtype))

    def _label(self, y: Tensor | None, batch: int) -> Tensor | None:
        if self.classes is None or self.num_classes is None:
            if y is not None:
                raise ValueError("got labels y, but the network was built with num_classes=None")
            return None
        null_row = self.classes.num_embeddings > self.num_classes
        if y is None:
            return self.classes.weight[self.num_classes] if null_row else None
        self._check_labels(y, batch, self.num_classes)
        if null_row:
            return self.classes(y)
        known = y < self.num_classes
        return self.classes(y.where(known, 0)) * known[:, None]

    @staticmethod
    def _check_labels(y: Tensor, batch: int, num_classes: int) -> None:
        if y.shape != (batch,) or y.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"y must be int64 or int32 of shape ({batch},), got {y.dtype} of shape {tuple(y.shape)}"
            )
        # The values are looked at only where that costs nothing: not on an accelerator (it would wait for the
        # device) and not while compiling (it would break the graph). There the lookup itself fails.
        if torch.compiler.is_compiling() or y.device.type != "cpu" or batch == 0:
            return
        low, high = int(y.min()), int(y.max())
        if low < 0 or high > num_classes:
            raise ValueError(
                f"labels must be in [0, {num_classes}], {num_classes} being the null class, "
                f"got values from {low} to {high}"
            )


class Modulations(nn.Module):
    """The projections of the condition vector for every block of a network, as one matrix product.

    ``forward(embedding)`` is ``Linear(SiLU(embedding))`` split into ``sizes``: block k gets the k-th piece
    (B, sizes[k]). One product in place of one per block saves launches, which is what small networks spend
    their time on.
    """

    def __init__(self, channels: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.linear = nn.Linear(channels, sum(self.sizes))

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """embedding: (B, channels) -> one (B, size) per block."""
        return list(self.linear(F.silu(embedding)).split(self.sizes, dim=1))


def fourier_features(x: Tensor, n_min: int, n_max: int) -> Tensor:
    """``sin(2^n pi x), cos(2^n pi x)`` for n = n_min .. n_max along dim 1 (Kingma et al. 2021, app. C).

    They let a network see the fine scale of its input, which likelihoods depend on. With data of L grey
    levels in [-1, 1] a bin is 2 / L wide, so n_max about log2(L) resolves it: (3, 4) for 17 levels, (7, 8)
    for 256.
    x: (B, C, *) -> (B, 2 * (n_max - n_min + 1) * C, *), computed in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    angles = torch.cat([wide * (2.0**n * math.pi) for n in range(n_min, n_max + 1)], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)


def coordinate_channels(x: Tensor, height: int, width: int) -> Tensor:
    """The y and x coordinates of pixel centres as two channels (Liu et al. 2018).

    Pixel i of an extent of n is at ``(2 i + 1) / n - 1``, in [-1, 1] for the image's own ``height`` and
    ``width`` and beyond 1 over padding. x: (B, C, H, W) -> (B, 2, H, W).
    """
    rows = (2 * torch.arange(x.shape[2], device=x.device, dtype=x.dtype) + 1) / height - 1
    columns = (2 * torch.arange(x.shape[3], device=x.device, dtype=x.dtype) + 1) / width - 1
    grid = torch.stack([rows[:, None].expand(-1, x.shape[3]), columns[None, :].expand(x.shape[2], -1)])
    return grid.expand(x.shape[0], -1, -1, -1)


def _sin_cos(c: Tensor, frequencies: Tensor) -> Tensor:
    wide = c.to(torch.promote_types(c.dtype, torch.float32))
    angles = wide[:, None] * frequencies.to(wide.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _even(channels: int) -> int:
    if positive_int("embedding channels", channels) % 2:
        raise ValueError(f"sines and cosines need an even number of channels, got {channels}")
    return channels


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)
