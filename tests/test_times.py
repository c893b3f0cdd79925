"""Grids of times fall from t_max to t_end, in the spacing they are named after."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, times64
from sde_diffusion.times import check_times

GRIDS = {
    "uniform": sd.uniform_times,
    "quadratic": sd.quadratic_times,
    "log_snr": sd.log_snr_times,
    "karras": lambda sde, n, t_end=None: sd.karras_times(sde, n, t_end=t_end),
}
grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


@grids
@sdes
@pytest.mark.parametrize("n", [1, 2, 10, 1000])
@pytest.mark.parametrize("t_end", [None, 1e-3])
def test_a_grid_falls_strictly_from_t_max_to_its_end(
    grid: Callable[..., Tensor], sde: sd.SDE, n: int, t_end: float | None
) -> None:
    times = grid(sde, n, t_end)
    assert times.shape == (n + 1,) and times.dtype == torch.float64
    assert float(times[0]) == sde.t_max
    assert float(times[-1]) == pytest.approx(sde.t_min if t_end is None else t_end, rel=1e-12)
    assert bool((times.diff() < 0).all())
    assert_close(check_times(sde, times), times, rtol=0, atol=0)


@sdes
def test_each_grid_is_even_in_what_it_is_named_after(sde: sd.SDE) -> None:
    assert_close(sd.uniform_times(sde, 10).diff(), torch.full((10,), (1e-5 - sde.t_max) / 10).double())
    roots = sd.quadratic_times(sde, 10).sqrt().diff()
    assert_close(roots, roots.mean().expand(10))
    log_snr = sde.log_snr(sd.log_snr_times(sde, 10)).diff()
    assert_close(log_snr, log_snr.mean().expand(10), rtol=1e-8, atol=0)


@sdes
@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("t_end", [None, 0.0])
def test_the_karras_grid_is_even_in_a_root_of_the_noise_level(
    sde: sd.SDE, rho: float, t_end: float | None
) -> None:
    times = sd.karras_times(sde, 10, rho, t_end)
    roots = ((sde.variance(times).sqrt() / sde.alpha(times)) ** (1 / rho)).diff()
    # A noise level is found again to the rounding of the bisection in t, which matters for the smallest.
    assert_close(roots, roots.mean().expand(10), rtol=1e-5, atol=0)


def test_the_karras_grid_of_edm_is_equation_5() -> None:
    """Karras et al. (2022), eq. 5 with N = 18 and the noise levels of their code, written out."""
    rho, first, last = 7, 80.0, 0.002
    steps = torch.arange(18, dtype=torch.float64) / 17
    wanted = (first ** (1 / rho) + steps * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    assert_close(sd.karras_times(sd.EDM(), 17), wanted, rtol=1e-12, atol=0)


def test_the_karras_grid_without_end_is_the_log_snr_grid() -> None:
    for sde in SDES.values():
        far = sd.karras_times(sde, 10, 1e7)
        assert_close(far, sd.log_snr_times(sde, 10), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("inf"), float("nan")])
def test_rho_is_positive(rho: float) -> None:
    with pytest.raises(ValueError, match="rho must be positive, got"):
        sd.karras_times(sd.VP(), 5, rho)


def test_an_explicit_grid_is_what_was_given() -> None:
    assert_close(sd.explicit_times(sd.VP(), [1, 0.5, 0]), times64(1.0, 0.5, 0.0), rtol=0, atol=0)
    for wrong, message in (([], "at least 2 times"), ([0.5, 1], "fall strictly"), ([2, 1], "lie in")):
        with pytest.raises(ValueError, match=message):
            sd.explicit_times(sd.VP(), wrong)


def test_the_log_snr_grid_of_ve_is_uniform() -> None:
    assert_close(sd.log_snr_times(sd.VE(), 50), sd.uniform_times(sd.VE(), 50), rtol=1e-9, atol=1e-12)


def test_a_grid_may_end_at_zero_where_the_log_snr_is_finite() -> None:
    for sde in SDES.values():
        assert float(sd.uniform_times(sde, 5, 0)[-1]) == 0 and float(sd.quadratic_times(sde, 5, 0)[-1]) == 0
    assert float(sd.log_snr_times(sd.VE(), 5, 0)[-1]) == 0
    with pytest.raises(ValueError, match="log-SNR is infinite at t = 0; choose t_end > 0"):
        sd.log_snr_times(sd.VP(), 5, 0)


@grids
@pytest.mark.parametrize("n", [0, -1, 2.0, "5"])
def test_a_grid_needs_steps(grid: Callable[..., Tensor], n: object) -> None:
    with pytest.raises(ValueError, match="a grid needs an integer number of steps n >= 1, got"):
        grid(sd.VP(), n)


@grids
@pytest.mark.parametrize("t_end", [-0.1, 1.0, 2.0, float("nan")])
def test_a_grid_ends_before_t_max(grid: Callable[..., Tensor], t_end: float) -> None:
    with pytest.raises(ValueError, match=f"end between 0 and t_max = 1.0, got t_end = {t_end}"):
        grid(sd.VP(), 4, t_end)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (times64(0.1, 0.5), "must fall strictly, from noise to data"),
        (times64(0.5, 0.5, 0.1), "must fall strictly"),
        (times64(1.0, float("nan"), 0.1), "must fall strictly"),
        (times64(1.5, 0.5), r"times must lie in \[0, 1.0\], got 0.5 to 1.5"),
        (times64(1.0, -0.5), r"times must lie in \[0, 1.0\], got -0.5 to 1.0"),
        (times64(1.0), r"vector of at least 2 times, got shape \(1,\)"),
        (torch.ones(2, 2), r"got shape \(2, 2\)"),
    ],
)
def test_what_is_no_grid_is_refused(times: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_times(sd.VP(), times)


def test_a_grid_may_be_a_list() -> None:
    assert_close(check_times(sd.VP(), [1.0, 0.5, 0.25]), times64(1.0, 0.5, 0.25))
