"""Checkpoints of score-SDE against the outputs of the original networks, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch import Tensor

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion.networks.ncsnpp import NCSNpp
from sde_diffusion.presets import PRESETS, SIGMA, TIME_999, Preset
from sde_diffusion.pretrained import PretrainedError, load_pretrained, score_sde
from sde_diffusion.pretrained.state import load_state, mapped_state
from sde_diffusion.tensors import expand
from shared_data import shared_path

NETS = ("ddpmpp_vp", "ncsnpp_ve", "ncsnpp_ve_skip", "ddpm_vp", "ncsnpp_ve_discrete")
#: Of max |difference| / max |reference|; Fourier phases reach 10^3 radians in float32.
TOLERANCE = dict.fromkeys(NETS, 1e-5) | {"ncsnpp_ve": 1e-4, "ncsnpp_ve_skip": 1e-4}
SMALL = FIXTURES / "score_sde" / "ncsnpp_ve"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def folder(name: str) -> Path:
    return shared_path("fixtures", "score_sde", name)


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path / "io.npz", allow_pickle=False) as io:
        return {name: torch.from_numpy(io[name]) for name in io.files}


def contents(path: Path = SMALL) -> dict[str, Any]:
    return torch.load(path / "checkpoint.pth", weights_only=True)


def written(tmp_path: Path, content: object, **options: Any) -> Path:
    torch.save(content, tmp_path / "checkpoint.pth", **options)
    (tmp_path / "config.json").write_text((SMALL / "config.json").read_text())
    return tmp_path / "checkpoint.pth"


# The numbers.


def test_small_checkpoint_that_is_always_here() -> None:
    io = arrays(SMALL)
    for ema in (True, False):
        model = sd.load_pretrained(SMALL / "checkpoint.pth", ema=ema)
        with torch.no_grad():
            assert relative(model.net(io["x"], io["labels"]), io["out_ema"]) < 1e-4
            assert relative(model(io["x"], io["t"]), io["score_ema"]) < 1e-4
    assert not model.training
    assert model.sde == sd.VE() and model.data_range == (0.0, 1.0)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_those_of_the_original(name: str, weights: str) -> None:
    path = folder(name)
    io = arrays(path)
    net = load_pretrained(path / "checkpoint.pth", ema=weights == "ema").net
    cases = [("labels", f"out_{weights}"), ("int_labels", f"out_int_{weights}")]
    present = [(c, out) for c, out in cases if out in io]
    assert present
    with torch.no_grad():
        for c, out in present:
            assert relative(net(io["x"], io[c].float()), io[out]) < TOLERANCE[name]


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", ["ddpmpp_vp", "ncsnpp_ve", "ncsnpp_ve_skip", "ddpm_vp"])
def test_scores_of_continuous_time(name: str, weights: str) -> None:
    path = folder(name)
    io = arrays(path)
    config = json.loads((path / "config.json").read_text())
    config["training"]["continuous"] = True  # ddpm_vp is a chain; its continuous score is among the numbers
    model = load_pretrained(path, config=config, ema=weights == "ema")
    with torch.no_grad():
        score = model(io["x"], io["t"])
    for i, t in enumerate(io["t"].tolist()):
        # The reference's float32 standard deviation for VP is 1.2e-4 too large at t = 0.001.
        tolerance = 5e-4 if t < 0.01 and name in ("ddpmpp_vp", "ddpm_vp") else TOLERANCE[name]
        assert relative(score[i], io[f"score_{weights}"][i]) < tolerance


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_scores_of_a_chain(weights: str) -> None:
    """The reference's label is t (N - 1), and its standard deviation that of the step below."""
    path = folder("ddpm_vp")
    io = arrays(path)
    model = load_pretrained(path, ema=weights == "ema")
    labels = io["t"].double() * 999
    t = (labels + 1) / 1000
    with torch.no_grad():
        noise = model.predict_noise(io["x"], t)
        below = model.sde.sigma((io["t"].mul(999).long() + 1).double() / 1000)
        score = -noise / expand(below, noise)
        # The table of the reference is in float32, where 1 - 0.9999 keeps four digits.
        tolerances = [2e-4, 1e-5, 1e-5, 1e-5]
        for ours, theirs, tolerance in zip(score, io[f"score_discrete_{weights}"], tolerances, strict=True):
            assert relative(ours, theirs) < tolerance
        # At the chain's own times there is but one standard deviation.
        whole = (io["int_labels"].double() + 1) / 1000
        expected = -io[f"out_int_{weights}"] / expand(model.sde.sigma(whole), io["x"])
        assert relative(model(io["x"], whole), expected) < 1e-5
    assert model.sde.t_min == pytest.approx(1e-3)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_scores_of_a_ladder(weights: str) -> None:
    path = folder("ncsnpp_ve_discrete")
    io = arrays(path)
    model = load_pretrained(path, ema=weights == "ema")
    step = ((1 - io["t"]) * 999).round()
    with torch.no_grad():
        score = model(io["x"], 1 - step.double() / 999)
    assert relative(score, io[f"score_discrete_{weights}"]) < 1e-5


