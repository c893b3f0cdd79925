"""The report of a likelihood: variance components, plans, failures that are named, and going on after a kill."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from sde_diffusion import likelihood_report
from sde_diffusion.config import changed
from sde_diffusion.likelihood import LikelihoodSolver
from sde_diffusion.likelihood_report import Components, cheapest, variance_components
from sde_diffusion.runs import Run, load
from sde_diffusion.workdir import Workdir
from tiny import NO_REPORT, arguments, command, keywords

IMAGES = {"likelihood__test_images": 6, "likelihood__train_images": 0, "likelihood__batch_size": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    assert command("train", folder, **keywords(NO_REPORT) | IMAGES | {"sde__t_min": 1e-3}) == 0
    return folder


def report(folder: Path, **changes) -> dict:
    assert command("likelihood", folder, **IMAGES | {"sde__t_min": 1e-3} | changes) == 0
    return json.loads((folder / "metrics.json").read_text())["likelihood"]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "likelihood.csv", newline="") as file:
        return list(csv.DictReader(file))


# Numbers -----------------------------------------------------------------------------------------------


def test_components_of_variance_are_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, between, dequantization, probe = 20_000, 3.0, 0.5, 0.2
    values = between**0.5 * normal(n, 1, 1) + dequantization**0.5 * normal(n, 2, 1)
    values = values + probe**0.5 * normal(n, 2, 2)
    found = variance_components(values)
    assert found == pytest.approx((dequantization, probe), rel=5 * (2 / n) ** 0.5)
    assert variance_components(normal(50, 1, 1).expand(50, 2, 2)) == (0.0, 0.0)


def test_the_cheapest_plan_meets_the_error_and_nothing_cheaper_does() -> None:
    components = Components(dequantization=0.04, probe=0.36, solver=0.001, solver_spread=0.01, images=8)
    plan = cheapest(components, 100, 0.02)
    assert plan is not None and plan.error <= 0.02
    for draws in range(1, 65):
        for probes in range(1, 17):
            error = math.hypot(math.sqrt((0.04 + 0.36 / probes) / draws / 100), 0.001, 0.01 / math.sqrt(8))
            cost = draws * (1 + 0.7 * probes)
            assert error > 0.02 or cost >= plan.cost
            if (draws, probes) == (plan.dequantizations, plan.probes):
                assert (error, cost) == pytest.approx((plan.error, plan.cost))
    assert cheapest(components, 10**6, 0.0035) is None  # the solver alone is worse
    assert cheapest(components, 1, 0.005) is None


# The whole ---------------------------------------------------------------------------------------------


def test_every_image_its_parts_of_the_error_and_how_it_was_made(trained: Path) -> None:
    section = report(trained, likelihood__pilot_images=2)
    found = rows(trained)
    assert len(found) == section["test"]["n"] == 6
    assert set(section["error_of_the_mean"]) == {
        "between_images", "dequantization", "probes", "solver", "solver_per_image", "pilot_images",
    }  # fmt: skip
    assert section["error_of_the_mean"]["probes"] > 0 and section["error_of_the_mean"]["pilot_images"] == 2
    nfe = [int(row["evaluations"]) for row in found]
    assert section["test"]["nfe"] == pytest.approx(sum(nfe) / 6)
    assert section["test"]["nfe_quartiles"][0] == min(nfe) and section["test"]["nfe_quartiles"][4] == max(nfe)
    assert 0 <= section["prior_mismatch"]["gaussian"] <= section["prior_mismatch"]["most"] < 1e-3
    assert not (trained / "likelihood_partial.csv").exists()


def test_an_evaluation_that_was_killed_goes_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = report(trained, likelihood__pilot_images=0)
    expected, evaluate, calls = rows(trained), Run.evaluate, []

    def dying(self, x, *args, **options):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(self, x, *args, **options)

    monkeypatch.setattr(Run, "evaluate", dying)
    run = load(trained)
    for key, value in IMAGES.items():
        run.config.likelihood[key.removeprefix("likelihood__")] = value
    run.config.likelihood.update({"pilot_images": 0, "rtol": 0.9, "atol": 5.0})
    with pytest.raises(KeyboardInterrupt):
        likelihood_report.likelihood(run, Workdir(trained))
    partial = trained / "likelihood_partial.csv"
    assert len(partial.read_text().splitlines()) == 1 + 4
    with open(partial, "a") as file:
        file.write('["test", 3, "')  # the line that was being written
    again = likelihood_report.likelihood(run, Workdir(trained))
    assert calls == [2, 2, 2, 2]
    assert again["test"]["resumed_after"] == 4
    assert again["test"]["mean"] == pytest.approx(whole["test"]["mean"], rel=1e-6)
    assert rows(trained) == expected
    # Other settings begin anew.
    partial.write_text("another\n" + json.dumps(["test", 0, "", 1.0, 1, 0.1]) + "\n")
    assert "resumed_after" not in report(trained, likelihood__pilot_images=0)["test"]


@pytest.mark.slow
def test_processes_share_the_images(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(trained, likelihood__pilot_images=0)
    expected = rows(trained)
    # Not in this process: the pool is at work.
    monkeypatch.setattr(Run, "evaluate", None)
    report(trained, likelihood__pilot_images=0, likelihood__jobs=2)
    found = rows(trained)
    assert [row["index"] for row in found] == [row["index"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["bits_per_dim"]) == pytest.approx(float(theirs["bits_per_dim"]), abs=1e-5)


@pytest.mark.slow
def test_images_that_fail_are_named_and_the_others_finished(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    # To a network that has learned nothing all images are alike: here some are harder, by one of their pixels.
    ratio = LikelihoodSolver._ratio
    monkeypatch.setattr(
        LikelihoodSolver,
        "_ratio",
        lambda *a: ratio(*a) * (4 * a[2].before[:, 27].double()).exp().clamp(1, 1e6),
    )
    close = {"likelihood__pilot_images": 0, "likelihood__rtol": 0.001, "likelihood__atol": 0.001}
    assert report(trained, **close)["test"]["n"] == 6
    complete = rows(trained)
    needed = [int(row["evaluations"]) for row in complete]
    cap = sorted(needed)[1]
    assert max(needed) > cap
    with pytest.warns(UserWarning, match="could not be computed and is NaN"):
        section = report(trained, likelihood__max_evaluations=cap, **close)
    failed = [int(row["index"]) for row, n in zip(complete, needed, strict=True) if n > cap]
    assert section["test"]["failed"] == failed and section["test"]["n"] == 6 - len(failed)
    assert "failed, and left out" in capsys.readouterr().out
    kept = [row["bits_per_dim"] for row in rows(trained) if int(row["index"]) not in failed]
    assert kept == [row["bits_per_dim"] for row in complete if int(row["index"]) not in failed]


@pytest.mark.slow
def test_a_tolerance_chooses_the_effort(trained: Path, capsys) -> None:
    section = report(trained, likelihood__tolerance=0.5, likelihood__pilot_images=2)
    plan = section["plan"]
    assert plan["expected_error"] <= 0.5
    costs = {row["rtol"]: row["cost"] for row in plan["tried"] if "cost" in row}
    assert plan["chosen"]["rtol"] == min(costs, key=costs.get)
    assert section["settings"]["probes"] == plan["chosen"]["probes"]
    assert "for an error of 0.5" in capsys.readouterr().out


def test_the_plan_compares_tolerances_by_their_whole_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loose one leaves little room for the noise, so it needs many draws; a tight one more evaluations for each."""
    found = {
        1e-1: (Components(0.02, 0.02, 0.019, 0.0, 8), 20.0),
        1e-2: (Components(0.02, 0.02, 0.001, 0.0, 8), 40.0),
        1e-3: (Components(0.02, 0.02, 0.0, 0.0, 8), 90.0),
        1e-4: (Components(0.02, 0.02, 0.0, 0.0, 8), 200.0),
    }
    monkeypatch.setattr(
        likelihood_report, "_measure", lambda run, x, labels, settings: found[settings["rtol"]]
    )

    run = SimpleNamespace(config=changed({"likelihood.tolerance": 0.02}))
    chosen, plan = likelihood_report._planned(run, torch.zeros(8, 1), None, 100)
    costs = {}
    for rtol, (components, nfe) in found.items():
        effort = cheapest(components, 100, 0.02)
        costs[rtol] = nfe * effort.cost
    assert min(costs, key=costs.get) == chosen["rtol"] == 1e-2
    assert costs[1e-1] > costs[1e-2] < costs[1e-3]
    # Once the next cannot be cheaper, it is not tried.
    assert [row["rtol"] for row in plan["tried"]] == [1e-1, 1e-2, 1e-3]
    assert plan["expected_error"] <= 0.02 and plan["chosen"] == chosen


