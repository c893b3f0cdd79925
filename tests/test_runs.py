"""A trained model in its folder: what ``load`` gives back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sde_diffusion.build import DataInfo
from sde_diffusion.checkpoint import CheckpointError, read_checkpoint
from sde_diffusion.config import UsageError
from sde_diffusion.data import to_model
from sde_diffusion.likelihood import bits_per_dim, dequantization_noise, log_likelihood
from sde_diffusion.runs import load
from sde_diffusion.sdes import VP
from tiny import NO_REPORT, POINTS, STEPS, command, keywords


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits with labels, some of them hidden in training."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    labelled = {"model.class_conditional": True, "training.label_dropout": 0.2}
    assert command("train", folder, **keywords(NO_REPORT | labelled)) == 0
    return folder


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A run on points in the plane."""
    folder = tmp_path_factory.mktemp("points") / "run"
    exact = {"likelihood.divergence": "exact"}
    assert command("train", folder, **keywords(NO_REPORT | POINTS | exact)) == 0
    return folder


def test_what_is_loaded(digits):
    run = load(digits)
    assert run.sde == VP(t_min=1e-2)
    assert run.step == STEPS
    assert run.info == DataInfo("digits", (1, 8, 8), 17, 10)
    assert run.data.train.shape == (1437, 1, 8, 8)
    assert not run.model.training
    assert not any(p.requires_grad for p in run.model.parameters())
    assert "digits" in repr(run)
    assert "4 steps" in repr(run)


def test_the_averaged_weights_are_loaded_unless_asked_otherwise(digits):
    state = read_checkpoint(digits / "checkpoints" / "latest.pt")
    for ema, weights in ((True, state["ema"]["model"]), (False, state["model"])):
        loaded = load(digits, ema=ema).model.state_dict()
        assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert any(not torch.equal(state["model"][n], state["ema"]["model"][n]) for n in state["model"])


