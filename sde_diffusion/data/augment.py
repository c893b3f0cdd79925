"""Random flips and small shifts of images, with what was applied reported beside them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Horizontal flips and small shifts; pure in the random words it is given.

    Each of the two transformations is considered with probability ``probability``, independently; then the
    flip mirrors the image with probability 1/2, and the shift moves it by a whole number of pixels, uniform
    in ``{-shift, .., shift}²``, filling with level 0 (the darkest). The applied transformation is reported as
    ``(flipped, down / shift, right / shift)``: 0 or 1, and two numbers in [-1, 1]; absent parts have no
    column.

    Args:
        flip: mirror left and right.
        shift: largest shift in pixels, 0 for none.
        probability: in [0, 1].

    Raises:
        ValueError: a negative shift or a probability outside [0, 1].
    """

    flip: bool = False
    shift: int = 0
    probability: float = 1.0

    # Random words per sample, whatever is switched on: switching one part on leaves the other's draws alone.
    draws = 5

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip must be True or False, got {self.flip!r}")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int) or self.shift < 0:
            raise ValueError(f"shift must be an integer >= 0, got {self.shift!r}")
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must be in [0, 1], got {self.probability!r}")

    @property
    def size(self) -> int:
        """Columns of the reported transformation: one for flips, two for shifts."""
        return int(self.flip) + 2 * (self.shift > 0)

    def __call__(self, x: Tensor, words: np.ndarray) -> tuple[Tensor, Tensor]:
        """Transforms a batch.

        Args:
            x: images ``(B, C, H, W)``; anything when nothing is switched on.
            words: uniform uint64 words ``(B, 5)``.

        Returns:
            The transformed images and the applied transformation, float32 ``(B, size)``, on the device of
            ``x``.
        """
        if self.size == 0:
            return x, torch.zeros(len(x), 0, device=x.device)
        height, width = x.shape[-2:]
        if self.shift >= min(height, width):
            raise ValueError(f"shift must be smaller than the image ({height}x{width}), got {self.shift}")
        uniform = torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)  # in [0, 1)
        columns = []
        if self.flip:
            flipped = (uniform[:, 0] < self.probability) & (uniform[:, 1] < 0.5)
            x = torch.where(flipped.to(x.device).reshape(-1, 1, 1, 1), x.flip(-1), x)
            columns.append(flipped[:, None].float())
        if self.shift:
            moved = ((2 * self.shift + 1) * uniform[:, 3:5]).long() - self.shift
            moved = torch.where((uniform[:, 2] < self.probability)[:, None], moved, 0)
            x = shift_images(x, moved)
            columns.append(moved.float() / self.shift)
        return x, torch.cat(columns, 1).to(x.device)


def shift_images(x: Tensor, by: Tensor) -> Tensor:
    """Shifts images ``(B, C, H, W)`` by ``by`` pixels down and right, int64 ``(B, 2)``; fills with 0."""
    by = by.to(x.device)
    batch, _, height, width = x.shape
    rows = torch.arange(height, device=x.device) - by[:, :1]  # the source of each target row, (B, H)
    cols = torch.arange(width, device=x.device) - by[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    sample = torch.arange(batch, device=x.device)[:, None, None]
    source = x.permute(0, 2, 3, 1)[
        sample, rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None, :]
    ]
    return torch.where(
        inside[:, None], source.permute(0, 3, 1, 2), torch.zeros((), dtype=x.dtype, device=x.device)
    )
