"""Variational dequantization: the flow against quadrature and autograd, its training against exact probabilities of
grey levels, and the mode of the command line."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import mixture_2d
from sde_diffusion.checkpoint import read_checkpoint
from sde_diffusion.data.dataset import DataSet
from sde_diffusion.dequantization import cell_log_volume, combine, dequantized
from sde_diffusion.dequantization_loss import CellTime, DequantizationLoss, FlowModel, denoising_bound
from sde_diffusion.losses import SimpleWeighting
from sde_diffusion.networks.dequantization_flow import DequantizationFlow
from sde_diffusion.networks.splines import parameter_count, spline, spline_inverse
from sde_diffusion.training import Trainer, TrainingSettings
from tiny import NO_REPORT, command, keywords

SIZES = {"layers": 3, "channels": 8, "bins": 5}


def random_flow(shape: tuple[int, int, int], levels: int, seed: int = 0) -> DequantizationFlow:
    """A flow far from uniform; in float64, in which its derivatives can be compared."""
    flow = DequantizationFlow(shape, levels, **SIZES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.requires_grad_(False).copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return flow


def uniforms(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# Splines -------------------------------------------------------------------------------------------------


def test_a_spline_is_a_distribution_function_with_its_density_and_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(500, parameter_count(8), dtype=torch.float64, generator=generator)
    x = uniforms(500).requires_grad_()
    y, log_density = spline(x, parameters)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert_close(log_density, slope.log())
    back, same = spline_inverse(y.detach(), parameters)
    assert_close(back, x.detach(), rtol=0, atol=1e-8)
    assert_close(same, log_density.detach(), rtol=0, atol=1e-6)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None].expand(-1, 5)
    values, densities = spline(grid, parameters[:5].expand(20_001, 5, -1))
    assert bool((values.diff(dim=0) > 0).all())
    assert_close(values[[0, -1]], grid[[0, -1]])
    assert_close(torch.trapezoid(densities.exp(), grid, dim=0), torch.ones(5).double(), rtol=0, atol=1e-3)
    y, log_density = spline(x.detach(), torch.zeros(500, 25, dtype=torch.float64))
    assert_close(y, x.detach())
    assert_close(log_density, torch.zeros_like(y))


# The flow ------------------------------------------------------------------------------------------------


def test_a_new_flow_is_uniform_dequantization() -> None:
    image = torch.randint(0, 17, (3, 2, 4, 4))
    u, log_q = DequantizationFlow((2, 4, 4), 17)(uniforms(3, 2, 4, 4), image)
    assert_close(u, uniforms(3, 2, 4, 4))
    assert_close(log_q, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (2, 1, 1)])
def test_it_integrates_to_one_within_a_cell(shape: tuple[int, int, int], levels: int) -> None:
    flow, dims = random_flow(shape, levels), math.prod(shape)
    axis = (torch.arange(120, dtype=torch.float64) + 0.5) / 120
    grid = torch.cartesian_prod(*[axis] * dims).reshape(-1, *shape)
    for level in (0, levels // 3, levels - 1):
        log_q = flow.log_prob(grid, torch.full_like(grid, level).long())
        assert float(log_q.exp().mean()) == pytest.approx(1, abs=2e-3)
        assert float(log_q.std()) > 0.02


def test_its_density_is_the_determinant_of_autograd() -> None:
    flow = random_flow((1, 2, 3), 17).double()
    image = torch.randint(0, 17, (4, 1, 2, 3), generator=torch.Generator().manual_seed(0))
    z = uniforms(4, 1, 2, 3)
    u, log_q = flow(z, image)
    for i in range(4):

        def one(a: Tensor, i: int = i) -> Tensor:
            return flow(a.reshape(1, 1, 2, 3), image[i : i + 1])[0].flatten()

        jacobian = torch.autograd.functional.jacobian(one, z[i].flatten())
        assert_close(-torch.linalg.slogdet(jacobian)[1], log_q[i], rtol=0, atol=1e-6)
    assert_close(flow.log_prob(u, image), log_q, rtol=0, atol=1e-6)
    assert float(log_q.abs().min()) > 0.01


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
def test_places_stay_in_their_cells(levels: int, data_range: tuple[float, float]) -> None:
    kind = sd.VariationalDequantization(random_flow((1, 8, 8), levels))
    image = torch.arange(levels).repeat(64).reshape(levels, 1, 8, 8)
    v, log_q = dequantized(kind, image, levels, data_range=data_range, seed=1)
    low, high = data_range
    assert v.dtype == torch.float32 and log_q.shape == (levels,)
    assert torch.equal(((v.double() - low) / (high - low) * levels).floor().long(), image)
    part, part_q = dequantized(kind, image[1:], levels, data_range=data_range, seed=1, first_index=1)
    assert_close(part, v[1:])
    assert_close(part_q, log_q[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DequantizationFlow((2,), 4), r"images \(C, H, W\), got the shape \(2,\)"),
        (lambda: DequantizationFlow((1, 1, 2), 1), "levels must be an integer >= 2, got 1"),
        (lambda: DequantizationFlow((1, 1, 2), 4, bins=0), "bins must be an integer >= 1, got 0"),
        (
            lambda: DequantizationFlow((1, 1, 2), 4)(torch.rand(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)),
            r"images of shape \(B, 1, 1, 2\), got images \(1, 1, 2, 2\)",
        ),
        (
            lambda: dequantized(
                sd.VariationalDequantization(DequantizationFlow((1, 1, 2), 4)), torch.zeros(1, 1, 1, 2), 5
            ),
            "the dequantization flow is for 4 grey levels, got 5",
        ),
        (lambda: CellTime(0.1)(sd.VP(t_min=0.0), uniforms(4)), "log-SNR is finite"),
    ],
)
def test_what_does_not_fit_is_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# The loss and the training -------------------------------------------------------------------------------


def image_mixture() -> sd.GaussianMixture:
    """The mixture in the plane as images of two pixels."""
    flat = mixture_2d()
    return sd.GaussianMixture(flat.weights, flat.means.reshape(-1, 1, 1, 2), flat.covariances)


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.SubVP()], ids=["vp", "ve", "subvp"])
def test_the_bound_that_trains_is_the_density_where_the_score_is_exact(sde: sd.SDE) -> None:
    mixture, n = image_mixture(), 8000
    generator = torch.Generator().manual_seed(0)
    x = mixture.sample(1, generator).expand(n, 1, 1, 2)
    # Independent uniform numbers, so that the standard error is that of independent terms.
    t, weight = CellTime(1.5)(sde, torch.rand(n, dtype=torch.float64, generator=generator))
    total = float(sde.log_snr(sde.t_min) - sde.log_snr(sde.t_max)) + 1
    assert float(weight.mean()) == pytest.approx(total, abs=4 * float(weight.std()) / n**0.5)
    assert float(weight.max()) <= 4 * total + 1e-6
    noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    bound = denoising_bound(sde, mixture.score(sde), x, t, noise, weight)
    exact = -float(mixture.marginal_log_prob(sde, x[:1], sde.t_min))
    # Data at t_min are those of the process: VE begins with noise of 0.01.
    assert float(bound.mean()) == pytest.approx(exact, abs=4 * float(bound.std()) / n**0.5 + 0.02)


LEVELS, RANGE, CELLS = 8, (-4.0, 4.0), 60


def exact_log_probabilities(mixture: sd.GaussianMixture, images: Tensor) -> Tensor:
    """``log P(k)`` by the midpoint rule in the cell, (B,)."""
    axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    u = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    width = (RANGE[1] - RANGE[0]) / LEVELS
    found = [mixture.log_prob(RANGE[0] + width * (k + u)).logsumexp(0) for k in images.double()]
    return torch.stack(found) - math.log(len(u)) + cell_log_volume(2, LEVELS, RANGE)


def fitted(folder: Path, mixture: sd.GaussianMixture, sde: sd.SDE) -> DequantizationFlow:
    """A flow trained on grey levels of the mixture, by its exact score."""
    width = (RANGE[1] - RANGE[0]) / LEVELS
    x = mixture.sample(4000, torch.Generator().manual_seed(1))
    images = ((x - RANGE[0]) / width).floor().clamp(0, LEVELS - 1).to(torch.uint8)
    times = CellTime(width)
    settings = TrainingSettings(
        steps=100, batch_size=192, learning_rate=1e-2, warmup_steps=10, ema_decay=0.97, precision="float32",
        loss=DequantizationLoss(mixture.score(sde), LEVELS, times, RANGE), weighting=SimpleWeighting(),
        time_sampler=times, density_correction=False, eval_every=0, eval_size=128, checkpoint_every=0,
    )  # fmt: skip
    torch.manual_seed(0)
    flow = DequantizationFlow((1, 1, 2), LEVELS, layers=3, channels=16, bins=8)
    data = DataSet("mixture", images[:3900], images[3900:], levels=LEVELS)
    result = Trainer(FlowModel(flow, sde), data, settings, folder, progress=False).run()
    return result.model.flow  # type: ignore[union-attr, return-value]


@pytest.mark.slow
def test_training_narrows_the_gap_that_uniform_noise_leaves(tmp_path: Path) -> None:
    """Bounds rise with K towards the exact probability and stay below; a hundred steps already narrow the gap."""
    mixture = image_mixture()
    kinds = {"variational": sd.VariationalDequantization(fitted(tmp_path, mixture, sd.VP()))}
    kinds["uniform"] = sd.UniformDequantization()
    axis = torch.arange(LEVELS)
    images = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    exact = exact_log_probabilities(mixture, images)
    assert float(exact.exp().sum()) == pytest.approx(1, abs=2e-3)
    repeats, draws = 30, 16
    repeated = images.repeat_interleave(repeats, 0)
    gaps: dict[tuple[str, int], float] = {}
    for name, kind in kinds.items():
        ratios = []
        for draw in range(draws):
            v, log_q = dequantized(kind, repeated, LEVELS, data_range=RANGE, draw=draw)
            ratios.append(mixture.log_prob(v.double()) + cell_log_volume(2, LEVELS, RANGE) - log_q)
        for k in (1, 4, 16):
            # Averages over independent groups of k draws.
            groups = torch.stack(ratios).reshape(-1, k, len(repeated))
            bound = torch.stack([combine(group, importance=True) for group in groups]).mean(0)
            by_image = bound.reshape(len(images), repeats)
            error = by_image.std(1) / repeats**0.5
            assert bool((by_image.mean(1) <= exact + 4 * error + 1e-3).all()), (name, k)
            gaps[name, k] = float((exact.exp() * (exact - by_image.mean(1))).sum())
        assert gaps[name, 1] > gaps[name, 4] > gaps[name, 16] > -0.02, gaps
    assert gaps["uniform", 1] > 0.3, gaps
    assert gaps["variational", 1] < 0.85 * gaps["uniform", 1], gaps


# The command line ----------------------------------------------------------------------------------------

FLOW = {
    "dequantize.steps": 4, "dequantize.batch_size": 8, "dequantize.channels": 8, "dequantize.layers": 2,
    "dequantize.bins": 4, "dequantize.eval_size": 16, "dequantize.checkpoint_every": 2,
}  # fmt: skip
IMAGES = {
    "likelihood.test_images": 3, "likelihood.train_images": 0, "likelihood.pilot_images": 0,
    "likelihood.dequantization": "variational", "model.class_conditional": True,
}  # fmt: skip


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose model has labels, and a flow for it."""
    folder = tmp_path_factory.mktemp("variational") / "run"
    assert command("train", folder, **keywords(NO_REPORT | {"model.class_conditional": True})) == 0
    assert command("dequantize", folder, **keywords(FLOW | {"model.class_conditional": True})) == 0
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_a_flow_is_trained_kept_and_used(trained: Path, capsys) -> None:
    before = (trained / "checkpoints" / "latest.pt").read_bytes()
    section = metrics(trained)["dequantization"]
    assert section["steps"] == 4 and section["model_step"] == 4
    assert section["uniform_heldout_loss"] != section["heldout_loss"]
    run = sd.load(trained)
    assert section["parameters"] == sum(p.numel() for p in run.flow.parameters())
    assert read_checkpoint(trained / "dequantization" / "checkpoints" / "latest.pt")["step"] == 4
    assert command("likelihood", trained, **keywords(IMAGES)) == 0
    report = metrics(trained)["likelihood"]
    assert report["settings"]["dequantization"] == "variational" and len(report["flow"]) == 64
    assert "bits/dim (3 samples)" in capsys.readouterr().out
    assert (trained / "checkpoints" / "latest.pt").read_bytes() == before
    # By hand: the flow's places and density, and the likelihood of the result.
    images, labels = run.data.test[:2], run.data.test_labels[:2]
    v, log_q = dequantized(sd.VariationalDequantization(run.flow), images, 17)
    out = sd.log_likelihood(
        run.sde, lambda x, t: run.score(x, t, y=labels), v, divergence="hutchinson", rtol=0.9, atol=5.0
    )
    found = run.log_likelihood(images, y=labels, dequantization="variational")
    assert_close(found, out.log_prob.double() - log_q, rtol=1e-4, atol=1e-2)
    assert float((found - run.log_likelihood(images, y=labels)).abs().min()) > 1e-3


