"""Checkpoints of improved-diffusion and guided-diffusion against the outputs of the original networks."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.networks.adm import ADM, MeanChannels
from sde_diffusion.networks.blocks import SelfAttention
from sde_diffusion.networks.levels import LevelUNet
from sde_diffusion.presets import PRESETS, cosine_betas
from sde_diffusion.pretrained import PretrainedError, load_pretrained, openai
from shared_data import shared_path

NETS = ("guided", "improved")
#: What the flags of the fixtures leave out.
CHAIN = {"diffusion_steps": 50, "noise_schedule": "linear", "rescale_timesteps": False}
SMALL: dict[str, Any] = {"channels": 16, "blocks_per_level": 1, "groups": 8}


def folder(name: str) -> Path:
    return shared_path("fixtures", "openai", name)


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as io:
        return {name: torch.from_numpy(io[name]) for name in io.files}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def whole(model: sd.ScoreModel) -> ADM:
    net = model.net.net if isinstance(model.net, MeanChannels) else model.net
    assert isinstance(net, ADM)
    return net


def copied(tmp_path: Path, name: str, change: Any = None) -> Path:
    """The fixture's weights in a folder of their own, without flags."""
    state = torch.load(folder(name) / "model.pt", weights_only=True)
    if change is not None:
        change(state)
    torch.save(state, tmp_path / "model.pt")
    return tmp_path / "model.pt"


# The numbers.


@pytest.mark.parametrize("name", NETS)
def test_outputs_of_the_original_network(name: str) -> None:
    model = load_pretrained(folder(name) / "model.pt")
    io = arrays(folder(name) / "io.npz")
    labels = {"y": io["y"]} if "y" in io else {}
    with torch.no_grad():
        assert relative(whole(model)(io["x"], io["t"], **labels), io["out"]) < 1e-5


@pytest.mark.parametrize(("name", "rescaled"), [("guided", False), ("improved", True)])
def test_score_at_the_steps_of_the_chain(name: str, rescaled: bool) -> None:
    """``-eps / sigma`` at step i, from the network called by hand with the label that the original gives it."""
    model = load_pretrained(folder(name), config=CHAIN | {"rescale_timesteps": rescaled})
    io = arrays(folder(name) / "io.npz")
    labels = {"y": io["y"]} if "y" in io else {}
    step = torch.tensor([0, 7, 25, 49])
    with torch.no_grad():
        eps = whole(model)(io["x"], step * (20.0 if rescaled else 1.0), **labels)[:, :3]
        score = model(io["x"], (step.double() + 1) / 50, **labels)
    alphas = (1 - torch.linspace(0.002, 0.4, 50, dtype=torch.float64)).cumprod(0)
    assert relative(score, -eps / (1 - alphas[step]).sqrt()[:, None, None, None]) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_means_of_the_original_sampler(name: str) -> None:
    """The original's reverse means: the posterior mean of our score, at an unclipped prediction of the data."""
    kind = {"guided": "LEARNED_RANGE", "improved": "FIXED_LARGE"}[name]
    path = shared_path("fixtures", "openai", name, "losses.npz")
    stored = arrays(path)
    setup = next(key.split("/")[0] for key in stored if key.startswith("linear"))
    where = f"{setup}/p_mean_variance/EPSILON/{kind}/clip=False"
    flags = CHAIN | {"rescale_timesteps": name == "improved"}
    model = load_pretrained(folder(name), config=flags)
    labels = {"y": stored["y"]} if "y" in stored else {}
    t = (torch.tensor([0, 1, 25, 49], dtype=torch.float64) + 1) / 50
    x = stored[f"{setup}/x_t"]
    with torch.no_grad():
        score = model(x, t, **labels)
    # From the first step to the data, the mean is the prediction of the data.
    mean = model.sde.posterior_mean(x.double(), score.double(), t, t - 1 / 50)
    assert relative(mean, stored[f"{where}/mean"]) < 1e-4


@pytest.mark.parametrize("key", ["linear_1000", "linear_4000", "cosine_1000", "cosine_4000"])
def test_schedules(key: str) -> None:
    stored = arrays(shared_path("fixtures", "openai", "schedules.npz"))
    kind, steps = key.split("_")
    betas = openai.betas(kind, int(steps))
    # The original's cosine betas are differences of nearly equal numbers, with 11 right digits at the start.
    torch.testing.assert_close(betas, stored[f"{key}/betas"], rtol=1e-10, atol=0)
    torch.testing.assert_close((1 - betas).cumprod(0), stored[f"{key}/alphas_cumprod"], rtol=1e-11, atol=0)


def test_cosine_chain_is_capped() -> None:
    betas = cosine_betas(20)
    assert betas[-1] == 0.999
    assert (betas > 0).all()


def test_learned_variances_stay_reachable() -> None:
    model = load_pretrained(folder("guided"), config=CHAIN)
    assert isinstance(model.net, MeanChannels)
    x, c, y = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 40.0]), torch.tensor([0, 9])
    assert model.net.net(x, c, y).shape == (2, 6, 16, 16)
    assert torch.equal(model.net(x, c, y), model.net.net(x, c, y)[:, :3])


