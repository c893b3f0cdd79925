"""Config keys, and the objects that configs become."""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch

from sde_diffusion import build
from sde_diffusion.builders import data as build_data
from sde_diffusion.config import (
    SCHEMA,
    UsageError,
    changed,
    config_keys,
    default_config,
    load_config,
    set_key,
    unknown_key,
)
from sde_diffusion.correctors import CORRECTORS, AnnealedLangevin, Langevin
from sde_diffusion.data import load_dataset
from sde_diffusion.losses import AntitheticDraw, EDMWeighting, LogNormalTime, MinSNRWeighting
from sde_diffusion.networks import MLP, UNet
from sde_diffusion.ode import DormandPrince, Heun
from sde_diffusion.predictors import DDIM, Ancestral, EulerMaruyama, ReverseDiffusion
from sde_diffusion.sdes import SDE, VE, VP, CosineVP, SubVP
from sde_diffusion.times import karras_times, quadratic_times
from sde_diffusion.training import TrainingSettings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
DIGITS = build.DataInfo("digits", (1, 8, 8), 17, 10)
PLANE = build.DataInfo("moons", (2,), None, None)


LIST = {"sampling__grid": "list", "sampling__times": (1.0, 0.1)}


def config(**changes):
    return changed({key.replace("__", "."): value for key, value in changes.items()})


# Keys


def test_the_default_is_digits_with_vp_and_is_locked():
    c = default_config()
    assert (c.data.name, c.sde.name) == ("digits", "vp")
    with pytest.raises(AttributeError):
        c.training.stepz = 3
    with pytest.raises(AttributeError):
        c.optimiser = "adam"


def test_every_key_is_explained_and_defaults_are_fresh():
    for name, key in config_keys().items():
        assert key.help, name
        assert (key.default is not None) or key.optional, f"{name}: a default of none needs a type"
    default_config().training.steps = 3
    assert default_config().training.steps != 3


def test_training_keys_are_the_settings():
    """Every setting can be reached from a config, and every key is one, belongs to an object that is one, or
    says where the weights begin."""
    settings = {f.name for f in dataclasses.fields(TrainingSettings)}
    elsewhere = {"conditional", "seed", "device", "loss"}  # model.class_conditional, seed, device, objective
    of_objects = {"min_snr_gamma", "log_normal_mean", "log_normal_std", "antithetic", "objective"}
    assert set(SCHEMA["training"]) == (settings - elsewhere) | of_objects | {"init_from"}


def test_model_keys_are_the_networks():
    taken = {name for net in build.NETWORKS.values() for name in inspect.signature(net).parameters}
    from_data = {"in_channels", "out_channels", "dim", "out_dim", "num_classes", "augment_dim", "context_dim"}
    own = {
        "level_features",
        "level_counts",
        "name",
        "parametrization",
        "conditioning",
        "sigma_data",
        "class_conditional",
        "learned_variance",
    }
    assert set(SCHEMA["model"]) == (taken - from_data) | own


def test_data_keys_are_the_loaders():
    assert set(SCHEMA["data"]) == set(inspect.signature(load_dataset).parameters) | set(
        build_data._AUGMENTATION
    )


