"""The arms of the comparison: a predictor, a corrector, how many of its steps, how large, and how many
evaluations."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.compare.targets import Target, target
from sde_diffusion.correctors import Chain, Corrector, Kernel, Recorder, corrector_named
from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors import DDIM, Ancestral, DPMSolverPP, Predictor, ReverseDiffusion
from sde_diffusion.sampling import SampleOutput, sample
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.times import uniform_times

T_END = 1e-3
_REPORTS = 50
"""About so many reports of a run's corrector steps are averaged."""


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
SCORES = ("exact", "biased", "minibatch")
_COST = {"none": 0, "ddim": 1, "reverse_diffusion": 1, "ancestral": 1, "dpm_solver": 1}


@dataclass(frozen=True, order=True)
class Arm:
    """One way to sample.

    Attributes:
        target: a name of :data:`~sde_diffusion.compare.targets.TARGETS`, or the folder of a run.
        score: ``"exact"``, ``"biased"`` or ``"minibatch"`` (that of a random half of the components).
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
        if self.score not in SCORES:
            raise unknown_name("score", self.score, SCORES)
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

    def build(self) -> tuple[Predictor, tuple[Kernel, ...]]:
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
class _Sparing:
    """A corrector that reports on one step of ``every``: with exact scores a report costs a fifth of a step."""

    kernel: Kernel
    every: int

    @property
    def steps(self) -> int:
        return self.kernel.steps

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.kernel.step(sde, score, x, t, noise)

    def start(self, sde: SDE, draw: NoiseSource, record: Recorder | None = None) -> Corrector:
        return Chain(self.kernel, draw, record, every=self.every)


@dataclass(frozen=True)
class Outcome:
    """What an arm gave: samples (n, *shape), evaluations per sample, seconds, and averages of the reports."""

    x: Tensor
    nfe: int
    seconds: float
    acceptance: float | None
    snr: float | None
    displacement: float | None


def run_arm(arm: Arm, chosen: Target, n: int, seed: int = 0) -> Outcome:
    """Samples of an arm. Arms with equal ``n`` and ``seed`` share their initial state, and their noise as far as they
    draw alike."""
    predictor, kernels = arm.build()
    scores: dict[str, Callable[[], Score]] = {
        "exact": lambda: chosen.score,
        "biased": chosen.biased,
        "minibatch": lambda: chosen.minibatch(n, 30_000 + seed),
    }
    every = 1 + arm.levels * arm.steps // _REPORTS
    correctors = tuple(_Sparing(kernel, every) for kernel in kernels)
    times = uniform_times(chosen.sde, arm.levels, max(T_END, chosen.sde.t_min))
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if chosen.mixture is not None else torch.float32

    def noise() -> Tensor:
        # In double precision normal numbers cost as much as an exact score.
        return torch.randn(n, *chosen.shape, generator=generator).to(dtype)

    begin = time.perf_counter()
    with torch.inference_mode():
        out: SampleOutput = sample(
            chosen.sde,
            scores[arm.score](),
            (n, *chosen.shape),
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


MINIBATCH = (("sgld", 1), ("sgld", 4), ("sgld_decaying", 4))
"""What meets the score of random components: SGLD with a constant and with a decaying step, and steps a time."""


def plan(
    targets: Sequence[str],
    evaluations: Sequence[int] = (20, 50, 200, 1000),
    *,
    correctors: Sequence[str] = CORRECTORS,
    ratios: Sequence[float] = RATIOS,
    scores: Sequence[str] = SCORES,
) -> list[Arm]:
    """The matrix, in the order in which it is worth having when time is short: in each part the cheapest first.

    1. With an exact (or trained) score what an answer needs at every number of evaluations: four predictors
       alone, each corrector after DDIM, four correctors alone, all with the middle step size; the paper's
       comparison.
    2. The other step sizes.
    3. With a biased score the same, with the middle step size.
    4. The correctors after reverse diffusion; four steps at a time after DDIM.
    5. On targets with modes to count, the score of a random half of the components.
    """
    middle = ratios[len(ratios) // 2]
    alone = [c for c in ("langevin", "sgld", "underdamped", "mala") if c in correctors]

    def arms(name: str, nfe: int) -> Iterator[tuple[int, Arm]]:
        for score in ("exact", "biased"):
            # A trained score has an error of its own.
            if score not in scores or (score == "biased" and "/" in name):
                continue
            first = 1 if score == "exact" else 3
            for predictor in ("ddim", "dpm_solver", "reverse_diffusion", "ancestral"):
                yield first, Arm(name, score, nfe, predictor)
                if score == "exact" and predictor in ("ddim", "reverse_diffusion"):
                    # As many predictor steps as with a corrector step to each.
                    yield first, Arm(name, score, nfe // 2, predictor)
            for ratio in ratios if score == "exact" else (middle,):
                part = first if ratio == middle else 2
                for corrector in correctors:
                    yield part, Arm(name, score, nfe, "ddim", corrector, 1, ratio)
                for corrector in alone:
                    yield part, Arm(name, score, nfe, "none", corrector, 1, ratio)
                if "langevin" in correctors:
                    yield part, Arm(name, score, nfe, "reverse_diffusion", "langevin", 1, ratio)
            for corrector in correctors:
                if corrector != "langevin":
                    yield 4, Arm(name, score, nfe, "reverse_diffusion", corrector, 1, middle)
                if score == "exact":
                    yield 4, Arm(name, score, nfe, "ddim", corrector, 4, middle)
        if "minibatch" in scores and "sgld" in correctors and "/" not in name and target(name).modes:
            yield 5, Arm(name, "minibatch", nfe, "ddim")
            for corrector, steps in MINIBATCH:
                for predictor in ("ddim", "none"):
                    yield 5, Arm(name, "minibatch", nfe, predictor, corrector, steps, middle)

    found = [arm for nfe in sorted(evaluations) for name in targets for arm in arms(name, nfe)]
    unique = {arm: part for part, arm in found}  # N/2 may be asked for on its own
    return sorted(unique, key=lambda arm: unique[arm])