def test_raw_and_averaged_weights_differ_in_every_tensor() -> None:
    path = folder("ncsnpp_ve")
    raw, averaged = (load_pretrained(path, ema=ema).net.state_dict() for ema in (False, True))
    same = [name for name in raw if torch.equal(raw[name], averaged[name])]
    assert same == ["condition.features.frequencies"]


# What a score is for.


def test_score_is_fit_for_samplers_and_likelihoods() -> None:
    model = load_pretrained(folder("ddpmpp_vp"))
    shape = (1, 3, 16, 16)
    times = sd.uniform_times(model.sde, 3)
    ancestral = sd.sample(model.sde, model, shape, predictor=sd.Ancestral(), times=times)
    assert ancestral.x.shape == shape and ancestral.x.isfinite().all()
    ode = sd.sample_ode(model.sde, model, shape, solver=sd.DormandPrince(rtol=1e-1, atol=1e-1))
    assert ode.x.isfinite().all()
    x = torch.rand(shape) * 2 - 1
    found = sd.log_likelihood(model.sde, model, x, divergence="hutchinson", rtol=1e-1, atol=1e-1)
    assert found.log_prob.isfinite().all()


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_score_has_derivatives_of_both_modes(mode: str) -> None:
    model = load_pretrained(SMALL)
    x, t = torch.rand(1, 3, 16, 16), torch.tensor([0.5])
    v = torch.randn(2, *x.shape)
    if mode == "forward":
        found = torch.stack([torch.func.jvp(lambda u: model(u, t), (x,), (d,))[1] for d in v])
    else:
        x.requires_grad_()
        out = model(x, t)
        found = torch.autograd.grad(out, x, v, is_grads_batched=True)[0]
    assert found.shape == v.shape and found.isfinite().all()


# Containers, configurations, presets.


def test_both_containers() -> None:
    starts = {name: (folder(name) / "checkpoint.pth").read_bytes()[:15] for name in NETS}
    assert starts["ncsnpp_ve"] == LEGACY
    assert all(start[:4] == b"PK\x03\x04" for name, start in starts.items() if name != "ncsnpp_ve")


@pytest.mark.parametrize("zip_file", [True, False])
def test_genuine_files_hold_a_numpy_scalar(tmp_path: Path, zip_file: bool) -> None:
    content = contents()
    content["optimizer"]["param_groups"][0]["lr"] = np.float64(1.25e-4)
    path = written(tmp_path, content, _use_new_zipfile_serialization=zip_file)
    with pytest.raises(Exception, match="[Uu]nsupported global"):
        torch.load(path, weights_only=True)
    read = score_sde.load_torch(path, allowed=score_sde._FLOAT64)
    rate = read["optimizer"]["param_groups"][0]["lr"]
    assert type(rate) is float and rate == 1.25e-4
    io = arrays(SMALL)
    with torch.no_grad():
        assert relative(load_pretrained(path)(io["x"], io["t"]), io["score_ema"]) < 1e-4
    with pytest.raises(Exception, match="[Uu]nsupported global"):  # the list is as it was
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("value", [np.float32(1.0), np.int64(3), np.zeros(2), np.array(None, dtype=object)])
def test_no_other_numpy_object_is_read(tmp_path: Path, value: Any) -> None:
    content = contents()
    content["optimizer"]["param_groups"][0]["lr"] = value
    with pytest.raises(PretrainedError):
        load_pretrained(written(tmp_path, content))


class Harmful:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Harmful, "ran", True)