def test_what_a_few_pilot_images_do_not_show_counts() -> None:
    assert Components(0, 0, 0.003, 0.012, 9).solver_error == pytest.approx(0.005)


# Bad input ---------------------------------------------------------------------------------------------


def test_images_off_the_grid_are_named_and_the_others_evaluated(
    trained: Path, tmp_path: Path, capsys
) -> None:
    run = load(trained)
    images = run.data.test[:7, 0].double().numpy()
    clean = images.copy()
    images[1, 2, 2] = 3.5  # between two levels
    images[3, 0, 0] = 17  # beyond the last
    images[4, 5, 5] = math.nan
    images[6, 0, 1] = -1
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "clean.npy", clean.astype(np.uint8))
    off = {"likelihood__pilot_images": 0, "likelihood__test_images": "none"}
    given = off | {"likelihood__batch_size": 3}
    section = report(trained, likelihood__images=str(tmp_path / "images.npy"), **given)
    bad = [1, 3, 4, 6]
    assert section["images"]["off_the_grid"] == section["images"]["failed"] == bad
    assert section["images"]["n"] == 3 and "test" not in section and "train" not in section
    printed = capsys.readouterr().out
    assert "images: failed, and left out: 1, 3, 4, 6 (no grey levels: 1, 3, 4, 6)" in printed
    found = [row["bits_per_dim"] for row in rows(trained)]
    assert [i for i, value in enumerate(found) if value == "nan"] == bad
    # The others are what they are without them, whatever the batches: no image is dropped.
    assert (
        report(trained, likelihood__images=str(tmp_path / "clean.npy"), **off, likelihood__batch_size=7)[
            "images"
        ]["n"]
        == 7
    )
    whole = [row["bits_per_dim"] for row in rows(trained)]
    assert [float(found[i]) for i in (0, 2, 5)] == pytest.approx(
        [float(whole[i]) for i in (0, 2, 5)], abs=1e-4
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 9, 8), dtype=np.uint8), r"the model is of images (1, 8, 8), and"),
        (np.array(["a"]), "must hold numbers"),
        (None, "an .npy or .npz file is needed"),
    ],
)
def test_images_of_another_shape_are_refused(trained: Path, tmp_path: Path, capsys, array, message) -> None:
    path = tmp_path / "images.npy"
    if array is not None:
        np.save(path, array)
    assert command("likelihood", trained, likelihood__images=str(path), sde__t_min=1e-3) == 2
    error = capsys.readouterr().err
    assert error.startswith("sde_diffusion: config.likelihood.images: ") and message in error


