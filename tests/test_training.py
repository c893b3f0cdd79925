"""The training loop: what it learns, and that nothing is lost or disturbed on the way."""

from __future__ import annotations

import copy
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sde_diffusion import devices
from sde_diffusion.data import Batches, DataSet, to_model
from sde_diffusion.ema import EMA, ema_decay
from sde_diffusion.losses import AntitheticDraw, RandomDraw, SimpleWeighting, UniformTime
from sde_diffusion.objective import Objective
from sde_diffusion.sdes import VE, VP
from sde_diffusion.training import TrainingDiverged, TrainingInterrupted
from sde_diffusion.training_settings import learning_rate_factor
from trainings import (
    CPU,
    StandIn,
    assert_equal,
    at_call,
    final_state,
    images,
    mlp,
    scalars,
    seeded,
    send,
    settings,
    trainer,
    vectors,
)

# Learning.


def test_learns_the_score_of_a_gaussian(tmp_path):
    """The held-out loss comes close to that of the exact score, for which there is a closed form."""
    root = torch.tensor([[0.9, 0.0], [0.5, 0.4]], dtype=torch.float64)
    generator = seeded(3)
    x = (torch.randn(6000, 2, dtype=torch.float64, generator=generator) @ root.T).float()
    sde = VP()
    data = DataSet("gaussian", x[:4000], x[4000:])
    long = {"steps": 300, "batch_size": 64, "accumulate": 1, "learning_rate": 5e-3, "warmup_steps": 20}
    t = trainer(tmp_path, mlp(dropout=0.0), data, ema_decay=0.99, eval_size=4000, eval_every=0, **long)
    untrained = t.evaluate()
    result = t.run()
    logs = (torch.linalg.eigvalsh(root @ root.T)).log()[:, None] + sde.log_snr(
        torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)
    )
    exact = float(0.5 * (nn.functional.softplus(logs[:, 0]) - nn.functional.softplus(logs[:, 1])).mean())
    assert exact - 0.3 < result.heldout_loss < exact + 0.4
    assert untrained["eval/heldout_loss"] > 1.5 * exact
    assert result.step == 300 and result.skipped == 0 and result.checkpoint.is_file()


def test_the_exact_score_has_the_exact_heldout_loss(tmp_path):
    """Times, weights, density correction and averaging, with the network taken out of the question."""

    class Exact(StandIn):
        sde = VE()

        def predict_noise(self, x, t):
            variance = self.sde.variance(t)[:, None]
            return (variance.sqrt() * x / (0.25 + variance)).float()

    data = DataSet("gaussian", torch.zeros(9, 3), 0.5 * torch.randn(5000, 3, generator=seeded(0)))
    values = trainer(tmp_path, Exact(), data, eval_size=40_000, batch_size=5000).evaluate()
    low, high = (float(nn.functional.softplus(Exact.sde.log_snr(t) + math.log(0.25))) for t in (1.0, 1e-5))
    width = float(Exact.sde.log_snr(1e-5) - Exact.sde.log_snr(1.0))
    # The mean of three squared normals of variance at most 1, times half the width of the log-SNR.
    standard_error = 0.5 * width * math.sqrt(2 / 3 / 40_000)
    assert values["eval/heldout_loss"] == pytest.approx(0.5 * (high - low), abs=4 * standard_error)


# One step.


def test_accumulation_has_the_gradient_of_the_whole_batch():
    data, model = vectors(), mlp(dropout=0.0)
    nn.init.normal_(model.net.linear_out.weight, std=0.1, generator=seeded(0))
    objective = Objective(settings(), data, model.sde, CPU)
    draws = objective.draw(data.train[:10], None, torch.zeros(10, 0), seeded(0))
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        pieces = list(draws.chunks(parts))
        assert [len(piece) for piece in pieces] == ([10] if parts == 1 else [3, 3, 3, 1])
        for piece in pieces:
            ((piece.weight * piece.errors(model)).sum() / len(draws)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-5 * float(whole.abs().max()) + 1e-9)


