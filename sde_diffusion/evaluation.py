"""What is computed of a trained model: each function writes its pictures and returns its numbers."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import metrics, pictures
from sde_diffusion.build import DataInfo
from sde_diffusion.config import UsageError
from sde_diffusion.data import DataSet, epoch_order, from_model
from sde_diffusion.data.arrays import read_arrays
from sde_diffusion.runs import Run, Samples
from sde_diffusion.workdir import Workdir

__all__ = ["baseline", "mean_and_error", "quality", "samples_section", "save_samples_picture"]

GRID = 100
"""Samples in a picture: 10 x 10."""

_LARGEST_FOR_BASELINE = 256
_LARGEST_FOR_QUALITY = 3072
# Bounds on what a report may cost: all of the digits, and a minute or so for larger sets.
_MOST_FOR_CLASSIFIER = 1500
_MOST_MULTIPLICATIONS = 2e10
_REPEATS = 10


def mean_and_error(values: Tensor) -> dict[str, Any]:
    """Mean, standard error of the mean and number of per-sample values."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": float(values.mean()), "standard_error": error, "n": len(values)}


def subset(total: int, count: int | None) -> Tensor:
    """Indices of ``total`` samples: all in their order, or ``count`` that are drawn once and for all."""
    if count is None or count >= total:
        return torch.arange(total)
    return epoch_order(total, 0, 0)[:count]


# ---------------------------------------------------------------------------------------------------- samples


def samples_section(run: Run, samples: Samples, method: str, picture: Path | None) -> dict[str, Any]:
    """The numbers of a set of samples, and how it was made."""
    x = samples.x
    section: dict[str, Any] = {
        "method": method,
        "step": run.step,
        "n": len(x),
        "seed": int(run.config.seed),
        "nfe": samples.nfe,
        "seconds": round(samples.seconds, 3),
        "mean": float(x.double().mean()),
        "std": float(x.double().std()),
        "settings": run.config.sampling.to_dict() | {"method": method},
    }
    if run.info.is_image:
        section["outside_of_range"] = float((x.abs() > 1).double().mean())
    if picture is not None:
        section["picture"] = picture.name
    return section


def save_samples_picture(run: Run, samples: Samples, path: Path) -> Path | None:
    """A 10 x 10 grid of images, or points in the plane over their density; None for other data."""
    if run.info.is_image:
        return pictures.save_image_grid(samples.x[:GRID], path, columns=10)
    if run.info.shape != (2,):
        return None
    density = run.data.density
    if density is None:
        return pictures.save_scatter_2d(samples.x, path, reference=run.data.test)
    return pictures.save_scatter_2d(
        samples.x, path, log_density=lambda x: density.log_prob(torch.from_numpy(x))
    )


