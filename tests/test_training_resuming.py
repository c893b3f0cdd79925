"""Runs that were interrupted: they go on to the same bits, and another run in the folder is refused."""

from __future__ import annotations

import pytest
import torch

from sde_diffusion.checkpoint import CheckpointError
from sde_diffusion.data import Augmentation
from sde_diffusion.networks import MLP, UNet, channels_last
from sde_diffusion.objective import Objective
from sde_diffusion.optimizers import layer_matrices
from sde_diffusion.score import ScoreModel
from sde_diffusion.sdes import VP
from sde_diffusion.training import TrainingInterrupted, TrainingSettings
from trainings import (
    assert_equal,
    assert_same_run,
    at_call,
    final_state,
    images,
    mlp,
    next_second,
    scalars,
    send,
    trainer,
    vectors,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    trainer(workdir).run()
    return workdir


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 11])
def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, uninterrupted, step):
    """Weights, average, optimizer, dropout, random states, data, TensorBoard; stopped anywhere."""
    first = trainer(tmp_path)
    at_call(first.model.net, 3 * (step - 1) + 2, send)
    with pytest.raises(TrainingInterrupted, match=f"stopped by SIGTERM after step {step} of 11") as stopped:
        first.run()
    assert stopped.value.step == step and stopped.value.checkpoint.is_file()
    assert "Run the same command again to resume" in str(stopped.value)
    next_second()
    torch.manual_seed(99)  # whatever state a new process starts from
    result = trainer(tmp_path, mlp(seed=77)).run()
    assert result.step == 11
    assert_same_run(tmp_path, uninterrupted)
    a, b = scalars(tmp_path), scalars(uninterrupted)
    a.pop("train/samples_per_second"), b.pop("train/samples_per_second")
    assert a == b and [s for s, _ in a["train/loss"]] == [4, 8, 11]


def test_muon_continues_to_the_same_bits(tmp_path):
    def make(workdir):
        return trainer(tmp_path / workdir, optimizer="muon", learning_rate=0.01, weight_decay=0.1)

    assert len(layer_matrices(make("a").model)) > 1
    make("a").run()
    first = make("b")
    at_call(first.model.net, 3 * 4 + 2, send)
    with pytest.raises(TrainingInterrupted):
        first.run()
    make("b").run()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    with pytest.raises(CheckpointError, match="optimizer"):
        trainer(tmp_path / "a", optimizer="adam", learning_rate=0.01, weight_decay=0.1).run()


def test_a_killed_run_continues_from_its_last_checkpoint(tmp_path, uninterrupted):
    """A crash without warning after step 8: steps 7 and 8 are done again, and TensorBoard shows them once."""

    def crash():
        raise MemoryError

    first = trainer(tmp_path)
    at_call(first.model.net, 3 * 8 + 1, crash)
    with pytest.raises(MemoryError):
        first.run()
    assert final_state(tmp_path)["step"] == 6
    next_second()
    trainer(tmp_path).run()
    assert_same_run(tmp_path, uninterrupted)
    assert scalars(tmp_path)["train/loss"] == scalars(uninterrupted)["train/loss"]


def test_a_truncated_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, uninterrupted):
    first = trainer(tmp_path)
    at_call(first.model.net, 3 * 7 + 1, send)
    with pytest.raises(TrainingInterrupted):
        first.run()
    path = tmp_path / "checkpoints" / "step-00000008.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"step-00000008\.pt .*falling back to .*step-00000006\.pt"):
        trainer(tmp_path).run()
    assert_same_run(tmp_path, uninterrupted)


def test_reports_and_checkpoints_do_not_disturb_training(tmp_path, uninterrupted):
    calls = []

    def on_sample(step, model):
        calls.append(step)
        assert not model.training
        torch.randn(3), torch.manual_seed(5)  # uses the global random state
        return torch.rand(1, 4, 4)

    changes = dict(
        eval_every=1, sample_every=2, log_every=1, checkpoint_every=1, eval_size=7, keep_checkpoints=4
    )
    trainer(tmp_path, **changes).run(on_sample)
    assert calls == [2, 4, 6, 8, 10, 11]
    assert_same_run(tmp_path, uninterrupted, skip=("seconds", "loss", "identity", "window"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(12)
    before = torch.get_rng_state()
    trainer(tmp_path).run()
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name) * seed + 3)
        trainer(tmp_path / name, seed=seed).run()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    a, c = (final_state(tmp_path / name)["model"] for name in "ac")
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_a_finished_run_reports_again_and_trains_no_more(tmp_path):
    first = trainer(tmp_path).run()
    again = trainer(tmp_path).run()
    assert (again.step, again.heldout_loss, again.loss) == (11, first.heldout_loss, first.loss)
    assert_equal(again.model.state_dict(), first.model.state_dict())