def test_accumulated_training_equals_the_big_batch(tmp_path):
    weights = {}
    for parts in (1, 4):
        trainer(tmp_path / str(parts), mlp(dropout=0.0), accumulate=parts, steps=8).run()
        weights[parts] = final_state(tmp_path / str(parts))["ema"]["model"]
    for name, value in weights[1].items():
        torch.testing.assert_close(value, weights[4][name], rtol=1e-3, atol=1e-5)


def test_a_step_is_adam_on_the_clipped_gradient(tmp_path):
    """One step of the trainer against the update written out."""
    t = trainer(
        tmp_path,
        mlp(dropout=0.0),
        steps=1,
        warmup_steps=0,
        gradient_clip=0.5,
        accumulate=1,
        schedule="constant",
    )
    reference = mlp(dropout=0.0)
    batch = Batches(t.data.train, 16, seed=0).batch(0)
    draws = t.objective.draw(batch.x, None, batch.augmentation, seeded(0))
    (draws.weight * draws.errors(reference)).mean().backward()
    gradients = [p.grad for p in reference.parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert norm > 0.5
    t.run()
    for p, g, new in zip(reference.parameters(), gradients, t.model.parameters(), strict=True):
        g = g * (0.5 / norm)
        # After one step the bias-corrected moments are g and g^2.
        expected = p.detach() - 3e-3 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(new.detach(), expected, rtol=1e-4, atol=1e-6)
    assert scalars(tmp_path)["train/gradient_norm"] == [(1, pytest.approx(norm, rel=1e-5))]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(3, 2))),
        lambda model: model.double(),
        lambda model: setattr(model[1], "running_mean", model[1].running_mean + 1),
    ],
    ids=["assigned", "another weight", "converted", "another buffer"],
)
def test_ema_follows_what_replaces_a_tensor(change: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = EMA(model, 0.0)
    ema.update_parameters(model)
    change(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), model[1].running_mean):
            tensor.fill_(5.0)
    ema.module.to(model[0].weight.dtype)
    ema.update_parameters(model)
    for tensor in (*ema.module.parameters(), ema.module[1].running_mean):
        assert bool((tensor == 5.0).all())


def test_ema_of_what_has_no_weights_and_of_another_model() -> None:
    ema = EMA(nn.Identity(), 0.9)
    ema.update_parameters(nn.Identity())
    assert ema.updates == 1
    with pytest.raises(ValueError, match="other parameters"):
        ema.update_parameters(nn.Linear(2, 2))
    ema = copy.deepcopy(EMA(nn.Linear(2, 2), 0.9))
    ema.update_parameters(nn.Linear(2, 2))