def test_a_class_conditional_network_asks_for_labels() -> None:
    model = load_pretrained(folder("guided"), config=CHAIN)
    with pytest.raises(ValueError, match=r"needs labels y in \[0, 10\)"):
        model(torch.zeros(1, 3, 16, 16), torch.tensor(0.5))


def test_samples_and_likelihoods() -> None:
    model = load_pretrained(folder("improved"), config=CHAIN)
    out = sd.sample(
        model.sde, model, (2, 3, 4, 4), predictor=sd.Ancestral(), times=sd.uniform_times(model.sde, 4)
    )
    assert torch.isfinite(out.x).all()
    likelihood = sd.log_likelihood(
        model.sde, model, torch.zeros(1, 3, 4, 4), divergence="hutchinson", rtol=0.9, atol=10.0
    )
    assert torch.isfinite(likelihood.log_prob).all()


# The architecture, from the weights alone.


def as_openai(net: ADM, *, new_order: bool = False) -> dict[str, Tensor]:
    """The state dict that OpenAI's code would have for ``net``: loading, backwards."""
    result: dict[str, Tensor] = {}
    state = net.state_dict()
    for name, source in openai.sources(net, new_order=new_order).items():
        value = state[name]
        module = net.get_submodule(name.rsplit(".", 2)[0])
        if isinstance(module, SelfAttention) and ".qkv." in name and not new_order:
            parts = value.unflatten(0, (3, module.heads, -1))
            value = parts.transpose(0, 1).flatten(0, 2)
        if isinstance(module, SelfAttention) and name.endswith("weight") and ".norm." not in name:
            value = value[..., None]
        sizes = net.modulations.sizes if len(source.keys) > 1 else len(value)
        result.update(zip(source.keys, value.split(sizes), strict=True))
    return result


ARCHITECTURES: list[dict[str, Any]] = [
    {"channel_multipliers": (1, 2), "attention_levels": (1,), "heads": 2},
    {"channel_multipliers": (1, 2, 2), "attention_levels": (), "head_channels": 8, "resampling": "block"},
    {"channel_multipliers": (0.5, 1), "attention_levels": (0, 1), "heads": 1, "resampling": "resampled"},
    {"channel_multipliers": (1,), "attention_levels": (), "heads": 2, "scale_shift": False},
    {"channel_multipliers": (1, 1), "attention_levels": (0,), "heads": 2, "decoder_heads": 4},
    {
        "channel_multipliers": (1, 1),
        "attention_levels": (1,),
        "heads": 4,
        "out_channels": 2,
        "num_classes": 5,
    },
]


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("arguments", ARCHITECTURES)
def test_what_the_weights_show_and_both_attention_orders(arguments: dict[str, Any], new_order: bool) -> None:
    net = ADM(1, **SMALL | arguments).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = as_openai(net, new_order=new_order)
    found = openai.infer(state)
    hidden = {"heads", "decoder_heads", "head_channels", "dropout", "null_class", "groups", "checkpointing"}
    stated = {key: value for key, value in net.config.items() if key not in hidden}
    stated["out_channels"] = net.out_channels
    if len(arguments["channel_multipliers"]) == 1:
        stated["resampling"] = "strided"
    assert found == stated
    again = ADM(**found, **{key: net.config[key] for key in hidden})
    openai.load_mapped(again, state, openai.sources(again, new_order=new_order))
    x, c = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 500.5])
    y = None if net.condition.num_classes is None else torch.tensor([0, 4])
    assert torch.equal(net(x, c, y), again.eval()(x, c, y))


def test_the_orders_of_attention_differ() -> None:
    """Read in the wrong order, the fixture's outputs are not the original's: the flag is used."""
    io = arrays(folder("guided") / "io.npz")
    model = load_pretrained(folder("guided"), config={"use_new_attention_order": True})
    with torch.no_grad():
        assert relative(whole(model)(io["x"], io["t"], io["y"]), io["out"]) > 1e-3


