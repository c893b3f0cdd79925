"""EDM's four preconditionings against the formulas of their paper, written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sde_diffusion.preconditioning import (
    Preconditioning,
    edm_preconditioning,
    iddpm_noise_levels,
    iddpm_preconditioning,
    ve_preconditioning,
    vp_preconditioning,
)

SIGMAS = torch.tensor([0.01, 0.4, 3.0, 60.0], dtype=torch.float64)


class Recorder(nn.Module):
    """Remembers what it is called with, and returns something that depends on both."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.x, self.c = x, c
        return (x + 0.1 * c[:, None]).sin()


def denoised(preconditioning: Preconditioning) -> tuple[Recorder, Tensor, Tensor, Tensor]:
    net = Recorder()
    x = torch.randn(4, 5, dtype=torch.float64) * (1 + SIGMAS[:, None])
    d = preconditioning.score(net).predict_data(x, SIGMAS)
    return net, x, d, net(net.x, net.c).double()


def column(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).expand(4)[:, None]


@pytest.mark.parametrize("data", [0.5, 1.3])
def test_edm(data: float) -> None:
    net, x, d, f = denoised(edm_preconditioning(data))
    total = SIGMAS**2 + data**2
    skip, out = data**2 / total, SIGMAS * data / total.sqrt()
    torch.testing.assert_close(d, column(skip) * x + column(out) * f, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.x.double(), x / column(total.sqrt()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net.c.double(), SIGMAS.log() / 4, rtol=1e-6, atol=1e-6)


def test_vp() -> None:
    net, x, d, f = denoised(vp_preconditioning(beta_d=25.0, beta_min=0.2, steps=500))
    torch.testing.assert_close(d, x - column(SIGMAS) * f, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(net.x.double(), x / column((SIGMAS**2 + 1).sqrt()), rtol=1e-6, atol=1e-7)
    t = ((0.2**2 + 2 * 25.0 * (1 + SIGMAS**2).log()).sqrt() - 0.2) / 25.0
    torch.testing.assert_close(net.c.double(), 499 * t, rtol=1e-5, atol=1e-6)


def test_vp_spans_the_times_of_its_training() -> None:
    sde = vp_preconditioning().sde
    for end, t in ((sde.t_min, 1e-5), (sde.t_max, 1.0)):
        assert end == pytest.approx(math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t)), rel=1e-9)


def test_ve() -> None:
    net, x, d, f = denoised(ve_preconditioning())
    torch.testing.assert_close(d, x + column(SIGMAS) * f, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(net.x.double(), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.c.double(), (SIGMAS / 2).log(), rtol=1e-6, atol=1e-6)


def test_iddpm() -> None:
    net, x, d, f = denoised(iddpm_preconditioning())
    torch.testing.assert_close(d, x - column(SIGMAS) * f, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(net.x.double(), x / column((SIGMAS**2 + 1).sqrt()), rtol=1e-6, atol=1e-7)
    levels = iddpm_noise_levels()
    for sigma, c in zip(SIGMAS.tolist(), net.c.tolist(), strict=True):
        nearest = 999 - int((levels[:-1] - sigma).abs().argmin())
        assert abs(c - nearest) < 1


def test_iddpm_levels_are_the_recurrence_and_their_positions_whole() -> None:
    steps, ratio_min, offset = 40, 0.001, 0.008
    levels = [0.0]
    for j in range(steps, 0, -1):
        before, here = (math.sin(0.5 * math.pi * i / steps / (1 + offset)) ** 2 for i in (j - 1, j))
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / max(before / here, ratio_min) - 1))
    found = iddpm_noise_levels(ratio_min, offset, steps)
    torch.testing.assert_close(found, torch.tensor(levels[::-1], dtype=torch.float64), rtol=1e-10, atol=1e-12)
    told = iddpm_preconditioning(ratio_min, offset, steps)
    positions = told.conditioning.function(told.sde, found[:-1])
    torch.testing.assert_close(positions, torch.arange(steps - 1.0, -1.0, -1.0).double(), rtol=0, atol=1e-9)
    outside = told.conditioning.function(told.sde, torch.tensor([1e-6, 1e9], dtype=torch.float64))
    assert outside.tolist() == [0, steps - 1]


def test_bounds() -> None:
    assert (edm_preconditioning().sde.t_min, edm_preconditioning().sde.t_max) == (0.002, 80.0)
    narrow = edm_preconditioning(sigma_min=0.01, sigma_max=50.0).sde
    assert (narrow.t_min, narrow.t_max) == (0.01, 50.0)
    assert (ve_preconditioning().sde.t_min, ve_preconditioning().sde.t_max) == (0.02, 100.0)
    assert iddpm_preconditioning().sde.t_max == 80.0