def test_sde_keys_are_the_sdes():
    taken = {name for sde in build.SDES.values() for name in inspect.signature(sde).parameters}
    assert set(SCHEMA["sde"]) == (taken - {"t_max"}) | {"name"}


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("training.stepz", "did you mean 'training.steps'?"),
        ("trainin.steps", "did you mean 'training.steps'?"),
        (
            "steps",
            "did you mean 'sde.steps' or 'training.steps' or 'sampling.steps' or 'dequantize.steps' or ",
        ),
        ("sde.sigma", "allowed: sde.beta_max, sde.beta_min"),
        ("learning_rat", "did you mean 'training.learning_rate' or 'dequantize.learning_rate'?"),
        ("qqq", "allowed: bound.*, compare.*, data.*, dequantize.*, device, likelihood.*"),
        ("training", "'training' is a block of keys; set one of them: training.accumulate, "),
    ],
)
def test_an_unknown_key_gets_the_nearest(name, suggested):
    assert suggested in str(unknown_key(name))
    with pytest.raises(UsageError, match=r"config key"):
        set_key(default_config(), name, 1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.steps", 2.5, "'training.steps' must be of type int, got 2.5"),
        ("training.steps", None, "cannot be none"),
        ("data.name", 3, "'data.name' must be of type str, got 3"),
        ("data.path", 3, "'data.path' must be of type str, got 3"),
        ("model.channel_multipliers", 2, "must be of type tuple, got 2"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(key, value, message):
    with pytest.raises(UsageError, match=message):
        set_key(default_config(), key, value)


def test_changes_survive_json():
    import json

    c = config(model__channel_multipliers=(1, 2, 4), training__gradient_clip=None, data__image_size=(4, 6))
    c.training.learning_rate = 1  # an int is a float
    again = changed(json.loads(json.dumps(c.to_dict())))
    assert again.model.channel_multipliers == (1, 2, 4)
    assert again.training.gradient_clip is None
    assert tuple(again.data.image_size) == (4, 6)
    assert again.training.learning_rate == 1.0


# Config files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_file_builds_its_objects(path):
    c = load_config(str(path))
    build.training_settings(c), build.augmentation(c), build.sampler(c), build.likelihood(c)
    assert isinstance(build.sde(c), SDE)
    differing = [
        name for name in config_keys() if "." in name and c[name] != default_config()[name]
    ]  # a config file says how it differs
    assert 0 < len(differing) <= 20
    info = PLANE if c.model.name == "mlp" else build.DataInfo("x", (1, 28, 28), 256, 10)
    with torch.device("meta"):
        c.seed = 0
        assert sum(p.numel() for p in build.network(c, info).parameters()) > 1000


def test_a_config_file_takes_a_name(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(name):\n    return {'data': {'name': name}, 'training.steps': 7}\n")
    c = load_config(f"{path}:moons")
    assert (c.data.name, c.training.steps) == ("moons", 7)
    with pytest.raises(UsageError, match="needs a name"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def get_config():\n    return {'training.stpes': 3}",
            r"mine.py: unknown config key 'training.stpes'; did you",
        ),
        (
            "from sde_diffusion.config import default_config\ndef get_config():\n    c = default_config()\n"
            "    c.training.stepz = 3\n    return c",
            r"mine.py, line 4: unknown config key 'training.stepz'; did you mean 'training.steps'",
        ),
        ("def get_config(:\n", r"mine.py, line 1: SyntaxError"),
        ("import nothing_of_the_kind", r"mine.py, line 1: ModuleNotFoundError"),
        ("x = 1", r"mine.py has no function get_config"),
        ("def get_config():\n    return 3", r"must return a config or a dict, got int"),
        ("def get_config():\n    raise ValueError('no\\nway')", r"mine.py, line 2: no way$"),
        ("def get_config():\n    return {'training.steps': 'x'}", r"mine.py: .*must be of type int, got 'x'"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_config_file_gets_the_nearest():
    with pytest.raises(UsageError, match=r"no config file .*digits_v.py'; did you mean .*digits_ve.py"):
        load_config(str(CONFIGS[0].parent / "digits_v.py"))
    with pytest.raises(UsageError, match="takes no name, got 'x'"):
        load_config(f"{CONFIGS[0].parent / 'digits_ve.py'}:x")


# Objects


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, VP(t_min=1e-5)),
        ({"sde__beta_max": 15}, VP(beta_max=15.0)),
        ({"sde__name": "subvp", "sde__sigma_max": 3.0}, SubVP()),
        ({"sde__name": "ve", "sde__sigma_max": 30.0, "sde__t_min": 1e-3}, VE(sigma_max=30.0, t_min=1e-3)),
        ({"sde__name": "cosine", "sde__s": 0.01}, CosineVP(s=0.01)),
    ],
)
def test_sde(changes, expected):
    """The name chooses; keys of the other SDEs have no effect."""
    assert build.sde(config(**changes)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ReverseDiffusion()),
        ({"sampling__predictor": "euler_maruyama"}, EulerMaruyama()),
        ({"sampling__predictor": "ancestral", "sampling__ancestral_variance": "large"}, Ancestral("large")),
        ({"sampling__predictor": "ddim", "sampling__eta": 0.5}, DDIM(0.5)),
    ],
)
def test_predictor(changes, expected):
    assert build.predictor(config(**changes)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", ()),
        ("langevin", (Langevin(0.2, 2),)),
        ("annealed_langevin", (AnnealedLangevin(0.2, 2),)),
    ],
)
def test_correctors(name, expected):
    c = config(sampling__corrector=name, sampling__snr=0.2, sampling__corrector_steps=2)
    assert build.correctors(c) == expected


@pytest.mark.parametrize("name", CORRECTORS)
def test_every_corrector_has_a_name_and_a_step_by_the_signal_to_noise_ratio(name):
    (corrector,) = build.correctors(config(sampling__corrector=name, sampling__corrector_steps=2))
    assert corrector == CORRECTORS[name](2 * 0.16**2, 2) and corrector.steps == 2