def part_of(data: DataSet, part: str, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    """Chosen samples of ``test`` or ``train`` data, and their labels if they have any."""
    x, labels = (data.test, data.test_labels) if part == "test" else (data.train, data.train_labels)
    return x[chosen], None if labels is None else labels[chosen]


def given_images(path: str, info: DataInfo) -> Tensor:
    """The images of an ``.npy`` or ``.npz`` file with one array, as values (N, C, H, W) of any type; whether they are
    grey levels is not looked at.

    Raises:
        UsageError: the run is not of images; there is no such file; it holds several arrays or no numbers; the images
            are of another shape than the model's.
    """
    if not info.is_image:
        raise UsageError(f"config.likelihood.images is for models of images, and {info.name!r} has vectors")
    try:
        arrays = read_arrays(Path(path))
    except ValueError as error:
        raise UsageError(f"config.likelihood.images: {' '.join(str(error).split())}") from None
    if len(arrays) != 1:
        raise UsageError(f"config.likelihood.images: {path} must hold one array, got {sorted(arrays)}")
    array = next(iter(arrays.values()))
    if array.dtype.kind not in "iuf" or len(array) < 1:
        raise UsageError(
            f"config.likelihood.images: {path} must hold numbers, got {array.dtype} {array.shape}"
        )
    x = torch.from_numpy(array.astype("float64" if array.dtype.kind == "f" else "int64"))
    c, h, w = info.shape
    if x.ndim == 3 and c == 1:
        x = x.unsqueeze(1)
    elif x.ndim == 4 and x.shape[1:] == (h, w, c):
        x = x.permute(0, 3, 1, 2)
    if tuple(x.shape[1:]) != info.shape:
        raise UsageError(
            f"config.likelihood.images: the model is of images {info.shape}, and {path} holds {tuple(array.shape)}"
        )
    return x.contiguous()


def as_pictures(levels: Tensor, run: Run) -> Tensor:
    """Grey levels in [-1, 1] from the darkest to the brightest, as pictures take them."""
    return levels.float() / ((run.info.levels or 2) - 1) * 2 - 1


# --------------------------------------------------------------------------------------------------- baseline


def baseline(run: Run) -> dict[str, Any]:
    """Test bits/dim of the best Gaussian mixture scikit-learn fits, or why that is not computed."""
    if run.info.levels is None:
        return {"skipped": "the data are vectors"}
    dims = math.prod(run.info.shape)
    if dims > _LARGEST_FOR_BASELINE:
        return {"skipped": f"{dims} dimensions, and the baseline is for at most {_LARGEST_FOR_BASELINE}"}
    started = time.perf_counter()
    report = metrics.gaussian_mixture_baseline(
        run.data.train, run.data.test, run.info.levels, seed=run.config.seed
    )
    return {**report, "seconds": round(time.perf_counter() - started, 3)}


# ---------------------------------------------------------------------------------------------------- quality


def quality(run: Run, place: Workdir, x: Tensor, method: str, labels: Tensor | None = None) -> dict[str, Any]:
    """Samples beside held-out data: a classifier, two-sample distances, copies of training data.

    Args:
        run: the trained model.
        place: where the pictures go.
        x: the samples.
        method: how they were drawn.
        labels: what they were asked to be, for a class-conditional model.
    """
    started = time.perf_counter()
    section = _image_quality(run, place, x, labels) if run.info.is_image else _vector_quality(run, x)
    return {
        "method": method,
        "n": len(x),
        **section,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _image_quality(run: Run, place: Workdir, x: Tensor, labels: Tensor | None) -> dict[str, Any]:
    dims = math.prod(run.info.shape)
    if dims > _LARGEST_FOR_QUALITY:
        return {
            "skipped": f"{dims} dimensions, and distances between pixels mean little beyond {_LARGEST_FOR_QUALITY}"
        }
    data, seed = run.data, int(run.config.seed)
    assert run.info.levels is not None
    levels = from_model(x.cpu(), run.info.levels)
    section: dict[str, Any] = {
        "two_sample": metrics.two_sample_report(
            levels, data.test, data.train, permutations=run.config.report.permutations, seed=seed
        )
    }
    if data.train_labels is not None:
        section["classifier"] = metrics.classifier_report(
            *part_of(data, "train", subset(len(data.train), _MOST_FOR_CLASSIFIER)),
            *part_of(data, "test", subset(len(data.test), _MOST_FOR_CLASSIFIER)),
            levels,
            None if labels is None else labels.cpu(),
            seed=seed,
        )
    most = max(10, int(_MOST_MULTIPLICATIONS / (len(data.train) * dims) / 2))
    levels = levels[:most]
    test, _ = part_of(data, "test", subset(len(data.test), most))
    nearest = metrics.nearest_neighbours(levels, data.train, test)
    closest = torch.as_tensor(nearest.closest(10))
    indices = torch.as_tensor(nearest.indices)[closest]
    pictures.save_neighbours(
        as_pictures(levels[closest], run),
        as_pictures(data.train[indices], run),
        place / "nearest_training_images.png",
        distances=nearest.distances[closest.numpy()],
        title="the ten samples nearest to training images",
    )
    section["memorisation"] = nearest.summary() | {"picture": "nearest_training_images.png"}
    return section


def _vector_quality(run: Run, x: Tensor) -> dict[str, Any]:
    data, seed, x = run.data, int(run.config.seed), x.cpu()
    section: dict[str, Any] = {
        "two_sample": metrics.two_sample_report(
            x, data.test, data.train, permutations=run.config.report.permutations, seed=seed
        )
    }
    if data.density is None:
        return section
    generator = torch.Generator().manual_seed(seed)
    exact = [data.density.sample(len(x), generator) for _ in range(2 * _REPEATS)]
    between = [
        metrics.sliced_wasserstein(a, b, seed=seed) for a, b in zip(exact[::2], exact[1::2], strict=True)
    ]
    to_exact = [metrics.sliced_wasserstein(x, a, seed=seed) for a in exact[::2]]
    section["sliced_wasserstein"] = {
        "samples_vs_exact": mean_and_error(torch.tensor(to_exact)),
        "exact_vs_exact": mean_and_error(torch.tensor(between))
        | {"largest": max(between), "standard_deviation": float(torch.tensor(between).std())},
    }
    return section
