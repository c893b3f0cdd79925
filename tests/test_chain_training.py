"""Chains, learned variances and learned schedules through the training loop, the command line and back."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import build
from sde_diffusion.chain_losses import (
    BoundLoss,
    ChainTime,
    HybridLoss,
    LadderTime,
    LossAwareSteps,
    LossAwareTime,
    NoiseError,
    VariationalLoss,
)
from sde_diffusion.checkpoint import read_checkpoint
from sde_diffusion.config import UsageError, changed
from sde_diffusion.data import DataSet
from sde_diffusion.learned_schedule import LearnedSchedule, MonotoneNetwork
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.losses import SimpleWeighting, UniformTime
from sde_diffusion.networks import MLP
from sde_diffusion.objective import Objective
from sde_diffusion.predictors import LearnedVariance
from sde_diffusion.runs import load
from sde_diffusion.schedules import linear_betas
from sde_diffusion.score import ScoreModel
from sde_diffusion.training import Trainer, TrainingSettings
from tiny import NO_REPORT, command, keywords

CHAIN = sd.DDPM(linear_betas(24), t_min=1 / 24)


def vectors() -> DataSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70, 2, generator=generator) @ torch.tensor([[0.8, 0.3], [0.0, 0.2]])
    return DataSet("vectors", x[:50], x[50:])


def settings(**changes: object) -> TrainingSettings:
    numbers = {"steps": 9, "batch_size": 16, "accumulate": 3, "warmup_steps": 3, "learning_rate": 3e-3}
    reports = {"log_every": 4, "eval_every": 5, "eval_size": 30, "checkpoint_every": 3}
    fixed = {"weighting": SimpleWeighting(), "ema_decay": 0.9, "device": "cpu"}
    return TrainingSettings(**{**numbers, **reports, **fixed, **changes})


def hybrid_model() -> ScoreModel:
    torch.manual_seed(0)
    return LearnedVarianceModel(MLP(2, out_dim=4, width=16, depth=1), CHAIN)


def scheduled_model() -> ScoreModel:
    torch.manual_seed(0)
    return ScoreModel(MLP(2, width=16, depth=1), LearnedSchedule(MonotoneNetwork(4)))


CASES = {
    "hybrid": (hybrid_model, {"loss": HybridLoss(), "time_sampler": LossAwareTime(history=1)}),
    "schedule": (scheduled_model, {"loss": VariationalLoss(), "time_sampler": UniformTime()}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, tmp_path: Path) -> None:
    make, changes = CASES[name]
    whole = Trainer(make(), vectors(), settings(**changes), tmp_path / "a", progress=False).run()
    Trainer(make(), vectors(), settings(**changes, steps=9), tmp_path / "b", progress=False)
    first = Trainer(make(), vectors(), settings(**changes), tmp_path / "b", progress=False)
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5 * 3:
            raise RuntimeError("stopped")

    first.model.net.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        first.run()
    second = Trainer(make(), vectors(), settings(**changes), tmp_path / "b", progress=False).run()
    a, b = (read_checkpoint(r.checkpoint) for r in (whole, second))
    for part in ("model", "objective"):
        assert a[part].keys() == b[part].keys()
        for key, value in a[part].items():
            assert torch.equal(value, b[part][key]), (part, key)
    assert_close(torch.tensor(second.heldout_loss), torch.tensor(whole.heldout_loss), rtol=0, atol=0)
    if name == "hybrid":
        assert int(a["objective"]["counts"].sum()) == 9 * 16
    else:
        start = make().state_dict()
        moved = [k for k in start if k.startswith("process.") and not torch.equal(start[k], a["model"][k])]
        assert len(moved) == 4  # the schedule is trained and saved
        averaged = second.model.sde.network.state_dict()
        assert all(torch.equal(averaged[k], b["ema"]["model"][f"process.network.{k}"]) for k in averaged)


def test_levels_are_centres_where_nothing_is_dequantized() -> None:
    images = torch.randint(0, 5, (6, 1, 2, 2), dtype=torch.uint8)
    data = DataSet("images", images, images, levels=5)
    changes = {"loss": BoundLoss(), "time_sampler": ChainTime(), "dequantize": False}
    objective = Objective(settings(**changes), data, CHAIN, torch.device("cpu"))
    draws = objective.draw(images, None, torch.zeros(6, 0), torch.Generator().manual_seed(0))
    assert_close(draws.x0, (2 * images.float() + 1) / 5 - 1)
    assert draws.loss.decoder.levels == 5  # type: ignore[union-attr]


def test_evaluations_do_not_depend_on_what_the_sampler_has_learned() -> None:
    model, data = hybrid_model(), vectors()
    objective = Objective(
        settings(loss=HybridLoss(), time_sampler=LossAwareTime(history=1)), data, CHAIN, torch.device("cpu")
    )
    before = objective.evaluate(model, data.test, None)[0]
    assert isinstance(objective.times, LossAwareSteps)
    objective.times.observe(CHAIN, CHAIN.times(), torch.arange(24.0))
    assert objective.evaluate(model, data.test, None)[0] == before


# ------------------------------------------------------------ configs


def config(**changes: object):
    return changed({key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sde__name": "ddpm", "training__objective": "simple"},
            (NoiseError(), SimpleWeighting(), ChainTime()),
        ),
        (
            {"sde__name": "ddpm", "training__objective": "bound"},
            (BoundLoss(), SimpleWeighting(), ChainTime()),
        ),
        (
            {
                "sde__name": "ddpm",
                "training__objective": "hybrid",
                "model__learned_variance": True,
                "model__parametrization": "noise",
                "training__time_sampler": "loss_aware",
            },
            (HybridLoss(), SimpleWeighting(), LossAwareTime()),
        ),
        (
            {"sde__name": "ve", "sde__steps": 30, "training__objective": "smld"},
            (NoiseError(), SimpleWeighting(), LadderTime(30)),
        ),
        (
            {"sde__name": "learned", "training__objective": "variational"},
            (VariationalLoss(), SimpleWeighting(), UniformTime()),
        ),
    ],
)
def test_objectives_by_name(changes: dict, expected: tuple) -> None:
    built = build.training_settings(config(**changes))
    assert (built.loss, built.weighting, built.time_sampler) == expected


def test_chains_by_name() -> None:
    chain = build.sde(config(sde__name="ddpm", sde__schedule="sigmoid", sde__steps=40))
    assert isinstance(chain, sd.DDPM) and chain.num_steps == 40 and chain.t_min == 1 / 40
    learned = build.sde(config(sde__name="learned", sde__log_snr_max=5.0))
    assert isinstance(learned, LearnedSchedule) and learned.log_snr_max == 5.0
    c = config(sde__name="ddpm", model__learned_variance=True, model__parametrization="noise",
               sampling__predictor="learned_variance")  # fmt: skip
    assert isinstance(build.predictor(c), LearnedVariance)
    model = build.score_model(c, build.DataInfo("digits", (1, 8, 8), 17, 10))
    assert isinstance(model, LearnedVarianceModel)
    assert isinstance(build.predictor(c, model), LearnedVariance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sde__name": "ddpm", "sde__steps": 10}, "config.sde: 10 steps are too few for the linear schedule"),
        ({"sde__name": "ddpm", "sde__steps": 1, "sde__schedule": "cosine"}, "n >= 2, got 1"),
        (
            {"sde__name": "ddpm", "sde__schedule": "cosin"},
            "unknown sde.schedule 'cosin'; did you mean 'cosine'?",
        ),
        ({"training__objective": "simple"}, "objective 'simple' needs sde.name ddpm, got 'vp'"),
        ({"training__objective": "hybird"}, "unknown training.objective 'hybird'; did you mean 'hybrid'?"),
        (
            {"sde__name": "ddpm", "training__objective": "hybrid"},
            "'hybrid' needs model.learned_variance=True, got False",
        ),
        ({"sde__name": "learned"}, "'learned' needs training.objective 'variational', got 'score_matching'"),
        (
            {"sde__name": "learned", "training__objective": "variational", "model__conditioning": "time"},
            "needs model.conditioning='log_noise', got 'time'",
        ),
        ({"training__time_sampler": "loss_aware"}, "'loss_aware' needs sde.name 'ddpm', got 'vp'"),
        ({"model__learned_variance": True}, "learned_variance goes with any parametrization but 'levels'"),
        ({"sampling__predictor": "learned_variance"}, "needs a model with model.learned_variance=True"),
        ({"bound__variance": "smal"}, "unknown variance 'smal'; did you mean 'small'?"),
        ({"bound__steps": 1}, "config.bound.steps must be an integer >= 2, got 1"),
        ({"bound__paths": -1}, "config.bound.paths must be an integer >= 0, got -1"),
        ({"bound__path_steps": 1}, "config.bound.path_steps must be an integer >= 2, got 1"),
        ({"bound__draws": 0}, "config.bound.draws must be an integer >= 1, got 0"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    c = config(**changes)
    with pytest.raises(UsageError, match=message):
        build.sde(c)
        build.training_settings(c)
        build.predictor(c)
        build.bound(c)
        build.score_model(c, build.DataInfo("digits", (1, 8, 8), 17, 10))


# ------------------------------------------------------------ the command line

CHAIN_SETTINGS = {
    **NO_REPORT,
    "training.steps": 3,
    "sde.name": "ddpm",
    "sde.schedule": "cosine",
    "sde.steps": 8,
    "training.dequantize": False,
    "bound.test_images": 5,
    "bound.path_steps": 6,
    "likelihood.batch_size": 3,
}
LEARNED = {
    "training.objective": "hybrid",
    "model.learned_variance": True,
    "training.time_sampler": "loss_aware",
    "sampling.predictor": "learned_variance",
    "sampling.corrector": "none",
    "sampling.steps": 7,
}


def test_train_bound_and_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = keywords(CHAIN_SETTINGS | LEARNED)
    assert command("train", tmp_path, **given) == 0
    assert command("bound", tmp_path, **given) == 0
    section = json.loads((tmp_path / "metrics.json").read_text())["bound"]
    assert section["unit"] == "bits/dim" and section["steps"] == 8
    assert section["decoder"] == "DiscretizedGaussian(levels=17, ends=False)"
    for kind in ("chain", "continuous", "ode"):
        parts = section[kind]
        whole = sum(parts[name]["mean"] for name in ("prior", "diffusion", "decoder"))
        assert parts["total"]["mean"] == pytest.approx(whole, rel=1e-9)
        assert parts["total"]["n"] == 5 and parts["total"]["standard_error"] > 0
    weighted = section["importance"]
    assert weighted["paths"] == 4 and weighted["nfe"] == 24 and 1 <= weighted["effective_paths"] <= 4
    assert weighted["gain"]["mean"] == pytest.approx(
        weighted["one_path"]["mean"] - weighted["total"]["mean"], abs=1e-9
    )
    assert weighted["gain"]["mean"] > 0 and weighted["total"]["n"] == 5
    with open(tmp_path / "bound.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["term"] for row in rows] == [*(f"L_{i}" for i in range(8)), "L_T"]
    assert sum(float(row["bits_per_dim"]) for row in rows) == pytest.approx(
        section["chain"]["total"]["mean"], rel=1e-6
    )
    assert (tmp_path / "bound.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "8 steps:" in printed and "importance-weighted, 4 paths of 6 steps:" in printed
    assert command("sample", tmp_path, **given, sampling__n=2) == 0
    run = load(tmp_path)
    assert repr(run.sde).startswith("DDPM(8 betas from")
    assert run.draw(2).nfe == 8


def test_a_learned_schedule_from_the_command_line(tmp_path: Path) -> None:
    given = keywords(
        {
            **NO_REPORT,
            "training.steps": 3,
            "sde.name": "learned",
            "training.objective": "variational",
            "bound.test_images": 4,
            "bound.steps": 6,
            "bound.draws": 4,
            "bound.ode": False,
            "bound.paths": 0,
            "bound.subset": 3,
        }
    )
    assert command("train", tmp_path, **given) == 0
    assert command("bound", tmp_path, **given) == 0
    section = json.loads((tmp_path / "metrics.json").read_text())["bound"]
    assert section["steps"] == 6 and "ode" not in section and "importance" not in section
    assert section["decoder"] == "GaussianDecoder()" and math.isfinite(section["chain"]["total"]["mean"])
    learned = load(tmp_path).sde
    assert isinstance(learned, LearnedSchedule)
    start = MonotoneNetwork()
    assert not torch.equal(learned.network.slope, start.slope)


def test_bound_refuses_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bound", tmp_path / "nothing") == 2
    assert "no such folder" in capsys.readouterr().err
