"""Distances between two sets of samples, with their standard errors and permutation p-values.

All kernel statistics are one formula, the unbiased squared maximum mean discrepancy; the energy distance is
it with the kernel ``-|x - y|``. Memory is that of the Gram matrices, O((n + m)^2) float64: a few thousand
samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.distance import cdist, pdist

from sde_diffusion.arrays import Array, as_matrix, same_width

Kernel = Callable[[Array, Array], Array]
"""(n, D), (m, D) -> Gram matrix (n, m)."""


class Estimate(NamedTuple):
    """A statistic and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class RBF:
    """``k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))``."""

    bandwidth: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth must be finite and > 0, got {self.bandwidth!r}")

    def __call__(self, x: Array, y: Array) -> Array:
        return np.exp(cdist(x, y, "sqeuclidean") / (-2 * self.bandwidth**2))


@dataclass(frozen=True)
class Polynomial:
    """``k(x, y) = (x . y / D + offset)^degree``: the kernel of KID (Binkowski et al. 2018) at 3 and 1."""

    degree: int = 3
    offset: float = 1.0

    def __post_init__(self) -> None:
        if self.degree < 1 or self.degree != int(self.degree):
            raise ValueError(f"degree must be an integer >= 1, got {self.degree!r}")

    def __call__(self, x: Array, y: Array) -> Array:
        return (x @ y.T / x.shape[1] + self.offset) ** self.degree


@dataclass(frozen=True)
class Distance:
    """``k(x, y) = -|x - y|``: conditionally positive definite, its MMD^2 is the energy distance."""

    def __call__(self, x: Array, y: Array) -> Array:
        return -cdist(x, y)


def median_bandwidth(reference: Any) -> float:
    """The median distance between two different elements of ``reference`` (N, *D).

    Give it the reference set only: a bandwidth that depends on the samples judged is a moving yardstick.
    """
    points = as_matrix(reference, "reference")
    if len(points) < 2:
        raise ValueError(f"reference must hold at least 2 elements, got {len(points)}")
    bandwidth = float(np.median(pdist(points)))
    if bandwidth == 0:
        raise ValueError(
            "the median distance within reference is 0 (most elements are equal): give a bandwidth"
        )
    return bandwidth