def test_ema_follows_its_formula():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.3)
    expected = None
    for k in range(6):
        with torch.no_grad():
            for p in model.parameters():
                p.uniform_(generator=seeded(k))
            model[1].running_mean.fill_(k)
        ema.update_parameters(model)
        now = [p.detach().clone() for p in model.parameters()]
        d = min(0.3, (1 + k) / (10 + k))
        expected = (
            now if expected is None else [d * e + (1 - d) * n for e, n in zip(expected, now, strict=True)]
        )
        for p, e in zip(ema.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach(), e)
        assert float(ema.module[1].running_mean[0]) == k
        assert ema.updates == k + 1
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    assert [ema_decay(0.999, k) for k in (0, 8, 10**6)] == [0.1, 0.5, 0.999]
    with pytest.raises(ValueError, match=r"ema decay must be in \[0, 1\), got 1.0"):
        EMA(model, 1.0)


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, place):
    t = trainer(
        tmp_path, mlp(dropout=0.0), accumulate=1, steps=6, log_every=1, max_skipped_steps=1, eval_every=0
    )
    before = {}

    def poison():
        before.update({name: value.clone() for name, value in t.model.state_dict().items()})
        weight = t.model.net.linear_out.weight
        if place == "loss":
            handle = t.model.net.register_forward_hook(lambda *a: (handle.remove(), a[2] * math.nan)[1])
        else:
            handle = weight.register_hook(lambda g: (handle.remove(), g + math.inf)[1])

    at_call(t.model.net, 4, poison)
    after = {}
    at_call(t.model.net, 5, lambda: after.update({n: v.clone() for n, v in t.model.state_dict().items()}))
    result = t.run()
    assert result.skipped == 1 and result.step == 6
    assert before and after
    assert_equal(after, before)
    assert t.ema.updates == 5
    assert all(bool(torch.isfinite(p).all()) for p in t.model.parameters())
    values = scalars(tmp_path)
    assert [value for _, value in values["train/skipped_steps"]] == [0, 0, 0, 1, 1, 1]
    assert [step for step, _ in values["train/loss"]] == [1, 2, 3, 5, 6]
    assert all(math.isfinite(value) for tag in values.values() for _, value in tag)
    assert final_state(tmp_path)["skipped"] == 1


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    model = mlp()
    model.net.register_forward_hook(lambda module, inputs, output: output * math.nan)
    t = trainer(tmp_path, model, max_skipped_steps=3, steps=50, checkpoint_every=2)
    message = r"4 steps had a loss .* not finite, and max_skipped_steps is 3\. .*step 4: loss nan"
    with pytest.raises(TrainingDiverged, match=message):
        t.run()
    assert all(bool(torch.isfinite(p).all()) for p in t.model.parameters())


# Data and conditions.


def test_images_are_dequantized_afresh_at_every_step():
    data = images()
    objective = Objective(settings(), data, VP(), CPU)
    generator = seeded(0)
    x = data.train[:8]
    first, second = (objective.draw(x, None, torch.zeros(8, 0), generator) for _ in range(2))
    assert not torch.equal(first.x0, second.x0) and not torch.equal(first.noise, second.noise)
    for draws in (first, second):
        position = (draws.x0 + 1) / 2 * 5 - x
        assert float(position.min()) > 0 and float(position.max()) < 1
    uniforms = torch.rand(x.shape, generator=seeded(0))
    assert torch.equal(first.x0, to_model(x, 5, uniforms))


