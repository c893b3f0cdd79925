"""A diffusion transformer for images (Peebles & Xie 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sde_diffusion.networks.attention import attend_tokens
from sde_diffusion.networks.blocks import checkpointed, zero_init
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
from sde_diffusion.networks.unet import head_count


class DiTBlock(nn.Module):
    """Self-attention among tokens, then a perceptron of each, both modulated and gated ("adaLN-zero").

    ``x + gate1 * out(attend(norm(x) * (1 + scale1) + shift1))``, then
    ``x + gate2 * mlp(norm(x) * (1 + scale2) + shift2)``, with layer norms without parameters of their own
    (Peebles & Xie 2023, fig. 3).

    Args:
        width: channels of a token.
        heads: number of heads, dividing width.
        hidden: width of the perceptron's one hidden layer.
        dropout: probability, after the hidden layer.
    """

    def __init__(self, width: int, heads: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        if width % positive_int("heads", heads):
            raise ValueError(f"heads must divide the {width} channels of the attention, got {heads}")
        self.heads = heads
        self.dropout = probability("dropout", dropout)
        #: Number of modulation features forward takes: shift, scale and gate of both parts.
        self.modulation_features = 6 * width
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x: (B, T, width), modulation: (B, modulation_features) -> (B, T, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.to(x.dtype)[:, None].chunk(6, dim=2)
        h = torch.addcmul(shift1, self.norm(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.out(attend_tokens(self.qkv(h), self.heads, self.training)))
        h = torch.addcmul(shift2, self.norm(x), 1 + scale2)
        h = F.dropout(F.gelu(self.linear1(h), approximate="tanh"), self.dropout, self.training)
        return torch.addcmul(x, gate2, self.linear2(h))


class DiT(nn.Module):
    """Transformer ``F(x, c, y)`` over the patches of an image, with the interface of :class:`UNet`.

    Patches are mapped to tokens, positions added, and ``depth`` blocks follow, see :class:`DiTBlock`; a
    modulated linear layer makes patches of the result. All modulations and the last layer start at zero, so
    blocks start as the identity and a new network computes zero. Images may have any size that patches cover.

    Args:
        in_channels: channels of x.
        out_channels: channels of the result; None for as many as ``in_channels``.
        patch_size: side of a patch.
        width: channels of a token, a multiple of 4.
        depth: number of blocks.
        heads, head_channels: as in :class:`UNet`.
        mlp_ratio: width of the perceptrons' hidden layer over ``width``.
        dropout: probability, within perceptrons.
        embedding, embedding_scale, num_classes, input_fourier, context_dim: as in :class:`UNet`.
        embedding_channels: width of the condition vector and its features; None for ``width``.
        augment_dim: length of augmentation labels; 0 for none.
        checkpointing: recompute activations in the backward pass in training mode.

    Attributes:
        config: the arguments above, so that ``DiT(**net.config)`` is a network of the same kind.

    Raises:
        ValueError: for an argument, or an input's shape or labels, outside what is said here.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | None = None,
        patch_size: int = 2,
        width: int = 128,
        depth: int = 6,
        heads: int | None = None,
        head_channels: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        embedding: str = "sinusoidal",
        embedding_scale: float | None = None,
        embedding_channels: int | None = None,
        num_classes: int | None = None,
        input_fourier: tuple[int, int] | None = None,
        augment_dim: int = 0,
        checkpointing: bool = False,
        context_dim: int = 0,
    ) -> None:
        config = constructor_arguments(DiT, locals())
        super().__init__()
        self.config = config
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = (
            in_channels if out_channels is None else positive_int("out_channels", out_channels)
        )
        self.patch_size = positive_int("patch_size", patch_size)
        self.input_fourier = fourier_range(input_fourier)
        self.checkpointing = checkpointing
        if positive_int("width", width) % 4:
            raise ValueError(f"width must be a multiple of 4, for the positions of tokens, got {width}")
        hidden = round(width * mlp_ratio) if mlp_ratio > 0 else 0
        if hidden < 1:
            raise ValueError(f"mlp_ratio must be a positive number, got {mlp_ratio!r}")
        copies = 1 if self.input_fourier is None else 3 + 2 * (self.input_fourier[1] - self.input_fourier[0])
        self.stem = nn.Conv2d(in_channels * copies, width, patch_size, stride=patch_size)
        count = head_count(width, heads, head_channels)
        self.blocks = nn.ModuleList(
            DiTBlock(width, count, hidden, dropout=dropout) for _ in range(positive_int("depth", depth))
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear_out = zero_init(nn.Linear(width, self.out_channels * patch_size**2))
        condition = (
            width if embedding_channels is None else positive_int("embedding_channels", embedding_channels)
        )
        features = make_embedding(embedding, condition + condition % 2, embedding_scale)
        self.condition = ConditionEmbedding(
            features, condition, num_classes, augment_dim=augment_dim, context_dim=context_dim
        )
        self.modulations = Modulations(condition, [6 * width] * depth + [2 * width])
        zero_init(self.modulations)
        self.blocks.apply(_glorot)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        y: Tensor | None = None,
        augment: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The network's output.

        Args:
            x: (B, in_channels, H, W), H and W multiples of ``patch_size``.
            c: (B,), the noise level in the units the embedding was built for.
            y: (B,) int64 labels in [0, num_classes], num_classes meaning "no class"; None for no class at
                all.
            augment: (B, augment_dim), what an augmentation did to the images; None for nothing.
            context: (B, context_dim), if there is one.

        Returns:
            (B, out_channels, H, W), in the dtype of x.
        """
        check_input(x, 4, self.in_channels, "(B, C, H, W)", self.patch_size)
        *modulations, last = self.modulations(self.condition(c, y, x.shape[0], augment, context))
        parts = [x] if self.input_fourier is None else [x, fourier_features(x, *self.input_fourier)]
        patches = self.stem(torch.cat(parts, dim=1))
        rows, columns = patches.shape[2:]
        h = patches.flatten(2).transpose(1, 2)
        h = h + positions(rows, columns, h.shape[2], h.device).to(h.dtype)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            h = checkpointed(self.checkpointing, block, h, modulation)
        shift, scale = last.to(h.dtype)[:, None].chunk(2, dim=2)
        h = self.linear_out(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        patches = h.transpose(1, 2).unflatten(2, (rows, columns))
        return F.pixel_shuffle(patches, self.patch_size).to(x.dtype)


def positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed features of the places of a grid, row by row, (rows * columns, width); nothing is learned.

    Sines and cosines of the row, then of the column, each ``width / 4`` frequencies from 1 down to about
    1e-4 radians per place (Vaswani et al. 2017; He et al. 2022).
    """
    steps = torch.arange(width // 4, device=device) / (width // 4)
    frequencies = torch.exp(-math.log(10_000.0) * steps)

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    grid = [
        waves(rows)[:, None].expand(-1, columns, -1),
        waves(columns)[None].expand(rows, -1, -1),
    ]
    return torch.cat(grid, dim=2).flatten(0, 1)


def _glorot(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
