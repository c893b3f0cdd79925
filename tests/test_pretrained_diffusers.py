"""Folders of diffusers against the outputs stored with them, and against the library itself."""

from __future__ import annotations

import json
import shutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion.networks.adm import ADM, MeanChannels
from sde_diffusion.networks.unet import UNet
from sde_diffusion.networks.unet2d import UNet2D
from sde_diffusion.presets import chain, chain_step
from sde_diffusion.pretrained import ExportError, PretrainedError, load_pretrained, save_diffusers
from sde_diffusion.pretrained.diffusers import scheduler_betas
from sde_diffusion.score import UNSCALED
from shared_data import shared_path

SMALL = FIXTURES / "diffusers" / "unet2d_class"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def diffusers() -> Any:
    """The library; its own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        _ = library.UNet2DModel, library.DDPMPipeline, library.DDPMScheduler  # imported when first used
    return library


def folder(name: str) -> Path:
    return SMALL if name == "unet2d_class" else shared_path("fixtures", "diffusers", name)


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path / "io.npz", allow_pickle=False) as io:
        return {name: torch.from_numpy(io[name]) for name in io.files}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def copied(tmp_path: Path) -> Path:
    shutil.copytree(SMALL, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The numbers.

NETS = ("unet2d_class", "unet2d_uncond")


@pytest.mark.parametrize("name", NETS)
def test_outputs_of_the_original_network(name: str) -> None:
    model, io = load_pretrained(folder(name)), arrays(folder(name))
    labels = {"y": io["y"]} if "y" in io else {}
    t = (io["t"].double() + 1) / 1000
    with torch.no_grad():
        assert relative(model.net(io["x"], io["t"].float(), **labels), io["out"]) < 1e-5
        assert relative(model.predict_noise(io["x"], t, **labels), io["out"]) < 1e-5
        sigma = (1 - io["alphas_cumprod"].double()[io["t"]]).sqrt()[:, None, None, None]
        assert relative(model(io["x"], t, **labels), -io["out"] / sigma) < 1e-5


@pytest.mark.parametrize("name", NETS)
def test_the_chain_is_the_scheduler(name: str) -> None:
    model, io = load_pretrained(folder(name)), arrays(folder(name))
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(
        model.sde.alpha(grid).square(), io["alphas_cumprod"].double(), rtol=0, atol=1e-12
    )
    t = (io["t"].double() + 1) / 1000
    assert relative(model.sde.perturb(io["x0"], t, io["noise"]), io["x_t"]) < 1e-6


@pytest.mark.parametrize("name", NETS)
def test_steps_of_the_scheduler(name: str) -> None:
    """DDPMScheduler.step is ancestral sampling with the small variance, for the score of the clipped data."""
    model, io = load_pretrained(folder(name)), arrays(folder(name))
    labels = {"y": io["y"]} if "y" in io else {}
    sde = model.sde

    def score(x: Tensor, t: Tensor) -> Tensor:
        data = model.predict_data(x, t, **labels).clamp(-1, 1)
        alpha, variance = (v[:, None, None, None] for v in (sde.alpha(t), sde.variance(t)))
        return (alpha * data - x) / variance

    t = (io["t"].double() + 1) / 1000
    with torch.no_grad():
        x0 = sde.posterior_mean(io["x"].double(), score(io["x"].double(), t), t)
        previous = sd.Ancestral().step(sde, score, io["x"].double(), t, t - 1 / 1000, io["noise"].double())
    torch.testing.assert_close(x0.float(), io["ddpm_step_x0"], rtol=0, atol=1e-3)
    assert relative(previous, io["ddpm_step_prev"]) < 1e-5


def test_old_names_of_attention(tmp_path: Path) -> None:
    path = copied(tmp_path)
    state = load_file(path / "unet" / WEIGHTS)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in state.items():
        if ".attentions." in key:
            for new, name in names.items():
                key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, path / "unet" / WEIGHTS)
    given, read = load_pretrained(SMALL).net.state_dict(), load_pretrained(path).net.state_dict()
    assert all(torch.equal(given[key], read[key]) for key in given)


def test_weights_in_a_file_of_torch(tmp_path: Path) -> None:
    path = copied(tmp_path)
    torch.save(load_file(path / "unet" / WEIGHTS), path / "unet" / "diffusion_pytorch_model.bin")
    (path / "unet" / WEIGHTS).unlink()
    given, read = load_pretrained(SMALL).net.state_dict(), load_pretrained(path).net.state_dict()
    assert all(torch.equal(given[key], read[key]) for key in given)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_models_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    remote = copied(tmp_path)
    if suffix == "bin":
        torch.save(load_file(remote / "unet" / WEIGHTS), remote / "unet" / "diffusion_pytorch_model.bin")
        (remote / "unet" / WEIGHTS).unlink()
    asked, cache = [], tmp_path / "cache"

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, *allow_patterns))
        for file in (f for pattern in allow_patterns for f in remote.rglob(pattern)):
            place = cache / file.relative_to(remote)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
        return str(cache)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    given, read = load_pretrained(SMALL).net.state_dict(), load_pretrained("somebody/digits").net.state_dict()
    assert all(torch.equal(given[key], read[key]) for key in given)
    assert asked[0] == ("somebody/digits", "*.json", "*.safetensors")
    assert len(asked) == (1 if suffix == "safetensors" else 2)


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub.*pip install 'sde_diffusion\[hub\]'"):
        load_pretrained("somebody/digits")


@pytest.mark.parametrize(
    ("kind", "parametrization"), [("epsilon", sd.NOISE), ("sample", sd.DATA), ("v_prediction", sd.V)]
)
def test_prediction_types(kind: str, parametrization: sd.Parametrization) -> None:
    model = load_pretrained(SMALL, config={"scheduler": {"prediction_type": kind}})
    assert model.parametrization is parametrization


def test_samples_and_likelihoods() -> None:
    model = load_pretrained(SMALL)
    y = torch.tensor([3])

    def score(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, y=y.expand(len(x)))

    times = sd.uniform_times(model.sde, 4)
    out = sd.sample(model.sde, score, (2, 3, 16, 16), predictor=sd.DDIM(), times=times)
    assert torch.isfinite(out.x).all()
    x = torch.zeros(1, 3, 4, 4)
    likelihood = sd.log_likelihood(model.sde, score, x, divergence="hutchinson", rtol=0.9, atol=10.0)
    assert torch.isfinite(likelihood.log_prob).all()


# Against the library.

CONFIGS: list[dict[str, Any]] = [
    {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6},
    {"attention_head_dim": None, "num_class_embeds": 7, "time_embedding_dim": 48},
    {"resnet_time_scale_shift": "scale_shift", "attention_head_dim": 4, "center_input_sample": True},
    {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2, "out_channels": 6},
    {"mid_block_scale_factor": 2**0.5, "mid_block_type": "UNetMidBlock2D", "add_attention": False},
    {"mid_block_type": None},
    {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 8, 16),
        "layers_per_block": 2,
        "attention_head_dim": 4,
    },
]
BASE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SCHEDULERS: list[dict[str, Any]] = [
    {"beta_schedule": "linear", "num_train_timesteps": 100, "beta_end": 0.1},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.01, 0.02, 0.5]},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_networks_of_the_library(diffusers: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Saved by the library and read here; written here and read by the library."""
    theirs = diffusers.UNet2DModel(**BASE | changes).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "model")
    diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path / "model")
    model = load_pretrained(tmp_path / "model")
    net = model.net.net if isinstance(model.net, MeanChannels) else model.net
    assert isinstance(net, UNet2D)
    assert (net is not model.net) == (net.out_channels == 6)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 31, 999])
    y = None if net.condition.num_classes is None else torch.tensor([0, 3, 6])
    with torch.no_grad():
        expected = theirs(x, t, class_labels=y).sample
        assert relative(net(x, t.float(), y), expected) < 1e-5
    again = diffusers.UNet2DModel.from_pretrained(save_diffusers(model, tmp_path / "ours") / "unet")
    with torch.no_grad():
        assert torch.equal(again.eval()(x, t, class_labels=y).sample, expected)


