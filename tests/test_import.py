"""Published models as runs: what is written, that they score, sample and are evaluated as they should be, and what is
refused."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion import run
from sde_diffusion.checkpoint import CheckpointError
from sde_diffusion.config import UsageError
from sde_diffusion.likelihood import dequantization_noise
from sde_diffusion.networks.edm import SongUNet
from sde_diffusion.networks.mlp import MLP
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.networks.unet import UNet
from sde_diffusion.presets import preset
from sde_diffusion.pretrained import load_pretrained, save_pretrained
from sde_diffusion.pretrained.image_size import stored_image_size

VE = FIXTURES / "score_sde" / "ncsnpp_ve"
CLASSES = FIXTURES / "diffusers" / "unet2d_class"
EDM = FIXTURES / "edm" / "song_ncsnpp"
ROUGH = {"likelihood.rtol": 0.9, "likelihood.atol": 50.0}


def command(mode: str, workdir: Path, *words: str, **changes: Any) -> int:
    keys = [f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return run.main(["--mode", mode, "--workdir", str(workdir), *words, *keys])


def imported(folder: Path, source: Path, *words: str, **changes: Any) -> Path:
    assert command("import", folder, "--source", str(source), *words, **changes) == 0
    return folder


def own_file(path: Path, **options: Any) -> Path:
    """A tiny U-Net of grey images with random weights, and a short path for the ODE."""
    net = UNet(1, channels=8, channel_multipliers=(1,), blocks_per_level=1)
    model = sd.ScoreModel(net, sd.VE(0.1, 2.0), **options)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return save_pretrained(model, path)


def arrays(path: Path, *shape: int) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    np.save(path, images)
    return path


@pytest.fixture(scope="module")
def ve(tmp_path_factory) -> Path:
    return imported(tmp_path_factory.mktemp("imported") / "ve", VE)


@pytest.fixture(scope="module")
def unit(tmp_path_factory) -> Path:
    """A model of images in (0, 1)."""
    folder = tmp_path_factory.mktemp("imported")
    file = own_file(folder / "grey.safetensors", data_range=(0.0, 1.0))
    return imported(folder / "run", file, data__image_size=2)


# What is written


def test_what_is_written(ve):
    section = json.loads((ve / "metrics.json").read_text())["import"]
    model = load_pretrained(VE)
    assert section["source"] == str(VE)
    assert section["format"] == "score_sde"
    assert section["parameters"] == sum(p.numel() for p in model.parameters())
    assert section["sde"] == str(model.sde)
    assert section["parametrization"] == "raw_score"
    assert section["data"] == {"name": "ncsnpp_ve", "shape": [3, 16, 16], "levels": 256, "num_classes": None}
    assert (
        section["sha256"]["checkpoint.pth"]
        == hashlib.sha256((VE / "checkpoint.pth").read_bytes()).hexdigest()
    )
    assert section["versions"]["torch"] == torch.__version__
    names = {"config.json", "imported.json", "metrics.json", "model.safetensors"}
    assert {path.name for path in ve.iterdir()} >= names
    config = json.loads((ve / "config.json").read_text())
    assert [config[block]["name"] for block in ("data", "sde", "model")] == ["imported"] * 3


@pytest.mark.parametrize("source", [VE, VE / "checkpoint.pth", CLASSES, EDM], ids=lambda path: path.name)
def test_scores_are_those_of_the_source(tmp_path, source):
    """To the bit, in memory and read from the folder."""
    loaded, model = sd.load(imported(tmp_path / "run", source)), load_pretrained(source)
    assert loaded.sde == model.sde
    assert loaded.model.data_range == model.data_range
    assert loaded.info.shape == (3, 16, 16)
    assert (loaded.step, loaded.info.levels) == (None, 256)
    classes = loaded.info.num_classes
    cond = {} if classes is None else {"y": torch.tensor([0, classes - 1])}
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded.score(x, t, **cond), model(x, t, **cond))
    assert "imported" in repr(loaded)


def test_raw_weights(tmp_path):
    """The last ones instead of the averaged ones, of a checkpoint where they differ."""
    content = torch.load(VE / "checkpoint.pth", weights_only=True)
    content["ema"]["shadow_params"] = [value + 1 for value in content["ema"]["shadow_params"]]
    source = tmp_path / "source"
    source.mkdir()
    torch.save(content, source / "checkpoint.pth")
    shutil.copy(VE / "config.json", source)
    for name, words, ema in (("averaged", (), True), ("raw", ("--raw",), False)):
        state = sd.load(imported(tmp_path / name, source, *words)).model.state_dict()
        expected = load_pretrained(source, ema=ema).state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert all(
        torch.equal(state[name], value) for name, value in load_pretrained(VE, ema=False).state_dict().items()
    )
    assert not torch.equal(state["net.stem.weight"], load_pretrained(source).net.stem.weight)


def test_the_architecture_may_be_given(tmp_path):
    """In a file of its own, and without one the message says what is missing."""
    source = tmp_path / "alone" / "checkpoint.pth"
    source.parent.mkdir()
    shutil.copy(VE / "checkpoint.pth", source)
    words = ("--source", str(source), "--format", "score_sde")
    assert command("import", tmp_path / "run", *words) == 2
    assert command("import", tmp_path / "run", *words, "--model-config", str(VE / "config.json")) == 0
    loaded = sd.load(tmp_path / "run")
    assert (loaded.info.name, loaded.info.shape) == ("checkpoint", (3, 16, 16))


def test_the_same_import_again_changes_nothing(tmp_path):
    folder = imported(tmp_path / "run", VE)
    before = {name: (folder / name).read_bytes() for name in ("config.json", "imported.json")}
    imported(folder, VE)
    assert {name: (folder / name).read_bytes() for name in before} == before


# Sizes


def test_sizes_are_found_where_they_are():
    edm = json.loads((EDM / "flags.json").read_text())
    nothing = torch.nn.Identity()
    assert stored_image_size(VE / "checkpoint.pth", None, nothing) == (16, 16)
    assert stored_image_size(EDM, None, nothing) == (edm["img_resolution"],) * 2
    assert stored_image_size(Path("elsewhere.pt"), {"unet": {"sample_size": [8, 4]}}, nothing) == (8, 4)
    assert stored_image_size(Path("elsewhere.pt"), {"image_size": 64}, nothing) == (64, 64)
    assert stored_image_size(Path("elsewhere.pt"), None, nothing) is None


def test_a_published_network_has_the_size_it_was_published_for():
    name = "ncsnpp_cifar10_ve"
    published = preset(name)
    net = published.build_network("meta")
    assert isinstance(net, NCSNpp)
    assert stored_image_size(Path("elsewhere.pth"), published, net) == (published.image_size,) * 2
    assert stored_image_size(Path("elsewhere.pth"), None, net) == (published.image_size,) * 2
    other = SongUNet(3, channels=16, attention_levels=(), channel_multipliers=(1,))
    assert stored_image_size(Path("elsewhere.pth"), None, other) is None


def test_a_size_that_nothing_states_is_asked_for(tmp_path, capsys):
    words = ("--source", str(own_file(tmp_path / "grey.safetensors")))
    assert command("import", tmp_path / "run", *words) == 2
    assert "give --config.data.image_size=N or =(H,W)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert command("import", tmp_path / "run", *words, data__image_size="(4,6)") == 0
    assert sd.load(tmp_path / "run").info.shape == (1, 4, 6)


def test_vectors_have_no_size(tmp_path):
    file = save_pretrained(sd.ScoreModel(MLP(2, width=8), sd.VP()), tmp_path / "points.safetensors")
    loaded = sd.load(imported(tmp_path / "run", file))
    assert (loaded.info.shape, loaded.info.levels) == ((2,), None)
    assert loaded.sample(3, steps=2).shape == (3, 2)


@pytest.mark.parametrize("features", [False, True])
def test_grey_levels_of_a_network_that_gives_them(tmp_path, features):
    inputs = 1 + sd.level_feature_count(17) if features else 1
    net = UNet(inputs, out_channels=17, channels=8, channel_multipliers=(1,), blocks_per_level=1)
    model = sd.QuantizedScoreModel(net, sd.VP(), 17, level_features=features)
    file = save_pretrained(model, tmp_path / "digits.safetensors")
    loaded = sd.load(imported(tmp_path / "run", file, data__image_size=8))
    assert (loaded.info.shape, loaded.info.levels) == ((1, 8, 8), 17)
    assert loaded.sample(1, steps=2).shape == (1, 1, 8, 8)
    loaded.config.data.name = "digits"
    assert loaded.data.name == "digits"  # though the model knows no classes


# Sampling and likelihood


def test_samples(ve):
    """Of images in (0, 1), as images in (-1, 1): by hand, and by the command line."""
    loaded = sd.load(ve)
    options = {"steps": 2, "corrector": "none", "denoise": False}
    x = loaded.sample(2, seed=3, **options)
    times = sd.uniform_times(loaded.sde, 2)
    with torch.no_grad():
        own = sd.sample(loaded.sde, loaded.model, (2, 3, 16, 16), predictor=sd.ReverseDiffusion(), times=times,
                        seed=3, denoise=False)  # fmt: skip
    torch.testing.assert_close(x, 2 * own.x - 1)
    words = {f"sampling__{key}": value for key, value in options.items()}
    assert command("sample", ve, seed=3, sampling__n=2, **words) == 0
    assert np.array_equal(np.load(ve / "samples.npz")["x"], x.numpy())
    assert "import" in json.loads((ve / "metrics.json").read_text())


@pytest.mark.parametrize("grid", ["uniform", "quadratic", "log_snr"])
def test_times_are_those_of_the_models_process(ve, grid):
    loaded = sd.load(ve)
    kind = {"uniform": sd.uniform_times, "quadratic": sd.quadratic_times, "log_snr": sd.log_snr_times}[grid]
    field = sd.sample_ode(
        loaded.sde, loaded.model, (1, 3, 16, 16), solver=sd.Heun(kind(loaded.sde, 2)), denoise=False
    )
    x = loaded.sample(1, method="ode", solver="heun", ode_steps=2, grid=grid, denoise=False)
    torch.testing.assert_close(x, 2 * field.x - 1)


def test_classes(tmp_path):
    loaded = sd.load(imported(tmp_path / "run", CLASSES))
    classes = loaded.info.num_classes
    assert classes == load_pretrained(CLASSES).net.condition.num_classes
    drawn = loaded.draw(2, steps=2, first_index=1)
    assert drawn.y.tolist() == [1, 2]
    assert torch.equal(loaded.sample(2, steps=2, y=[1, 2], first_index=1), drawn.x)


def test_bits_per_dim_of_images_in_the_unit_interval(unit):
    """``-log2 p`` of ``(x + u) / 256`` per dimension, and 8 bits for the width of a level."""
    loaded = sd.load(unit)
    images = torch.randint(
        0, 256, (2, 1, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    tolerances = {"rtol": 1e-4, "atol": 1e-4}
    bits = loaded.bits_per_dim(images, seed=2, divergence="exact", **tolerances)
    x = (images + dequantization_noise(images.shape, seed=2)) / 256
    expected = sd.log_likelihood(
        loaded.sde, loaded.model, x.float(), divergence=sd.ExactDivergence(), **tolerances
    )
    torch.testing.assert_close(bits, 8 - expected.log_prob.double() / (4 * math.log(2)), rtol=1e-4, atol=1e-4)
    log_prob = loaded.log_likelihood(images, seed=2, divergence="exact", **tolerances)
    torch.testing.assert_close(log_prob, expected.log_prob.double() - 4 * math.log(2), rtol=1e-4, atol=1e-4)


def test_the_mode_likelihood(unit, tmp_path, capsys):
    assert command("likelihood", unit) == 2
    assert "has no data of its own: name some, such as --config.data.name=" in capsys.readouterr().err
    rough = {key.replace(".", "__"): value for key, value in ROUGH.items()} | {"likelihood__test_images": 2}
    wrong = arrays(tmp_path / "wrong.npy", 1, 4, 4)
    assert command("likelihood", unit, data__name="arrays", data__path=wrong, **rough) == 2
    assert "do not fit the model: it is for DataInfo(name='grey', shape=(1, 2, 2)" in capsys.readouterr().err
    data = arrays(tmp_path / "data.npy", 1, 2, 2)
    assert command("likelihood", unit, data__name="arrays", data__path=data, **rough) == 0
    section = json.loads((unit / "metrics.json").read_text())["likelihood"]
    assert (section["unit"], section["test"]["n"]) == ("bits/dim", 2)
    assert command("bound", unit, data__name="arrays", data__path=data) == 2
    assert "the bound is for models of data in (-1, 1)" in capsys.readouterr().err


def test_data_named_at_the_import(tmp_path):
    data = arrays(tmp_path / "data.npy", 3, 16, 16)
    folder = imported(tmp_path / "run", VE, data__name="arrays", data__path=data)
    assert sd.load(folder).data.sample_shape == (3, 16, 16)


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--source nowhere.pth --workdir run", "nowhere.pth does not exist"),
        (f"--source {VE} --workdir run --format score-sde", "unknown format 'score-sde'; did you mean 'score_sde'?"),
        (f"--source {VE} --workdir run --model-config ncsn", "unknown preset (nor is it a file) 'ncsn'"),
        (f"--source {VE / 'io.npz'} --workdir run", "io.npz"),
        (f"--source {VE} --workdir run --format diffusers", str(VE)),
        (f"--source {VE}", "--mode import needs --source PATH_OR_REPO and --workdir DIR"),
        ("--workdir run", "--mode import needs --source PATH_OR_REPO and --workdir DIR"),
        (f"--source {VE} --workdir run --config x.py", "takes no --config: the architecture"),
        (f"--source {VE} --workdir run --config.sde.name=ve", "leave out --config.sde.*"),
        (f"--source {VE} --workdir run --config.model.channels=3", "leave out --config.model.*"),
        (f"--source {VE} --workdir run --config.data.image_size=0", "data.image_size must be N or (H,W), got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing_behind(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--mode", "import", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sde_diffusion: ")
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["--source x", "--format edm", "--model-config x", "--raw"])
def test_flags_of_the_import_are_for_it_alone(words, capsys):
    assert run.main(["--mode", "train", *words.split()]) == 2
    assert f"{words.split()[0]} is for --mode import" in capsys.readouterr().err


def test_a_folder_that_holds_another_run(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert command("import", folder, "--source", str(VE)) == 2
    assert "already holds another run: choose another --workdir" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    folder = imported(tmp_path / "imported", VE)
    assert command("import", folder, "--source", str(VE), "--raw") == 2
    assert command("train", folder) == 2
    assert "holds an imported model: choose another --workdir" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert command("import", tmp_path / "file" / "run", "--source", str(VE)) == 2
    assert "cannot write into" in capsys.readouterr().err


def test_a_process_or_network_of_the_config_is_refused(ve, capsys):
    assert command("sample", ve, sde__sigma_max=10.0) == 2
    assert "no config changes them: sde.sigma_max: 50.0, 10.0 now" in capsys.readouterr().err


def test_damaged_files(tmp_path):
    folder = imported(tmp_path / "run", VE)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"imported model in .* cannot be read: .*model.safetensors"):
        sd.load(folder)
    assert command("sample", folder) == 2
    (folder / "imported.json").write_text("{")
    with pytest.raises(UsageError, match=r"imported.json"):
        sd.load(folder)
