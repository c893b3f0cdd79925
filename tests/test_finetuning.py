"""Training that begins with the weights of another run: what is taken over, what is not, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from sde_diffusion.checkpoint import config_differences, read_checkpoint, weights_hash
from sde_diffusion.runs import load
from tiny import NO_REPORT, POINTS, command, keywords

TINY = {**NO_REPORT, **POINTS, "sde.t_min": 1e-3}


def train(folder: Path, **changes) -> int:
    return command("train", folder, **keywords(TINY) | changes)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def state(folder: Path) -> dict:
    return read_checkpoint(folder / "checkpoints" / "latest.pt")


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning") / "first"
    simple = {"training__weighting": "simple", "training__time_sampler": "uniform"}
    assert train(folder, **simple) == 0
    return folder


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    folder = first.parent / "second"
    assert train(folder, training__init_from=str(first)) == 0
    return folder


def test_it_begins_with_the_averaged_weights_and_a_new_optimizer(first: Path, tmp_path: Path) -> None:
    still = {"training__steps": 1, "training__warmup_steps": 0, "training__learning_rate": 1e-12}
    assert train(tmp_path / "run", training__init_from=str(first), **still) == 0
    found, source = state(tmp_path / "run"), state(first)
    averaged = source["ema"]["model"]
    for name, value in found["model"].items():
        assert float((value - averaged[name]).abs().max()) < 1e-9, name
    assert max(float((source["model"][k] - v).abs().max()) for k, v in averaged.items()) > 1e-6
    assert all(int(entry["step"]) == 1 for entry in found["optimizer"]["state"].values())
    assert found["step"] == 1 and found["ema"]["updates"] == 1


def test_it_is_recorded(first: Path, second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((second / "config.json").read_text())["training"]["init_from"] == str(first)
    section = metrics(second)["initial_weights"]
    assert section["folder"] == str(first) and section["step"] == 4
    assert section["weights_sha256"] == weights_hash(load(first).model) != weights_hash(load(second).model)
    assert section["objective"]["weighting"] == "simple"
    assert metrics(second)["run"]["config"]["training"]["weighting"] == "likelihood"
    assert "initial_weights" not in metrics(first)
    assert train(second, training__init_from=str(first)) == 0
    assert f"of {first} after 4 steps" in capsys.readouterr().out


def test_resuming_is_exact_and_needs_the_first_run_no_more(first: Path, second: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(second, tmp_path / "second")
    checkpoints = folder / "checkpoints"
    (checkpoints / "step-00000004.pt").unlink()
    (checkpoints / "latest.pt").unlink()
    hidden = first.rename(first.with_name("hidden"))
    try:
        assert train(folder, training__init_from=str(first)) == 0
    finally:
        hidden.rename(first)
    ours, theirs = state(folder), state(second)
    assert ours["step"] == theirs["step"] == 4
    for part in ("model", "optimizer", "ema", "random"):
        assert repr(ours[part]) == repr(theirs[part])
    for name, value in theirs["ema"]["model"].items():
        assert torch.equal(ours["ema"]["model"][name], value)
    assert metrics(folder)["initial_weights"] == metrics(second)["initial_weights"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__init_from": "nowhere"}, "init_from: there is no run in 'nowhere': no such folder"),
        ({"training__init_from": "runs/new"}, "this is the folder of the new run itself"),
        ({"model__width": 24}, "is of another model: model.width: 16 there, 24 now"),
        ({"model__parametrization": "v"}, "model.parametrization: 'noise' there, 'v' now"),
        ({"sde__name": "ve"}, "sde.name: 'vp' there, 've' now"),
        (
            {"data__name": "digits", "data__size": None, "model__name": "unet"},
            r"shape of the data: \(2,\) there",
        ),
    ],
)
def test_another_model_is_refused_before_any_work(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, changes: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"training__init_from": str(first)} | changes
    left_out = {key for key, value in changes.items() if value is None}
    given = {k: v for k, v in (keywords(TINY) | changes).items() if k not in left_out}
    assert command("train", Path("runs/new"), **given) == 2
    error = capsys.readouterr().err
    assert error.startswith("sde_diffusion: config.training.init_from: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_what_changes_no_weight_may_differ(first: Path, tmp_path: Path) -> None:
    given = {"training__init_from": str(first), "model__dropout": 0.0, "sde__t_min": 1e-4}
    assert train(tmp_path / "run", training__steps=1, **given) == 0


def test_a_started_run_keeps_its_beginning(first: Path, second: Path, capsys) -> None:
    assert train(second) == 2
    assert "training.init_from" in capsys.readouterr().err


def test_checkpoints_of_versions_without_the_key_go_on() -> None:
    before, now = {"training": {"steps": 3}}, {"training": {"steps": 3, "init_from": None}}
    assert config_differences(before, now) == []
    now["training"]["init_from"] = "runs/digits"
    assert config_differences(before, now) == [
        "training.init_from: absent in the checkpoint, 'runs/digits' now"
    ]
