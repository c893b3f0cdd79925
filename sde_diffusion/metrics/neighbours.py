"""Does a model copy its training set? Distances to the nearest training images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from sde_diffusion.arrays import Array, as_matrix, same_width

_BLOCK = 2048  # rows of the distance matrix held at once


@dataclass(frozen=True)
class NearestNeighbours:
    """What ``nearest_neighbours`` found.

    Attributes:
        distances: (N,) Euclidean distance of each sample to its nearest training element.
        indices: (N,) which element that is.
        test_distances: (M,) the same for test elements, which the model cannot have copied.
    """

    distances: Array
    indices: Array
    test_distances: Array

    def closest(self, count: int) -> Array:
        """The indices of the ``count`` samples nearest to the training set, nearest first."""
        return np.argsort(self.distances, kind="stable")[:count]

    def summary(self) -> dict[str, Any]:
        """A dict for JSON.

        ``samples`` and ``test`` describe both sets of distances. ``closer_than_test`` is the chance that a
        sample lies closer to the training set than a test element (ties count half): 1/2 for a perfect model,
        towards 1 for one that copies. ``suspected_copies`` is the fraction of samples closer than 99% of the
        test elements are, about 0.01 for a perfect model.
        """
        ranked = np.sort(self.test_distances)
        farther = len(ranked) - np.searchsorted(ranked, self.distances, side="right")
        ties = len(ranked) - np.searchsorted(ranked, self.distances, side="left") - farther
        return {
            "samples": _describe(self.distances),
            "test": _describe(self.test_distances),
            "closer_than_test": float((farther + 0.5 * ties).mean() / len(ranked)),
            "suspected_copies": float((self.distances < np.quantile(ranked, 0.01)).mean()),
        }


def nearest_neighbours(samples: Any, train: Any, test: Any) -> NearestNeighbours:
    """For every sample, and for every test element, its nearest training element in Euclidean distance.

    Args:
        samples, train, test: (N, *D), (K, *D), (M, *D) in one scaling.
    """
    points = as_matrix(samples, "samples")
    train_points = as_matrix(train, "train")
    test_points = as_matrix(test, "test")
    same_width(samples=points, train=train_points, test=test_points)
    distances, indices = _nearest(points, train_points)
    return NearestNeighbours(distances, indices, _nearest(test_points, train_points)[0])


def _nearest(points: Array, train: Array) -> tuple[Array, Array]:
    distances, indices = np.empty(len(points)), np.empty(len(points), dtype=np.int64)
    for start in range(0, len(points), _BLOCK):
        block = cdist(points[start : start + _BLOCK], train)
        indices[start : start + _BLOCK] = block.argmin(1)
        distances[start : start + _BLOCK] = block.min(1)
    return distances, indices


def _describe(distances: Array) -> dict[str, Any]:
    return {
        "n": len(distances),
        "mean": float(distances.mean()),
        "minimum": float(distances.min()),
        "quantiles": {str(q): float(np.quantile(distances, q)) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)},
    }
