"""The arms of the comparison: a predictor, a corrector, how many of its steps, how large, and how many
evaluations."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.compare.targets import Target
from sde_diffusion.correctors import Corrector, corrector_named
from sde_diffusion.errors import unknown_name
from sde_diffusion.predictors import DDIM, Ancestral, DPMSolverPP, Predictor, ReverseDiffusion
from sde_diffusion.sampling import SampleOutput, sample
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.times import uniform_times

T_END = 1e-3


@dataclass(frozen=True)
class Stay:
    """The predictor of a sampler without one: the state stays as it is, up to the scale of the data's part."""

    stochastic = False

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """``x``."""
        return x


PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "none": Stay,
    "ddim": DDIM,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "dpm_solver": DPMSolverPP,
}
_COST = {"none": 0, "ddim": 1, "reverse_diffusion": 1, "ancestral": 1, "dpm_solver": 1}


@dataclass(frozen=True, order=True)
class Arm:
    """One way to sample.

    Attributes:
        target: a name of :data:`~sde_diffusion.compare.targets.TARGETS`, or the folder of a run.
        score: ``"exact"`` or ``"biased"``.
        nfe: evaluations that may be spent on a sample, the final denoising included.
        predictor: ``none``, ``ddim``, ``reverse_diffusion``, ``ancestral`` or ``dpm_solver``.
        corrector: a name of :data:`~sde_diffusion.correctors.CORRECTORS`, or ``none``.
        steps: corrector steps at each time.
        ratio: of a corrector step to the variance of the noise; 0 without a corrector.
    """

    target: str
    score: str
    nfe: int
    predictor: str
    corrector: str = "none"
    steps: int = 1
    ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in ("exact", "biased"):
            raise unknown_name("score", self.score, ("exact", "biased"))
        if self.predictor not in PREDICTORS:
            raise unknown_name("predictor", self.predictor, PREDICTORS)
        if self.predictor == "none" and self.corrector == "none":
            raise ValueError("an arm needs a predictor or a corrector, got none of either")
        self.build()
        if self.levels < 1:
            raise ValueError(f"{self.nfe} evaluations are too few for a single step of {self}")

    @property
    def kind(self) -> str:
        """``P``, ``PC`` or ``C``."""
        return "P" if self.corrector == "none" else "C" if self.predictor == "none" else "PC"

    @property
    def levels(self) -> int:
        """The steps of the grid that the evaluations are enough for."""
        each = _COST[self.predictor]
        if self.corrector != "none":
            # Chains that remember the last score ask once more after something else has moved the state. Without a
            # predictor the state stays, but the time changes.
            once_more = self.corrector in ("mala", "barker", "underdamped")
            each += self.steps * (2 if self.corrector == "implicit" else 1) + once_more
        return (self.nfe - 1) // each

    def build(self) -> tuple[Predictor, tuple[Corrector, ...]]:
        """The objects."""
        predictor = PREDICTORS[self.predictor]()
        if self.corrector == "none":
            return predictor, ()
        return predictor, (corrector_named(self.corrector, self.ratio, self.steps),)

    @staticmethod
    def digest(text: str) -> str:
        """A short name for the cache."""
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What an arm gave: samples (n, *shape), evaluations per sample, seconds, and averages of the reports."""

    x: Tensor
    nfe: int
    seconds: float
    acceptance: float | None
    snr: float | None
    displacement: float | None


def run_arm(arm: Arm, target: Target, n: int, seed: int = 0) -> Outcome:
    """Samples of an arm. Arms with equal ``n`` and ``seed`` share their initial state, and their noise as far as they
    draw alike."""
    predictor, correctors = arm.build()
    score = target.score if arm.score == "exact" else target.biased()
    times = uniform_times(target.sde, arm.levels, max(T_END, target.sde.t_min))
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if target.mixture is not None else torch.float32

    def noise() -> Tensor:
        return torch.randn(n, *target.shape, dtype=dtype, generator=generator)

    begin = time.perf_counter()
    out: SampleOutput = sample(
        target.sde,
        score,
        (n, *target.shape),
        predictor=predictor,
        correctors=correctors,
        times=times,
        noise=noise,
        dtype=dtype,
        reports=bool(correctors),
    )
    seconds = time.perf_counter() - begin
    record = out.reports[0] if out.reports else []
    return Outcome(
        out.x,
        out.nfe,
        seconds,
        _mean([r.acceptance for r in record if r.acceptance is not None]),
        _mean([r.snr for r in record]),
        _mean([r.displacement for r in record]),
    )


def _mean(values: Sequence[Tensor]) -> float | None:
    return float(torch.stack(list(values)).nanmean()) if values else None


CORRECTORS = (
    "langevin",
    "sgld",
    "psgld",
    "underdamped",
    "sghmc",
    "mala",
    "barker",
    "tamed",
    "implicit",
    "renoise",
)
RATIOS = (0.02, 0.1, 0.4)


def plan(
    targets: Sequence[str],
    evaluations: Sequence[int] = (20, 50, 200, 1000),
    *,
    correctors: Sequence[str] = CORRECTORS,
    ratios: Sequence[float] = RATIOS,
    scores: Sequence[str] = ("exact", "biased"),
) -> list[Arm]:
    """The matrix, the cheapest arms first, so that a budget that ends early has something of everything.

    With an exact score: four predictors alone; each corrector at each step size after DDIM, and at the middle
    one after reverse diffusion and with four steps a time; five correctors alone. With a biased score the
    middle step size only.
    """
    middle = ratios[len(ratios) // 2]

    def arms() -> Iterator[Arm]:
        for nfe in sorted(evaluations):
            for name in targets:
                for score in scores:
                    if score == "biased" and "/" in name:
                        continue  # a trained score has its own
                    for predictor in ("ddim", "reverse_diffusion", "ancestral", "dpm_solver"):
                        yield Arm(name, score, nfe, predictor)
                        # As many predictor steps as with a corrector step to each.
                        if score == "exact" and predictor in ("ddim", "reverse_diffusion"):
                            yield Arm(name, score, nfe // 2, predictor)
                    for corrector in correctors:
                        some = ratios if score == "exact" else (middle,)
                        for ratio in some:
                            yield Arm(name, score, nfe, "ddim", corrector, 1, ratio)
                        yield Arm(name, score, nfe, "reverse_diffusion", corrector, 1, middle)
                        if score == "exact":
                            yield Arm(name, score, nfe, "ddim", corrector, 4, middle)
                    for corrector in ("langevin", "sgld", "underdamped", "mala"):
                        if corrector in correctors:
                            for ratio in some:
                                yield Arm(name, score, nfe, "none", corrector, 1, ratio)

    return list(arms())
