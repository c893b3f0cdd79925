"""What each step of likelihood training is worth on digits, in bits/dim on the same images, noise and probes.

    python experiments/likelihood_training.py                # trains what is missing, then evaluates

A network that predicts noise, trained with the simple weighting and uniform times; the same number of steps with the
last third fine-tuned for likelihood from the averaged weights of the first two; the same with the simple weighting in
the last third too, as a control; the likelihood objective from the start; and a network that predicts grey levels.
All have equal size, data, seed and number of steps. The likelihood is that of the probability-flow ODE with uniform
dequantization, and beside it stands the variational bound in continuous time, which is what the likelihood objective
minimises; differences are paired, image by image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.config import changed
from sde_diffusion.data import to_model
from sde_diffusion.evaluation import mean_and_error
from sde_diffusion.jobs import train_job
from sde_diffusion.likelihood import dequantization_noise
from sde_diffusion.runs import Run
from sde_diffusion.workdir import Workdir

SIMPLE = {
    "model.parametrization": "noise",
    "training.weighting": "simple",
    "training.time_sampler": "uniform",
}
NOISE = {"model.parametrization": "noise"}  # the default objective is the likelihood's
COMMON = {
    "model.blocks_per_level": 2,
    **{f"report.{name}": False for name in ("pc", "ode", "likelihood", "baseline", "quality")},
    "training.eval_every": 0,
    "device": "cpu",
}
NAMES = {
    "first": "noise, simple weighting, two thirds of the steps",
    "simple": "noise, simple weighting",
    "finetuned": "noise, two thirds simple, one third fine-tuned for likelihood",
    "control": "noise, two thirds simple, one third as fine-tuned but simple",
    "likelihood": "noise, likelihood weighting throughout",
    "levels": "grey levels, likelihood weighting throughout",
}


def changes(arm: str, folder: Path, steps: int) -> dict[str, Any]:
    """How the config of an arm differs from the default."""
    first = 2 * steps // 3
    later = {
        "training.steps": steps - first,
        "training.learning_rate": 1e-3,
        "training.warmup_steps": 20,
        "training.init_from": str(folder / "first"),
    }
    return {
        "first": SIMPLE | {"training.steps": first},
        "simple": SIMPLE | {"training.steps": steps},
        "finetuned": NOISE | later,
        "control": SIMPLE | later,
        "likelihood": NOISE | {"training.steps": steps},
        "levels": {"training.steps": steps},
    }[arm] | COMMON


def train(arm: str, folder: Path, steps: int) -> None:
    """Trains an arm, and what it begins with, unless that is done."""
    if arm in ("finetuned", "control"):
        train("first", folder, steps)
    config = changed(changes(arm, folder, steps))
    done = Workdir(folder / arm).read_metrics().get("training", {}).get("steps")
    if done != config.training.steps:
        train_job(config, folder / arm)


def evaluate(arm: str, folder: Path, images: int) -> dict[str, Tensor]:
    """Bits/dim of the first test images by the ODE and by the bound, (images,) each; kept in the folder of the
    arm."""
    found = {}
    for kind, compute in {"ode": by_ode, "bound": by_bound}.items():
        kept = folder / arm / f"{kind}_{images}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(compute(sd.load(folder / arm, device="cpu"), images).tolist()))
        found[kind] = torch.tensor(json.loads(kept.read_text()), dtype=torch.float64)
    return found


def by_ode(run: Run, images: int) -> Tensor:
    """Bits/dim through the probability flow."""
    return run.bits_per_dim(run.data.test[:images], seed=0)


def by_bound(run: Run, images: int) -> Tensor:
    """The variational bound on bits/dim of the same dequantized images."""
    levels, count = run.data.test[:images], run.data.levels
    x = to_model(levels, count, dequantization_noise(levels.shape, seed=0))
    return sd.continuous_bound(run.sde, run.model, x, draws=50).bits_per_dim(levels=count)


def cell(values: Tensor) -> str:
    """A mean with its standard error."""
    found = mean_and_error(values)
    return f"{found['mean']:.3f} ± {found['standard_error']:.3f}"


def main() -> None:
    """The command line; prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/likelihood_training"))
    parser.add_argument("--steps", type=int, default=450, help="of training, in each arm")
    parser.add_argument("--images", type=int, default=180, help="test images evaluated")
    parser.add_argument("--arms", default=",".join(NAMES), help="which, of these")
    parser.add_argument("--against", default="simple", help="the arm that differences are taken from")
    given = parser.parse_args()
    arms = given.arms.split(",")
    unknown = [arm for arm in arms if arm not in NAMES]
    if unknown or given.steps < 3 or given.images < 2:
        parser.error(f"arms are {', '.join(NAMES)}; at least 3 steps and 2 images")
    for arm in arms:
        train(arm, given.workdir, given.steps)
    bits = {arm: evaluate(arm, given.workdir, given.images) for arm in arms}
    less = f"less {given.against}"
    print(
        f"\n| {given.steps} steps | ODE, bits/dim | {less} | bound, bits/dim | {less} |\n|---|---|---|---|---|"
    )
    for arm in arms:
        cells = []
        for kind, values in bits[arm].items():
            other = bits.get(given.against, {}).get(kind)
            cells += [cell(values), "" if other is None or arm == given.against else cell(values - other)]
        print(f"| {NAMES[arm]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