def test_training_goes_on_to_the_same_bits(copy: Path, tmp_path: Path, capsys) -> None:
    """Four steps and two more are six; a finished flow is not trained again."""
    fresh = shutil.copytree(copy, tmp_path / "fresh")
    shutil.rmtree(fresh / "dequantization")
    changes = keywords(
        FLOW | {"model.class_conditional": True, "dequantize.steps": 6, "dequantize.minutes": 99}
    )
    for folder in (copy, fresh):
        assert command("dequantize", folder, **changes) == 0
    assert "resuming after step 4 of 6" in capsys.readouterr().out
    resumed, straight = sd.load(copy).flow, sd.load(fresh).flow
    assert resumed.config == straight.config
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert metrics(copy)["dequantization"]["uniform_heldout_loss"] == pytest.approx(
        metrics(fresh)["dequantization"]["uniform_heldout_loss"]
    )


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        (
            "likelihood",
            {**IMAGES, "flow": None},
            "needs a trained flow, and .* has none: train it by --mode deq",
        ),
        ("train", IMAGES | {"report.likelihood": True}, "trained when its model is finished"),
        (
            "dequantize",
            {"dequantize.channels": 16},
            "flow.channels: 8 in the checkpoint, 16 now.*: delete that",
        ),
        ("dequantize", {"dequantize.batch_size": 4}, "settings.batch_size: 8 in the checkpoint, 4 now"),
        ("dequantize", {"dequantize.bins": 0}, "config.dequantize.bins must be an integer >= 1, got 0"),
        ("dequantize", {"dequantize.steps": 0}, "config.dequantize: steps must be an integer >= 1, got 0"),
    ],
)
def test_what_makes_no_sense(copy: Path, mode: str, changes: dict, message: str, capsys) -> None:
    if "flow" in changes:
        shutil.rmtree(copy / "dequantization")
    changes = {k: v for k, v in changes.items() if k != "flow"}
    assert command(mode, copy, **keywords(FLOW | {"model.class_conditional": True} | changes)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_flow_of_other_images_or_weights(copy: Path) -> None:
    path = copy / "dequantization" / "checkpoints" / "latest.pt"
    state = read_checkpoint(path)
    with pytest.warns(UserWarning, match="trained for other weights of this model"):
        assert sd.load(copy, ema=False).flow.levels == 17
    state["config"]["flow"]["levels"] = 16
    for file in path.parent.glob("*.pt"):
        torch.save(state, file)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\) with 16 levels, and those of this model have"):
        _ = sd.load(copy).flow


def test_vectors_have_no_cells(tmp_path: Path, capsys) -> None:
    from tiny import POINTS

    points = POINTS | NO_REPORT
    assert command("train", tmp_path / "run", **keywords(points)) == 0
    assert command("dequantize", tmp_path / "run", **keywords(points | FLOW)) == 2
    assert "data set 'gaussians8' has vectors" in capsys.readouterr().err
