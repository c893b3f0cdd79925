"""The published models by name: network, forward process, parametrization and conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from sde_diffusion.ddpm import DDPM
from sde_diffusion.errors import unknown_name
from sde_diffusion.networks.adm import ADM, mean_of
from sde_diffusion.networks.edm import DhariwalUNet, EDMUNet, SongUNet
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.parametrization import NOISE, RAW_SCORE, Parametrization
from sde_diffusion.preconditioning import edm_preconditioning
from sde_diffusion.schedules import cosine_betas
from sde_diffusion.score import UNSCALED, Conditioning, InputScaling, ScoreModel
from sde_diffusion.sdes import SDE, VE, VP, SubVP

TIME_999 = Conditioning("time_999", lambda sde, t: 999 * t)
"""``999 t``: the scale of the thousand steps of DDPM (Song et al. 2021, for VP and sub-VP)."""

SIGMA = Conditioning("sigma", lambda sde, t: sde.sigma(t))
"""The standard deviation of the noise (Song et al. 2021, for VE)."""


def chain_step(steps: int) -> Conditioning:
    """The step ``t n - 1`` of a chain of n, 0 to n - 1 (Ho et al. 2020); whole at the chain's own times."""
    return Conditioning(f"chain_step_{steps}", lambda sde, t: t * steps - 1)


def rescaled_chain_step(steps: int) -> Conditioning:
    """The same times 1000 / n, which is in [0, 1000) for any n (Nichol & Dhariwal 2021, ``rescale_timesteps``)."""
    return Conditioning(f"rescaled_chain_step_{steps}", lambda sde, t: (t * steps - 1) * (1000 / steps))


def ladder_step(steps: int) -> Conditioning:
    """The step ``(1 - t) (n - 1)`` of a ladder of n levels, 0 being the most noise (Song & Ermon 2019)."""
    return Conditioning(f"ladder_step_{steps}", lambda sde, t: (1 - t) * (steps - 1))


def chain(betas: torch.Tensor) -> DDPM:
    """The chain as a continuous process that ends at its first step, below which its network knows nothing."""
    return DDPM(betas, t_min=1 / len(betas))


@dataclass(frozen=True)
class Preset:
    """A published model: how to make its network, and how its output becomes a score.

    Attributes:
        format: the :mod:`sde_diffusion.pretrained` format in which its weights were published.
        network: the class of the network.
        arguments: what the class is called with.
        image_size: height and width of the images it was trained on.
        reference: where it was published.
        sde, parametrization, conditioning, input_scaling, sigma_data, data_range: see :class:`ScoreModel`.
    """

    format: str
    network: type[nn.Module]
    arguments: Mapping[str, Any]
    image_size: int
    reference: str
    sde: SDE
    parametrization: Parametrization
    conditioning: Conditioning
    input_scaling: InputScaling = UNSCALED
    sigma_data: float = 1.0
    data_range: tuple[float, float] = (-1.0, 1.0)

    def build_network(self, device: torch.device | str | None = None) -> nn.Module:
        """A new network, with random weights; on the "meta" device it costs no memory."""
        with torch.device("cpu" if device is None else device):
            return self.network(**self.arguments)

    def build(self, net: nn.Module | None = None) -> ScoreModel:
        """The score model of ``net``, or of a new network; of its means, where it has variances too."""
        return ScoreModel(
            mean_of(self.build_network() if net is None else net),
            self.sde,
            self.parametrization,
            conditioning=self.conditioning,
            input_scaling=self.input_scaling,
            sigma_data=self.sigma_data,
            data_range=self.data_range,
        )


Process: TypeAlias = tuple[SDE, Parametrization, Conditioning]


def _song(arguments: Mapping[str, Any], process: Process, *, image_size: int = 32) -> Preset:
    """A model of Song et al. (2021)."""
    sde, parametrization, conditioning = process
    return Preset(
        format="score_sde",
        network=NCSNpp,
        arguments={"in_channels": 3, **arguments},
        image_size=image_size,
        reference="Song et al. 2021, github.com/yang-song/score_sde_pytorch",
        sde=sde,
        parametrization=parametrization,
        conditioning=conditioning,
        data_range=(-1.0, 1.0) if arguments["centered"] else (0.0, 1.0),
    )


