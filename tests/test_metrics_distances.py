"""Wasserstein and Frechet distances against closed forms, and the features that images are compared in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sde_diffusion.data import load_dataset
from sde_diffusion.metrics import ClassifierFeatures, bootstrap_frechet, frechet_distance, wasserstein2


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_wasserstein2_is_the_best_of_all_assignments():
    x, y = rng().standard_normal((2, 6, 3))
    best = min(((x - y[list(p)]) ** 2).sum(1).mean() for p in itertools.permutations(range(6)))
    assert wasserstein2(x, y) == pytest.approx(best**0.5, rel=1e-12)


def test_wasserstein2_of_a_shifted_set_is_the_shift():
    x = rng().standard_normal((200, 2, 2))
    shift = np.array([[0.3, -0.1], [0.2, 0.5]])
    assert wasserstein2(x, (x + shift)[::-1]) == pytest.approx(np.linalg.norm(shift), rel=1e-9)


def test_wasserstein2_needs_sets_of_equal_length():
    with pytest.raises(ValueError, match="length"):
        wasserstein2(np.zeros((4, 2)), np.zeros((5, 2)))


def moments_exactly(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """The set moved so that its sample mean and covariance are these."""
    centred = x - x.mean(0)
    whitened = np.linalg.solve(np.linalg.cholesky(np.cov(centred, rowvar=False)), centred.T).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_covariances():
    rotation, _ = np.linalg.qr(rng().standard_normal((3, 3)))
    a, b = np.array([2.0, 0.5, 1.0]), np.array([1.0, 3.0, 0.1])
    mean = np.array([1.0, -2.0, 0.5])
    x, y = rng().standard_normal((2, 50, 3))
    x = moments_exactly(x, np.zeros(3), rotation @ np.diag(a) @ rotation.T)
    y = moments_exactly(y, mean, rotation @ np.diag(b) @ rotation.T)
    assert frechet_distance(x, y) == pytest.approx(mean @ mean + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_full_covariances_is_that_of_the_optimal_map():
    """The optimal map between two Gaussians is ``T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2``, symmetric, and here given
    first: ``B = T A T``, so that the distance is ``tr(A - 2 T A + T A T)``."""
    a, t = (m @ m.T + 0.1 * np.eye(4) for m in rng().standard_normal((2, 4, 4)))
    x, y = rng().standard_normal((2, 80, 4))
    x, y = moments_exactly(x, np.ones(4), a), moments_exactly(y, np.ones(4), t @ a @ t)
    assert frechet_distance(x, y) == pytest.approx(np.trace(a - 2 * t @ a + t @ a @ t), rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_one_dimension_works():
    x = rng().standard_normal((30, 1))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, 2 * x + 1 + x.mean()) > 0.5
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(x[:1], x)


def test_bootstrap_error_is_the_spread_over_fresh_sets():
    y = rng().standard_normal((2000, 2)) + np.array([1.0, 0.0])
    fresh = [
        frechet_distance(rng_i.standard_normal((400, 2)), y)
        for rng_i in map(np.random.default_rng, range(200))
    ]
    estimate = bootstrap_frechet(rng().standard_normal((400, 2)), y, resamples=400)
    # A standard deviation from 200 values is known to 5%, that of the bootstrap depends on its one set, too.
    assert estimate.standard_error == pytest.approx(np.std(fresh, ddof=1), rel=0.25)
    assert abs(estimate.value - np.mean(fresh)) < 4 * estimate.standard_error


def test_features_of_digits_recognise_and_separate():
    data = load_dataset("digits")
    flat, labels = data.train.flatten(1).double().numpy() / 8 - 1, data.train_labels.numpy()
    features = ClassifierFeatures.fit(flat[:1000], labels[:1000], hidden=(128, 32), epochs=60)
    again = ClassifierFeatures.fit(flat[:1000], labels[:1000], hidden=(128, 32), epochs=60)
    np.testing.assert_array_equal(features(flat[:5]), again(flat[:5]))
    assert features(flat[:7]).shape == (7, 32)
    assert features.accuracy(flat[1000:], labels[1000:]) > 0.92
    # The features are those that the classifier decides on.
    logits = features(flat[:9]) @ features.classifier.coefs_[-1] + features.classifier.intercepts_[-1]
    np.testing.assert_array_equal(
        logits.argmax(1), features.classifier.predict(features.scaler.transform(flat[:9]))
    )
    # Twos missing are seen.
    whole, without = flat[1000:], flat[1000:][labels[1000:] != 2]
    assert frechet_distance(features(without), features(whole)) > 2 * frechet_distance(
        features(flat[:437]), features(whole)
    )