def test_samplers():
    c = config(
        sampling__steps=7, sampling__grid="log_snr", sampling__t_end=1e-3, report__quality_method="ode"
    )
    pc, ode = build.sampler(c), build.sampler(c, "report.quality_method")
    assert len(pc.times) == 8
    assert math.isclose(float(pc.times[-1]), 1e-3)
    assert ode.solver == DormandPrince(1e-3, 1e-3)
    assert ode.t_end == 1e-3
    heun = build.solver(config(sampling__solver="heun", sampling__ode_steps=5))
    assert isinstance(heun, Heun)
    assert len(heun.times) == 6


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grid": "karras"}, karras_times(VP(), 7)),
        ({"grid": "karras", "rho": 3.0}, karras_times(VP(), 7, 3.0)),
        ({"grid": "karras", "t_end": 0.01}, karras_times(VP(), 7, t_end=0.01)),
        ({"grid": "quadratic"}, quadratic_times(VP(), 7)),
        ({"grid": "list", "times": (1, 0.5, 0.1)}, torch.tensor([1, 0.5, 0.1], dtype=torch.float64)),
    ],
)
def test_grids(changes, expected):
    c = config(**{f"sampling__{key}": value for key, value in changes.items()})
    assert torch.equal(build.times(c, 7), expected)
    assert torch.equal(
        build.solver(changed(c.to_dict() | {"sampling.solver": "heun"})).times[-1], expected[-1]
    )


def test_the_solver_of_a_list_ends_with_it():
    c = config(sampling__method="ode", sampling__solver="heun", sampling__grid="list")
    c.sampling.times = (1.0, 0.5, 0.1)
    assert build.sampler(c).t_end == 0.1
    c.sampling.times = (0.9, 0.5)
    with pytest.raises(UsageError, match=r"must begin at t_max = 1.0 for the solver 'heun', got 0.9"):
        build.sampler(c)


def test_training_settings():
    c = config(
        seed=4, training__weighting="min_snr", training__min_snr_gamma=3, training__time_sampler="log_normal",
        training__log_normal_mean=0, training__antithetic=True, model__class_conditional=True,
        training__label_dropout=0.1, training__steps=5, training__gradient_clip=None,
    )  # fmt: skip
    settings = build.training_settings(c)
    assert settings.weighting == MinSNRWeighting(3.0)
    assert settings.time_sampler == LogNormalTime(0.0, 1.2)
    assert isinstance(settings.time_draw, AntitheticDraw)
    assert (settings.conditional, settings.seed, settings.steps) == (True, 4, 5)
    assert settings.gradient_clip is None
    edm = build.training_settings(config(training__weighting="edm", model__sigma_data=0.3))
    assert edm.weighting == EDMWeighting(0.3)


def test_networks_fit_the_data():
    c = config(model__channels=16, model__blocks_per_level=1)
    model = build.score_model(c, DIGITS)
    assert isinstance(model.net, UNet)
    assert model(torch.zeros(2, 1, 8, 8), torch.tensor(0.5)).shape == (2, 1, 8, 8)
    plane = build.score_model(config(model__name="mlp", model__parametrization="v"), PLANE)
    assert isinstance(plane.net, MLP)
    assert plane.parametrization.name == "v"
    assert plane(torch.zeros(3, 2), torch.tensor(0.5)).shape == (3, 2)