_CENTERED: dict[str, Any] = {"embedding": "sinusoidal", "scale_by_sigma": False, "centered": True}
_DDPM: dict[str, Any] = {
    **_CENTERED,
    "blocks_per_level": 2,
    "resample_in_block": False,
    "fir": None,
    "skip_rescale": False,
    "progressive_input": "none",
    "min_group_size": 1,
}
_DDPM_256 = {**_DDPM, "channel_multipliers": (1, 1, 2, 2, 4, 4), "attention_levels": (4,), "dropout": 0.0}
_DDPMPP: dict[str, Any] = {**_CENTERED, "fir": None, "progressive_input": "none"}
_NCSNPP_VP: dict[str, Any] = _CENTERED
_NCSNPP_VE: dict[str, Any] = {"centered": False}
_DEEP = {"blocks_per_level": 8}
_SKIPS: dict[str, Any] = {
    **_NCSNPP_VE,
    "progressive_input": "skip",
    "progressive_output": "skip",
    "dropout": 0.0,
}
_SKIPS_256 = {
    **_SKIPS,
    "channel_multipliers": (1, 1, 2, 2, 2, 2, 2),
    "blocks_per_level": 2,
    "attention_levels": (4,),
}
_SKIPS_1024 = {
    **_SKIPS,
    "channels": 16,
    "channel_multipliers": (1, 2, 4, 8, 16, 32, 32, 32),
    "blocks_per_level": 1,
    "attention_levels": (6,),
}
_DISCRETE_VE = {"embedding": "sinusoidal", "sigma_ladder": (0.01, 50.0, 1000)}
_CHAIN: Process = (chain(VP().discretize(1000)), NOISE, chain_step(1000))
_VP: Process = (VP(), NOISE, TIME_999)
_SUBVP: Process = (SubVP(), NOISE, TIME_999)


def _ve(sigma_max: float, conditioning: Conditioning = SIGMA) -> Process:
    return VE(sigma_max=sigma_max), RAW_SCORE, conditioning


def _openai(image_size: int, betas: torch.Tensor, *, rescaled: bool = False, **arguments: Any) -> Preset:
    """A model of Nichol & Dhariwal (2021) or Dhariwal & Nichol (2021), with learned variances."""
    steps = len(betas)
    return Preset(
        format="openai",
        network=ADM,
        arguments={"in_channels": 3, "out_channels": 6, **arguments},
        image_size=image_size,
        reference="github.com/openai/improved-diffusion, github.com/openai/guided-diffusion",
        sde=chain(betas),
        parametrization=NOISE,
        conditioning=rescaled_chain_step(steps) if rescaled else chain_step(steps),
    )


_IDDPM: dict[str, Any] = {"channels": 128, "blocks_per_level": 3, "heads": 4, "rescaled": True}
_ADM: dict[str, Any] = {"channels": 256, "blocks_per_level": 2, "resampling": "block"}
_ADM_256: dict[str, Any] = {
    **_ADM,
    "channel_multipliers": (1, 1, 2, 2, 4, 4),
    "attention_levels": (3, 4, 5),
    "head_channels": 64,
}
_LINEAR = VP().discretize(1000)
_OPENAI: dict[str, Preset] = {
    "iddpm_cifar10": _openai(
        32,
        cosine_betas(4000),
        channel_multipliers=(1, 2, 2, 2),
        attention_levels=(1, 2),
        dropout=0.3,
        **_IDDPM,
    ),
    "iddpm_imagenet64": _openai(
        64, cosine_betas(4000), channel_multipliers=(1, 2, 3, 4), attention_levels=(2, 3), **_IDDPM
    ),
    "adm_imagenet64": _openai(
        64,
        cosine_betas(1000),
        **_ADM
        | {
            "channels": 192,
            "channel_multipliers": (1, 2, 3, 4),
            "blocks_per_level": 3,
            "attention_levels": (1, 2, 3),
            "head_channels": 64,
            "dropout": 0.1,
            "num_classes": 1000,
        },
    ),
    "adm_imagenet128": _openai(
        128,
        _LINEAR,
        channel_multipliers=(1, 1, 2, 3, 4),
        attention_levels=(2, 3, 4),
        heads=4,
        num_classes=1000,
        **_ADM,
    ),
    "adm_imagenet256": _openai(256, _LINEAR, num_classes=1000, **_ADM_256),
    "adm_imagenet256_uncond": _openai(256, _LINEAR, **_ADM_256),
    "adm_imagenet512": _openai(
        512,
        _LINEAR,
        num_classes=1000,
        **_ADM_256 | {"channel_multipliers": (0.5, 1, 1, 2, 2, 4, 4), "attention_levels": (4, 5, 6)},
    ),
    "adm_lsun256": _openai(256, _LINEAR, dropout=0.1, **_ADM_256),
}


