"""What an independent classifier, trained on real images only, says about samples."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import SVC

from sde_diffusion.arrays import Array, as_labels, as_matrix, same_length, same_width

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


def image_classifier(train_x: Any, seed: int = 0) -> CalibratedClassifierCV:
    """A support vector machine per class (RBF kernel), probabilities by Platt's sigmoid on held-out folds.

    About 99% right on scikit-learn's digits. The kernel is narrower than usual (gamma is twice the library's
    "scale"): far from all training images every machine says no, so that what looks like nothing is given to
    no class with confidence.

    Args:
        train_x: training images (N, *D); only their variance is used, for the kernel's width.
        seed: of the folds.

    Returns:
        A scikit-learn classifier, not yet fitted.
    """
    train = as_matrix(train_x, "train_x")
    variance = float(train.var())
    if variance == 0:
        raise ValueError(f"train_x must not be constant, got {train.flat[0]} everywhere")
    machines = OneVsRestClassifier(SVC(C=10.0, gamma=2 / (train.shape[1] * variance)))
    # An integer for cv would take the folds unshuffled, in the order of the file.
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return CalibratedClassifierCV(machines, method="sigmoid", cv=folds, ensemble=False)


def classifier_report(
    train_x: Any,
    train_y: Any,
    real_x: Any,
    real_y: Any,
    sample_x: Any,
    sample_y: Any | None = None,
    *,
    classifier: Any | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Fits a classifier on ``train`` and reads it off on real test images and on samples.

    Args:
        train_x, train_y: images (N, *D) and labels (N,), the only thing the classifier is fitted on.
        real_x, real_y: held-out real images with labels.
        sample_x: generated images, in the same scaling as the real ones (grey levels against grey levels:
            continuous samples against rounded data would measure the rounding).
        sample_y: the classes that the samples were asked to be (N,), for a class-conditional model.
        classifier: anything with ``fit``, ``predict_proba`` and ``classes_``; default
            :func:`image_classifier`.
        seed: of the default classifier.

    Returns:
        A dict for JSON. ``real`` and ``samples`` each hold ``n``; ``class_histogram`` {label: count} of the
        predicted classes; ``confidence`` (mean of the largest class probability, its standard error,
        quantiles, the fraction below 0.5); and ``chi_square`` against the class frequencies of the training
        labels: the ``statistic``, its degrees of freedom, the ``p_value`` and the ``distance`` sum (p - q)^2
            / q (the statistic over n).
        ``real``, and ``samples`` where ``sample_y`` is given, also have ``accuracy`` with its standard error.
        ``train_class_frequencies`` are the q.
    """
    train, real, samples = (
        as_matrix(train_x, "train_x"),
        as_matrix(real_x, "real_x"),
        as_matrix(sample_x, "sample_x"),
    )
    train_labels, real_labels = as_labels(train_y, "train_y"), as_labels(real_y, "real_y")
    same_width(train_x=train, real_x=real, sample_x=samples)
    same_length(train_x=train, train_y=train_labels)
    same_length(real_x=real, real_y=real_labels)
    classes, counts = np.unique(train_labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"train_y must hold at least 2 classes, got {classes.tolist()}")
    unknown = np.setdiff1d(real_labels, classes)
    if len(unknown):
        raise ValueError(f"real_y holds classes that train_y lacks: {unknown.tolist()}")

    model = image_classifier(train, seed) if classifier is None else classifier
    model.fit(train, train_labels)
    frequencies = counts / counts.sum()
    real_report, predicted = _describe(model, real, frequencies)
    sample_report, sampled = _describe(model, samples, frequencies)
    real_report |= _accuracy(predicted, real_labels)
    if sample_y is not None:
        asked = as_labels(sample_y, "sample_y")
        same_length(sample_x=samples, sample_y=asked)
        sample_report |= _accuracy(sampled, asked)
    return {
        "train_class_frequencies": {str(c): float(f) for c, f in zip(classes, frequencies, strict=True)},
        "real": real_report,
        "samples": sample_report,
    }


def _accuracy(predicted: Array, labels: Array) -> dict[str, float]:
    accuracy = float((predicted == labels).mean())
    error = float(np.sqrt(accuracy * (1 - accuracy) / len(labels)))
    return {"accuracy": accuracy, "accuracy_standard_error": error}


def _describe(model: Any, x: Array, frequencies: Array) -> tuple[dict[str, Any], Array]:
    """Predicted classes of ``x`` in summary, and one by one."""
    probabilities = model.predict_proba(x)
    predicted = model.classes_[probabilities.argmax(1)]
    confidence = probabilities.max(1)
    counts = np.array([(predicted == c).sum() for c in model.classes_])
    statistic, p_value = stats.chisquare(counts, frequencies * len(x))
    report = {
        "n": len(x),
        "class_histogram": {str(c): int(k) for c, k in zip(model.classes_, counts, strict=True)},
        "chi_square": {
            "statistic": float(statistic),
            "degrees_of_freedom": len(counts) - 1,
            "p_value": float(p_value),
            "distance": float(statistic) / len(x),
        },
        "confidence": {
            "mean": float(confidence.mean()),
            "standard_error": float(confidence.std(ddof=min(1, len(x) - 1)) / np.sqrt(len(x))),
            "quantiles": {str(q): float(np.quantile(confidence, q)) for q in QUANTILES},
            "below_half": float((confidence < 0.5).mean()),
        },
    }
    return report, predicted