def test_flags_of_the_scripts(tmp_path: Path) -> None:
    file = copied(tmp_path, "guided")
    flags = {
        **{
            "image_size": 16,
            "num_channels": 32,
            "num_res_blocks": 1,
            "num_heads": 4,
            "num_heads_upsample": -1,
        },
        **{"num_head_channels": 16, "attention_resolutions": "8", "channel_mult": "1,1", "dropout": 0.0},
        **{
            "class_cond": True,
            "use_checkpoint": False,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        **{"use_fp16": False, "use_new_attention_order": False, "learn_sigma": True, "diffusion_steps": 50},
        **{"noise_schedule": "cosine", "timestep_respacing": "", "use_kl": False, "predict_xstart": True},
        **{"rescale_timesteps": False, "rescale_learned_sigmas": False},
    }
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    model = load_pretrained(file)
    assert model.parametrization is sd.DATA
    assert model.sde.betas == tuple(cosine_betas(50).tolist())
    io = arrays(folder("guided") / "io.npz")
    with torch.no_grad():
        assert relative(whole(model)(io["x"], io["t"], io["y"]), io["out"]) < 1e-5


def test_defaults_of_the_chain_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_pretrained(folder("guided"))
    assert "diffusion_steps=1000, noise_schedule='linear'" in caplog.text
    assert len(model.sde.betas) == 1000


# What is refused.


def test_what_the_weights_do_not_show_is_asked_for_by_name(tmp_path: Path) -> None:
    file = copied(tmp_path, "improved")
    with pytest.raises(PretrainedError, match="num_heads or num_head_channels.*noise_schedule='linear'"):
        load_pretrained(file)
    with pytest.raises(PretrainedError, match="say by the flag rescale_timesteps"):
        load_pretrained(file, config={"num_heads": 4, "diffusion_steps": 50})
    assert load_pretrained(file, config={"num_heads": 4}).sde.num_steps == 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_channels": 64}, "num_channels is 64 in the flags and 32 in the weights"),
        ({"channel_mult": "1,2"}, "channel_mult is '1,2' in the flags"),
        ({"learn_sigma": True}, "learn_sigma is True in the flags and False"),
        ({"attention_resolutions": [1]}, "attention_resolutions is .1. in the flags"),
    ],
)
def test_flags_against_the_weights(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(folder("improved"), config=flags)


def test_unknown_flags_and_schedules() -> None:
    with pytest.raises(ValueError, match="unknown flag 'noise_shedule'; did you mean 'noise_schedule'"):
        load_pretrained(folder("improved"), config={"noise_shedule": "cosine"})
    with pytest.raises(ValueError, match="unknown noise_schedule 'cosin'"):
        load_pretrained(folder("improved"), config={"noise_schedule": "cosin"})
    with pytest.raises(ValueError, match="diffusion_steps must be an integer >= 2, got 1"):
        load_pretrained(folder("improved"), config={"diffusion_steps": 1})


def test_truncated_file(tmp_path: Path) -> None:
    content = (folder("improved") / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(PretrainedError, match=r"model.pt \(\d+ bytes\) is truncated or damaged"):
        load_pretrained(tmp_path / "model.pt", format="openai")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["out.3.weight"] = state.pop("out.0.weight")

    file = copied(tmp_path, "improved", change)
    with pytest.raises(PretrainedError, match=r"1 missing: out.0.weight; 1 too many: out.3.weight"):
        load_pretrained(file, config={"num_heads": 4})

    def shape(state: dict[str, Tensor]) -> None:
        state["middle_block.1.proj_out.weight"] = torch.zeros(32, 31, 1)

    file = copied(tmp_path, "improved", shape)
    with pytest.raises(
        PretrainedError, match=r"1 of another shape: middle_block.1.proj_out.weight \(32, 31, 1\)"
    ):
        load_pretrained(file, config={"num_heads": 4})


def test_part_of_a_network(tmp_path: Path) -> None:
    def change(state: dict[str, Tensor]) -> None:
        del state["input_blocks.1.0.emb_layers.1.weight"]

    with pytest.raises(PretrainedError, match="input_blocks.1.0.emb_layers.1.weight' is missing"):
        load_pretrained(copied(tmp_path, "improved", change), config={"num_heads": 4})


def test_other_files(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(PretrainedError, match="no UNetModel of OpenAI's: it lacks input_blocks"):
        load_pretrained(tmp_path / "model.pt", format="openai")
    with pytest.raises(PretrainedError, match="is of no known format"):
        load_pretrained(tmp_path / "model.pt")
    torch.save({}, tmp_path / "other.pt")
    with pytest.raises(PretrainedError, match="must hold one .pt file, found model.pt, other.pt"):
        load_pretrained(tmp_path, format="openai")


# Presets.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # Nichol & Dhariwal (2021) state 52.5 M and 120 M, Dhariwal & Nichol (2021) 296, 422, 554 and 559 M.
        ("iddpm_cifar10", 52_546_438),
        ("iddpm_imagenet64", 121_063_942),
        ("adm_imagenet64", 295_904_454),
        ("adm_imagenet128", 421_529_606),
        ("adm_imagenet256", 553_838_086),
        ("adm_imagenet256_uncond", 552_814_086),
        ("adm_imagenet512", 558_997_638),
    ],
)
def test_parameters_of_presets(name: str, count: int) -> None:
    net = PRESETS[name].build_network("meta")
    assert isinstance(net, LevelUNet)
    assert sum(parameter.numel() for parameter in net.parameters()) == count
    assert isinstance(PRESETS[name].build(net).net, MeanChannels)


def test_a_preset_that_is_not_the_file(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="the preset is a NCSNpp"):
        load_pretrained(folder("improved"), format="openai", config="ddpm_cifar10")
