"""How good samples and densities are: distances, a classifier, nearest neighbours, a baseline.

Nothing here knows a network or an SDE: everything takes arrays (or tensors) and returns numbers, and what is
meant for a report is a plain dict that ``json.dump`` accepts.
"""

from sde_diffusion.metrics.baseline import gaussian_mixture_baseline
from sde_diffusion.metrics.classifier import classifier_report, image_classifier
from sde_diffusion.metrics.distances import (
    RBF,
    Distance,
    Estimate,
    Polynomial,
    energy_distance,
    median_bandwidth,
    mmd,
    permutation_test,
    sliced_wasserstein,
    two_sample_report,
)
from sde_diffusion.metrics.frechet import ClassifierFeatures, bootstrap_frechet, frechet_distance
from sde_diffusion.metrics.neighbours import NearestNeighbours, nearest_neighbours
from sde_diffusion.metrics.transport import wasserstein2

__all__ = [
    "RBF",
    "ClassifierFeatures",
    "Distance",
    "Estimate",
    "NearestNeighbours",
    "Polynomial",
    "bootstrap_frechet",
    "classifier_report",
    "energy_distance",
    "frechet_distance",
    "gaussian_mixture_baseline",
    "image_classifier",
    "median_bandwidth",
    "mmd",
    "nearest_neighbours",
    "permutation_test",
    "sliced_wasserstein",
    "two_sample_report",
    "wasserstein2",
]
