"""Grids of times for samplers: from ``t_max`` down to ``t_end``, (n + 1,) float64 for n steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sde_diffusion.sdes import SDE


def _ends(sde: SDE, n: int, t_end: float | None) -> float:
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"a grid needs an integer number of steps n >= 1, got {n!r}")
    end = sde.t_min if t_end is None else float(t_end)
    if not 0 <= end < sde.t_max:
        raise ValueError(f"a grid must end between 0 and t_max = {sde.t_max}, got t_end = {end}")
    return end


def uniform_times(sde: SDE, n: int, t_end: float | None = None) -> Tensor:
    """``n`` steps of equal length from ``t_max`` to ``t_end`` (default: the SDE's ``t_min``)."""
    return torch.linspace(sde.t_max, _ends(sde, n, t_end), n + 1, dtype=torch.float64)


def quadratic_times(sde: SDE, n: int, t_end: float | None = None) -> Tensor:
    """``n`` steps whose square roots of t are equally spaced: finer near the data (Song et al. 2020, DDIM,
    appendix D.2)."""
    end = _ends(sde, n, t_end)
    times = torch.linspace(sde.t_max**0.5, end**0.5, n + 1, dtype=torch.float64).square()
    times[0], times[-1] = sde.t_max, end  # the square of a root may round to beyond the schedule
    return times


@torch.no_grad()
def log_snr_times(sde: SDE, n: int, t_end: float | None = None) -> Tensor:
    """``n`` steps of equal change in log-SNR (Lu et al. 2022, DPM-Solver, section 3.3)."""
    end = _ends(sde, n, t_end)
    if end == 0 and not bool(torch.isfinite(sde.log_snr(0.0))):
        raise ValueError("the log-SNR is infinite at t = 0; choose t_end > 0")
    log_snr = torch.linspace(
        float(sde.log_snr(sde.t_max)), float(sde.log_snr(end)), n + 1, dtype=torch.float64
    )
    times = sde.time_of_log_snr(log_snr)
    times[0], times[-1] = sde.t_max, end
    return times


@torch.no_grad()
def karras_times(sde: SDE, n: int, rho: float = 7.0, t_end: float | None = None) -> Tensor:
    """``n`` steps of equal length in ``(sigma / alpha)^(1 / rho)``, from ``t_max`` to ``t_end`` (Karras et al. 2022,
    eq. 5).

    Their grid is over the noise levels of ``x / alpha``, ``sigma / alpha``, and is mapped back to the times of the
    SDE. They have a last step from ``sigma_min`` to the data, which here is the sampler's ``denoise``: their N steps
    are ``karras_times(sde, N - 1)`` with it.

    Args:
        sde: the forward process.
        n: the number of steps.
        rho: 1 for equal steps in ``sigma / alpha``; the larger, the more steps near the data. Without end it is the
            log-SNR grid.
        t_end: the last time; default the SDE's ``t_min``.
    """
    end = _ends(sde, n, t_end)
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, got {rho!r}")
    ends = torch.tensor([sde.t_max, end], dtype=torch.float64)
    first, last = (sde.sigma(ends) / sde.alpha(ends)).log()
    steps = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    # (first^(1/rho) + u (last^(1/rho) - first^(1/rho)))^rho; at t = 0 there may be no noise, last = 0.
    log_level = first + rho * torch.log1p(steps * torch.expm1((last - first) / rho))
    times = sde.time_of_log_snr(-2 * log_level)
    times[0], times[-1] = sde.t_max, end
    return times


def explicit_times(sde: SDE, values: Sequence[float] | Tensor) -> Tensor:
    """A grid that is given time by time, from noise to data; it may begin after ``t_max`` and end anywhere.

    Raises:
        ValueError: fewer than two times, or times that do not fall strictly within [0, t_max].
    """
    return check_times(sde, torch.as_tensor(values, dtype=torch.float64))


def check_times(sde: SDE, times: Tensor) -> Tensor:
    """``times`` as float64, once it is sure that they fall strictly and lie in [0, t_max]."""
    times = torch.as_tensor(times).double()
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"a time grid must be a vector of at least 2 times, got shape {tuple(times.shape)}")
    if not bool((times.diff() < 0).all()):
        raise ValueError("a time grid must fall strictly, from noise to data")
    if not float(times[-1]) >= 0 or not float(times[0]) <= sde.t_max:
        raise ValueError(f"times must lie in [0, {sde.t_max}], got {float(times[-1])} to {float(times[0])}")
    return times