def test_initial_weights_are_those_of_the_seed_and_disturb_nothing():
    before = torch.get_rng_state()
    weights = [
        build.network(config(seed=s, model__name="mlp", model__parametrization="v"), PLANE).state_dict()
        for s in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    assert not torch.equal(weights[0]["stem.weight"], weights[2]["stem.weight"])


def test_labels_reach_the_network():
    c = config(model__channels=16, model__blocks_per_level=1, model__class_conditional=True)
    assert build.network(c, DIGITS).config["num_classes"] == 10
    assert build.network(config(model__channels=16), DIGITS).config["num_classes"] is None


@pytest.mark.parametrize(
    ("function", "changes", "message"),
    [
        (build.sde, {"sde__name": "vpp"}, "unknown sde.name 'vpp'; did you mean 'vp'?"),
        (build.sde, {"sde__beta_max": 0.01}, "config.sde: betas must satisfy"),
        (build.sde, {"sde__t_min": 2.0}, "config.sde: times must satisfy"),
        (build.predictor, {"sampling__predictor": "dim"}, "sampling.predictor 'dim'; did you mean 'ddim'?"),
        (build.predictor, {"sampling__predictor": "ddim", "sampling__eta": 2.0}, "config.sampling: eta"),
        (build.correctors, {"sampling__corrector": "x"}, "unknown sampling.corrector 'x'"),
        (build.correctors, {"sampling__snr": -1.0}, "config.sampling: the signal-to-noise ratio"),
        (build.sampler, {"sampling__method": "od"}, "unknown sampling.method 'od'; did you mean 'ode'?"),
        (build.sampler, {"sampling__order": "x"}, "unknown sampling.order 'x'"),
        (build.sampler, {"sampling__steps": 0}, "config.sampling: .* n >= 1, got 0"),
        (build.sampler, {"sampling__grid": "log"}, "unknown sampling.grid 'log'; did you mean 'log_snr'?"),
        (build.sampler, {"sampling__rho": 3.0}, "sampling.rho=3.0 is not for .* 'uniform', but for karras"),
        (build.sampler, {"sampling__times": (1, 0)}, "sampling.times=.* is not for .* 'uniform', but for list"),
        (build.sampler, {"sampling__grid": "list"}, "'list' needs its times, such as"),
        (build.sampler, {"sampling__grid": "karras", "sampling__rho": -1.0}, "sampling: rho must be positive"),
        (build.sampler, LIST | {"sampling__t_end": 0.1}, "ends with its last time: leave out t_end=0.1"),
        (build.sampler, LIST | {"sampling__times": (0.1, 1.0)}, "config.sampling: a time grid must fall"),
        (build.solver, {"sampling__solver": "dopri"}, "sampling.solver 'dopri'; did you mean 'dopri[58]'?"),
        (build.solver, {"sampling__rtol": 0.0}, "config.sampling: tolerances"),
        (build.likelihood, {"likelihood__divergence": "exakt"}, "config.likelihood: .*did you mean 'exact'"),
        (build.likelihood, {"likelihood__dequantizations": 0}, "likelihood.dequantizations must be an int"),
        (build.likelihood, {"likelihood__test_images": 0}, "likelihood.test_images must be an integer >= 1"),
        (build.training_settings, {"training__weighting": "simpel"}, "did you mean 'simple'?"),
        (build.training_settings, {"training__steps": 0}, "config.training: steps must be an integer >= 1"),
        (build.training_settings, {"training__label_dropout": 0.1}, "config.training: label_dropout"),
        (build.training_settings, {"training__optimizer": "sgd"}, "config.training: unknown optimizer 'sgd'"),
        (build.device, {"device": "gpu"}, "config.device: unknown device 'gpu'; did you mean 'cpu'?"),
        (build.dataset, {"data__name": "digit"}, "unknown data set 'digit'; did you mean 'digits'?"),
        (build.dataset, {"data__path": "x"}, "config.data: data set 'digits' does not take path"),
        (build.augmentation, {"data__shift": -1}, "config.data: shift must be"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_its_key(function, changes, message):
    with pytest.raises(UsageError, match=message):
        function(config(**changes))


@pytest.mark.parametrize(
    ("changes", "info", "message"),
    [
        ({"model__name": "mpl"}, DIGITS, "unknown model.name 'mpl'; did you mean 'mlp'?"),
        ({"model__name": "mlp"}, DIGITS, "'mlp' is for vectors, but .* data set 'digits' .*use name 'unet'"),
        ({}, PLANE, "'unet' is for images, but samples of data set 'moons' .*use name 'mlp'"),
        ({"model__class_conditional": True, "model__name": "mlp"}, PLANE, "data set 'moons' has no labels"),
        ({"model__parametrization": "nois"}, DIGITS, "config.model: .*did you mean 'noise'?"),
        ({"model__conditioning": "log"}, DIGITS, "config.model: unknown conditioning"),
        ({"model__embedding": "x"}, DIGITS, "config.model: unknown embedding"),
        ({"model__channels": 0}, DIGITS, "config.model: channels must be"),
        ({"model__channel_multipliers": ("a", "b")}, DIGITS, "channel_multipliers must be a tuple"),
        ({"model__attention_levels": (5,)}, DIGITS, "config.model: attention_levels must be"),
        ({"model__dropout": 1.5}, DIGITS, "config.model: dropout"),
        ({"model__sigma_data": 0.0}, DIGITS, "config.model: sigma_data must be positive"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_names_its_key(changes, info, message):
    with pytest.raises(UsageError, match=message):
        build.score_model(config(**changes), info)


def test_data_info_round_trip():
    info = build.DataInfo.of(load_dataset("digits"))
    assert info == DIGITS
    assert build.DataInfo.of_plain(info.plain()) == info
