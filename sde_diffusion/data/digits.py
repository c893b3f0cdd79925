"""The embedded default: scikit-learn's handwritten digits."""

from __future__ import annotations

import torch

from sde_diffusion.data.dataset import DataSet
from sde_diffusion.data.order import permutation

TEST_SIZE = 360


def load_digits() -> DataSet:
    """1,797 real handwritten digits, 8x8, 17 grey levels (Alpaydin and Kaynak, UCI, 1998), split 1,437 / 360.

    The split is one fixed random permutation (SHA-256 of a constant, see :mod:`sde_diffusion.data.order`):
    the same on every machine and with every library version. Labels are the digits 0 to 9.
    """
    from sklearn import datasets  # imported here because it is slow and nothing else needs it

    raw = datasets.load_digits()
    x = torch.from_numpy(raw.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(raw.target).long()
    if x.shape != (1797, 1, 8, 8):
        raise ValueError(f"scikit-learn's digits should have the shape (1797, 1, 8, 8), got {tuple(x.shape)}")
    order = permutation(len(x), "digits")
    test, train = order[:TEST_SIZE].sort().values, order[TEST_SIZE:].sort().values
    names = tuple(str(digit) for digit in range(10))
    return DataSet("digits", x[train], x[test], labels[train], labels[test], levels=17, class_names=names)
