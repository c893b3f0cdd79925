"""Sample quality against closed forms, against brute force, and on the real digits."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from sde_diffusion import metrics
from sde_diffusion.metrics import RBF, Distance, Polynomial, distances


def normal(seed, n, d=1, mean=0.0, std=1.0):
    return mean + std * np.random.default_rng(seed).standard_normal((n, d))


@pytest.fixture(scope="module")
def digits():
    """The real digits in a random split: train images and labels, test images and labels."""
    data = load_digits()
    images, labels = data.images[:, None].astype(np.uint8), data.target
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1437], order[1437:]
    return images[train], labels[train], images[test], labels[test]


# Sliced Wasserstein


def test_sliced_wasserstein_between_gaussians_in_one_dimension():
    """W_2^2 = (m1 - m2)^2 + (s1 - s2)^2, on the quantiles of the two laws: no sampling noise."""
    grid = (np.arange(20000) + 0.5) / 20000
    x, y = stats.norm.ppf(grid), stats.norm.ppf(grid, loc=1.5, scale=2)
    assert metrics.sliced_wasserstein(x, y, projections=3) == pytest.approx(math.hypot(1.5, 1), rel=2e-3)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 70), (7, 30), (1, 5)])
def test_sliced_wasserstein_of_order_one_agrees_with_scipy(n, m):
    x, y = normal(0, n), normal(1, m, mean=0.3)
    expected = stats.wasserstein_distance(x[:, 0], y[:, 0])
    assert metrics.sliced_wasserstein(x, y, projections=2, p=1) == pytest.approx(expected, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_in_many_dimensions():
    """A translation by v costs E (v.u)^2 = |v|^2 / D."""
    x, shift = normal(0, 20, d=3), np.array([1.0, 2.0, 2.0])
    distance = metrics.sliced_wasserstein(x, x + shift, projections=20000)
    assert distance**2 == pytest.approx(9 / 3, rel=5 * math.sqrt(4 / 5 / 20000))  # var (v.u)^2 = 4/45 |v|^4
    assert metrics.sliced_wasserstein(x, x[::-1]) == 0


def test_unequal_sizes_are_the_limit_of_repetition():
    x, y = normal(0, 6, d=2), normal(1, 4, d=2)
    expected = metrics.sliced_wasserstein(np.repeat(x, 2, axis=0), np.repeat(y, 3, axis=0), seed=3)
    assert metrics.sliced_wasserstein(x, y, seed=3) == pytest.approx(expected, rel=1e-12)
    assert metrics.sliced_wasserstein(y, x, seed=3) == pytest.approx(expected, rel=1e-12)
    assert metrics.sliced_wasserstein(x, y, seed=4) != pytest.approx(expected, rel=1e-3)


# Kernel statistics


def brute_mmd(x, y, kernel):
    def k(a, b):
        return float(kernel(a[None], b[None])[0, 0])

    within = [np.mean([k(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)]) for s in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("kernel", [RBF(0.7), Polynomial(), Polynomial(degree=2, offset=0.5), Distance()])
def test_mmd_is_the_unbiased_statistic(kernel):
    x, y = normal(0, 6, d=3), normal(1, 9, d=3, mean=0.5)
    assert metrics.mmd(x, y, kernel).value == pytest.approx(brute_mmd(x, y, kernel), rel=1e-9)


def test_kernels_are_what_they_say():
    x, y = np.array([[0.0, 1.0]]), np.array([[2.0, 3.0]])
    assert RBF(2.0)(x, y)[0, 0] == pytest.approx(math.exp(-8 / 8))
    assert Polynomial()(x, y)[0, 0] == pytest.approx((3 / 2 + 1) ** 3)
    assert Distance()(x, y)[0, 0] == pytest.approx(-math.sqrt(8))


def gaussian_mmd2(mean, std, bandwidth):
    """MMD^2 of N(0, 1) and N(mean, std^2) in one dimension under the RBF kernel."""

    def expected(gap, variance):
        scale = bandwidth**2 + variance
        return bandwidth / math.sqrt(scale) * math.exp(-(gap**2) / (2 * scale))

    return expected(0, 2) + expected(0, 2 * std**2) - 2 * expected(mean, 1 + std**2)


@pytest.mark.parametrize(("mean", "std", "n", "m"), [(0, 1, 60, 40), (0.5, 1, 50, 90), (0, 2, 40, 40)])
def test_mmd_and_its_variance_are_unbiased(mean, std, n, m):
    """Over 1,000 repeats: the mean is the closed form, and the variance the mean estimate of the variance.

    The first case has equal laws, where the first-order variance is 0 and that of the pairs is all there is.
    """
    repeats, kernel, rng = 1000, RBF(1.0), np.random.default_rng(5)
    values, errors, variances = np.empty(repeats), np.empty(repeats), np.empty((repeats, 2))
    for i in range(repeats):
        x, y = rng.standard_normal((n, 1)), mean + std * rng.standard_normal((m, 1))
        values[i], errors[i] = metrics.mmd(x, y, kernel)
        grams = distances._within(kernel(x, x)), distances._within(kernel(y, y))
        variances[i] = distances._variance(*grams, distances._between(kernel(x, y)))
    spread = values.std(ddof=1)
    assert abs(values.mean() - gaussian_mmd2(mean, std, 1.0)) < 4 * spread / math.sqrt(repeats)
    fourth = ((values - values.mean()) ** 4).mean() / spread**4  # the sample variance has noise of its own
    noise = math.sqrt((fourth - 1) / repeats + (variances.sum(1).std() / spread**2) ** 2 / repeats)
    assert variances.sum(1).mean() / spread**2 == pytest.approx(1, abs=4 * noise)
    if mean == 0 and std == 1:
        first = variances[:, 0]
        assert abs(first.mean()) < 4 * first.std() / math.sqrt(repeats)
        assert 0.95 < errors.mean() / spread < 1.4
    else:
        assert 0.9 < errors.mean() / spread < 1.1


def test_energy_distance_of_gaussians():
    """E|x - y| of two normals is the mean of a folded normal."""
    mean, std = 0.8, 1.5
    across = stats.foldnorm(mean / math.hypot(1, std), scale=math.hypot(1, std)).mean()
    truth = 2 * across - (1 + std) * 2 / math.sqrt(math.pi)
    value, error = metrics.energy_distance(normal(0, 2000), normal(1, 1500, mean=mean, std=std))
    assert abs(value - truth) < 4 * error
    assert error < 0.1 * truth


def test_the_default_kernel_has_the_median_distance_of_the_reference():
    x, y = normal(0, 30, d=2, std=9), normal(1, 41, d=2)
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(y, 2)]
    assert metrics.median_bandwidth(y) == pytest.approx(np.median(gaps))
    assert metrics.mmd(x, y) == metrics.mmd(x, y, RBF(float(np.median(gaps))))


def test_tensors_and_images_are_welcome():
    x = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = normal(1, 12, d=16)
    assert metrics.mmd(x, y) == metrics.mmd(x.detach().numpy().reshape(10, 16), y)
    assert metrics.mmd(x.to(torch.bfloat16), y).value == pytest.approx(metrics.mmd(x, y).value, abs=0.01)


# Permutation test


def test_permutation_p_value_against_enumeration():
    x, y = normal(0, 4), normal(1, 4, mean=0.7)
    pooled, observed = np.concatenate([x, y]), brute_mmd(x, y, RBF(1.0))
    values = []
    for chosen in itertools.combinations(range(8), 4):
        rest = [i for i in range(8) if i not in chosen]
        values.append(brute_mmd(pooled[list(chosen)], pooled[rest], RBF(1.0)))
    exact = np.mean(np.array(values) >= observed - 1e-12)
    p = metrics.permutation_test(x, y, RBF(1.0), permutations=20000)
    assert p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 20000))


@pytest.mark.parametrize(("n", "m"), [(30, 30), (20, 45)])
def test_p_values_are_uniform_when_the_laws_are_equal(n, m):
    rng = np.random.default_rng(3)
    p = [
        metrics.permutation_test(rng.random((n, 2)), rng.random((m, 2)), permutations=199, seed=i)
        for i in range(300)
    ]
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert np.mean(np.array(p) <= 0.05) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 300)


def test_p_value_of_different_and_of_identical_sets():
    x = normal(0, 40, d=2)
    assert metrics.permutation_test(x, normal(1, 40, d=2, mean=2), permutations=499) == 1 / 500
    assert metrics.permutation_test(x, x, permutations=499) > 0.9


def test_two_sample_report(digits):
    train, _, test, _ = digits
    noisy = np.clip(train[:500] + np.random.default_rng(0).normal(0, 4, train[:500].shape), 0, 16)
    report = metrics.two_sample_report(noisy / 8 - 1, test / 8 - 1, train / 8 - 1, permutations=200)
    assert json.loads(json.dumps(report)) == report
    assert report["n"] == 360
    for kernel in ("rbf", "polynomial", "energy"):
        assert report[kernel]["samples_vs_test"]["p_value"] < 0.01
        assert report[kernel]["train_vs_test"]["p_value"] > 0.01
        good, bad = report[kernel]["train_vs_test"], report[kernel]["samples_vs_test"]
        assert abs(good["value"]) < 4 * good["standard_error"]
        assert bad["value"] > 4 * bad["standard_error"]
    assert report["sliced_wasserstein"]["samples_vs_test"] > report["sliced_wasserstein"]["train_vs_test"]
    again = metrics.two_sample_report(noisy / 8 - 1, test / 8 - 1, train / 8 - 1, permutations=200)
    assert again == report


def test_the_report_counts_what_the_single_functions_count():
    """With sets of equal size nothing is thinned away, and order does not matter."""
    samples, test, train = normal(0, 30, d=2), normal(1, 30, d=2), normal(2, 30, d=2)
    report = metrics.two_sample_report(samples, test, train, permutations=10)
    assert report["rbf"]["samples_vs_test"]["value"] == pytest.approx(metrics.mmd(samples, test).value)
    energy = metrics.energy_distance(train, test)
    assert report["energy"]["train_vs_test"]["value"] == pytest.approx(energy.value)
    assert report["energy"]["train_vs_test"]["standard_error"] == pytest.approx(energy.standard_error)


# Classifier


def test_classifier_report_on_real_digits(digits):
    train, labels, test, test_labels = digits
    ones = train[labels == 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = metrics.classifier_report(train, labels, test, test_labels, ones)
    assert json.loads(json.dumps(report)) == report
    real, samples = report["real"], report["samples"]
    assert real["accuracy"] > 0.97
    assert real["n"] == sum(real["class_histogram"].values()) == 360
    truth = np.bincount(test_labels, minlength=10)
    assert all(abs(real["class_histogram"][str(c)] - truth[c]) <= 8 for c in range(10))
    assert real["confidence"]["mean"] > 0.9
    assert real["chi_square"]["p_value"] > 1e-3
    assert samples["class_histogram"]["1"] >= len(ones) - 1
    assert samples["chi_square"]["p_value"] < 1e-30
    q = (labels == 1).mean()  # all mass on one class: sum (p - q)^2 / q = 1 / q - 1
    assert samples["chi_square"]["distance"] == pytest.approx(1 / q - 1, rel=0.02)
    assert report["train_class_frequencies"]["1"] == pytest.approx(q)


def test_noise_has_low_confidence(digits):
    train, labels, test, test_labels = digits
    noise = np.random.default_rng(0).integers(0, 17, (1000, 1, 8, 8))
    report = metrics.classifier_report(train, labels, test, test_labels, noise)
    assert report["samples"]["confidence"]["mean"] < report["real"]["confidence"]["mean"] - 0.5
    quantiles = list(report["samples"]["confidence"]["quantiles"].values())
    assert quantiles == sorted(quantiles)


def test_any_classifier_and_any_labels():
    x = np.concatenate([normal(0, 50, d=2, mean=-3), normal(1, 50, d=2, mean=3)])
    y = np.repeat([4, 9], 50)
    model = LogisticRegression()
    report = metrics.classifier_report(x, y, x[::2], y[::2], normal(2, 30, d=2, mean=3), classifier=model)
    assert report["samples"]["class_histogram"] == {"4": 0, "9": 30}
    assert report["samples"]["chi_square"] == pytest.approx(
        {"statistic": 30, "degrees_of_freedom": 1, "p_value": stats.chi2.sf(30, 1), "distance": 1}
    )
    assert report["real"]["accuracy"] == 1


# Nearest neighbours


def test_nearest_neighbours_against_brute_force():
    samples, train, test = normal(0, 5, d=3), normal(1, 7, d=3), normal(2, 6, d=3)
    found = metrics.nearest_neighbours(samples, train, test)
    for i, sample in enumerate(samples):
        gaps = np.linalg.norm(train - sample, axis=1)
        assert found.indices[i] == gaps.argmin()
        assert found.distances[i] == pytest.approx(gaps.min())
    wins = [(a < b) + 0.5 * (a == b) for a in found.distances for b in found.test_distances]
    summary = found.summary()
    assert summary["closer_than_test"] == pytest.approx(np.mean(wins))
    assert json.loads(json.dumps(summary)) == summary
    assert found.distances[found.closest(2)].tolist() == sorted(found.distances)[:2]


def test_copies_are_seen(digits):
    train, _, test, _ = digits
    copies = metrics.nearest_neighbours(train[100:200], train, test)
    assert copies.indices.tolist() == list(range(100, 200))
    assert copies.summary()["suspected_copies"] == 1
    assert copies.summary()["closer_than_test"] == 1
    honest = metrics.nearest_neighbours(test[:180], train, test[180:]).summary()
    assert honest["closer_than_test"] == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 * (2 / 180)))
    assert honest["suspected_copies"] < 0.06


# The Gaussian mixture


SINGLE = {"full": (1,)}


def test_bits_per_dim_do_not_depend_on_the_scaling():
    """One full Gaussian, computed independently in the units of grey levels, where the offset is zero."""
    rng = np.random.default_rng(0)
    train, test = rng.binomial(16, 0.4, (4000, 3)), rng.binomial(16, 0.4, (1000, 3))
    report = metrics.gaussian_mixture_baseline(
        train, test, 17, components=SINGLE, regularizations=(0.0,), copies=1, draws=20
    )
    noisy = train + rng.random(train.shape)
    gaussian = stats.multivariate_normal(noisy.mean(0), np.cov(noisy.T, bias=True))
    bits = [-gaussian.logpdf(test + rng.random(test.shape)) / (3 * math.log(2)) for _ in range(20)]
    assert report["test_bits_per_dim"] == pytest.approx(np.mean(bits), abs=3e-3)
    per_image = np.mean(bits, axis=0)
    expected = per_image.std(ddof=1) / math.sqrt(1000)
    assert report["test_standard_error"] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_levels_cost_what_a_gaussian_pays_for_a_uniform(levels):
    """The dequantized law is uniform on [0, levels]: cross-entropy log2(levels) + log2(2 pi e / 12) / 2."""
    x = np.random.default_rng(0).integers(0, levels, (20000, 2))
    report = metrics.gaussian_mixture_baseline(
        x, x[:5000], levels, components=SINGLE, copies=1, draws=2, restarts=1
    )
    expected = math.log2(levels) + 0.5 * math.log2(2 * math.pi * math.e / 12)
    for name in ("test", "train"):
        error = report[f"{name}_standard_error"]
        assert report[f"{name}_bits_per_dim"] == pytest.approx(expected, abs=4 * error + 1e-3)


def test_the_baseline_on_digits_with_few_candidates(digits):
    """The best mixture on a random split is near 2.58 bits/dim; a single Gaussian is well above it."""
    train, _, test, _ = digits
    few = {"full": (1,), "tied": (2,), "diag": (60,)}
    report = metrics.gaussian_mixture_baseline(train, test, 17, components=few, regularizations=(0.3,))
    assert json.loads(json.dumps(report)) == report
    assert report["covariance_type"] == "diag"
    assert report["test_bits_per_dim"] == pytest.approx(2.58, abs=0.08)
    assert report["train_bits_per_dim"] < report["test_bits_per_dim"]
    assert 0.015 < report["test_standard_error"] < 0.04
    held_out = {c["covariance_type"]: c["held_out_bits_per_dim"] for c in report["candidates"]}
    assert min(held_out, key=held_out.get) == "diag"
    again = metrics.gaussian_mixture_baseline(train, test, 17, components=few, regularizations=(0.3,))
    assert again == report


def test_a_candidate_that_cannot_be_fitted_is_left_out():
    x = np.random.default_rng(0).integers(0, 4, (30, 2))
    options = {"regularizations": (1.0,), "copies": 1, "draws": 1, "restarts": 1}
    report = metrics.gaussian_mixture_baseline(x, x, 4, components={"diag": (2, 500)}, **options)
    assert report["components"] == 2
    assert [c["held_out_bits_per_dim"] is None for c in report["candidates"]] == [False, True]
    with pytest.raises(ValueError, match="none of the 1 mixtures could be fitted on 24 images"):
        metrics.gaussian_mixture_baseline(x, x, 4, components={"diag": (500,)}, **options)


@pytest.mark.slow
def test_the_default_baseline_on_digits(digits):
    train, _, test, _ = digits
    report = metrics.gaussian_mixture_baseline(train, test, 17)
    assert report["test_bits_per_dim"] == pytest.approx(2.58, abs=0.06)


# Errors


BAD = np.full((5, 2), np.nan)
GOOD = normal(0, 5, d=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.sliced_wasserstein(BAD, GOOD), "x must be finite, got 10 NaN or infinite of 10"),
        (lambda: metrics.sliced_wasserstein(GOOD[:0], GOOD), r"x must not be empty, got shape \(0, 2\)"),
        (lambda: metrics.sliced_wasserstein(GOOD, GOOD[:, :1]), "got x 2, y 1"),
        (lambda: metrics.sliced_wasserstein(GOOD, GOOD, projections=0), "projections must be >= 1, got 0"),
        (lambda: metrics.sliced_wasserstein(GOOD, GOOD, p=0.5), "p must be >= 1, got 0.5"),
        (lambda: metrics.mmd(GOOD, BAD), "y must be finite"),
        (lambda: metrics.mmd(GOOD[:3], GOOD), "at least 4 elements, got 3 and 5"),
        (lambda: metrics.mmd(GOOD, np.ones((5, 2))), "median distance within reference is 0"),
        (lambda: metrics.mmd(1.0, GOOD), "got a scalar"),
        (lambda: RBF(0.0), "bandwidth must be finite and > 0, got 0.0"),
        (lambda: Polynomial(degree=0), "degree must be an integer >= 1, got 0"),
        (lambda: metrics.permutation_test(GOOD, GOOD, permutations=0), "permutations must be >= 1, got 0"),
        (lambda: metrics.two_sample_report(GOOD, GOOD, BAD), "train must be finite"),
        (
            lambda: metrics.two_sample_report(GOOD[:3], GOOD, GOOD),
            "at least 4 elements, the smallest holds 3",
        ),
        (lambda: metrics.nearest_neighbours(BAD, GOOD, GOOD), "samples must be finite"),
        (lambda: metrics.nearest_neighbours(GOOD, GOOD, GOOD[:, :1]), "samples 2, train 2, test 1"),
    ],
)
def test_errors_of_distances(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_x": BAD}, "sample_x must be finite"),
        ({"train_y": [0, 1, 0]}, "got train_x 5, train_y 3"),
        ({"real_y": [0, 1, 0, 1, 2]}, r"classes that train_y lacks: \[2\]"),
        ({"train_y": [0.5, 1, 0, 1, 0]}, "train_y must be whole numbers"),
        ({"train_y": [1, 1, 1, 1, 1]}, r"at least 2 classes, got \[1\]"),
        ({"real_x": GOOD[:, :1]}, "real_x 1"),
    ],
)
def test_errors_of_the_classifier(changes, message):
    arguments = {
        "train_x": GOOD,
        "train_y": [0, 1, 0, 1, 0],
        "real_x": GOOD,
        "real_y": [0, 1, 0, 1, 0],
        "sample_x": GOOD,
    }
    with pytest.raises(ValueError, match=message):
        metrics.classifier_report(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 1}, "levels must be an integer >= 2, got 1"),
        ({"levels": 4}, r"whole grey levels 0 .. 3, got values from 0 to 9"),
        ({"train_levels": np.full((10, 2), 0.5)}, "whole grey levels"),
        ({"test_levels": np.zeros((3, 5))}, "train_levels 2, test_levels 5"),
        ({"held_out": 1.0}, "held_out must lie between 0 and 1, got 1.0"),
        ({"draws": 0}, "draws must be >= 1, got 0"),
        ({"components": {"daig": (2,)}}, "unknown covariance type 'daig'; did you mean 'diag'"),
        ({"train_levels": np.zeros((2, 2))}, "enough images to hold some out, got 2"),
    ],
)
def test_errors_of_the_baseline(changes, message):
    arguments = {
        "train_levels": np.arange(20).reshape(10, 2) // 2,
        "test_levels": np.zeros((3, 2)),
        "levels": 10,
    }
    with pytest.raises(ValueError, match=message):
        metrics.gaussian_mixture_baseline(**{**arguments, **changes})


def test_the_classifier_tells_whether_samples_are_what_they_were_asked_to_be() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = generator.normal(size=(300, 4)) * 0.1 + labels[:, None]
    asked = labels.copy()
    asked[:30] = (asked[:30] + 1) % 3
    report = metrics.classifier_report(x, labels, x, labels, x, asked)
    assert report["samples"]["accuracy"] == pytest.approx(0.9)
    assert "accuracy" not in metrics.classifier_report(x, labels, x, labels, x)["samples"]
    with pytest.raises(ValueError, match="sample_y"):
        metrics.classifier_report(x, labels, x, labels, x, asked[:10])
