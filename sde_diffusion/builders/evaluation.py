"""How a config evaluates a model: its likelihood and its variational bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ml_collections import ConfigDict

from sde_diffusion.builders.shared import block_errors, device, named, network_precision, positive
from sde_diffusion.coordinates import Coordinates, coordinates
from sde_diffusion.dequantization import (
    Dequantization,
    Flow,
    TruncatedNormalDequantization,
    UniformDequantization,
    VariationalDequantization,
)
from sde_diffusion.divergence import Divergence, make_divergence
from sde_diffusion.likelihood import likelihood_solver
from sde_diffusion.ode import Solver
from sde_diffusion.scipy_ode import ScipyRK45
from sde_diffusion.score import ScoreModel
from sde_diffusion.variances import FixedSmall, ReverseVariance, fixed_variance

__all__ = ["BoundSettings", "LikelihoodSettings", "bound", "likelihood", "reverse_variance"]


def _no_flow() -> Flow:
    raise ValueError("dequantization 'variational' needs the run that its flow was trained for")


def _dequantization(name: str, flow: Callable[[], Flow]) -> Callable[[], Dequantization]:
    kinds: dict[str, Callable[[], Dequantization]] = {
        "uniform": UniformDequantization,
        "truncated_normal": TruncatedNormalDequantization,
        VARIATIONAL: lambda: VariationalDequantization(flow()),
    }
    return named("likelihood.dequantization", name, kinds)


VARIATIONAL = "variational"
"""The dequantization by a flow, which a run has or has not."""


@dataclass(frozen=True)
class LikelihoodSettings:
    """How likelihoods are evaluated, and of how many samples (None: all of test, as many of training)."""

    divergence: Divergence
    solver: Solver
    coordinates: Coordinates
    dequantization: Callable[[], Dequantization]
    dequantizations: int
    importance: bool
    batch_size: int
    test_images: int | None
    train_images: int | None
    tolerance: float | None
    pilot_images: int
    jobs: int


def likelihood(config: ConfigDict, flow: Callable[[], Flow] = _no_flow) -> LikelihoodSettings:
    """How likelihoods are evaluated.

    Args:
        config: the config.
        flow: loads what variational dequantization needs, when that is first used.
    """
    block = config.likelihood
    cap = positive(config, "likelihood.max_evaluations")
    solvers: dict[str, Callable[[], Solver]] = {
        "dopri5": lambda: likelihood_solver(block.rtol, block.atol, cap, "nan"),
        "scipy": lambda: ScipyRK45(block.rtol, block.atol),
    }
    make = named("likelihood.solver", block.solver, solvers)
    dequantization = _dequantization(block.dequantization, flow)
    place = device(config)
    network_precision(config, "likelihood", place)
    with block_errors("likelihood"):
        if block.jobs > 1 and place.type != "cpu":
            raise ValueError(f"jobs is for CPUs; on {place} it must be 1, got {block.jobs}")
        if block.tolerance is not None and not 0 < block.tolerance < float("inf"):
            raise ValueError(f"tolerance must be positive, got {block.tolerance!r}")
        if block.importance and block.divergence != "exact":
            # E[log mean exp] grows with noise: that of the probes would pass for probability.
            raise ValueError(
                f"importance needs divergence 'exact', got {block.divergence!r}: with random probes the result is no "
                "bound"
            )
        return LikelihoodSettings(
            make_divergence(block.divergence, block.probes, block.mode),
            make(),
            coordinates(block.coordinates),
            dequantization,
            positive(config, "likelihood.dequantizations"),
            block.importance,
            positive(config, "likelihood.batch_size"),
            None if block.test_images is None else positive(config, "likelihood.test_images"),
            None if block.train_images is None else positive(config, "likelihood.train_images", 0),
            block.tolerance,
            positive(config, "likelihood.pilot_images", 0),
            positive(config, "likelihood.jobs"),
        )


def reverse_variance(config: ConfigDict, model: ScoreModel | None) -> ReverseVariance:
    """The variance of reverse steps: the model's own, where it has learned one, else that of ``bound.variance``."""
    with block_errors("bound"):
        fixed = fixed_variance(config.bound.variance)
    if not config.model.learned_variance:
        return fixed
    # Without a model the config is only checked.
    own = getattr(model, "reverse_variance", None)
    return FixedSmall() if own is None else own()


@dataclass(frozen=True)
class BoundSettings:
    """How the variational bound is evaluated, and of how many test images (None: all)."""

    steps: int
    subset: int | None
    clip: bool
    draws: int
    paths: int
    path_steps: int
    ode: bool
    test_images: int | None
    batch_size: int


def bound(config: ConfigDict) -> BoundSettings:
    """How the variational bound is evaluated."""
    block = config.bound
    reverse_variance(config, None)
    return BoundSettings(
        positive(config, "bound.steps", 2),
        None if block.subset is None else positive(config, "bound.subset"),
        block.clip,
        positive(config, "bound.draws"),
        positive(config, "bound.paths", 0),
        positive(config, "bound.path_steps", 2),
        block.ode,
        None if block.test_images is None else positive(config, "bound.test_images"),
        positive(config, "bound.batch_size"),
    )
