"""The samplers of a config: predictors, correctors, grids of times, and solvers of the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from sde_diffusion.builders.evaluation import reverse_variance
from sde_diffusion.builders.model import SDES, sde
from sde_diffusion.builders.shared import accepted, block_errors, named, options, positive
from sde_diffusion.config import UsageError
from sde_diffusion.correctors import CORRECTORS, SNR, Corrector
from sde_diffusion.errors import unknown_name
from sde_diffusion.ode import (
    TORCHDIFFEQ_ADAPTIVE,
    TORCHDIFFEQ_FIXED,
    DormandPrince,
    Heun,
    Solver,
    TorchDiffEq,
)
from sde_diffusion.ode_sampling import sample_ode
from sde_diffusion.optimal_times import optimal_times
from sde_diffusion.predictors import (
    DDIM,
    DEIS,
    IPNDM,
    RK4,
    AdaptiveSDE,
    Ancestral,
    DPMSolverPP,
    EDMHeun,
    EulerMaruyama,
    FlowSolver,
    LearnedVariance,
    Predictor,
    Restart,
    RestartInterval,
    ReverseDiffusion,
    SASolver,
    SDEDPMSolverPP,
    TorchSDE,
    UniPC,
    is_stochastic,
)
from sde_diffusion.sampling import ORDERS, SampleOutput, sample
from sde_diffusion.score import Score, ScoreModel
from sde_diffusion.sdes import EDM, SDE
from sde_diffusion.thresholding import Thresholded
from sde_diffusion.times import explicit_times, karras_times, log_snr_times, quadratic_times, uniform_times
from sde_diffusion.transfer import transfer

__all__ = [
    "GRIDS",
    "PREDICTORS",
    "ODESampler",
    "PCSampler",
    "correctors",
    "predictor",
    "sampler",
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
    # The first guess of a grid that is made for the model, in ``PCSampler.calibrated``.
    "optimal": log_snr_times,
}
_GRID_OPTIONS = {"rho": "rho", "times": "times"}


def _learned() -> Predictor:
    raise AssertionError("made by predictor(), which knows the model")


def _flow() -> Predictor:
    raise AssertionError("made by predictor(), which knows the solver")


def _restart(restart: tuple[float, ...] | None = None) -> Predictor:
    if restart is None:
        return Restart()
    if len(restart) != 4:
        raise ValueError(f"restart must be (low, high, iterations, steps), got {restart!r}")
    low, high, iterations, steps = restart
    return Restart(intervals=(RestartInterval(low, high, int(iterations), int(steps)),))


PREDICTORS: dict[str, Callable[..., Predictor]] = {
    "reverse_diffusion": ReverseDiffusion,
    "euler_maruyama": EulerMaruyama,
    "ancestral": Ancestral,
    "learned_variance": _learned,
    "ddim": DDIM,
    "edm_heun": EDMHeun,
    "rk4": RK4,
    "dpm_solver++": DPMSolverPP,
    "unipc": UniPC,
    "deis": DEIS,
    "ipndm": IPNDM,
    "flow": _flow,
    "sde_dpm_solver++": SDEDPMSolverPP,
    "sa_solver": SASolver,
    "adaptive_sde": AdaptiveSDE,
    "restart": _restart,
    "torchsde": TorchSDE,
}
_PREDICTOR_OPTIONS = {
    "variance": "ancestral_variance",
    "eta": "eta",
    "stochasticity": "stochasticity",
    "order": "solver_order",
    "method": "solver_method",
    "variant": "variant",
    "variable": "variable",
    "lower_order_final": "lower_order_final",
    "churn": "churn",
    "s_min": "s_min",
    "s_max": "s_max",
    "s_noise": "s_noise",
    "rtol": "sde_rtol",
    "atol": "sde_atol",
    "adaptive": "adaptive",
    "restart": "restart",
}


def predictor(config: ConfigDict, model: ScoreModel | None = None) -> Predictor:
    """The predictor of the predictor-corrector sampler; ``model`` is needed to run one with learned variances."""
    chosen = options(config, "sampling.predictor", PREDICTORS, _PREDICTOR_OPTIONS)
    name = config.sampling.predictor
    with block_errors("sampling"):
        if name == "learned_variance":
            if not config.model.learned_variance:
                raise ValueError(
                    "predictor 'learned_variance' needs a model with model.learned_variance=True"
                )
            return LearnedVariance(reverse_variance(config, model))
        if name == "flow":
            way = solver(config, model)
            if isinstance(way, Heun):
                raise ValueError(
                    "predictor 'flow' goes from time to time by an adaptive solver or one of fixed step size; "
                    "for Heun's method use predictor 'edm_heun'"
                )
            return FlowSolver(way)
        return PREDICTORS[name](**chosen)


def correctors(config: ConfigDict) -> tuple[Corrector, ...]:
    """The correctors of the predictor-corrector sampler: one or none."""
    block = config.sampling
    if block.corrector == "none":
        return ()
    make = named("sampling.corrector", block.corrector, {**CORRECTORS, "none": None})
    assert make is not None
    with block_errors("sampling"):
        SNR(block.snr)  # says what is wrong
        # By Song's rule a step for a score that is all noise has the size 2 snr^2 variance: so it has for all names.
        return (make(2 * block.snr**2, block.corrector_steps),)


def process(config: ConfigDict, model: ScoreModel | None = None) -> SDE:
    """The process that is sampled: that of ``sampling.sde``, else the model's, or without a model the config's."""
    own = sde(config) if model is None else model.sde
    name = config.sampling.sde
    if name is None:
        return own
    make = named("sampling.sde", name, SAMPLED)
    with block_errors("sampling"):
        return make(**{k: v for k, v in accepted(make, config.sde).items() if k not in ("t_min", "t_max")})


SAMPLED: dict[str, Callable[..., SDE]] = {k: v for k, v in SDES.items() if k != "learned"} | {"edm": EDM}


def times(config: ConfigDict, steps: int, model: ScoreModel | None = None) -> Tensor:
    """The grid of times with so many steps, of the process that is sampled."""
    block = config.sampling
    chosen = options(config, "sampling.grid", GRIDS, _GRID_OPTIONS)
    sampled, t_end = process(config, model), block.t_end
    with block_errors("sampling"):
        if block.sde is not None and t_end is None and block.grid != "list":
            # A grid ends at the smallest noise that the model was trained for.
            trained = sde(config) if model is None else model.sde
            with torch.no_grad():
                t_end = float(sampled.time_of_log_snr(trained.log_snr(trained.t_min)))
            t_end = max(t_end, 0.0) if float(sampled.variance(t_end)) > 0 else None
        return GRIDS[block.grid](sampled, steps, t_end=t_end, **chosen)


@dataclass(frozen=True)
class ScoreChanges:
    """What is done to a score before it is sampled: thresholds on the expected data, another process."""

    process: SDE | None = None
    threshold: str = "none"
    bound: float = 1.0
    quantile: float = 0.995

    def __call__(self, sde: SDE, score: Score) -> tuple[SDE, Score]:
        """The process and score to sample."""
        if self.threshold != "none":
            score = Thresholded(score, sde, self.threshold, self.bound, self.quantile)
        if self.process is None:
            return sde, score
        return self.process, transfer(score, sde, self.process)


def _score_changes(config: ConfigDict) -> ScoreChanges:
    block = config.sampling
    other = None if block.sde is None else process(config)
    with block_errors("sampling"):
        if block.threshold != "none":  # says what is wrong with it
            Thresholded(
                lambda x, t: x, sde(config), block.threshold, block.threshold_bound, block.threshold_quantile
            )
        return ScoreChanges(other, block.threshold, block.threshold_bound, block.threshold_quantile)


@dataclass(frozen=True)
class PCSampler:
    """:func:`~sde_diffusion.sampling.sample` with its settings.

    With ``optimal`` the times are those of a standard grid until :meth:`calibrated` makes better ones.
    """

    predictor: Predictor
    correctors: Sequence[Corrector]
    times: Tensor
    order: str
    denoise: bool
    changes: ScoreChanges = ScoreChanges()
    optimal: bool = False
    compile: bool = False

    def calibrated(self, sde: SDE, score: Score, shape: Sequence[int], **where: Any) -> PCSampler:
        """Itself, with a grid made for this score where one is wanted; ``shape`` is that of the calibration batch."""
        if not self.optimal:
            return self
        sde, score = self.changes(sde, score)
        found = optimal_times(
            sde,
            score,
            len(self.times) - 1,
            shape,
            predictor=self.predictor,
            t_end=float(self.times[-1]),
            **where,
        )
        return replace(self, times=found.times, optimal=False)

    def __call__(self, sde: SDE, score: Score, shape: Sequence[int], **where: Any) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ..."""
        sde, score = self.changes(sde, score)
        return sample(
            sde,
            score,
            shape,
            predictor=self.predictor,
            correctors=self.correctors,
            times=self.times,
            order=self.order,
            denoise=self.denoise,
            compile=self.compile,
            **where,
        )