@pytest.mark.parametrize("format", [None, "score_sde"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, format: str | None) -> None:
    path = written(tmp_path, contents() | {"extra": Harmful()})
    with pytest.raises(PretrainedError, match="setattr.*not\\s+loaded"):
        load_pretrained(path, format=format)
    assert not Harmful.ran


def test_configuration_from_every_place(tmp_path: Path) -> None:
    config = json.loads((SMALL / "config.json").read_text())
    lone = tmp_path / "net.pth"
    lone.write_bytes((SMALL / "checkpoint.pth").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "options.json"
    other.write_text(json.dumps(config))
    io = arrays(SMALL)
    for given in (config, ConfigDict(config), other, str(other)):
        with torch.no_grad():
            assert relative(load_pretrained(lone, config=given)(io["x"], io["t"]), io["score_ema"]) < 1e-4
    with pytest.raises(PretrainedError, match=r"no config\.json beside .* fit no preset: give config="):
        load_pretrained(lone)
    with pytest.raises(
        ValueError, match="unknown preset .*'ncsnpp_cifar10_v'; did you mean 'ncsnpp_cifar10_v"
    ):
        load_pretrained(lone, config="ncsnpp_cifar10_v")


def test_weights_find_their_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lone = tmp_path / "net.pth"
    lone.write_bytes((SMALL / "checkpoint.pth").read_bytes())
    arguments = {"in_channels": 3, "channels": 12, "channel_multipliers": (1, 2), "blocks_per_level": 1}
    reference = PRESETS["ncsnpp_cifar10_ve"]
    tiny = Preset(
        format="score_sde",
        network=NCSNpp,
        arguments=arguments,
        image_size=16,
        reference="",
        sde=reference.sde,
        parametrization=reference.parametrization,
        conditioning=SIGMA,
        data_range=(0.0, 1.0),
    )
    for name in list(PRESETS):
        monkeypatch.delitem(PRESETS, name)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    io = arrays(SMALL)
    for config in (None, "tiny"):
        with torch.no_grad():
            assert relative(load_pretrained(lone, config=config)(io["x"], io["t"]), io["score_ema"]) < 1e-4
    monkeypatch.setitem(PRESETS, "twin", tiny)
    with pytest.raises(PretrainedError, match="fit 2 presets, tiny, twin"):
        load_pretrained(lone)


@pytest.mark.parametrize(
    "name", ["ddpm_cifar10", "ddpmpp_cifar10_vp", "ncsnpp_cifar10_ve", "ncsnpp_ffhq_1024_ve"]
)
def test_every_weight_of_a_preset_has_one_source(name: str) -> None:
    net = PRESETS[name].build_network("meta")
    assert isinstance(net, NCSNpp)
    found = score_sde.sources(net)
    assert set(found) == set(net.state_dict())
    keys = [key for source in found.values() for key in source.keys]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    "options",
    [
        {"resample_in_block": False},
        {"resample_in_block": False, "fir": None, "progressive_output": "residual"},
        {"progressive_input": "skip", "combination": "cat", "progressive_output": "residual"},
    ],
)
def test_combinations_that_no_published_model_has(options: dict[str, Any]) -> None:
    net = NCSNpp(3, channels=8, channel_multipliers=(1, 2), blocks_per_level=1, **options)
    found = score_sde.sources(net)
    assert set(found) == set(net.state_dict())
    layers = {int(key.split(".")[1]) for source in found.values() for key in source.keys}
    assert layers <= set(range(max(layers) + 1))


def test_processes_of_the_configurations() -> None:
    config = json.loads((SMALL / "config.json").read_text())
    config["training"] |= {"sde": "subvpsde"}
    model = score_sde.from_config(config)
    assert (model.sde, model.parametrization, model.conditioning) == (sd.SubVP(), sd.NOISE, TIME_999)
    config["training"] |= {"sde": "vpsde"}
    config["model"] |= {"beta_max": 15.0}
    assert score_sde.from_config(config).sde == sd.VP(beta_max=15.0)


# What does not fit.


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("model", "name", "ncsnv2_64", "model.name .* is 'ncsnv2_64'; known here: 'ncsnpp', 'ddpm'"),
        ("model", "nonlinearity", "elu", "model.nonlinearity"),
        ("model", "conditional", False, "model.conditional"),
        ("model", "embedding_type", "learned", "model.embedding_type"),
        ("model", "progressive", "input_skip", "model.progressive"),
        ("training", "sde", "edm", "training.sde .* 'edm'"),
        ("training", "continuous", False, "'fourier' goes with training.continuous"),
    ],
)
def test_unknown_options(section: str, option: str, value: object, message: str) -> None:
    config = json.loads((SMALL / "config.json").read_text())
    config[section][option] = value
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(SMALL, config=config)


