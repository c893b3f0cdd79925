"""What a corrector does alone: chains started in p_t itself, their drift, and how fast they forget."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.arrays import Array
from sde_diffusion.compare.targets import Target
from sde_diffusion.correctors import Report, corrector_named


def autocorrelation(values: Array) -> Array:
    """The autocorrelation at lags 0, 1, .. of chains (steps, n) that begin in equilibrium: over all chains
    and starts.

    ``sum (v_s - m)(v_{s+l} - m) / sum (v - m)^2`` with the mean over everything.
    """
    centred = values - values.mean()
    variance = (centred**2).mean()
    lags = len(values) // 2
    return np.array([(centred[: len(values) - lag] * centred[lag:]).mean() / variance for lag in range(lags)])


def effective_share(values: Array) -> float:
    """Effective samples per step of a chain: ``1 / (1 + 2 sum_l rho_l)``, summed while pairs of neighbouring lags are
    positive (Geyer 1992)."""
    rho = autocorrelation(values)
    total, lag = 1.0, 1
    while lag + 1 < len(rho) and rho[lag] + rho[lag + 1] > 0:
        total += 2 * (rho[lag] + rho[lag + 1])
        lag += 2
    return float(1 / max(total, 1e-9))


def stationarity(
    target: Target,
    corrector: str,
    ratio: float,
    *,
    t: float = 0.2,
    n: int = 1000,
    steps: int = 60,
    seed: int = 0,
) -> dict[str, Any]:
    """A chain from exact samples of ``p_t``: how far ``E log p_t(x)`` and ``E |x|^2`` drift, in standard errors.

    For a chain without bias the drift is 0 within error. Both are averages of ``n`` independent chains against their
    own beginnings, so that most of the chance cancels.

    Returns:
        For JSON: ``drift`` of ``E log p_t`` in nats (its ``error``; ``curve`` by step), ``z`` the larger of
        both drifts in standard errors, ``effective`` samples per evaluation, ``autocorrelation`` of ``log
        p_t``, ``acceptance``.
    """
    assert target.mixture is not None
    generator = torch.Generator().manual_seed(seed)
    time = torch.tensor(t, dtype=torch.float64)

    def draw() -> Tensor:
        return torch.randn(n, *target.shape, dtype=torch.float64, generator=generator)

    x = target.sde.perturb(target.mixture.sample(n, generator), time, draw())
    record: list[Report] = []
    kernel = corrector_named(corrector, ratio)
    chain = kernel.start(target.sde, draw, record.append)
    log_prob = target.score.log_prob  # type: ignore[attr-defined]
    states, squares = [log_prob(x, time)], [x.square().sum(1)]
    for _ in range(steps):
        x = chain.step(target.sde, target.score, x, time, draw())
        states.append(log_prob(x, time))
        squares.append(x.square().sum(1))
    energies, norms = torch.stack(states).numpy(), torch.stack(squares).numpy()
    scores = []
    for values in (energies, norms):
        change = values[-(steps // 3) :].mean(0) - values[0]
        scores.append(change.mean() / (change.std(ddof=1) / np.sqrt(n)))
    late = energies[-(steps // 3) :].mean(0) - energies[0]
    accepted = [r.acceptance for r in record if r.acceptance is not None]
    each = 2 if corrector == "implicit" else 1
    return {
        "target": target.name,
        "corrector": corrector,
        "ratio": ratio,
        "t": t,
        "n": n,
        "steps": steps,
        "drift": float(late.mean()),
        "error": float(late.std(ddof=1) / np.sqrt(n)),
        "z": float(max(scores, key=abs)),
        "effective": effective_share(energies) / each,
        "curve": (energies.mean(1) - energies[0].mean()).tolist(),
        "curve_error": ((energies - energies[0]).std(1, ddof=1) / np.sqrt(n)).tolist(),
        "autocorrelation": autocorrelation(energies).tolist(),
        "acceptance": float(torch.stack(accepted).mean()) if accepted else None,
    }
