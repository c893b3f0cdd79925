"""The density baseline: the best Gaussian mixture scikit-learn fits on dequantized images."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from sde_diffusion.arrays import Array, as_matrix, same_width
from sde_diffusion.errors import unknown_name

COMPONENTS: Mapping[str, Sequence[int]] = {"full": (5, 10, 20), "tied": (20,), "diag": (40, 60, 80, 100)}
"""Numbers of components tried by default for each kind of covariance: what can win on 1,000 8x8 images."""


def gaussian_mixture_baseline(
    train_levels: Any,
    test_levels: Any,
    levels: int,
    *,
    components: Mapping[str, Sequence[int]] = COMPONENTS,
    regularizations: Sequence[float] = (0.1, 0.3, 1.0),
    copies: int = 2,
    draws: int = 10,
    held_out: float = 0.2,
    restarts: int = 4,
    seed: int = 0,
) -> dict[str, Any]:
    """Test bits/dim of the best Gaussian mixture on uniformly dequantized data.

    Every candidate is fitted on part of the training images; the one that is best on the held-out rest is
    fitted again on all of them. The test images are looked at once, at the end.

    ``bits/dim = -log p(y) / (D ln 2) + log2(levels / 2)`` for ``y = (x + u) / levels * 2 - 1``, u uniform in
    [0, 1): by Jensen's inequality, averaged over u, an upper bound of the code length of the grey levels
    themselves.

    Args:
        train_levels, test_levels: grey level indices 0 .. levels - 1, (N, *D) and (M, *D).
        levels: number of grey levels, >= 2.
        components: for each covariance type (``full``, ``tied``, ``diag``, ``spherical``) the numbers to try.
        regularizations: what is added to the covariance diagonals, in units of the variance of u.
        copies: differently dequantized copies of each image to fit on.
        draws: dequantizations averaged per image when evaluating.
        held_out: fraction of the training images that selects the candidate.
        restarts: initialisations of the final fit (the one with the highest training likelihood is kept).
        seed: of the split, of the dequantization and of the fits.

    Returns:
        A dict for JSON: ``test_bits_per_dim`` and ``train_bits_per_dim``, each with its ``.._standard_error``
        (over images), the choice (``covariance_type``, ``components``, ``regularization``), its
        ``held_out_bits_per_dim``, the settings, and ``candidates``: one entry per fit, null where
        scikit-learn found it ill-defined.
    """
    if levels != int(levels) or levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
    train, test = _levels(train_levels, "train_levels", levels), _levels(test_levels, "test_levels", levels)
    same_width(train_levels=train, test_levels=test)
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1, got {held_out!r}")
    for name, number in (("copies", copies), ("draws", draws), ("restarts", restarts)):
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number!r}")
    for kind in components:
        if kind not in ("full", "tied", "diag", "spherical"):
            raise unknown_name("covariance type", kind, ("full", "tied", "diag", "spherical"))

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    size = max(1, round(held_out * len(train)))
    validation, fitted = train[order[:size]], train[order[size:]]
    if len(fitted) < 2:
        raise ValueError(f"train_levels must hold enough images to hold some out, got {len(train)}")
    to_fit = np.concatenate([_dequantize(fitted, levels, rng) for _ in range(copies)])
    to_judge = np.stack([_dequantize(validation, levels, rng) for _ in range(draws)])

    candidates: list[dict[str, Any]] = []
    for kind, numbers in components.items():
        for number in numbers:
            for regularization in regularizations:
                model = _fit(to_fit, kind, number, _covariance_floor(regularization, levels), 1, seed)
                judged = None if model is None else float(_bits_per_dim(model, to_judge, levels).mean())
                candidates.append(
                    {
                        "covariance_type": kind,
                        "components": int(number),
                        "regularization": float(regularization),
                        "held_out_bits_per_dim": judged,
                    }
                )
    sound = [c for c in candidates if c["held_out_bits_per_dim"] is not None]
    if not sound:
        raise ValueError(f"none of the {len(candidates)} mixtures could be fitted on {len(fitted)} images")
    best = min(sound, key=lambda c: c["held_out_bits_per_dim"])

    everything = np.concatenate([_dequantize(train, levels, rng) for _ in range(copies)])
    floor = _covariance_floor(best["regularization"], levels)
    final = _fit(everything, best["covariance_type"], best["components"], floor, restarts, seed)
    if final is None:
        raise ValueError(f"the chosen mixture could not be fitted on all training images: {best}")
    report: dict[str, Any] = {}
    for name, images in (("test", test), ("train", train)):
        bits = _bits_per_dim(
            final, np.stack([_dequantize(images, levels, rng) for _ in range(draws)]), levels
        )
        report[f"{name}_bits_per_dim"] = float(bits.mean())
        report[f"{name}_standard_error"] = float(bits.std(ddof=min(1, len(bits) - 1)) / np.sqrt(len(bits)))
        report[f"{name}_images"] = len(images)
    settings = {"levels": int(levels), "copies": copies, "draws": draws, "restarts": restarts, "seed": seed}
    return {**report, **best, **settings, "candidates": candidates}


def _levels(value: Any, name: str, levels: int) -> Array:
    matrix = as_matrix(value, name)
    if (matrix != np.round(matrix)).any() or matrix.min() < 0 or matrix.max() > levels - 1:
        raise ValueError(
            f"{name} must hold whole grey levels 0 .. {levels - 1}, "
            f"got values from {matrix.min():g} to {matrix.max():g}"
        )
    return matrix


def _dequantize(x: Array, levels: int, rng: np.random.Generator) -> Array:
    return (x + rng.random(x.shape)) / levels * 2 - 1


def _covariance_floor(regularization: float, levels: int) -> float:
    """In the data's units: the dequantization noise u of variance 1/12 is scaled by 2 / levels."""
    return regularization * (2 / levels) ** 2 / 12


def _bits_per_dim(model: GaussianMixture, draws: Array, levels: int) -> Array:
    """(draws, N, D) -> (N,), averaged over the draws. Data in [-1, 1], hence the offset log2(levels / 2)."""
    count, images, dims = draws.shape
    log_prob = model.score_samples(draws.reshape(count * images, dims)).reshape(count, images).mean(0)
    return -log_prob / (dims * np.log(2)) + np.log2(levels / 2)


def _fit(
    data: Array, kind: str, number: int, floor: float, restarts: int, seed: int
) -> GaussianMixture | None:
    """The mixture, or None where there is none (more components than points, singular covariance)."""
    if number > len(data):
        return None
    model = GaussianMixture(
        number, covariance_type=kind, reg_covar=floor, max_iter=100, n_init=restarts, random_state=seed
    )
    with warnings.catch_warnings():
        # A hundred steps of EM are plenty for a baseline; whether the last 1e-3 nat was reached does not
        # matter.
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return model.fit(data)
        except ValueError as error:
            if "ill-defined" in str(error):
                return None
            raise
