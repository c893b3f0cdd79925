"""The published models: parameter counts to the digit, and what they were trained with."""

from __future__ import annotations

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.parametrization import RAW_SCORE
from sde_diffusion.presets import PRESETS, chain, chain_step, ladder_step, preset

COUNTS = {
    "ddpm_cifar10": 35_218_947,
    "ddpmpp_cifar10_vp": 61_804_419,
    "ddpmpp_deep_cifar10_vp": 106_632_579,
    "ncsnpp_cifar10_vp": 62_693_251,
    "ncsnpp_cifar10_ve": 62_758_915,
    "ncsnpp_deep_cifar10_ve": 107_587_075,
    "ncsnpp_celebahq_256_ve": 65_574_549,
    "ncsnpp_ffhq_1024_ve": 105_785_896,
}


@pytest.mark.parametrize("name", COUNTS)
def test_number_of_parameters(name: str) -> None:
    net = PRESETS[name].build_network("meta")
    assert sum(parameter.numel() for parameter in net.parameters()) == COUNTS[name]


def test_fourier_frequencies_are_frozen() -> None:
    net = PRESETS["ncsnpp_cifar10_ve"].build_network("meta")
    assert sum(p.numel() for p in net.parameters() if not p.requires_grad) == 128


@pytest.mark.parametrize("name", PRESETS)
def test_presets_as_score_models(name: str) -> None:
    found = preset(name)
    model = found.build(torch.nn.Identity())
    assert (model.sde, model.parametrization) == (found.sde, found.parametrization)
    assert model.conditioning is found.conditioning
    assert model.data_range == ((0.0, 1.0) if found.parametrization is RAW_SCORE else (-1.0, 1.0))


@pytest.mark.parametrize("name", ["ddpm_cifar10", "ncsnpp_cifar10_ve_discrete"])
def test_presets_run(name: str) -> None:
    image = torch.empty(2, 3, 32, 32, device="meta")
    assert PRESETS[name].build_network("meta")(image, torch.empty(2, device="meta")).shape == image.shape


def test_what_networks_are_told_of_the_time() -> None:
    t = torch.tensor([0.001, 0.5, 1.0], dtype=torch.float64)
    cases = {
        "ddpm_cifar10": [0.0, 499.0, 999.0],
        "ddpmpp_cifar10_vp": [0.999, 499.5, 999.0],
        "ncsnpp_cifar10_ve": [0.01 * 5000**u for u in t.tolist()],
        "ncsnpp_cifar10_ve_discrete": [998.001, 499.5, 0.0],
    }
    for name, expected in cases.items():
        found = PRESETS[name]
        told = found.conditioning.function(found.sde, t)
        torch.testing.assert_close(told, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-9)
    assert chain_step(50).name != chain_step(51).name != ladder_step(51).name


def test_a_chain_ends_at_its_first_step() -> None:
    process = chain(sd.VP().discretize(100))
    assert process.t_min == pytest.approx(0.01)
    assert process.variance(process.t_min) == pytest.approx(0.1 / 100, rel=1e-12)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown preset 'ddpm_cifar'; did you mean 'ddpm_cifar10'"):
        preset("ddpm_cifar")