def sliced_wasserstein(x: Any, y: Any, *, projections: int = 200, p: float = 2, seed: int = 0) -> float:
    """``(E_v W_p^p(v.x, v.y))^(1/p)`` over random unit vectors v (Bonneel et al. 2015), in data units.

    Args:
        x, y: (n, *D) and (m, *D); n and m may differ (the one-dimensional optimal coupling is exact).
        projections: number of directions.
        p: order of the distance, >= 1.
        seed: of the directions. The same seed gives the same directions for every pair of sets.
    """
    a, b = as_matrix(x, "x"), as_matrix(y, "y")
    same_width(x=a, y=b)
    if projections < 1:
        raise ValueError(f"projections must be >= 1, got {projections!r}")
    if not p >= 1:
        raise ValueError(f"p must be >= 1, got {p!r}")
    directions = np.random.default_rng(seed).standard_normal((a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    # Both quantile functions are constant between the merged breakpoints i/n and j/m. The breakpoints are
    # compared as whole multiples of 1/(n m), so that equal ones are equal.
    n, m = len(a), len(b)
    edges = np.union1d(np.arange(n + 1, dtype=np.int64) * m, np.arange(m + 1, dtype=np.int64) * n)
    left, weights = edges[:-1], np.diff(edges) / (n * m)
    gaps = np.sort(a @ directions, axis=0)[left // m] - np.sort(b @ directions, axis=0)[left // n]
    return float((weights @ np.abs(gaps) ** p).mean() ** (1 / p))


def mmd(x: Any, y: Any, kernel: Kernel | None = None) -> Estimate:
    """The unbiased estimate of the squared maximum mean discrepancy, with its standard error.

    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)`` (Gretton et al.
    2012, eq. 3). Its expectation is 0 for equal distributions, so a single value may be negative.

    The standard error is the root of the sum of the variances in the Hoeffding decomposition of the
    statistic, each estimated without bias by an analysis of variance of the Gram matrices. Where the sets
    differ, the first-order terms rule; where they do not, only the second-order terms are left (the estimate
    of the first is cut at 0, which makes the standard error a little too large there, never too small on
    average).

    Args:
        x, y: (n, *D) and (m, *D), at least 4 elements each. ``y`` is the reference.
        kernel: (n, D), (m, D) -> (n, m), symmetric. Default: RBF at the median distance within ``y``.
    """
    a, b = _two_sets(x, y)
    k = RBF(median_bandwidth(b)) if kernel is None else kernel
    return _mmd_from_gram(k(a, a), k(b, b), k(a, b))


def energy_distance(x: Any, y: Any) -> Estimate:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` (Szekely & Rizzo 2013), unbiased, with its standard error.

    This is the squared metric in the units of the data, not its root; a single value may be negative.
    """
    return mmd(x, y, Distance())


def permutation_test(
    x: Any, y: Any, kernel: Kernel | None = None, *, permutations: int = 1000, seed: int = 0
) -> float:
    """The p-value of "x and y have one distribution": the MMD^2 against random relabellings of both.

    ``(1 + #{permuted >= observed}) / (1 + permutations)``: never 0, and exact at every level for a
    kernel chosen beforehand (the default looks at ``y`` for its bandwidth, which hardly matters).
    """
    a, b = _two_sets(x, y)
    k = RBF(median_bandwidth(b)) if kernel is None else kernel
    pooled = np.concatenate([a, b])
    return _permutation_p_value(k(pooled, pooled), len(a), permutations, seed)


def two_sample_report(
    samples: Any, test: Any, train: Any, *, permutations: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Samples against test data beside train against test data, at equal n: what a perfect model would show.

    Args:
        samples, test, train: (N, *D) in one scaling (images in [-1, 1], where the polynomial kernel is at
            home), and all rounded to grey levels or none; the larger sets are thinned at random to the
            smallest.
        permutations: random relabellings behind each p-value.
        seed: of thinning, projections and relabellings.

    Returns:
        A dict for JSON: ``n``; for each of the kernels ``rbf`` (bandwidth: median distance within the test
        set), ``polynomial`` (KID's) and ``energy``, and for each of ``samples_vs_test`` and
        ``train_vs_test``, the unbiased squared discrepancy ``value``, its ``standard_error`` and a
        permutation ``p_value``; and ``sliced_wasserstein`` (W_2) for both pairs.
    """
    sets = {
        name: as_matrix(value, name)
        for name, value in (("samples", samples), ("test", test), ("train", train))
    }
    same_width(**sets)
    n = min(len(points) for points in sets.values())
    if n < 4:
        raise ValueError(f"every set must hold at least 4 elements, the smallest holds {n}")
    rng = np.random.default_rng(seed)
    sets = {name: points[np.sort(rng.permutation(len(points))[:n])] for name, points in sets.items()}
    bandwidth = median_bandwidth(sets["test"])
    kernels: dict[str, Kernel] = {"rbf": RBF(bandwidth), "polynomial": Polynomial(), "energy": Distance()}
    report: dict[str, Any] = {"n": n, "permutations": permutations, "bandwidth": bandwidth}
    for kernel_name, kernel in kernels.items():
        report[kernel_name] = {
            f"{name}_vs_test": _tested_mmd(sets[name], sets["test"], kernel, permutations, seed)
            for name in ("samples", "train")
        }
    report["sliced_wasserstein"] = {
        f"{name}_vs_test": sliced_wasserstein(sets[name], sets["test"], seed=seed)
        for name in ("samples", "train")
    }
    return report


def _two_sets(x: Any, y: Any) -> tuple[Array, Array]:
    a, b = as_matrix(x, "x"), as_matrix(y, "y")
    same_width(x=a, y=b)
    if min(len(a), len(b)) < 4:
        raise ValueError(f"both sets must hold at least 4 elements, got {len(a)} and {len(b)}")
    return a, b


def _tested_mmd(a: Array, b: Array, kernel: Kernel, permutations: int, seed: int) -> dict[str, float]:
    n, pooled = len(a), np.concatenate([a, b])
    gram = kernel(pooled, pooled)
    value, error = _mmd_from_gram(gram[:n, :n], gram[n:, n:], gram[:n, n:])
    return {
        "value": value,
        "standard_error": error,
        "p_value": _permutation_p_value(gram, n, permutations, seed),
    }


class _Anova(NamedTuple):
    """``k_ij = mean + row_i + column_j + residual_ij``, and the variance of the residual."""

    mean: float
    rows: Array
    columns: Array
    variance: float


def _within(gram: Array) -> _Anova:
    """The decomposition of a symmetric Gram matrix without its diagonal (diallel analysis, Griffing 1956)."""
    n = len(gram)
    row_sums = gram.sum(1) - gram.diagonal()
    mean = row_sums.sum() / (n * (n - 1))
    effects = (row_sums - (n - 1) * mean) / (n - 2)
    residual = gram - mean - effects[:, None] - effects
    np.fill_diagonal(residual, 0.0)
    return _Anova(float(mean), effects, effects, float((residual**2).sum() / (n * (n - 3))))


def _between(gram: Array) -> _Anova:
    """The two-way decomposition of the Gram matrix of two independent sets."""
    n, m = gram.shape
    mean = gram.mean()
    rows, columns = gram.mean(1) - mean, gram.mean(0) - mean
    residual = gram - mean - rows[:, None] - columns
    return _Anova(float(mean), rows, columns, float((residual**2).sum() / ((n - 1) * (m - 1))))


def _mmd_from_gram(kxx: Array, kyy: Array, kxy: Array) -> Estimate:
    xx, yy, xy = _within(kxx), _within(kyy), _between(kxy)
    first, second = _variance(xx, yy, xy)
    return Estimate(xx.mean + yy.mean - 2 * xy.mean, float(np.sqrt(max(0.0, first) + second)))


def _variance(xx: _Anova, yy: _Anova, xy: _Anova) -> tuple[float, float]:
    """The variance of the MMD^2 by the projections on single elements, and that by pairs: both unbiased.

    The first is 0 for equal laws, so its estimate may be negative.
    """
    n, m = len(xy.rows), len(xy.columns)
    # The row effects carry the residuals' noise; without it the variance of the projections is left.
    of_x = np.var(xx.rows - xy.rows, ddof=1) - xx.variance / (n - 2) - xy.variance / m
    of_y = np.var(yy.rows - xy.columns, ddof=1) - yy.variance / (m - 2) - xy.variance / n
    pairs = xx.variance / (n * (n - 1)) + yy.variance / (m * (m - 1)) + 2 * xy.variance / (n * m)
    return float(4 * of_x / n + 4 * of_y / m), 2 * pairs


def _permutation_p_value(gram: Array, n: int, permutations: int, seed: int) -> float:
    """The p-value from the Gram matrix of the pooled set whose first ``n`` rows are the first set."""
    if permutations < 1:
        raise ValueError(f"permutations must be >= 1, got {permutations!r}")
    total = len(gram)
    m = total - n
    rng = np.random.default_rng(seed)
    member = np.zeros((permutations + 1, total))
    member[0, :n] = 1.0  # row 0 is the observed labelling
    for row in member[1:]:
        row[rng.permutation(total)[:n]] = 1.0
    off_diagonal = gram - np.diag(gram.diagonal())
    row_sums, everything = off_diagonal.sum(1), off_diagonal.sum()
    within_x = np.einsum("pi,pi->p", member @ off_diagonal, member)
    across = member @ row_sums - within_x
    within_y = everything - within_x - 2 * across
    statistics = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # Ties with the observed value (discrete data, the same labelling again) count, whatever the rounding.
    slack = 1e-12 * float(np.abs(gram).max())
    return float((1 + (statistics[1:] >= statistics[0] - slack).sum()) / (1 + permutations))
