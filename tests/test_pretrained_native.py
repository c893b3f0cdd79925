"""Score models written to one file and read back to the bit, and programs of torch.export."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion.networks.adm import ADM, MeanChannels
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.unet import UNet
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.preconditioning import edm_preconditioning, vp_preconditioning
from sde_diffusion.presets import (
    PRESETS,
    SIGMA,
    TIME_999,
    chain,
    chain_step,
    ladder_step,
    rescaled_chain_step,
)
from sde_diffusion.pretrained import (
    ExportError,
    PretrainedError,
    export_program,
    load_pretrained,
    native,
    save_pretrained,
)
from sde_diffusion.score import LOG_NOISE, TIME, UNIT_VARIANCE, UNSCALED, Conditioning

CHAIN = chain(sd.VP().discretize(50))
SMALL: dict[str, Any] = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1}


def unet(**options: Any) -> UNet:
    return UNet(1, **SMALL | options)


def adm(**options: Any) -> ADM:
    return ADM(1, **SMALL | {"attention_levels": (1,), "heads": 2, "groups": 4} | options)


MODELS = {
    "log_noise": lambda: sd.ScoreModel(unet(), sd.VP(beta_max=12.0), sd.NOISE, conditioning=LOG_NOISE),
    "time": lambda: sd.ScoreModel(unet(input_fourier=(1, 2)), sd.SubVP(), sd.SCORE, conditioning=TIME),
    "edm": lambda: sd.ScoreModel(unet(), sd.CosineVP(), sd.edm(0.5), sigma_data=0.5),
    "edm_process": lambda: edm_preconditioning().score(unet()),
    "vp_preconditioning": lambda: vp_preconditioning().score(unet()),
    "sigma": lambda: sd.ScoreModel(
        unet(), sd.VE(sigma_max=20.0), sd.V, conditioning=SIGMA, input_scaling=UNSCALED, data_range=(0.0, 1.0)
    ),
    "time_999": lambda: sd.ScoreModel(unet(), sd.VP(), conditioning=TIME_999, input_scaling=UNIT_VARIANCE),
    "ladder": lambda: sd.ScoreModel(unet(), sd.VE(), conditioning=ladder_step(1000)),
    "chain": lambda: sd.ScoreModel(adm(), CHAIN, conditioning=chain_step(50)),
    "rescaled": lambda: sd.ScoreModel(
        MeanChannels(adm(out_channels=2), 1), CHAIN, sd.DATA, conditioning=rescaled_chain_step(50)
    ),
    "unet2d": lambda: sd.ScoreModel(
        UNet2D(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        CHAIN,
        conditioning=chain_step(50),
    ),
    "levels": lambda: sd.QuantizedScoreModel(unet(out_channels=17), sd.VP(), 17),
    "level_features": lambda: sd.QuantizedScoreModel(
        UNet(10, out_channels=17, **SMALL), sd.VP(), 17, level_features=True
    ),
    "level_counts": lambda: sd.QuantizedScoreModel(
        UNet(10, out_channels=19, context_dim=17, **SMALL),
        sd.VP(),
        17,
        level_features=True,
        level_counts=True,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_back_to_the_bit(tmp_path: Path, name: str) -> None:
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = save_pretrained(model, tmp_path / "new" / "model.safetensors")
    again = load_pretrained(path)
    assert type(again) is type(model)
    assert again.sde == model.sde
    assert again.data_range == model.data_range
    assert not again.training
    x = torch.randn(3, 1, 4, 4)
    t = torch.linspace(model.sde.t_min, model.sde.t_max, 3, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(x, t), model(x, t))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_pretrained(path.parent).sde == model.sde


def test_an_imported_model(tmp_path: Path) -> None:
    model = load_pretrained(FIXTURES / "diffusers" / "unet2d_class")
    again = load_pretrained(save_pretrained(model, tmp_path / "model.safetensors"))
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 9])
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor(0.3), y=y), model(x, torch.tensor(0.3), y=y))


def test_a_network_of_vectors(tmp_path: Path) -> None:
    model = sd.ScoreModel(MLP(2, width=8), sd.VP()).eval()
    again = load_pretrained(save_pretrained(model, tmp_path / "model.safetensors"))
    x = torch.randn(3, 2)
    with torch.no_grad():
        assert torch.equal(again(x, torch.tensor(0.3)), model(x, torch.tensor(0.3)))


def test_channels_last_and_tensors_that_share_memory(tmp_path: Path) -> None:
    model = MODELS["log_noise"]().to(memory_format=torch.channels_last)
    again = load_pretrained(save_pretrained(model, tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_description(name: str) -> None:
    """All but the network, whose place a small one takes."""
    model = PRESETS[name].build(unet())
    again = native.build(native.describe(model))
    assert again.sde == model.sde
    assert again.conditioning.name == model.conditioning.name
    assert again.data_range == model.data_range


def test_networks_of_the_presets_are_known() -> None:
    assert {found.network for found in PRESETS.values()} <= set(native.NETWORKS.values())


def test_models_without_a_description(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ExportError, match="the network is a Identity; known are MLP"):
        save_pretrained(sd.ScoreModel(torch.nn.Identity(), sd.VP()), path)
    mine = Conditioning("mine", lambda sde, t: t)
    with pytest.raises(ExportError, match="unknown conditioning 'mine'"):
        save_pretrained(sd.ScoreModel(unet(), sd.VP(), conditioning=mine), path)
    wrong = Conditioning("time", lambda sde, t: 2 * t)
    with pytest.raises(ExportError, match="the conditioning 'time' is not the one this name stands for"):
        save_pretrained(sd.ScoreModel(unet(), sd.VP(), conditioning=wrong), path)
    with pytest.raises(ExportError, match="the parametrization 'edm' is not the one"):
        save_pretrained(sd.ScoreModel(unet(), sd.VP(), sd.edm(0.5), sigma_data=1.0), path)
    with pytest.raises(ValueError, match=r"must be named \*.safetensors, got 'model.pt'"):
        save_pretrained(MODELS["time"](), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, change: Any) -> Path:
    """The file with another description."""
    with safe_open(path, framework="pt") as opened:
        description = json.loads(opened.metadata()["sde_diffusion"])
    change(description)
    save_file(load_file(path), path, metadata={"sde_diffusion": json.dumps(description)})
    return path


def test_damaged_files(tmp_path: Path) -> None:
    path = save_pretrained(MODELS["time"](), tmp_path / "model.safetensors")
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 10):
        path.write_bytes(content[:size])
        with pytest.raises(PretrainedError, match="is empty|is truncated or damaged"):
            load_pretrained(path)
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match="give no config"):
        load_pretrained(path, config={"channels": 8})


def test_descriptions_that_do_not_fit(tmp_path: Path) -> None:
    path = save_pretrained(MODELS["time"](), tmp_path / "model.safetensors")
    rewritten(path, lambda d: d["network"]["arguments"].update(channels=16))
    with pytest.raises(
        PretrainedError, match=r"stem.weight \(8, 5, 3, 3\) where the network has \(16, 5, 3, 3\)"
    ):
        load_pretrained(path)
    rewritten(path, lambda d: d["network"].update(name="UNett"))
    with pytest.raises(PretrainedError, match="unknown class 'UNett'; did you mean 'UNet'"):
        load_pretrained(path)
    rewritten(path, lambda d: d.pop("sde"))
    with pytest.raises(PretrainedError, match="describes no model of this version: 'sde'|'UNett'"):
        load_pretrained(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log_noise", "chain", "level_counts"])
def test_programs(tmp_path: Path, name: str) -> None:
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch.export.save(export_program(model, (1, 4, 4)), tmp_path / "score.pt2")
        program = torch.export.load(tmp_path / "score.pt2").module()
    for batch in (2, 5):
        x, t = torch.randn(batch, 1, 4, 4), torch.rand(batch, dtype=torch.float64) * 0.9 + 0.05
        with torch.no_grad():
            torch.testing.assert_close(program(x, t), model(x, t), rtol=1e-5, atol=1e-5)


def test_programs_with_labels() -> None:
    model = sd.ScoreModel(
        adm(num_classes=3, channel_multipliers=(1,), attention_levels=(0,)),
        CHAIN,
        conditioning=chain_step(50),
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export_program(model, (1, 4, 4), labels=True).module()
    x, t, y = (
        torch.randn(4, 1, 4, 4),
        torch.linspace(0.1, 1, 4, dtype=torch.float64),
        torch.tensor([0, 1, 2, 0]),
    )
    with torch.no_grad():
        torch.testing.assert_close(program(x, t, y), model(x, t, y=y), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(program(x, t, y), program(x, t, torch.zeros_like(y)))
