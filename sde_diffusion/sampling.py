"""The one sampling loop: a predictor along a grid of times, with correctors in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sde_diffusion.correctors import Corrector, Report, start_chain
from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource, SampleNoise
from sde_diffusion.predictors import Predictor, is_stochastic, start_run
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.times import check_times, uniform_times

ORDERS = ("corrector-first", "predictor-first")


@dataclass
class CountedScore:
    """A score that counts its evaluations: NFE is counted where it happens."""

    score: Score
    evaluations: int = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, one evaluation more."""
        self.evaluations += 1
        return self.score(x, t)

    @property
    def log_prob(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The score's own energy, if it has one; it is asked where the score is, and not counted."""
        return getattr(self.score, "log_prob", None)


@dataclass(frozen=True)
class SampleOutput:
    """The result of a sampler.

    Attributes:
        x: the samples, (B, *D).
        nfe: network evaluations per sample.
        trajectory: the state at every time of the grid, (n + 1, B, *D), where asked for.
        reports: for each corrector what each of its steps did, in order, where asked for.
    """

    x: Tensor
    nfe: int
    trajectory: Tensor | None = field(default=None, repr=False)
    reports: tuple[list[Report], ...] = field(default=(), repr=False)


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape (B, *D) of positive integers, or a clear error."""
    shape = tuple(shape)
    if len(shape) < 2 or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"a shape must be (batch, *data) with positive integers, got {shape}")
    return shape


def check_dtype(dtype: torch.dtype) -> None:
    """A clear error for a state in less than single precision."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the state must be float32 or float64, got {dtype}")


def device_of(score: Score) -> torch.device:
    """The device of a score's parameters, where it is a module that has any; otherwise the CPU."""
    parameters = score.parameters() if isinstance(score, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


# Without gradients, but not in inference mode: a score may differentiate inside (guidance by a classifier or by a
# measurement), and what is sampled may be given to a likelihood or a loss, which inference tensors refuse. Who has a
# plain network can call it within ``torch.inference_mode()``: everything here works there, SDEs' derivatives too.
@torch.no_grad()
def sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    predictor: Predictor,
    correctors: Sequence[Corrector] = (),
    times: Tensor | None = None,
    seed: int = 0,
    first_index: int = 0,
    noise: NoiseSource | None = None,
    x_init: Tensor | None = None,
    order: str = "corrector-first",
    denoise: bool = True,
    trajectory: bool = False,
    reports: bool = False,
    progress: bool = False,
    compile: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SampleOutput:
    """Predictor-corrector samples from the reverse process (Song et al. 2021, algorithm 1).

    Starts from ``N(0, sigma(t_max)^2 I)``, and goes along ``times``. At every time ``t``,
    ``"corrector-first"`` (the order of the authors' code, the default) applies the correctors at ``t`` and
    then the predictor from ``t`` to ``s``; ``"predictor-first"`` (the order of their algorithm 1) predicts
    first and corrects at ``s``. Last, the noise left at the end of the grid is removed by the posterior
    mean of the data (``denoise``, one evaluation more).

    Sample ``i`` of a seed depends on ``(seed, first_index + i)`` and nothing else: not on the batch size or
    the device.

    Args:
        sde: the forward process.
        score: ``(x, t) -> grad log p_t(x)``; a network or analytic.
        shape: (B, *D).
        predictor: the step between two times.
        correctors: applied in order, each ``corrector.steps`` times.
        times: falling times, (n + 1,) for n steps; default ``uniform_times(sde, 1000)``.
        seed: of the noise.
        first_index: the index of the first sample, to draw a large set in batches.
        noise: a source of standard normal draws instead of the seed. Order of consumption: the initial
            state (unless ``x_init`` is given), then within each step one draw for each corrector step (those
            that need more take it after their first) and one for the predictor if it is stochastic, in the order
            they run.
        x_init: the initial state at ``times[0]`` instead of the prior.
        order: ``"corrector-first"`` or ``"predictor-first"``.
        denoise: whether to end with the posterior mean of the data, where the grid ends with noise.
        trajectory: whether to keep the state at every time.
        reports: whether the correctors report on every step: its size, acceptance, signal-to-noise ratio.
        progress: whether to show a progress bar.
        compile: whether to compile the score by ``torch.compile``. What else is in a step are a few sums, whose
            coefficients change from step to step, and no gain. A compiled module keeps what was compiled.
        dtype: of the state; float32 or float64.
        device: of the state; default that of the score's parameters if it is a module, otherwise the CPU.

    Returns:
        The samples and the number of score evaluations per sample.

    Raises:
        ValueError: a shape, grid, order or seed that makes no sense.
    """
    shape = check_shape(shape)
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    check_dtype(dtype)
    device = device_of(score) if device is None else device
    grid = check_times(sde, uniform_times(sde, 1000) if times is None else times).to(device)
    if noise is None:
        rows = range(first_index, first_index + shape[0])
        noise = SampleNoise(seed, rows, shape[1:], dtype=dtype, device=device).normal
    source = noise

    def draw() -> Tensor:
        z = source()
        if tuple(z.shape) != shape:
            # Broadcast, it would give the samples of a batch the same noise.
            raise ValueError(f"the noise must have shape {shape}, got {tuple(z.shape)}")
        return z.to(device=device, dtype=dtype)

    if x_init is None:
        x = sde.sigma(grid[0]).to(dtype) * draw()
    else:
        if tuple(x_init.shape) != shape:
            raise ValueError(f"x_init must have shape {shape}, got {tuple(x_init.shape)}")
        x = x_init.to(device=device, dtype=dtype)
    counted = CountedScore(torch.compile(score) if compile else score)
    states = [x] if trajectory else []
    records: tuple[list[Report], ...] = tuple([] for _ in correctors)
    chains = [
        start_chain(corrector, sde, draw, record.append if reports else None)
        for corrector, record in zip(correctors, records, strict=True)
    ]

    def correct(x: Tensor, t: Tensor) -> Tensor:
        for chain in chains:
            for _ in range(chain.steps):
                x = chain.step(sde, counted, x, t, draw())
        return x

    stepper = start_run(predictor, sde, grid, draw)
    # For a deterministic predictor nothing is drawn: noise costs more than its step does.
    still = None if is_stochastic(predictor) else x.new_zeros(()).expand(shape)
    steps = list(itertools.pairwise(grid.unbind()))
    for t, s in tqdm(steps, desc="sampling", disable=not progress, leave=False):
        if order == "corrector-first":
            x = correct(x, t)
        x = stepper.step(sde, counted, x, t, s, draw() if still is None else still)
        if order == "predictor-first":
            x = correct(x, s)
        if trajectory:
            states.append(x)
    if denoise and float(sde.variance(grid[-1])) > 0:
        x = sde.posterior_mean(x, counted(x, grid[-1]), grid[-1])
    states_kept = torch.stack(states) if trajectory else None
    return SampleOutput(x, counted.evaluations, states_kept, records if reports else ())