def test_more_steps_go_on_from_the_end(tmp_path):
    trainer(tmp_path / "a", schedule="constant").run()
    trainer(tmp_path / "a", schedule="constant", steps=17).run()
    trainer(tmp_path / "b", schedule="constant", steps=17).run()
    a, b = final_state(tmp_path / "a"), final_state(tmp_path / "b")
    assert_equal(a["model"], b["model"])
    assert_equal(a["ema"], b["ema"])


def test_a_run_on_images_in_bfloat16_resumes_in_either_layout(tmp_path, monkeypatch):
    """To the same bits in the same layout of the weights, to rounding in the other."""

    def make(workdir, last):
        monkeypatch.setattr(channels_last, "available", lambda: last)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = UNet(1, channels=16, channel_multipliers=(1, 1), blocks_per_level=1)
        numbers = {"steps": 8, "batch_size": 8, "checkpoint_every": 4, "precision": "bfloat16"}
        made = trainer(tmp_path / workdir, ScoreModel(net, VP()), images(), learning_rate=1e-3, **numbers)
        weights = made.model.net.encoder[0][0].block.conv1.weight
        assert weights.is_contiguous() is not last
        return made

    def interrupted(workdir, first, then):
        run = make(workdir, first)
        at_call(run.model.net, 8, send)
        with pytest.raises(TrainingInterrupted, match="after step 3 of 8"):
            run.run()
        run = make(workdir, then)
        result = run.run()
        assert all(state["exp_avg"].stride() == p.stride() for p, state in run.optimizer.state.items())
        assert all(p.is_contiguous() for p in result.model.parameters())
        return result.model

    whole = make("whole", True).run().model
    start = make("start", False).model
    same, other = interrupted("same", True, True), interrupted("other", False, True)
    assert_same_run(tmp_path / "whole", tmp_path / "same")
    far, near = (
        sum(
            float((a - b).detach().square().sum())
            for a, b in zip(m.parameters(), whole.parameters(), strict=True)
        )
        for m in (start, other)
    )
    # Adam divides gradients by their own size, so that the rounding of the small ones moves weights too.
    assert 0 < near < 0.1 * far
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), whole.parameters(), strict=True))


def test_images_with_augmentation_resume_too(tmp_path):
    def make(workdir):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = UNet(1, channels=8, channel_multipliers=(1, 1), blocks_per_level=1, dropout=0.1)
        both = Augmentation(flip=True, shift=1)
        numbers = {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "channels_last": True}
        return trainer(workdir, ScoreModel(net, VP()), images(), augmentation=both, **numbers)

    make(tmp_path / "a").run()
    first = make(tmp_path / "b")
    at_call(first.model.net, 8, send)
    with pytest.raises(TrainingInterrupted):
        first.run()
    make(tmp_path / "b").run()
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_gpu"), [(None, False, True), (True, True, True), (False,) * 3]
)
def test_the_memory_format_is_the_devices_unless_told(asked, on_cpu, on_gpu):
    settings = TrainingSettings(channels_last=asked)
    for device, expected in (("cpu", on_cpu), ("cuda", on_gpu)):
        assert Objective(settings, images(), VP(), torch.device(device)).channels_last is expected
    with pytest.raises(ValueError, match="channels_last must be True, False or None, got 'yes'"):
        TrainingSettings(channels_last="yes")


# Another run in the folder.


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    trainer(tmp_path, config={"sde": {"beta_max": 20.0}, "sampling": {"n": 1}}).run()
    with pytest.raises(CheckpointError) as error:
        trainer(
            tmp_path, mlp(sde=VP(beta_max=15.0)), config={"sde": {"beta_max": 15.0}, "sampling": {"n": 2}},
            learning_rate=1.0, log_every=1,
        ).run()  # fmt: skip
    text = str(error.value)
    assert "of a run with another configuration" in text
    assert "sde.beta_max: 20.0 in the checkpoint, 15.0 now" in text
    assert "settings.learning_rate: 0.003 in the checkpoint, 1.0 now" in text
    assert "model.sde: 'VP(" in text
    assert "sampling" not in text and "log_every" not in text


def test_other_weights_are_refused_with_the_differences(tmp_path):
    trainer(tmp_path).run()
    other = ScoreModel(MLP(2, width=20, depth=2, dropout=0.2), VP())
    with pytest.raises(
        CheckpointError, match=r"of another model:(.|\n)*missing: net.blocks.1(.|\n)*shape: net.stem"
    ):
        trainer(tmp_path, other).run()


def test_another_data_set_is_refused(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(CheckpointError, match=r"data.shape\[?.*\[50, 2\] in the checkpoint, \[40, 2\] now"):
        trainer(tmp_path, data=vectors(40)).run()
