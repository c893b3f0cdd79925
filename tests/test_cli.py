"""The command line: what each mode writes, what is refused and how, and how it is interrupted."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion import evaluation, likelihood_report, run
from sde_diffusion.checkpoint import read_checkpoint
from sde_diffusion.config import config_keys, default_config
from sde_diffusion.runs import load
from sde_diffusion.workdir import Workdir
from tiny import NO_REPORT, POINTS, SETTINGS, STEPS, arguments, command, keywords

ROOT = Path(__file__).parents[1]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits with everything its report has, but for the slow baseline; and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "digits"
    assert command("train", folder, report__baseline=False) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that run, to be changed."""
    return shutil.copytree(trained, tmp_path / "digits")


def fails(capsys, words: list[str], message: str, status: int = 2) -> str:
    """Runs a command line that must fail: with this status, one line on stderr that matches, and no
    traceback."""
    assert run.main(words) == status
    error = capsys.readouterr().err
    assert error.startswith("sde_diffusion: ")
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    return error


# Help


def test_help_names_everything(capsys):
    for flag in ("--help", "-h", "--helpfull"):
        assert run.main([flag]) == 0
        text = capsys.readouterr().out
    for name, key in config_keys().items():
        default = "none" if key.default is None else str(key.default).replace(" ", "")
        assert re.search(rf"^  {re.escape(f'{name}={default}')} +\S", text, re.MULTILINE), name
    for word in (
        "train",
        "sample",
        "likelihood",
        "metrics.json",
        "runs/digits",
        "Ctrl-C",
        "sde_diffusion.load",
    ):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_the_examples_of_the_help_are_understood(capsys, monkeypatch):
    """Each line that begins like a command is parsed, its keys and values included."""
    seen = []
    monkeypatch.setattr(
        run, "JOBS", dict.fromkeys(run.JOBS, lambda config, folder, **_: seen.append((config, folder)))
    )
    monkeypatch.setattr(Workdir, "require_run", lambda self: None)
    monkeypatch.chdir(ROOT)
    run.main(["--help"])
    examples = re.findall(
        r"^  python -m sde_diffusion.run (--mode [a-z].*)$", capsys.readouterr().out, re.MULTILINE
    )
    assert len(examples) >= 5
    for words in examples:
        assert run.main(words.split()) == 0, words
    assert [str(folder) for _, folder in seen] == [
        "runs/digits", "runs/digits_ve", "runs/digits", "runs/digits_ve", "runs/digits", "runs/correctors",
        "runs/cifar10_ve",
    ]  # fmt: skip
    assert seen[1][0].sde.name == "ve"
    assert seen[1][0].training.steps == 3000


# Train


def test_what_training_writes(trained):
    report = metrics(trained)
    assert set(report) == {"run", "training", "samples_pc", "samples_ode", "likelihood", "quality"}
    assert report["run"]["config"]["training"]["steps"] == STEPS
    assert report["run"]["versions"]["torch"] == torch.__version__
    assert report["run"]["machine"]["cpus"] == os.cpu_count()
    assert report["run"]["data"] == {
        "name": "digits", "shape": [1, 8, 8], "levels": 17, "num_classes": 10, "train": 1437, "test": 360,
    }  # fmt: skip
    assert report["training"]["steps"] == STEPS
    assert report["training"]["parameters"] == sum(p.numel() for p in load(trained).model.parameters())
    assert (trained / report["training"]["checkpoint"]).is_file()
    assert report["samples_pc"]["nfe"] == 7
    assert report["samples_pc"]["n"] == 100
    assert report["samples_ode"]["n"] == 100
    assert report["samples_ode"]["settings"]["method"] == "ode"
    assert report["quality"]["n"] == SETTINGS["report.quality_samples"]
    assert set(report["quality"]) >= {"classifier", "two_sample", "memorisation"}
    assert report["likelihood"]["unit"] == "bits/dim"
    for part in ("test", "train"):
        assert report["likelihood"][part]["n"] == 8
        assert report["likelihood"][part]["standard_error"] > 0
    assert json.loads((trained / "config.json").read_text()) == report["run"]["config"]
    pictures = {"samples_pc", "samples_ode", "likelihood", "likelihood_extremes", "nearest_training_images"}
    for name in pictures:
        with Image.open(trained / f"{name}.png") as picture:
            assert min(picture.size) > 100, name
    assert list((trained / "tensorboard").iterdir())
    assert not list(trained.glob(".*"))  # nothing half-written is left


