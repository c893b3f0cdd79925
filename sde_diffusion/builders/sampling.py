"""The samplers of a config: predictors, correctors, grids of times, and solvers of the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from sde_diffusion.builders.evaluation import reverse_variance
from sde_diffusion.builders.model import sde
from sde_diffusion.builders.shared import block_errors, named, options
from sde_diffusion.config import UsageError
from sde_diffusion.correctors import AnnealedLangevin, Corrector, Langevin
from sde_diffusion.devices import choose_precision
from sde_diffusion.errors import unknown_name
from sde_diffusion.ode import DormandPrince, Heun, Solver
from sde_diffusion.ode_sampling import sample_ode
from sde_diffusion.predictors import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LearnedVariance,
    Predictor,
    ReverseDiffusion,
)
from sde_diffusion.sampling import ORDERS, SampleOutput, sample
from sde_diffusion.score import Score, ScoreModel
from sde_diffusion.sdes import SDE
from sde_diffusion.times import explicit_times, karras_times, log_snr_times, quadratic_times, uniform_times

__all__ = [
    "GRIDS",
    "ODESampler",
    "PCSampler",
    "correctors",
    "predictor",
    "sampler",
    "sampling_precision",
    "solver",
    "times",
]


def _listed(sde: SDE, n: int, t_end: float | None = None, times: tuple[float, ...] | None = None) -> Tensor:
    """The times of ``sampling.times``, whose number is one more than that of the steps."""
    if times is None:
        raise ValueError("the grid 'list' needs its times, such as sampling.times=(1.0,0.5,0.1,0.001)")
    if t_end is not None:
        raise ValueError(f"the grid 'list' ends with its last time: leave out t_end={t_end!r}")
    return explicit_times(sde, times)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_times,
    "quadratic": quadratic_times,
    "log_snr": log_snr_times,
    "karras": karras_times,
    "list": _listed,
}
_GRID_OPTIONS = {"rho": "rho", "times": "times"}


def predictor(config: ConfigDict, model: ScoreModel | None = None) -> Predictor:
    """The predictor of the predictor-corrector sampler; ``model`` is needed to run one with learned variances."""
    block = config.sampling

    def learned() -> Predictor:
        if not config.model.learned_variance:
            raise ValueError("predictor 'learned_variance' needs a model with model.learned_variance=True")
        return LearnedVariance(reverse_variance(config, model))

    table: dict[str, Callable[[], Predictor]] = {
        "reverse_diffusion": ReverseDiffusion,
        "euler_maruyama": EulerMaruyama,
        "ancestral": lambda: Ancestral(block.ancestral_variance),
        "learned_variance": learned,
        "ddim": lambda: DDIM(block.eta),
    }
    make = named("sampling.predictor", block.predictor, table)
    with block_errors("sampling"):
        return make()


def correctors(config: ConfigDict) -> tuple[Corrector, ...]:
    """The correctors of the predictor-corrector sampler: one or none."""
    block = config.sampling
    table: dict[str, Callable[[], tuple[Corrector, ...]]] = {
        "none": lambda: (),
        "langevin": lambda: (Langevin(block.snr, block.corrector_steps),),
        "annealed_langevin": lambda: (AnnealedLangevin(block.snr, block.corrector_steps),),
    }
    make = named("sampling.corrector", block.corrector, table)
    with block_errors("sampling"):
        return make()


def sampling_precision(config: ConfigDict, device: torch.device) -> torch.dtype:
    """The precision of the network in sampling."""
    with block_errors("sampling"):
        return choose_precision(config.sampling.precision, device)


def times(config: ConfigDict, steps: int, model: ScoreModel | None = None) -> Tensor:
    """The grid of times with so many steps, of the model's process, or without a model of the config's."""
    block = config.sampling
    chosen = options(config, "sampling.grid", GRIDS, _GRID_OPTIONS)
    process = sde(config) if model is None else model.sde
    with block_errors("sampling"):
        return GRIDS[block.grid](process, steps, t_end=block.t_end, **chosen)


@dataclass(frozen=True)
class PCSampler:
    """:func:`~sde_diffusion.sampling.sample` with its settings."""

    predictor: Predictor
    correctors: Sequence[Corrector]
    times: Tensor
    order: str
    denoise: bool

    def __call__(self, sde: SDE, score: Score, shape: Sequence[int], **where: Any) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ..."""
        return sample(
            sde,
            score,
            shape,
            predictor=self.predictor,
            correctors=self.correctors,
            times=self.times,
            order=self.order,
            denoise=self.denoise,
            **where,
        )


@dataclass(frozen=True)
class ODESampler:
    """:func:`~sde_diffusion.ode_sampling.sample_ode` with its settings."""

    solver: Solver
    t_end: float | None
    denoise: bool

    def __call__(
        self, sde: SDE, score: Score, shape: Sequence[int], *, progress: bool = False, **where: Any
    ) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ... There is no progress to show."""
        return sample_ode(
            sde, score, shape, solver=self.solver, t_end=self.t_end, denoise=self.denoise, **where
        )


def solver(config: ConfigDict, model: ScoreModel | None = None) -> Solver:
    """The solver of the probability-flow ODE for sampling; ``model`` as in :func:`sampler`."""
    block = config.sampling
    table: dict[str, Callable[[], Solver]] = {
        "dopri5": lambda: DormandPrince(rtol=block.rtol, atol=block.atol),
        "heun": lambda: Heun(times(config, block.ode_steps, model)),
    }
    make = named("sampling.solver", block.solver, table)
    with block_errors("sampling"):
        return make()


def sampler(
    config: ConfigDict, key: str = "sampling.method", model: ScoreModel | None = None
) -> PCSampler | ODESampler:
    """The sampler of the method, ``pc`` or ``ode``, that the config has under a key.

    ``model`` is needed to run a predictor with learned variances, and for the process of an imported model.
    """
    block = config.sampling
    if block.order not in ORDERS:
        raise UsageError(str(unknown_name("sampling.order", block.order, ORDERS)))

    def ode() -> ODESampler:
        chosen = solver(config, model)
        if not isinstance(chosen, Heun):
            return ODESampler(chosen, block.t_end, block.denoise)
        process = sde(config) if model is None else model.sde
        if float(chosen.times[0]) != process.t_max:
            raise UsageError(
                f"config.sampling.times must begin at t_max = {process.t_max} for the solver {block.solver!r}, "
                f"got {float(chosen.times[0])}"
            )
        return ODESampler(chosen, float(chosen.times[-1]), block.denoise)

    table: dict[str, Callable[[], PCSampler | ODESampler]] = {
        "pc": lambda: PCSampler(
            predictor(config, model),
            correctors(config),
            times(config, block.steps, model),
            block.order,
            block.denoise,
        ),
        "ode": ode,
    }
    return named(key, config[key], table)()