def test_missing_options() -> None:
    config = json.loads((SMALL / "config.json").read_text())
    del config["model"]["nf"]
    with pytest.raises(PretrainedError, match="lacks 'nf'"):
        load_pretrained(SMALL, config=config)
    with pytest.raises(PretrainedError, match="lacks 'training'"):
        load_pretrained(SMALL, config={})


@pytest.mark.parametrize("zip_file", [True, False])
@pytest.mark.parametrize("part", [0.5, 0.999])
def test_truncated_files(tmp_path: Path, zip_file: bool, part: float) -> None:
    path = written(tmp_path, contents(), _use_new_zipfile_serialization=zip_file)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(PretrainedError, match=r"checkpoint\.pth \(\d+ bytes\) is truncated or damaged"):
        load_pretrained(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    empty, text = tmp_path / "empty.pth", tmp_path / "text.pth"
    empty.write_bytes(b"")
    text.write_text("no weights here")
    with pytest.raises(PretrainedError, match="is empty"):
        load_pretrained(empty)
    with pytest.raises(PretrainedError, match="of no known format; known: .*score_sde"):
        load_pretrained(text)
    with pytest.raises(PretrainedError, match="no file of torch.save: it starts with b'no weights here'"):
        load_pretrained(text, format="score_sde")
    with pytest.raises(ValueError, match="unknown format 'score-sde'; did you mean 'score_sde'"):
        load_pretrained(text, format="score-sde")
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        load_pretrained(tmp_path / "nowhere.pth")
    torch.save([1, 2], text)
    with pytest.raises(PretrainedError, match="no weights under 'model'"):
        load_pretrained(text, format="score_sde", config={})


def test_weights_that_do_not_fit_the_network(tmp_path: Path) -> None:
    key = "module.all_modules.4.Conv_0.weight"
    content = contents()
    weight = content["model"].pop(key)
    content["model"]["module.extra"] = torch.zeros(2)
    with pytest.raises(
        PretrainedError, match=r"1 missing: all_modules\.4\.Conv_0\.weight; 1 too many: extra"
    ):
        load_pretrained(written(tmp_path, content), ema=False)
    content = contents()
    content["model"][key] = weight[:, :5]
    with pytest.raises(
        PretrainedError, match=r"1 of another shape: all_modules\.4.*\(12, 5, 3, 3\).*\(12, 12"
    ):
        load_pretrained(written(tmp_path, content), ema=False)
    projection = "module.all_modules.4.Dense_0.weight"
    content["model"] = contents()["model"] | {projection: torch.zeros(12, 3)}
    with pytest.raises(PretrainedError, match=r"all_modules\.4\.Dense_0\.weight \(12, 3\)"):
        load_pretrained(written(tmp_path, content), ema=False)


def test_averages_that_do_not_fit_the_weights(tmp_path: Path) -> None:
    content = contents()
    averages = content["ema"]["shadow_params"]
    content["ema"]["shadow_params"] = averages[1:]
    with pytest.raises(PretrainedError, match=f"{len(averages) - 1} averaged weights for {len(averages)}"):
        load_pretrained(written(tmp_path, content))
    content["ema"]["shadow_params"] = [*averages[1:], averages[0]]
    with pytest.raises(PretrainedError, match=r"in the place of all_modules\.1\.weight has shape"):
        load_pretrained(written(tmp_path, content))
    content["ema"] = {}
    with pytest.raises(PretrainedError, match="ema=False"):
        load_pretrained(written(tmp_path, content))
    assert load_pretrained(written(tmp_path, content), ema=False) is not None


def test_a_network_is_unchanged_by_a_failed_load() -> None:
    net = NCSNpp(3, channels=8, channel_multipliers=(1, 2), blocks_per_level=1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(PretrainedError, match="missing"):
        mapped_state(net, {}, score_sde.sources(net))
    with pytest.raises(PretrainedError):
        load_state(net, {name: torch.ones(1) for name in before})
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_importing_the_package_imports_no_networks() -> None:
    code = (
        "import sys, sde_diffusion; "
        "heavy = ('networks', 'presets', 'pretrained'); "
        "assert not [m for m in sys.modules if m.startswith('sde_diffusion.') and m.split('.')[1] in heavy]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