def test_reported_numbers_are_those_of_the_run(trained):
    """The likelihood and the samples of the report, computed again from the folder."""
    run_, report = load(trained), metrics(trained)
    chosen = evaluation.subset(360, 8)
    bits = run_.bits_per_dim(run_.data.test[chosen])
    assert report["likelihood"]["test"]["mean"] == pytest.approx(float(bits.mean()), rel=1e-5)
    assert report["likelihood"]["test"]["standard_error"] == pytest.approx(
        float(bits.std()) / 8**0.5, rel=1e-3
    )
    with open(trained / "likelihood.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["test"] * 8 + ["train"] * 8
    assert [int(row["index"]) for row in rows[:8]] == chosen.tolist()
    assert [int(row["label"]) for row in rows[:8]] == run_.data.test_labels[chosen].tolist()
    assert [float(row["bits_per_dim"]) for row in rows[:8]] == pytest.approx(bits.tolist(), rel=1e-5)
    x = run_.sample(100, method="pc")
    assert report["samples_pc"]["std"] == pytest.approx(float(x.std()), rel=1e-4)


def test_the_same_command_again_resumes_at_the_end(copy, capsys):
    """Nothing is trained again; results of the earlier state are replaced, and switched-off ones removed."""
    before = read_checkpoint(copy / "checkpoints" / "latest.pt")["model"]
    assert command("train", copy, **keywords(NO_REPORT)) == 0
    after = read_checkpoint(copy / "checkpoints" / "latest.pt")["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(metrics(copy)) == {"run", "training"}
    assert "resuming after step 4 of 4" in capsys.readouterr().out


def test_more_steps_and_other_reports_may_follow(copy):
    """More steps, another log, other sampling are no other run."""
    changes = {"training.steps": 6, "training.log_every": 1, "sampling.steps": 2, "report.permutations": 5}
    assert command("train", copy, **keywords(NO_REPORT | changes)) == 0
    assert metrics(copy)["training"]["steps"] == 6
    assert load(copy).config.sampling.steps == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.channels", 32, "model.channels: 16 in the checkpoint, 32 now"),
        ("sde.name", "ve", "sde.name: 'vp' in the checkpoint, 've' now"),
        ("data.shift", 1, "data.shift: 0 in the checkpoint, 1 now"),
        ("training.batch_size", 8, "training.batch_size: 16 in the checkpoint, 8 now"),
    ],
)
def test_another_config_in_the_same_folder_is_refused(trained, capsys, key, value, message):
    before = (trained / "config.json").read_bytes()
    words = arguments("train", trained, **keywords({key: value}))
    fails(
        capsys,
        words,
        rf"another config \(.*{re.escape(message)}.*--config .*config.json\), or another --workdir",
    )
    assert (trained / "config.json").read_bytes() == before


def test_a_stored_config_is_a_config(trained, capsys):
    """``--config FOLDER/config.json`` means the run in that folder."""
    assert run.main(["--mode", "sample", "--config", f"{trained}/config.json", "--config.sampling.n=2"]) == 0
    assert metrics(trained)["samples"]["n"] == 2


def test_points_in_the_plane(tmp_path, capsys):
    """The default parametrization is for images, a switch without a value, and a flag with a space before its
    value."""
    words = arguments("train", tmp_path / "m", **keywords(POINTS | {"likelihood.divergence": "exact"}))
    assert run.main([*words, "--config.training.antithetic", "--config.seed", "3"]) == 0
    report = metrics(tmp_path / "m")
    assert report["run"]["config"]["seed"] == 3
    assert report["run"]["config"]["training"]["antithetic"] is True
    assert report["baseline"] == {"skipped": "the data are vectors"}
    assert report["likelihood"]["unit"] == "nats"
    data = load(tmp_path / "m").data
    exact = data.density.log_prob(data.test[evaluation.subset(40, 8)].double())
    assert report["likelihood"]["test"]["exact"]["mean"] == pytest.approx(float(exact.mean()))
    distances = report["quality"]["sliced_wasserstein"]
    assert distances["samples_vs_exact"]["mean"] > distances["exact_vs_exact"]["mean"] > 0
    assert (tmp_path / "m" / "samples_pc.png").is_file()
    printed = capsys.readouterr().out
    assert "sliced Wasserstein distance: samples to exact" in printed
    assert "nats (8 samples); the true density has" in printed