@dataclass(frozen=True)
class ODESampler:
    """:func:`~sde_diffusion.ode_sampling.sample_ode` with its settings."""

    solver: Solver
    t_end: float | None
    denoise: bool
    changes: ScoreChanges = ScoreChanges()

    def calibrated(self, sde: SDE, score: Score, shape: Sequence[int], **where: Any) -> ODESampler:
        """Itself: its solver needs no grid made for the score."""
        return self

    def __call__(
        self, sde: SDE, score: Score, shape: Sequence[int], *, progress: bool = False, **where: Any
    ) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ... There is no progress to show."""
        sde, score = self.changes(sde, score)
        return sample_ode(
            sde, score, shape, solver=self.solver, t_end=self.t_end, denoise=self.denoise, **where
        )


def solver(config: ConfigDict, model: ScoreModel | None = None) -> Solver:
    """The solver of the probability-flow ODE for sampling; ``model`` as in :func:`sampler`."""
    block = config.sampling
    with block_errors("sampling"):
        if block.solver == "dopri5":
            return DormandPrince(rtol=block.rtol, atol=block.atol)
        if block.solver == "heun":
            return Heun(times(config, block.ode_steps, model))
        method = block.solver.removeprefix("torchdiffeq_")
        if method in TORCHDIFFEQ_ADAPTIVE:
            return TorchDiffEq(method, block.rtol, block.atol)
        if method in TORCHDIFFEQ_FIXED:
            sampled = process(config, model)
            end = sampled.t_min if block.t_end is None else block.t_end
            return TorchDiffEq(
                method, step_size=(sampled.t_max - end) / positive(config, "sampling.ode_steps")
            )
    known = ("dopri5", "heun", "torchdiffeq_dopri5", *TORCHDIFFEQ_ADAPTIVE[1:], *TORCHDIFFEQ_FIXED)
    raise UsageError(str(unknown_name("sampling.solver", block.solver, known)))


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
            return ODESampler(chosen, block.t_end, block.denoise, _score_changes(config))
        if block.grid == "optimal":
            raise UsageError("config.sampling.grid 'optimal' is for sampling.method 'pc'")
        t_max = process(config, model).t_max
        if float(chosen.times[0]) != t_max:
            raise UsageError(
                f"config.sampling.times must begin at t_max = {t_max} for the solver {block.solver!r}, "
                f"got {float(chosen.times[0])}"
            )
        return ODESampler(chosen, float(chosen.times[-1]), block.denoise, _score_changes(config))

    def pc() -> PCSampler:
        way = predictor(config, model)
        optimal = block.grid == "optimal"
        if optimal and is_stochastic(way):
            raise UsageError(
                f"config.sampling.grid 'optimal' is for predictors without noise, such as 'dpm_solver++', not "
                f"{block.predictor!r}"
            )
        grid = times(config, block.steps, model)
        return PCSampler(
            way,
            correctors(config),
            grid,
            block.order,
            block.denoise,
            _score_changes(config),
            optimal,
            block.compile,
        )

    table: dict[str, Callable[[], PCSampler | ODESampler]] = {"pc": pc, "ode": ode}
    return named(key, config[key], table)()