@pytest.mark.parametrize("options", SCHEDULERS)
def test_schedulers_of_the_library(diffusers: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = diffusers.DDPMScheduler(**options)
    model = load_pretrained(SMALL, config={"scheduler": {"num_train_timesteps": 1000, **options}})
    torch.testing.assert_close(scheduler_betas({**theirs.config}).float(), theirs.betas, rtol=1e-6, atol=2e-7)
    n = len(theirs.betas)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    kept = theirs.alphas_cumprod.double()
    torch.testing.assert_close(model.sde.alpha(grid).square(), kept, rtol=1e-10, atol=0)
    # One step on from the other's prediction, in its own parametrization.
    x, output, noise = torch.randn(3, 1, 3, 4, 4).unbind(0)
    step = n // 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator)
    theirs.register_to_config(clip_sample=False)
    expected = theirs.step(output, step, x, generator=generator.manual_seed(0)).prev_sample
    t = torch.tensor([(step + 1) / n], dtype=torch.float64)
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    score = -model.parametrization.to_noise(output, x, alpha, sigma).double() / sigma[:, None, None, None]
    previous = sd.Ancestral().step(model.sde, lambda x, t: score, x.double(), t, t - 1 / n, noise.double())
    assert relative(previous, expected) < 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_levels": (1,), "head_channels": 4, "num_classes": 5},
        {"attention_levels": (0, 1), "head_channels": 8, "resampling": "block", "out_channels": 6},
        {"attention_levels": (), "heads": 2, "resampling": "block", "scale_shift": False},
    ],
)
def test_adm_becomes_a_pipeline(diffusers: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    options = {"channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1, "groups": 4} | arguments
    net = ADM(3, **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    whole = MeanChannels(net, 3) if net.out_channels == 6 else net
    betas = sd.VP().discretize(100)
    model = sd.ScoreModel(
        whole, chain(betas), sd.NOISE, conditioning=chain_step(100), input_scaling=UNSCALED
    ).eval()
    path = save_diffusers(model, tmp_path, image_size=8)
    pipeline = diffusers.DDPMPipeline.from_pretrained(path)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 99])
    y = None if net.condition.num_classes is None else torch.tensor([0, 4])
    with torch.no_grad():
        assert relative(pipeline.unet(x, t, class_labels=y).sample, net(x, t.float(), y)) < 1e-5
    torch.testing.assert_close(pipeline.scheduler.betas, betas.float(), rtol=1e-6, atol=0)
    if y is None:
        images = pipeline(batch_size=1, num_inference_steps=2, output_type="np").images
        assert images.shape == (1, 8, 8, 3)
    labels = {} if y is None else {"y": y}
    again = load_pretrained(path)
    with torch.no_grad():
        assert relative(again(x, torch.tensor(0.5), **labels), model(x, torch.tensor(0.5), **labels)) < 1e-6


# What is refused.


def test_models_that_diffusers_has_not(tmp_path: Path) -> None:
    model = sd.ScoreModel(UNet(3, channels=8), sd.VE(), data_range=(0.0, 1.0))
    with pytest.raises(ExportError) as refused:
        save_diffusers(model, tmp_path / "model")
    for part in ("is a UNet", "is a VE", "'unit_variance'", r"in (0.0, 1.0)"):
        assert part in str(refused.value)
    assert not (tmp_path / "model").exists()
    adm = ADM(
        3,
        channels=8,
        channel_multipliers=(0.5, 2),
        attention_levels=(0, 1),
        heads=2,
        groups=4,
        blocks_per_level=1,
        resampling="resampled",
        num_classes=2,
        null_class=True,
    )
    step = {"conditioning": chain_step(10), "input_scaling": UNSCALED}
    with pytest.raises(ExportError) as refused:
        save_diffusers(sd.ScoreModel(adm, sd.DDPM([0.1] * 10), **step), tmp_path / "model")
    for part in ("different widths, [2, 8]", "first level is 4 wide", "without weights", "a null class"):
        assert part in str(refused.value)
    plain = UNet2D(**BASE | {"sample_size": None})
    with pytest.raises(ExportError, match="give image_size"):
        save_diffusers(sd.ScoreModel(plain, sd.DDPM([0.1] * 10), **step), tmp_path / "model")


def test_truncated_weights(tmp_path: Path) -> None:
    path = copied(tmp_path)
    content = (path / "unet" / WEIGHTS).read_bytes()
    (path / "unet" / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(PretrainedError, match=r"safetensors \(\d+ bytes\) is truncated or damaged"):
        load_pretrained(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = copied(tmp_path)
    state = load_file(path / "unet" / WEIGHTS)
    state["conv_out2.bias"] = state.pop("conv_out.bias")
    save_file(state, path / "unet" / WEIGHTS)
    with pytest.raises(PretrainedError, match="1 missing: conv_out.bias; 1 too many: conv_out2.bias"):
        load_pretrained(path)
    edit(path / "unet" / "config.json", out_channels=4)
    state["conv_out.bias"] = state.pop("conv_out2.bias")
    save_file(state, path / "unet" / WEIGHTS)
    with pytest.raises(PretrainedError, match=r"conv_out.weight \(3, 16, 3, 3\) for conv_out.weight \(4, 16"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel; .* only UNet2DModel is known"),
        (
            {"time_embedding_type": "fourier"},
            "time_embedding_type must be one of 'positional' here, got 'fourier'",
        ),
        (
            {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
            "unknown down_block_types 'SkipDownBlock2D'",
        ),
        ({"act_fn": "relu"}, "act_fn must be one of 'silu', 'swish' here, got 'relu'"),
        ({"freq_shift": 2}, "freq_shift must be one of 0, 1"),
        ({"new_option": 2}, "new_option"),
        ({"attention_head_dim": 5}, "attention_head_dim must divide the 24 channels"),
        ({"norm_num_groups": 5}, "norm_num_groups must divide block_out_channels, got 5"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types must be as many as block_out_channels, 2"),
    ],
)
def test_other_architectures(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = copied(tmp_path)
    edit(path / "unet" / "config.json", **changes)
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(path)


def test_other_schedulers(tmp_path: Path) -> None:
    path = copied(tmp_path)
    file = path / "scheduler" / "scheduler_config.json"
    edit(file, rescale_betas_zero_snr=True)
    with pytest.raises(PretrainedError, match="rescale_betas_zero_snr"):
        load_pretrained(path)
    edit(file, rescale_betas_zero_snr=False, beta_schedule="sqrt")
    with pytest.raises(ValueError, match="unknown beta_schedule 'sqrt'"):
        load_pretrained(path)
    edit(file, beta_schedule="linear", prediction_type="flow")
    with pytest.raises(ValueError, match="unknown prediction_type 'flow'"):
        load_pretrained(path)
    file.write_text(json.dumps({"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348}))
    with pytest.raises(PretrainedError, match="ScoreSdeVeScheduler.*neither beta_schedule nor trained_betas"):
        load_pretrained(path)
    file.unlink()
    with pytest.raises(PretrainedError, match="scheduler_config.json is missing; give its contents"):
        load_pretrained(path)
    assert load_pretrained(path, config={"scheduler": {"beta_schedule": "linear"}}).sde.num_steps == 1000


def test_other_folders(tmp_path: Path) -> None:
    path = copied(tmp_path)
    edit(path / "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(PretrainedError, match="a pipeline of scheduler, unet, vqvae"):
        load_pretrained(path)
    edit(path / "model_index.json", vqvae=None)
    (path / "unet" / WEIGHTS).unlink()
    with pytest.raises(PretrainedError, match="must hold config.json and one of .*; it holds config.json"):
        load_pretrained(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainedError, match="no known format"):
        load_pretrained(tmp_path / "empty")


def test_a_class_conditional_network_asks_for_labels() -> None:
    with pytest.raises(ValueError, match=r"needs labels y in \[0, 10\)"):
        load_pretrained(SMALL)(torch.zeros(1, 3, 16, 16), torch.tensor(0.5))
    with pytest.raises(ValueError, match="sides are multiples of 2"):
        load_pretrained(SMALL)(torch.zeros(1, 3, 15, 16), torch.tensor(0.5), y=torch.tensor([0]))