@pytest.mark.slow
def test_the_whole_default_report(tmp_path, capsys):
    """The parametrization and the report of the default config, the baseline and the preview of samples
    included."""
    words = ["--mode", "train", "--workdir", str(tmp_path / "run"), "--config.training.steps=2"]
    small = {
        "model.channels": 16, "model.blocks_per_level": 1, "training.batch_size": 16,
        "training.eval_size": 16,
        "training.sample_every": 1, "sampling.steps": 2, "sampling.solver": "heun", "sampling.ode_steps": 2,
        "likelihood.test_images": 3, "likelihood.rtol": 0.9, "likelihood.atol": 5.0,
        "report.permutations": 10,
        "report.quality_samples": 50,
    }  # fmt: skip
    assert run.main([*words, *(f"--config.{key}={value}" for key, value in small.items())]) == 0
    report = metrics(tmp_path / "run")
    assert 2.4 < report["baseline"]["test_bits_per_dim"] < 2.8
    summary = capsys.readouterr().out
    for word in (
        "training",
        "samples pc",
        "samples ode",
        "likelihood",
        "baseline",
        "quality",
        "metrics.json",
    ):
        assert f"\n  {word}" in summary or word == "metrics.json"
    assert re.search(r"test: \d\.\d{3} ± \d\.\d{3} bits/dim \(3 samples\)", summary)


