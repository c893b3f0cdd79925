"""Other libraries' solvers on the same grid with the same score, for ``experiments/solvers.py``.

diffusers' schedulers run on their table of 1,000 steps of the linear chain, whose times are ours; k-diffusion's
functions run on noise levels, which are the times of our ``EDM``. Both end at the data. Each peer is used as its
users use it: a loop over ``scheduler.step``, a call of ``sample_..``. Nothing here is imported by the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd

CHAIN = sd.DDPM(sd.VP().discretize(1000), t_min=1e-3)
EDM = sd.EDM()
Network = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Peer:
    """A solver of another library, and ours for the same task.

    Attributes:
        package: the other library.
        name: of the solver.
        sde: ours.
        predictor: ours.
        evaluations: of a step.
        times: steps -> our grid, (n + 1,), that of the other.
        run: (score of our SDE, initial state, steps) -> samples by the other.
    """

    package: str
    name: str
    sde: sd.SDE
    predictor: sd.Predictor
    evaluations: int
    times: Callable[[int], Tensor]
    run: Callable[[sd.Score, Tensor, int], Tensor]


def of_diffusers() -> list[Peer]:
    """Those of diffusers."""
    try:
        import diffusers
    except ImportError:
        print("diffusers is not installed (pip install diffusers): not compared")
        return []

    def scheduler(kind: str, steps: int, options: dict[str, Any]) -> Any:
        table = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "linspace"}
        made = getattr(diffusers, kind)(**table | options)
        made.set_timesteps(steps)
        return made

    def peer(name: str, kind: str, predictor: sd.Predictor, **options: Any) -> Peer:
        def times(steps: int) -> Tensor:
            grid = (scheduler(kind, steps, options).timesteps.double() + 1) / 1000
            return torch.cat([grid, grid.new_zeros(1)])

        def run(score: sd.Score, x: Tensor, steps: int) -> Tensor:
            made = scheduler(kind, steps, options)
            for i in made.timesteps:
                t = (i.double() + 1) / 1000
                noise = -CHAIN.sigma(t).to(x.dtype) * score(x, t)
                x = made.step(noise, i, x).prev_sample
            return x

        return Peer("diffusers", name, CHAIN, predictor, 1, times, run)

    # Its DDIM steps by 1000 / n whatever the timesteps are, which fits them only where they trail.
    plain = {"set_alpha_to_one": True, "clip_sample": False, "timestep_spacing": "trailing"}
    return [
        peer("DDIM", "DDIMScheduler", sd.DDIM(), **plain),
        peer("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", sd.DPMSolverPP(2), solver_order=2),
        peer("DPM-Solver++ 3M", "DPMSolverMultistepScheduler", sd.DPMSolverPP(3), solver_order=3),
        peer("UniPC 2", "UniPCMultistepScheduler", sd.UniPC(2), solver_order=2),
        peer("UniPC 3", "UniPCMultistepScheduler", sd.UniPC(3), solver_order=3),
        peer("DEIS 3", "DEISMultistepScheduler", sd.DEIS(3), solver_order=3),
    ]


def of_k_diffusion() -> list[Peer]:
    """Those of k-diffusion."""
    try:
        from k_diffusion import sampling
    except ImportError as error:
        print(f"k-diffusion cannot be imported ({error}): not compared")
        return []

    def sigmas(steps: int) -> Tensor:
        levels: Tensor = sampling.get_sigmas_karras(steps, EDM.t_min, EDM.t_max)
        return levels

    def peer(name: str, function: str, predictor: sd.Predictor, evaluations: int = 1, **options: Any) -> Peer:
        call = getattr(sampling, function)

        def run(score: sd.Score, x: Tensor, steps: int) -> Tensor:
            def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
                return x + sigma[0] ** 2 * score(x, sigma[0])

            out: Tensor = call(denoiser, x, sigmas(steps).to(x.dtype), disable=True, **options)
            return out

        return Peer(
            "k-diffusion",
            name,
            EDM,
            predictor,
            evaluations,
            lambda n: sigmas(n).double().clamp_max(EDM.t_max),
            run,
        )

    return [
        peer("DDIM", "sample_euler", sd.DDIM()),
        peer("Heun (EDM)", "sample_heun", sd.EDMHeun(), 2),
        peer("DPM-Solver++ 2M", "sample_dpmpp_2m", sd.DPMSolverPP(2)),
        peer("SDE-DPM-Solver++ 2", "sample_dpmpp_2m_sde", sd.SDEDPMSolverPP(2)),
        peer("SDE-DPM-Solver++ 3", "sample_dpmpp_3m_sde", sd.SDEDPMSolverPP(3)),
    ]


def peers() -> list[Peer]:
    """All whose library is here."""
    return of_diffusers() + of_k_diffusion()