def test_labels_are_given_and_dropped():
    data = vectors(labels=True)
    objective = Objective(settings(conditional=True, label_dropout=0.25), data, VP(), CPU)
    generator = seeded(0)
    y = data.train_labels
    drawn = torch.stack(
        [objective.draw(data.train, y, torch.zeros(50, 0), generator).cond["y"] for _ in range(40)]
    )
    dropped = drawn == data.num_classes
    assert torch.equal(torch.where(dropped, y, drawn), y.expand(40, -1))
    assert abs(float(dropped.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert objective.draw(data.train, None, torch.zeros(50, 0), generator).cond == {}
    silent = Objective(settings(), data, VP(), CPU)
    assert silent.draw(data.train, y, torch.zeros(50, 0), generator).cond == {}


def test_conditional_training_runs_and_needs_labels(tmp_path):
    result = trainer(
        tmp_path, mlp(num_classes=2), vectors(labels=True), conditional=True, label_dropout=0.1
    ).run()
    assert math.isfinite(result.heldout_loss)
    with pytest.raises(
        ValueError, match="conditional training needs labels, and data set 'vectors' has none"
    ):
        trainer(tmp_path, conditional=True)


def test_augmentation_is_told_only_where_it_is_wanted():
    applied = torch.ones(8, 2)
    draw = dict(x=images().train[:8], labels=None, augmentation=applied, generator=torch.Generator())
    assert Objective(settings(), images(), VP(), CPU).draw(**draw).cond == {}
    told = Objective(settings(condition_on_augmentation=True), images(), VP(), CPU)
    assert torch.equal(told.draw(**draw).cond["augment"], applied)
    assert told.draw(**{**draw, "augmentation": torch.zeros(8, 0)}).cond == {}


def test_the_density_correction_is_optional():
    values = {
        "weighting": SimpleWeighting(),
        "time_sampler": UniformTime(),
        "time_draw": AntitheticDraw(RandomDraw()),
    }
    for correct, weight in ((True, VP().t_max - VP().t_min), (False, 1.0)):
        objective = Objective(settings(density_correction=correct, **values), vectors(), VP(), CPU)
        draws = objective.draw(vectors().train, None, torch.zeros(50, 0), seeded(0))
        np.testing.assert_allclose(draws.weight, weight, rtol=1e-6)
        assert draws.t.dtype == torch.float64


# Reports.


def test_tensorboard_has_everything(tmp_path):
    trainer(tmp_path, sample_every=5, steps=10).run(lambda step, model: {"grid": torch.rand(1, 8, 8)})
    values = scalars(tmp_path)
    assert {"train/loss", "train/gradient_norm", "train/learning_rate", "train/samples_per_second",
            "train/skipped_steps", "eval/train_loss", "eval/heldout_loss"} <= set(values)  # fmt: skip
    assert len([tag for tag in values if tag.startswith("train_error/log_snr_")]) == 5
    assert len([tag for tag in values if tag.startswith("eval_heldout_error/log_snr_")]) == 5
    assert [step for step, _ in values["eval/heldout_loss"]] == [5, 10]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Images("grid")] == [5, 10]


def test_noise_levels_split_the_errors(tmp_path):
    """The error of a network that predicts no noise at all is 1 at every level."""

    class Zero(StandIn):
        sde = VP()

        def predict_noise(self, x, t):
            return 0 * x

    values = trainer(tmp_path, Zero(), eval_size=5000, batch_size=500).evaluate()
    levels = {tag: value for tag, value in values.items() if tag.startswith("eval_heldout_error/")}
    assert len(levels) == 5
    for value in levels.values():
        assert value == pytest.approx(1.0, abs=4 * math.sqrt(2 / 2000))


def test_evaluations_repeat_exactly_and_disturb_nothing(tmp_path):
    t = trainer(tmp_path)
    state, mine = torch.get_rng_state(), t.generator.get_state()
    first, second = t.evaluate(), t.evaluate()
    assert first == second
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(mine, t.generator.get_state())


# Time and signals.


def test_learning_rate():
    s = settings(steps=110, warmup_steps=10, schedule="cosine")
    assert [learning_rate_factor(s, k) for k in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [learning_rate_factor(s, k) for k in (10, 60, 110)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate_factor(settings(steps=110, schedule="constant"), 100) == 1.0
    assert learning_rate_factor(settings(warmup_steps=0), 0) == 1.0
    timed = settings(steps=10**6, warmup_steps=0, minutes=2.0)
    assert learning_rate_factor(timed, 5, elapsed=60.0) == pytest.approx(0.5, abs=1e-4)
    assert learning_rate_factor(timed, 5, elapsed=500.0) == pytest.approx(0.0, abs=1e-9)


def test_a_wall_clock_budget_ends_the_run(tmp_path):
    start = time.monotonic()
    result = trainer(tmp_path, steps=10**6, minutes=0.02, log_every=0, eval_every=0, checkpoint_every=0).run()
    assert result.seconds >= 1.2 and time.monotonic() - start < 30
    assert 0 < result.step < 10**6 and math.isfinite(result.heldout_loss)
    assert final_state(tmp_path)["step"] == result.step
    assert trainer(tmp_path, steps=10**6, minutes=0.02).run().step == result.step


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    t = trainer(tmp_path)
    at_call(t.model.net, 4, lambda: (send(signal.SIGINT), send(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        t.run()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside_saves_and_the_same_command_resumes(tmp_path, number):
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            import torch
            sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
            from test_training import trainer, TrainingInterrupted
            torch.set_num_threads(1)
            changes = dict(checkpoint_every=0, schedule="constant")
            t = trainer({str(tmp_path / "run")!r}, steps=int(sys.argv[1]), **changes)
            t.model.net.register_forward_pre_hook(lambda *_: print("training", flush=True))
            try:
                t.run()
            except TrainingInterrupted as stop:
                print(stop)
                raise SystemExit(7)
            """
        )
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        [*command, "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert f"{number.name}: finishing this step, then saving" in err
    assert f"stopped by {number.name} after step" in out and "Run the same command again" in out
    done = final_state(tmp_path / "run")["step"]
    assert done >= 1
    again = subprocess.run([*command, str(done + 5)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert final_state(tmp_path / "run")["step"] == done + 5
    trainer(tmp_path / "whole", steps=done + 5, checkpoint_every=0, schedule="constant").run()
    assert_equal(final_state(tmp_path / "run")["model"], final_state(tmp_path / "whole")["model"])


# Precision and compilation.


def test_bfloat16_is_for_the_network_alone(tmp_path):
    t = trainer(tmp_path, precision="bfloat16", steps=2)
    seen = []
    t.model.net.stem.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = t.run()
    assert seen[0] == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    assert result.model.autocast is None and math.isfinite(result.heldout_loss)


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_cpus_train_in_bfloat16_where_they_compute_in_it(tmp_path, monkeypatch, has_bfloat16):
    monkeypatch.setattr(devices, "computes_in_bfloat16", lambda: has_bfloat16)
    wanted = torch.bfloat16 if has_bfloat16 else None
    assert trainer(tmp_path, precision="auto").model.autocast is wanted
    assert trainer(tmp_path, precision="float32").model.autocast is None


@pytest.mark.slow
def test_compiled_training_equals_eager_training(tmp_path):
    for name, compiled in (("a", False), ("b", True)):
        trainer(tmp_path / name, mlp(dropout=0.0), compile=compiled, accumulate=1, steps=4).run()
    a, b = (final_state(tmp_path / name)["ema"]["model"] for name in "ab")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_resumes(tmp_path):
    first = trainer(tmp_path, device="cuda", precision="float32")
    at_call(first.model.net, 14, send)
    with pytest.raises(TrainingInterrupted):
        first.run()
    result = trainer(tmp_path, device="cuda", precision="float32").run()
    assert result.step == 11 and math.isfinite(result.heldout_loss)
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer >= 1, got 2.0"),
        ({"accumulate": 17}, "accumulate must be at most batch_size, 16, got 17"),
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        ({"log_every": True}, "log_every must be an integer >= 0, got True"),
        ({"eval_size": 0}, "eval_size must be an integer >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be a number > 0, got nan"),
        ({"learning_rate": "1e-3"}, "learning_rate must be a number > 0, got '1e-3'"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"beta2": 1.0}, "beta2 must be a number >= 0 and < 1, got 1.0"),
        ({"ema_decay": 1.5}, "ema_decay must be a number >= 0 and < 1, got 1.5"),
        ({"gradient_clip": 0}, "gradient_clip must be a number > 0, got 0"),
        ({"minutes": -1}, "minutes must be a number > 0, got -1"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"optimizer": "adm"}, "unknown optimizer 'adm'; did you mean 'adam'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"precision": "bf16"}, "unknown precision 'bf16'.*allowed: auto, bfloat16, float32"),
        ({"device": "gpu"}, "unknown device 'gpu'.*allowed: auto, cpu, cuda"),
        ({"weighting": "simple"}, r"weighting must be an object of sde_diffusion.losses, got 'simple'"),
        ({"label_dropout": 0.1}, "label_dropout is 0.1, but conditional is False"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path):
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no GPU"):
        trainer(tmp_path, device="cuda")


def test_a_config_that_is_not_plain_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"config\.sde must be made of .*, got VP\("):
        trainer(tmp_path, config={"sde": VP()})