def test_a_failed_evaluation_loses_nothing(tmp_path, capsys, monkeypatch):
    """The others are computed, the checkpoint is there, and the exit status says that something is
    missing."""

    def broken(*_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(likelihood_report, "likelihood", broken)
    changes = NO_REPORT | {"report.likelihood": True, "report.pc": True}
    assert command("train", tmp_path / "run", **keywords(changes)) == 1
    report = metrics(tmp_path / "run")
    assert report["likelihood"] == {"error": "RuntimeError: no luck"}
    assert report["samples_pc"]["n"] == 100
    assert load(tmp_path / "run").step == STEPS
    out, err = capsys.readouterr()
    assert "FAILED: RuntimeError: no luck" in out
    assert "sde_diffusion: failed: likelihood (see above). The model is safe in" in err


def test_training_that_diverges(tmp_path, capsys):
    changes = NO_REPORT | {
        "training.learning_rate": 1e30,
        "training.gradient_clip": "none",
        "training.max_skipped_steps": 1,
    }
    words = arguments("train", tmp_path / "run", **keywords(changes | {"training.steps": 20}))
    error = fails(capsys, words, "stopped: 2 steps had a loss or gradient that is not finite", status=1)
    assert "learning_rate" in error


# Sample and likelihood


def test_sample(copy, capsys):
    words = ["--mode", "sample", "--workdir", str(copy), "--config.sampling.n=12", "--config.seed=5"]
    assert run.main([*words, "--config.sampling.predictor=ddim", "--config.sampling.corrector=none"]) == 0
    samples = np.load(copy / "samples.npz")
    expected = load(copy).sample(12, seed=5, predictor="ddim", corrector="none")
    assert np.array_equal(samples["x"], expected.numpy())
    assert samples["levels"].dtype == np.uint8
    assert samples["levels"].max() <= 16
    section = metrics(copy)["samples"]
    assert (section["n"], section["nfe"], section["seed"]) == (12, 4, 5)
    assert "machine" in section
    assert {"training", "quality"} <= set(metrics(copy))  # the rest is still there
    assert "12 in " in capsys.readouterr().out
    assert (copy / "samples.png").is_file()
    assert load(copy).config.seed == 0  # the run keeps its config


def test_likelihood(copy, capsys):
    words = ["--mode", "likelihood", "--workdir", str(copy), "--config.likelihood.test_images=4"]
    assert (
        run.main([*words, "--config.likelihood.train_images=0", "--config.likelihood.dequantizations=2"]) == 0
    )
    section = metrics(copy)["likelihood"]
    assert section["test"]["n"] == 4
    assert "train" not in section
    assert section["settings"]["dequantizations"] == 2
    assert len((copy / "likelihood.csv").read_text().splitlines()) == 5
    assert re.search(r"test: .* bits/dim \(4 samples\)", capsys.readouterr().out)


def test_the_config_of_a_run_is_found_by_its_default_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "digits")
    assert run.main(["--mode", "sample", "--config.sampling.n=1"]) == 0
    assert (tmp_path / "runs" / "digits" / "samples.npz").is_file()


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say what to do: --mode train, sample, dequantize, likelihood"),
        ("--mode trian", "unknown mode 'trian'; did you mean 'train'?"),
        ("--mode", "Missing value for flag --mode"),
        ("--mode train --workdirr x", "unknown flag 'workdirr'; did you mean 'workdir'?"),
        ("--mode train --verbose", "unknown flag 'verbose'; allowed:"),
        ("--mode train please", "unexpected argument 'please'"),
        ("--mode train --config nowhere.py", "there is no config file 'nowhere.py'"),
        ("--mode train --config.training.stepz=3", "'training.stepz'; did you mean 'training.steps'?"),
        ("--mode train --config.steps 3", "did you mean .*'training.steps'"),
        ("--mode train --config.training=3", "'training' is a block of keys"),
        ("--mode train --config.training.steps", "--config.training.steps needs a value"),
        ("--mode train --config.training.steps=abc", "'training.steps' must be of type int, got 'abc'"),
        ("--mode train --config.training.steps=1.5", "'training.steps' must be of type int, got '1.5'"),
        ("--mode train --config.sde.beta_max=x", "'sde.beta_max' must be of type float, got 'x'"),
        ("--mode train --config.data.flip=maybe", "'data.flip' must be of type bool, got 'maybe'"),
        ("--mode train --noconfig.training.steps", "only switches can be negated"),
        ("--mode train --config.sde.beta_max=none", "'sde.beta_max' must be of type float, got 'none'"),
        ("--mode train --config.model.heads=x", "'model.heads' must be of type int, got 'x'"),
        ("--mode train --config.sde.name=vpp", "unknown sde.name 'vpp'; did you mean 'vp'?"),
        ("--mode train --config.sde.beta_min=-1", "config.sde: betas must satisfy"),
        ("--mode train --config.training.steps=-1", "config.training: steps must be an integer >= 1, got -1"),
        ("--mode train --config.model.name=cnn", "unknown model.name 'cnn'; allowed: .*mlp, unet"),
        ("--mode train --config.data.name=digts", "unknown data set 'digts'; did you mean 'digits'?"),
        ("--mode train --config.data.name=idx --config.data.path=nowhere", "config.data: .*nowhere"),
        ("--mode train --config.sampling.predictor=ddmi", "sampling.predictor 'ddmi'; did you mean 'ddim'?"),
        ("--mode train --config.report.quality_method=x", "report.quality_method 'x'; allowed: ode, pc"),
        ("--mode train --config.report.permutations=0", "config.report.permutations must be an integer >= 1"),
        ("--mode train --config.likelihood.divergence=exakt", "did you mean 'exact'?"),
        ("--mode train --config.seed=-1", "seed must be an integer >= 0, got -1"),
        ("--mode train --config.device=gpu", "config.device: unknown device 'gpu'"),
        ("--mode train --tolerance=0.01", "--tolerance is for --mode likelihood"),
        ("--mode likelihood --tolerence=0.01", "unknown flag 'tolerence'; did you mean 'tolerance'"),
        ("--mode sample --workdir nowhere", "there is no run in 'nowhere': no such folder"),
        ("--mode likelihood", "no run in 'runs/digits': no such folder; train one first: --mode train"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing_behind(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, words.split(), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config.sampling.n=0", "config.sampling.n must be an integer >= 1, got 0"),
        ("--config.sampling.steps=0", "config.sampling: .*n >= 1, got 0"),
        (
            "--config.sde.beta_max=10",
            "not the one .* trained with: sde.beta_max: 20.0 in the checkpoint, 10.0 now",
        ),
        ("--config.model.channels=32", "model.channels: 16 in the checkpoint, 32 now"),
        ("--config.seed=-3", "config.seed must be an integer >= 0, got -3"),
    ],
)
def test_mistakes_in_sampling(words, message, capsys, trained):
    before = metrics(trained)
    fails(capsys, ["--mode", "sample", "--workdir", str(trained), *words.split()], message)
    assert metrics(trained) == before


def test_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    words = arguments("train", tmp_path / "file" / "run", **keywords(NO_REPORT))
    fails(capsys, words, "cannot write into .*file/run")


def test_damaged_checkpoints(capsys, copy):
    for path in (copy / "checkpoints").glob("*.pt"):
        path.write_bytes(b"nothing")
    for mode in ("train", "sample"):
        fails(capsys, arguments(mode, copy, report__baseline=False), "none of the checkpoints .* can be read")


