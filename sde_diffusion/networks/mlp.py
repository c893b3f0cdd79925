"""A residual multilayer perceptron for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.blocks import zero_init
from sde_diffusion.networks.checks import (
    check_input,
    constructor_arguments,
    fourier_range,
    positive_int,
    probability,
)
from sde_diffusion.networks.embeddings import (
    ConditionEmbedding,
    Modulations,
    fourier_features,
    make_embedding,
)


class LinearBlock(nn.Module):
    """``x + linear2(dropout(silu(linear1(norm(x) * (1 + scale) + shift))))``, linear2 starting at zero.

    The layer norm has no parameters of its own; scale and shift come from the condition (Peebles & Xie 2023).
    """

    def __init__(self, width: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = probability("dropout", dropout)
        #: Number of modulation features forward takes.
        self.modulation_features = 2 * width
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: (B, width), modulation: (B, modulation_features) -> (B, width)."""
        h = self.norm(x)
        scale, shift = modulation.to(h.dtype).chunk(2, dim=1)
        h = F.silu(self.linear1(torch.addcmul(shift, h, 1 + scale)))
        return x + self.linear2(F.dropout(h, self.dropout, self.training))


class MLP(nn.Module):
    """Residual MLP ``F(x, c, y)`` for vectors, with the interface of :class:`UNet`; a new one computes zero.

    Args:
        dim: length of the vectors.
        out_dim: length of the result; None for ``dim``.
        width: hidden width.
        depth: number of residual blocks, each of two linear layers.
        dropout: probability, before the second layer of each block.
        embedding, embedding_scale, num_classes, input_fourier: as in :class:`UNet`.
        embedding_channels: width of the condition vector and its features; None for ``width``.

    Attributes:
        config: the arguments above, so that ``MLP(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        dim: int,
        *,
        out_dim: int | None = None,
        width: int = 128,
        depth: int = 3,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        embedding_scale: float | None = None,
        embedding_channels: int | None = None,
        num_classes: int | None = None,
        input_fourier: tuple[int, int] | None = None,
    ) -> None:
        config = constructor_arguments(MLP, locals())
        super().__init__()
        self.config = config
        self.dim = positive_int("dim", dim)
        self.out_dim = dim if out_dim is None else positive_int("out_dim", out_dim)
        self.input_fourier = fourier_range(input_fourier)
        positive_int("width", width)
        condition = (
            width if embedding_channels is None else positive_int("embedding_channels", embedding_channels)
        )
        copies = 1 if self.input_fourier is None else 3 + 2 * (self.input_fourier[1] - self.input_fourier[0])
        self.stem = nn.Linear(dim * copies, width)
        self.blocks = nn.ModuleList(
            LinearBlock(width, dropout=dropout) for _ in range(positive_int("depth", depth))
        )
        self.norm_out = nn.LayerNorm(width)
        self.linear_out = zero_init(nn.Linear(width, self.out_dim))
        features = make_embedding(embedding, condition + condition % 2, embedding_scale)
        self.condition = ConditionEmbedding(features, condition, num_classes)
        self.modulations = Modulations(condition, [2 * width] * depth)

    def forward(self, x: Tensor, c: Tensor, y: Tensor | None = None) -> Tensor:
        """x: (B, dim), c: (B,), y: (B,) or None, as in :class:`UNet` -> (B, out_dim), in the dtype of x."""
        check_input(x, 2, self.dim, "(B, C)")
        modulations = self.modulations(self.condition(c, y, x.shape[0]))
        if self.input_fourier is None:
            h = self.stem(x)
        else:
            h = self.stem(torch.cat([x, fourier_features(x, *self.input_fourier)], dim=1))
        for block, modulation in zip(self.blocks, modulations, strict=True):
            h = block(h, modulation)
        return self.linear_out(F.silu(self.norm_out(h))).to(x.dtype)
