"""A score for another forward process than the one it was trained for.

At equal log-SNR the noisy data of two linear SDEs are the same up to scale, ``x' / alpha' = x / alpha``, so that a
score for one is a score for the other:

    grad log p'_{t'}(x') = (alpha / alpha') score(alpha x' / alpha', t),        log_snr(t) = log_snr'(t')

(Song et al. 2021, appendix B; Kingma et al. 2021, section 3.3; Karras et al. 2022, section 3). A network trained
under VP can be sampled on EDM's grid, the path of VE, or a cosine schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand

_ROUNDING = 1e-9


def transfer(score: Score, trained: SDE, sampled: SDE, *, strict: bool = False) -> Score:
    """The score of the process ``sampled`` from that of the process ``trained``.

    Exact wherever the log-SNR of ``sampled`` is one of ``trained`` between its ``t_min`` and ``t_max``. Beyond, the
    expected data ``D`` are those of the nearest noise level that the score knows: below the smallest noise at the
    same point, above the largest at the point scaled down to that noise.

    Args:
        score: ``(x, t) -> grad log p_t(x)`` of ``trained``.
        trained: the process of the score.
        sampled: the process wanted.
        strict: refuse noise levels that ``trained`` does not have instead.

    Returns:
        ``(x, t) -> grad log p_t(x)`` of ``sampled``.

    Raises:
        ValueError: when called with ``strict``, for a time whose log-SNR is out of range.
    """
    with torch.no_grad():
        low, high = float(trained.log_snr(trained.t_max)), float(trained.log_snr(trained.t_min))

    def transferred(x: Tensor, t: Tensor) -> Tensor:
        t = batched_time(t, x).double()
        wanted = sampled.log_snr(t)
        known = wanted.clamp(low, high)
        if strict and bool(((wanted - known).abs() > _ROUNDING * (1 + known.abs())).any()):
            raise ValueError(
                f"log-SNRs of {float(wanted.min()):g} to {float(wanted.max()):g} are asked for, but the score "
                f"was trained for {low:g} to {high:g}"
            )
        time = trained.time_of_log_snr(known)
        alpha, sigma = trained.alpha(time), trained.sigma(time)
        rho, rho_known = (-wanted / 2).exp(), (-known / 2).exp()
        y = x / expand(sampled.alpha(t), x)
        y_known = y * expand((rho_known / rho).clamp_max(1), x)
        # (D - y) of the noise level known; the second term is exactly 0 within the range.
        towards = expand(rho_known * sigma, x) * score(expand(alpha, x) * y_known, time) + (y_known - y)
        return towards / expand(sampled.alpha(t) * rho.square(), x)

    return transferred