def test_damaged_metrics_are_kept_aside(copy):
    (copy / "metrics.json").write_text('{"training": ')
    assert run.main(["--mode", "sample", "--workdir", str(copy), "--config.sampling.n=1"]) == 0
    assert set(metrics(copy)) == {"samples"}
    assert (copy / "metrics.json.damaged").is_file()


# Overrides


def overridden(monkeypatch, *words: str):
    seen = []
    monkeypatch.setattr(run, "JOBS", {"train": lambda config, folder: seen.append((config, str(folder)))})
    assert run.main(["--mode", "train", *words]) == 0
    return seen[0]


def test_a_wanted_tolerance_is_a_flag(monkeypatch, trained, capsys):
    seen = []
    monkeypatch.setitem(
        run.JOBS, "likelihood", lambda config, folder: seen.append(config.likelihood.tolerance)
    )
    words = ["--mode", "likelihood", "--workdir", str(trained)]
    assert run.main([*words, "--tolerance", "0.01"]) == 0
    assert run.main([*words, "--tolerance=0.02"]) == 0
    assert seen == [0.01, 0.02]
    assert run.main([*words, "--tolerance=small"]) == 2
    assert "'likelihood.tolerance' must be of type float, got 'small'" in capsys.readouterr().err


def test_overrides_are_read_as_the_types_of_the_config(monkeypatch):
    config, folder = overridden(
        monkeypatch,
        "--config.model.channel_multipliers=1,2,2",
        "--config.model.attention_levels=()",
        "--config.data.flip",
        "--noconfig.sampling.denoise",
        "--config.data.image_size=(4,6)",
        "--config.training.gradient_clip=none",
        "--config.training.learning_rate",
        "1",
        "--config.training.log_normal_mean",
        "-0.5",
        "--config.model.heads=2",
        "--config.data.path=a=b c",
        "--config.training.steps=1",
        "--config.training.steps=2",
        "--config.model.input_fourier=3,4",
    )
    assert config.model.channel_multipliers == (1, 2, 2)
    assert config.model.attention_levels == ()
    assert config.data.flip is True
    assert config.sampling.denoise is False
    assert config.data.image_size == (4, 6)
    assert config.training.gradient_clip is None
    assert config.training.learning_rate == 1.0
    assert config.training.log_normal_mean == -0.5
    assert config.model.heads == 2
    assert config.data.path == "a=b c"
    assert config.training.steps == 2
    assert config.model.input_fourier == (3, 4)
    assert folder == "runs/digits"
    untouched = overridden(monkeypatch)[0]
    assert untouched == default_config()


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (["--config.data.name=hf:ylecun/mnist"], "runs/hf-ylecun-mnist"),
        (["--config", "configs/digits_ve.py"], "runs/digits_ve"),
        (["--config", "configs/mixture.py:moons"], "runs/mixture_moons"),
        (["--config", "sde_diffusion/default_config.py"], "runs/digits"),
        (["--config", "configs/digits_ve.py", "--workdir", "here"], "here"),
    ],
)
def test_default_folders(monkeypatch, words, folder):
    monkeypatch.chdir(ROOT)
    assert overridden(monkeypatch, *words)[1] == folder


# Interruptions


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training_saves_and_resumes(tmp_path, number, status):
    """A real process: it says how to go on, and the same command does."""
    folder = tmp_path / "run"
    endless = keywords(NO_REPORT | {"training.steps": 100_000})
    words = [sys.executable, "-m", "sde_diffusion.run", *arguments("train", folder, **endless)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while (
        not list(folder.glob("checkpoints/*.pt")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "Traceback" not in error
    assert re.search(
        r"stopped by SIG.* after step \d+ of 100000; saved in .*Run the same command again", error
    )
    step = load(folder).step
    assert step >= 2
    assert command("train", folder, **endless | {"training__steps": step + 1}) == 0
    assert load(folder).step == step + 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_evaluation_is_no_error(tmp_path, capsys, monkeypatch, number, status):
    """After training, when nothing but reports are lost."""

    def interrupted(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(likelihood_report, "likelihood", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    words = arguments("train", tmp_path / "run", **keywords(NO_REPORT | {"report.likelihood": True}))
    # A shell starts what runs in the background with Ctrl-C ignored, and that may be these tests.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run.main(words) == status
    finally:
        signal.signal(signal.SIGINT, ours)
    assert "run the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert load(tmp_path / "run").step == STEPS
