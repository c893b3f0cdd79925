"""The Frechet distance between Gaussian fits to two sets, and features of a small classifier to take it in."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from sde_diffusion.arrays import Array, as_labels, as_matrix, same_length, same_width
from sde_diffusion.metrics.distances import Estimate


def frechet_distance(x: Any, y: Any) -> float:
    """``|m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))``, the squared Wasserstein distance between the Gaussians
    of equal means and covariances (Dowson & Landau 1982; FID of Heusel et al. 2017 takes it in network features).

    It is biased upwards by an amount that falls with the number of samples: compare values at equal ``n`` only,
    beside that of real data against real data.

    Args:
        x, y: (n, *D) and (m, *D), at least 2 elements each.
    """
    a, b = as_matrix(x, "x"), as_matrix(y, "y")
    same_width(x=a, y=b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"both sets must hold at least 2 elements, got {len(a)} and {len(b)}")
    c, d = (np.atleast_2d(np.cov(z, rowvar=False)) for z in (a, b))
    # The eigenvalues of C_x C_y are those of the symmetric R C_y R with R = C_x^(1/2), so none is negative.
    values, vectors = np.linalg.eigh(c)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ d @ root).clip(0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(max(0.0, gap @ gap + np.trace(c) + np.trace(d) - 2 * cross))


def bootstrap_frechet(x: Any, y: Any, *, resamples: int = 50, seed: int = 0) -> Estimate:
    """:func:`frechet_distance` with the standard deviation over bootstrap resamples of ``x``, ``y`` kept.

    The error is that of drawing the samples; the reference ``y`` is the same for all that are compared.
    """
    a, b = as_matrix(x, "x"), as_matrix(y, "y")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples!r}")
    rng = np.random.default_rng(seed)
    values = [frechet_distance(a[rng.integers(len(a), size=len(a))], b) for _ in range(resamples)]
    return Estimate(frechet_distance(a, b), float(np.std(values, ddof=1)))


@dataclass(frozen=True)
class ClassifierFeatures:
    """The last hidden layer of a small perceptron trained to tell the classes of real images apart.

    Attributes:
        scaler, classifier: fitted, of scikit-learn.
    """

    scaler: StandardScaler
    classifier: MLPClassifier

    @classmethod
    def fit(
        cls, x: Any, labels: Any, *, hidden: tuple[int, ...] = (256, 64), epochs: int = 40, seed: int = 0
    ) -> ClassifierFeatures:
        """Trains on images (N, *D) and labels (N,), the same to the bit for the same seed.

        Raises:
            ValueError: images and labels that do not fit, or no hidden layer.
        """
        images, classes = as_matrix(x, "x"), as_labels(labels, "labels")
        same_length(x=images, labels=classes)
        if not hidden:
            raise ValueError("hidden must name at least one layer, got ()")
        scaler = StandardScaler(with_std=False).fit(images)
        classifier = MLPClassifier(hidden, max_iter=epochs, alpha=1e-3, random_state=seed)
        with warnings.catch_warnings():
            # The number of epochs is what was asked for; that the loss could fall further is no fault.
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(scaler.transform(images), classes)
        return cls(scaler, classifier)

    def __call__(self, x: Any) -> Array:
        """The features of images (n, *D), (n, width of the last hidden layer)."""
        value = self.scaler.transform(as_matrix(x, "x"))
        for weights, bias in zip(self.classifier.coefs_[:-1], self.classifier.intercepts_[:-1], strict=True):
            value = np.maximum(value @ weights + bias, 0)
        return value

    def accuracy(self, x: Any, labels: Any) -> float:
        """The fraction of images whose class is recognised."""
        return float(
            self.classifier.score(self.scaler.transform(as_matrix(x, "x")), as_labels(labels, "labels"))
        )