def test_the_score_is_the_models(digits):
    run = load(digits)
    x = torch.randn(3, 1, 8, 8)
    expected = run.model(x, torch.full((3,), 0.3, dtype=torch.float64))
    assert torch.equal(run.score(x, 0.3), expected)
    assert torch.equal(run.score(x, torch.tensor(0.3, dtype=torch.float64)), expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(run.score(x, 0.3).sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize("method", ["pc", "ode"])
def test_a_sample_does_not_depend_on_its_batch(digits, method):
    """Sample i of a seed, labels included, is the same in any batch, up to the network's rounding."""
    run = load(digits)
    whole = run.sample(7, seed=3, method=method)
    assert whole.shape == (7, 1, 8, 8)
    torch.testing.assert_close(
        run.sample(7, seed=3, method=method, batch_size=3), whole, rtol=1e-3, atol=1e-3
    )
    later = run.sample(2, seed=3, method=method, first_index=5)
    torch.testing.assert_close(later, whole[5:], rtol=1e-3, atol=1e-3)
    assert (run.sample(7, seed=4, method=method) - whole).abs().amax((1, 2, 3)).min() > 0.1


def test_sampling_counts_and_options(digits):
    run = load(digits)
    # 3 steps with one corrector each, and the final denoising
    assert run.draw(2).nfe == 7
    assert run.draw(2, corrector="none", denoise=False, steps=5).nfe == 5
    assert (
        run.draw(2, predictor="ddim", corrector="annealed_langevin", corrector_steps=2, denoise=False).nfe
        == 9
    )
    assert run.draw(2, method="ode", solver="heun", ode_steps=4, denoise=False).nfe == 8
    with pytest.raises(UsageError, match=r"'sampling.stepz'; did you mean 'sampling.steps'"):
        run.sample(2, stepz=3)
    with pytest.raises(UsageError, match=r"unknown sampling.predictor 'dimm'; did you mean 'ddim'"):
        run.sample(2, predictor="dimm")


def test_the_precision_of_likelihoods_is_chosen_and_ends_with_it(digits):
    run = load(digits)
    images = run.data.test[:4]
    fine, coarse = run.bits_per_dim(images), run.bits_per_dim(images, precision="bfloat16")
    difference = float((fine - coarse).abs().max())
    assert 0 < difference < 0.05
    assert torch.equal(run.bits_per_dim(images), fine)
    with pytest.raises(UsageError, match="unknown precision 'half'"):
        run.bits_per_dim(images, precision="half")


def test_the_precision_of_sampling_is_chosen_and_ends_with_it(digits):
    run = load(digits)
    exact = run.sample(3)
    coarse = run.sample(3, precision="bfloat16")
    assert run.model.autocast is None
    assert torch.equal(run.sample(3), exact)
    assert coarse.dtype == exact.dtype == torch.float32
    assert 0 < (coarse - exact).abs().max() < 0.1
    with pytest.raises(UsageError, match="unknown precision 'half'"):
        run.sample(3, precision="half")


def test_labels(digits):
    run = load(digits)
    assert run.draw(12).y.tolist() == [*range(10), 0, 1]
    assert run.draw(2, first_index=9).y.tolist() == [9, 0]
    nothing = run.sample(2, y=10)  # "no class"
    assert torch.equal(run.sample(2, y=[10, 10]), nothing)
    assert not torch.equal(run.sample(2, y=3), nothing)
    assert torch.equal(run.sample(2, y=[0, 1]), run.sample(2))
    with pytest.raises(ValueError, match=r"labels must lie in 0 .. 10, .*got 11 to 11"):
        run.sample(2, y=11)
    with pytest.raises(ValueError, match=r"y must be 2 integer labels"):
        run.sample(2, y=[1, 2, 3])


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_number_of_samples_is_a_positive_integer(digits, n):
    with pytest.raises(ValueError, match="n must be an integer >= 1"):
        load(digits).sample(n)


def test_bits_per_dim_is_its_definition(digits):
    """By hand: dequantize, likelihood of the flow, bits."""
    run = load(digits)
    images, labels = run.data.test[:5], run.data.test_labels[:5]
    bits = run.bits_per_dim(images, seed=2, y=labels)
    x = to_model(images, 17, dequantization_noise(images.shape, seed=2))
    out = log_likelihood(run.sde, lambda x, t: run.model(x, t, y=labels), x, divergence="hutchinson", seed=2,
                         rtol=0.9, atol=5.0)  # fmt: skip
    torch.testing.assert_close(bits, bits_per_dim(out.log_prob, 64, 17).double(), rtol=1e-5, atol=0)
    assert not torch.equal(run.bits_per_dim(images, seed=3, y=labels), bits)


def test_bits_per_dim_do_not_depend_on_the_batch(digits):
    run = load(digits)
    images = run.data.test[:5]
    whole = run.bits_per_dim(images)
    assert whole.shape == (5,)
    torch.testing.assert_close(run.bits_per_dim(images, batch_size=2), whole, rtol=1e-4, atol=0)
    torch.testing.assert_close(run.bits_per_dim(images[3:], first_index=3), whole[3:], rtol=1e-4, atol=0)


def test_dequantizations_are_averaged(digits):
    """Two draws are another two noises and probes, and their mean is that of each."""
    run = load(digits)
    images = run.data.test[:3]
    one, two = (run.evaluate(images, dequantizations=n) for n in (1, 2))
    other = 2 * two.log_prob - one.log_prob
    assert torch.all((other - one.log_prob).abs() > 1e-6)
    assert two.nfe >= 8  # evaluations for one likelihood, not for both


def test_images_that_are_none(digits):
    run = load(digits)
    with pytest.raises(
        ValueError, match=r"images must be grey levels 0 .. 16 in an integer tensor, got torch.float32"
    ):
        run.bits_per_dim(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x must have the shape \(B, 1, 8, 8\), got \(2, 8, 8\)"):
        run.bits_per_dim(torch.zeros(2, 8, 8, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match="images must hold grey levels 0 .. 16; images 0, 1 hold others, such as 17"
    ):
        run.bits_per_dim(torch.full((2, 1, 8, 8), 17, dtype=torch.uint8))


def test_points(points):
    run = load(points)
    x = run.data.test[:6]
    expected = log_likelihood(run.sde, run.model, x, divergence="exact", rtol=0.9, atol=5.0)
    torch.testing.assert_close(run.log_likelihood(x), expected.log_prob.double(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="data set 'gaussians8' has vectors; use log_likelihood"):
        run.bits_per_dim(x)
    with pytest.raises(ValueError, match="takes no y"):
        run.sample(2, y=1)
    assert run.sample(5).shape == (5, 2)
    assert math.isfinite(run.draw(5).seconds)


# Folders that are no runs


def test_a_folder_that_is_not_there(digits):
    with pytest.raises(UsageError, match=rf"no such folder; did you mean '{digits}'"):
        load(digits.parent / "rum")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(
        UsageError, match="is not the folder of a run: it has no config.json and no checkpoints"
    ):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="has no checkpoint yet; train it first: --mode train --workdir"):
        load(tmp_path)


@pytest.fixture
def copy(points, tmp_path):
    import shutil

    return shutil.copytree(points, tmp_path / "copy")


def test_without_a_config_file_the_checkpoint_says_what_it_is(copy):
    (copy / "config.json").unlink()
    assert load(copy).info.name == "gaussians8"


def test_a_config_that_was_changed_by_hand(copy):
    path = copy / "config.json"
    stored = json.loads(path.read_text())
    stored["sampling"]["steps"] = 5
    path.write_text(json.dumps(stored))
    assert load(copy).draw(2, corrector="none", denoise=False).nfe == 5
    stored["sde"]["beta_max"] = 10.0
    path.write_text(json.dumps(stored))
    with pytest.raises(
        UsageError, match=r"not the one .* was trained with: sde.beta_max: 20.0 in the checkpoint, 10.0 now"
    ):
        load(copy)
    stored["sde"]["beta_maxx"] = 10.0
    path.write_text(json.dumps(stored))
    with pytest.raises(
        UsageError, match=r"config.json: unknown config key 'sde.beta_maxx'; did you mean 'sde.beta_max'"
    ):
        load(copy)
    path.write_text("{")
    with pytest.raises(UsageError, match=r"config.json: Expecting"):
        load(copy)


def test_damaged_checkpoints(copy):
    for path in (copy / "checkpoints").glob("*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="can be read"):
        load(copy)


def test_data_that_have_changed(copy):
    run = load(copy)
    run.info = DataInfo("gaussians8", (3,), None, None)
    with pytest.raises(UsageError, match=r"data of .* have changed"):
        _ = run.data
