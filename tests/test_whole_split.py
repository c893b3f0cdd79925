"""``experiments/whole_split.py``: the estimate for all images from some, and going on."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import tiny

TOTAL = 60  # images of the run below, the last block shorter than the others


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imported by its name, so that processes of its own can do so too."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "experiments"))
    return importlib.import_module("whole_split")


def estimate(printed: str) -> tuple[float, float]:
    """The mean over all and its error."""
    return tuple(map(float, re.search(r"by the ODE: (\S+) ± (\S+),", printed).groups()))


def rows(script: ModuleType, noise: float, blocks: list[int], total: int = 1000) -> tuple[list, float]:
    """Results where the ODE is twice the bound less one, and noise; the mean of the ODE over all images."""
    generator = torch.Generator().manual_seed(0)
    bound = 2 + torch.randn(total, generator=generator, dtype=torch.float64)
    bound += torch.linspace(0, 1, total, dtype=torch.float64)  # the first images are easier
    ode = 2 * bound - 1 + noise * torch.randn(total, generator=generator, dtype=torch.float64)
    drawn = [i for i in range(total) if i // script.BLOCK in blocks]
    found = [("bound", i, float(bound[i]), 16) for i in range(total)]
    return found + [("ode", i, float(ode[i]), 50) for i in drawn], float(ode.mean())


def test_a_line_between_bound_and_ode_is_found_exactly(script: ModuleType, capsys) -> None:
    found, truth = rows(script, 0.0, [0, 1, 2, 5])
    script.report(found, 1000)
    assert estimate(capsys.readouterr().out) == (pytest.approx(truth, abs=1e-4), 0.0)


def test_the_error_is_that_of_the_blocks_not_run(script: ModuleType, capsys) -> None:
    """Over many draws of blocks the estimate is off by what it says, on average."""
    scores = []
    for seed in range(60):
        blocks = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:12].tolist()
        found, truth = rows(script, 0.5, blocks)
        script.report(found, 1000)
        mean, error = estimate(capsys.readouterr().out)
        scores.append((mean - truth) / error)
    scores = torch.tensor(scores)
    # A t-variable of about 10 degrees of freedom has a standard deviation of 1.12.
    assert abs(scores.mean()) < 4 * 1.12 / 60**0.5
    assert 0.75 < scores.std() < 1.6


@pytest.mark.slow
def test_a_trained_run_and_going_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    images = np.random.default_rng(0).integers(0, 17, (100, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train=images, test=images[:TOTAL])
    settings = tiny.NO_REPORT | {
        "data.name": "arrays",
        "data.path": tmp_path / "images.npz",
        "data.levels": 17,
    }
    assert tiny.command("train", tmp_path / "run", **tiny.keywords(settings)) == 0
    options = ["--workdir", str(tmp_path / "run"), "--draws", "2", "--tolerance", "0.5"]
    file = tmp_path / "run" / "whole_split.jsonl"

    def results(*more: str) -> dict[tuple[str, int], float]:
        monkeypatch.setattr(sys, "argv", ["whole_split.py", *options, *more])
        script.main()
        lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
        assert len(lines) == len({tuple(line[:2]) for line in lines})
        return {(kind, i): value for kind, i, value, _ in lines}

    some = results("--ode", "30")
    assert sum(kind == "bound" for kind, _ in some) == TOTAL
    capsys.readouterr()
    # Killed in the middle of a line: what was whole is kept, the rest is made again.
    kept = file.read_text().splitlines()[:42]
    file.write_text("\n".join([*kept, '["bound", 3']))
    everything = results("--ode", str(TOTAL))
    assert all(everything[key] == value for key, value in some.items())
    ode = [value for (kind, _), value in everything.items() if kind == "ode"]
    mean, error = estimate(capsys.readouterr().out)
    assert len(ode) == TOTAL and mean == pytest.approx(sum(ode) / TOTAL, abs=1e-4) and error == 0.0
    with pytest.raises(SystemExit):
        results("--ode", str(TOTAL + 1))