def _edm(image_size: int, network: type[EDMUNet], **arguments: Any) -> Preset:
    """A model of Karras et al. (2022), under their preconditioning."""
    told = edm_preconditioning()
    return Preset(
        format="edm",
        network=network,
        arguments={"in_channels": 3, **arguments},
        image_size=image_size,
        reference="Karras et al. 2022, github.com/NVlabs/edm",
        sde=told.sde,
        parametrization=told.parametrization,
        conditioning=told.conditioning,
        input_scaling=told.input_scaling,
        sigma_data=told.sigma_data,
    )


_SONG_VP: dict[str, Any] = {"network": SongUNet, "augment_dim": 9, "dropout": 0.13}
_SONG_VE: dict[str, Any] = {
    **_SONG_VP,
    "embedding": "fourier",
    "feature_multiplier": 2,
    "progressive_input": "residual",
    "fir": (1, 3, 3, 1),
}
_FACES: dict[str, Any] = {"channel_multipliers": (1, 2, 2, 2), "attention_levels": (2,)}
_EDM: dict[str, Preset] = {
    "edm_cifar10_vp": _edm(32, **_SONG_VP),
    "edm_cifar10_ve": _edm(32, **_SONG_VE),
    "edm_cifar10_cond_vp": _edm(32, **_SONG_VP, num_classes=10),
    "edm_cifar10_cond_ve": _edm(32, **_SONG_VE, num_classes=10),
    "edm_ffhq64_vp": _edm(64, **_SONG_VP | _FACES | {"dropout": 0.05}),
    "edm_ffhq64_ve": _edm(64, **_SONG_VE | _FACES | {"dropout": 0.05}),
    "edm_afhqv2_vp": _edm(64, **_SONG_VP | _FACES | {"dropout": 0.25}),
    "edm_afhqv2_ve": _edm(64, **_SONG_VE | _FACES | {"dropout": 0.25}),
    "edm_imagenet64": _edm(64, DhariwalUNet, num_classes=1000),
}

PRESETS: dict[str, Preset] = {
    **_OPENAI,
    **_EDM,
    "ddpm_cifar10": _song(_DDPM, _CHAIN),
    "ddpm_cifar10_continuous": _song(_DDPM, _VP),
    "ddpm_cifar10_subvp": _song(_DDPM, _SUBVP),
    "ddpm_celebahq_256": _song(_DDPM_256, _CHAIN, image_size=256),
    "ddpmpp_cifar10": _song(_DDPMPP, _CHAIN),
    "ddpmpp_cifar10_vp": _song(_DDPMPP, _VP),
    "ddpmpp_cifar10_subvp": _song(_DDPMPP, _SUBVP),
    "ddpmpp_deep_cifar10_vp": _song(_DDPMPP | _DEEP, _VP),
    "ddpmpp_deep_cifar10_subvp": _song(_DDPMPP | _DEEP, _SUBVP),
    "ncsnpp_cifar10_vp": _song(_NCSNPP_VP, _VP),
    "ncsnpp_cifar10_subvp": _song(_NCSNPP_VP, _SUBVP),
    "ncsnpp_deep_cifar10_vp": _song(_NCSNPP_VP | _DEEP, _VP),
    "ncsnpp_deep_cifar10_subvp": _song(_NCSNPP_VP | _DEEP, _SUBVP),
    "ncsnpp_cifar10_ve": _song(_NCSNPP_VE, _ve(50.0)),
    "ncsnpp_deep_cifar10_ve": _song(_NCSNPP_VE | _DEEP, _ve(50.0)),
    "ncsnpp_cifar10_ve_discrete": _song(_NCSNPP_VE | _DISCRETE_VE, _ve(50.0, ladder_step(1000))),
    "ncsnpp_celebahq_256_ve": _song(_SKIPS_256, _ve(348.0), image_size=256),
    "ncsnpp_ffhq_256_ve": _song(_SKIPS_256, _ve(348.0), image_size=256),
    "ncsnpp_bedroom_256_ve": _song(_SKIPS_256, _ve(378.0), image_size=256),
    "ncsnpp_church_256_ve": _song(_SKIPS_256, _ve(380.0), image_size=256),
    "ncsnpp_ffhq_1024_ve": _song(_SKIPS_1024, _ve(1348.0), image_size=1024),
}
"""All presets by name."""


def preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
