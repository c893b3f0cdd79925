"""What the network predicts: every inverse recovers the data and the noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, times64
from sde_diffusion.parametrization import RAW_SCORE, parametrization

KINDS = {
    "noise": sd.NOISE,
    "data": sd.DATA,
    "score": sd.SCORE,
    "raw-score": RAW_SCORE,
    "v": sd.V,
    "edm": sd.edm(),
    "edm-0.5": sd.edm(0.5),
    "sum": sd.Parametrization("sum", lambda alpha, sigma: (2 * torch.ones_like(alpha), 3 * sigma)),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@kinds
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_the_inverse_recovers_data_and_noise(kind: sd.Parametrization, sde: sd.SDE) -> None:
    t = torch.linspace(0.05, sde.t_max, 9, dtype=torch.float64)
    if kind.name == "sum":
        # 2 sigma - 3 sigma alpha vanishes where alpha = 2/3; stay away from it.
        t = t[(sde.alpha(t) - 2 / 3).abs() > 0.05]
    x0, noise = torch.randn(2, len(t), 3, 4, 4, dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = sde.perturb(x0, t, noise)
    output = kind.target(x0, noise, alpha, sigma)
    assert_close(kind.to_data(output, x, alpha, sigma), x0, rtol=1e-8, atol=1e-8)
    assert_close(kind.to_noise(output, x, alpha, sigma), noise, rtol=1e-8, atol=1e-8)


def test_targets_are_the_literatures() -> None:
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    alpha, sigma = times64(0.6, 1.0, 0.1, 0.9), times64(0.8, 30.0, 0.2, 0.01)
    a, s = alpha[:, None], sigma[:, None]
    assert_close(sd.NOISE.target(x0, noise, alpha, sigma), noise)
    assert_close(sd.DATA.target(x0, noise, alpha, sigma), x0)
    assert_close(sd.SCORE.target(x0, noise, alpha, sigma), -noise)
    assert_close(RAW_SCORE.target(x0, noise, alpha, sigma), -noise / s)
    assert_close(sd.V.target(x0, noise, alpha, sigma), a * noise - s * x0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_edm_target_is_that_of_its_own_preconditioning(sigma_data: float) -> None:
    """Karras et al. (2022), table 1, written out: ``D(y) = c_skip y + c_out F`` with ``y = x_0 + s eps``."""
    x0, noise = sigma_data * torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    s = times64(0.002, 0.3, 1.0, 7.0, 80.0)
    y = x0 + s[:, None] * noise
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
    target = (x0 - c_skip[:, None] * y) / c_out[:, None]
    for alpha in (torch.ones_like(s), times64(0.9, 0.5, 0.1, 0.7, 0.01)):
        # The target depends on sigma / alpha only: a scaled process asks for the same.
        ours = sd.edm(sigma_data).target(x0, noise, alpha, alpha * s)
        assert_close(ours, target, rtol=1e-9, atol=1e-9)
    denoised = sd.edm(sigma_data).to_data(target, y, torch.ones_like(s), s)
    assert_close(denoised, c_skip[:, None] * y + c_out[:, None] * target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_target_has_unit_variance_at_every_noise_level(sigma_data: float) -> None:
    x0 = sigma_data * torch.randn(20_000, 1, dtype=torch.float64)
    noise = torch.randn_like(x0)
    for s in (0.01, 0.5, 2.0, 50.0):
        target = sd.edm(sigma_data).target(x0, noise, times64(1.0)[0], times64(s)[0])
        assert float(target.var()) == pytest.approx(1, abs=4 * (2 / 20_000) ** 0.5)


def test_edm_for_unit_data_is_minus_v_for_variance_preserving_processes() -> None:
    x0, noise = torch.randn(2, 3, 2, dtype=torch.float64)
    t = times64(0.1, 0.5, 0.9)
    alpha, sigma = sd.VP().alpha(t), sd.VP().sigma(t)
    assert_close(sd.edm().target(x0, noise, alpha, sigma), -sd.V.target(x0, noise, alpha, sigma))


@kinds
def test_coefficients_may_be_scalars_and_types_are_kept(kind: sd.Parametrization) -> None:
    x0, noise = torch.randn(2, 4, 2)
    alpha, sigma = times64(0.9)[0], times64(0.3)[0]
    output = kind.target(x0, noise, alpha, sigma)
    batch = kind.target(x0, noise, alpha.expand(4), sigma.expand(4))
    assert output.dtype == torch.float32
    assert_close(output, batch)
    assert kind.to_data(output, x0, alpha, sigma).dtype == torch.float32


def test_names_are_turned_into_objects_once() -> None:
    assert [parametrization(n).name for n in ("noise", "data", "score", "v", "edm")] == [
        "noise",
        "data",
        "score",
        "v",
        "edm",
    ]
    alpha, sigma = times64(0.5), times64(0.7)
    x0, noise = torch.randn(2, 1, 3, dtype=torch.float64)

    def target(kind: sd.Parametrization) -> Tensor:
        return kind.target(x0, noise, alpha, sigma)

    assert_close(target(parametrization("edm", 0.5)), target(sd.edm(0.5)))
    with pytest.raises(ValueError, match=r"unknown parametrization 'nois'; did you mean 'noise'\? allowed: "):
        parametrization("nois")
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            sd.edm(wrong)