@pytest.mark.parametrize("solver", ["dopri5", "scipy"])
def test_a_score_that_is_nan_for_some_images(
    trained: Path, monkeypatch: pytest.MonkeyPatch, solver: str
) -> None:
    """SciPy's method has one state for the batch: its batch is halved until the images are found."""
    run = load(trained)
    images = run.data.test[:5].clone()
    images[[1, 4]] = 16

    def score(x: Tensor, t: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1) > 0.9
        return torch.where(bright.reshape(-1, 1, 1, 1), math.nan, -x)

    monkeypatch.setattr(Run, "_conditioned", lambda *_: score)
    options = {"solver": solver, "coordinates": "time" if solver == "scipy" else "angle"}
    with pytest.warns(UserWarning, match="the likelihood of sample 1, 4 could not be computed"):
        out = run.evaluate(images, **options)
    assert out.failed.tolist() == torch.isnan(out.log_prob).tolist() == [False, True, False, False, True]
    alone = run.evaluate(images[:1], **options)
    assert float(alone.log_prob[0] - out.log_prob[0]) == pytest.approx(0, abs=0.2)


@pytest.mark.slow
def test_an_evaluation_killed_in_its_middle_goes_on_to_the_same_figures(
    trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    given = {"likelihood__test_images": 12, "likelihood__batch_size": 1, "likelihood__pilot_images": 0}
    changes = IMAGES | {"sde__t_min": 1e-3, "likelihood__rtol": 0.1, "likelihood__atol": 0.1} | given
    words = [sys.executable, "-m", "sde_diffusion.run", *arguments("likelihood", folder, **changes)]
    partial = folder / "likelihood_partial.csv"
    process = subprocess.Popen(words, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not partial.is_file() or len(partial.read_text().splitlines()) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    done = len(partial.read_text().splitlines()) - 1
    assert 3 <= done < 12
    assert command("likelihood", folder, **changes) == 0
    section = json.loads((folder / "metrics.json").read_text())["likelihood"]
    assert done - 1 <= section["test"]["resumed_after"] <= done
    resumed = rows(folder)
    assert command("likelihood", folder, **changes) == 0
    whole = json.loads((folder / "metrics.json").read_text())["likelihood"]["test"]
    assert rows(folder) == resumed and "resumed_after" not in whole
    for name in ("mean", "standard_error", "n", "nfe", "nfe_quartiles"):
        assert whole[name] == section["test"][name]
    assert section["test"]["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likelihood__tolerance": -1.0}, "tolerance must be positive, got -1.0"),
        ({"likelihood__dequantization": "normal"}, "unknown likelihood.dequantization 'normal'"),
        ({"likelihood__solver": "rk45"}, "unknown likelihood.solver 'rk45'"),
        ({"likelihood__coordinates": "angel"}, "did you mean 'angle'"),
        ({"likelihood__mode": "back"}, "unknown mode 'back'"),
        ({"likelihood__max_evaluations": 0}, "likelihood.max_evaluations must be an integer >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused(trained: Path, changes, message, capsys) -> None:
    assert command("likelihood", trained, sde__t_min=1e-3, **changes) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_truncated_normal_and_importance(trained: Path) -> None:
    """By hand: the density where the noise of the diffusion is that of the dequantization."""
    import sde_diffusion as sd
    from sde_diffusion.dequantization import dequantized

    run = load(trained)
    images = run.data.test[:2]
    kind = sd.TruncatedNormalDequantization()
    t = kind.start(run.sde, 17)
    alpha, ratios = float(run.sde.alpha(t)), []
    for draw in range(2):
        v, log_q = dequantized(kind, images, 17, draw=draw)
        seed = draw * 0x9E3779B97F4A7C15 % 2**64
        out = sd.log_likelihood(
            run.sde, run.model, alpha * v, divergence="exact", rtol=0.9, atol=5.0, t_start=t, seed=seed
        )
        ratios.append(out.log_prob.double() + 64 * math.log(alpha) - log_q)
    options = {"dequantization": "truncated_normal", "dequantizations": 2, "divergence": "exact"}
    average = run.log_likelihood(images, **options)
    torch.testing.assert_close(average, torch.stack(ratios).mean(0), rtol=1e-5, atol=1e-4)
    weighted = run.log_likelihood(images, importance=True, **options)
    expected = torch.stack(ratios).logsumexp(0) - math.log(2)
    torch.testing.assert_close(weighted, expected, rtol=1e-5, atol=1e-4)
    assert bool((weighted >= average).all())
    with pytest.raises(ValueError, match="importance needs divergence 'exact', got 'hutchinson'"):
        run.log_likelihood(images, importance=True, dequantizations=2, divergence="hutchinson")
