"""ADM and UNet2D as networks: derivatives, checkpointing, arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sde_diffusion.networks.adm import ADM, MeanChannels, mean_of
from sde_diffusion.networks.unet2d import UNet2D

SMALL: dict[str, Any] = {
    "channels": 8,
    "channel_multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_levels": (1,),
    "groups": 4,
}


def adm(**options: Any) -> ADM:
    return ADM(1, **SMALL | {"head_channels": 8, "resampling": "block"} | options)


def unet2d(**options: Any) -> UNet2D:
    base: dict[str, Any] = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2D(**base | options)


MAKERS: list[Callable[..., nn.Module]] = [adm, unet2d]


def filled(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.mark.parametrize("make", MAKERS)
def test_derivatives_of_every_mode_agree(make: Callable[..., nn.Module]) -> None:
    net = filled(make()).double()
    x, v, c = *torch.randn(2, 2, 1, 4, 4, dtype=torch.float64), torch.tensor([3.0, 700.0])

    def function(x: torch.Tensor) -> torch.Tensor:
        return net(x, c)

    _, forward = torch.func.jvp(function, (x,), (v,))
    jacobian = torch.func.jacrev(function)(x)
    torch.testing.assert_close(torch.einsum("...bchw,bchw->...", jacobian, v), forward)


@pytest.mark.parametrize("make", MAKERS)
def test_checkpointing_changes_no_gradient(make: Callable[..., nn.Module]) -> None:
    plain = filled(make()).train()
    saving = make(checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    x, c = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    for net in (plain, saving):
        net(x, c).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("make", MAKERS)
def test_config_makes_the_same_network(make: Callable[..., Any]) -> None:
    net = make()
    again = type(net)(**net.config)
    assert again.config == net.config
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize("make", MAKERS)
def test_a_new_network_computes_zero(make: Callable[..., nn.Module]) -> None:
    assert not make()(torch.randn(1, 1, 4, 4), torch.zeros(1)).any()


def test_null_class() -> None:
    with_null = filled(adm(num_classes=3, null_class=True))
    x, c = torch.randn(1, 1, 4, 4), torch.zeros(1)
    assert torch.equal(with_null(x, c), with_null(x, c, torch.tensor([3])))
    with pytest.raises(ValueError, match=r"needs labels y in \[0, 3\), got None"):
        adm(num_classes=3)(x, c)
    with pytest.raises(ValueError, match="got labels y"):
        adm()(x, c, torch.tensor([0]))


def test_means() -> None:
    net = adm(out_channels=2)
    assert isinstance(mean_of(net), MeanChannels)
    assert mean_of(adm()).__class__ is ADM
    assert mean_of(net)(torch.zeros(2, 1, 4, 4), torch.zeros(2)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (adm, {"resampling": "fir"}, "unknown resampling 'fir'.*allowed: block, resampled, strided"),
        (adm, {"heads": 2}, "give heads or head_channels, not both"),
        (adm, {"decoder_heads": 2}, "decoder_heads goes with heads, got 2"),
        (adm, {"in_channels": 0}, "in_channels"),
        (
            unet2d,
            {"class_embed_type": "timestep"},
            "class_embed_type must be one of None here, got 'timestep'",
        ),
        (unet2d, {"downsample_padding": 2}, "downsample_padding must be one of 0, 1"),
        (unet2d, {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type must be one of"),
        (unet2d, {"upsample_type": "convv"}, "upsample_type must be one of 'conv', 'resnet'"),
    ],
)
def test_arguments(make: Callable[..., nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make(**options)


@pytest.mark.parametrize("make", MAKERS)
def test_sides_of_the_image(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"sides are multiples of 2, got \(1, 1, 5, 4\)"):
        make()(torch.zeros(1, 1, 5, 4), torch.zeros(1))
