"""DDPM on digits: linear against cosine against learned variances, in bits/dim by the variational bound.

    python experiments/bound.py                      # everything; resumes where an earlier attempt stopped
    python experiments/bound.py --quick              # the same in miniature, to see that it works

Trains ``configs/digits_ddpm.py`` in its three variants with the same network, data, seed and number of steps
(T = 1000), evaluates the bound of the test images term by term, and writes into the folder ``runs/bound`` the
table (``table.md``) and two pictures: ``information.png``, the information that each step loses along the
linear and the cosine schedule, and ``cumulated.png``, how much of it is lost by which step. By the terms of
the bound with the smaller fixed variance, ``L_{i-1} = (snr_{i-1} - snr_i) E |x_0 - x_0_hat|^2 / 2``, which
for an exact prediction is at least the mutual information with the data that step i loses (Guo, Shamai, Verdu
2005), and as the steps become short equals it.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from sde_diffusion import pictures
from sde_diffusion.config import load_config, set_key
from sde_diffusion.jobs import bound_job, train_job
from sde_diffusion.workdir import Workdir

VARIANTS = {"linear": "linear", "cosine": "cosine", "learned_variance": "cosine, learned variance (hybrid)"}
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits_ddpm.py"
QUICK = {
    "sde.steps": 40,
    "sampling.steps": 39,
    "training.steps": 20,
    "training.batch_size": 32,
    "training.eval_size": 64,
    "model.channels": 16,
    "model.blocks_per_level": 1,
    "bound.test_images": 12,
    "bound.draws": 10,
    "likelihood.rtol": 0.1,
    "likelihood.atol": 1.0,
}


def run(variant: str, folder: Path, steps: int | None, subset: int | None, quick: bool) -> dict[str, Any]:
    """Trains and evaluates one variant in its own folder, or what is left of that; its ``metrics.json``."""
    config = load_config(f"{CONFIG}:{variant}")
    changes: dict[str, Any] = {
        **{f"report.{name}": False for name in ("pc", "ode", "likelihood", "baseline", "quality")},
        "bound.subset": subset,
        "likelihood.rtol": 1e-3,
        "likelihood.atol": 0.1,  # nats of an image of 64 pixels: 0.002 bits/dim
        **(QUICK if quick else {}),
        **({} if steps is None else {"training.steps": steps}),
    }
    for key, value in changes.items():
        set_key(config, key, value)
    place = Workdir(folder / variant)
    done = place.read_metrics()
    if done.get("training", {}).get("steps") != config.training.steps:
        train_job(config, place.folder)
        done = {}
    settings = done.get("bound", {}).get("settings")
    if settings != json.loads(json.dumps(config.bound.to_dict())):
        bound_job(config, place.folder)
    return place.read_metrics()


def cell(values: dict[str, Any]) -> str:
    """A mean with its standard error."""
    return f"{values['mean']:.3f} ± {values['standard_error']:.3f}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """All variants in Markdown."""
    steps = next(iter(results.values()))["bound"]["steps"]
    head = (
        "schedule and variances",
        f"bound, T = {steps}",
        "L_T",
        "L_1 .. L_{T-1}",
        "L_0",
        "continuous bound",
        "ODE",
        "training",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant, metrics in results.items():
        bound, training = metrics["bound"], metrics["training"]
        chain = bound["chain"]
        parts = (cell(chain[name]) for name in ("total", "prior", "diffusion", "decoder"))
        other = (cell(bound[kind]["total"]) for kind in ("continuous", "ode"))
        spent = f"{training['steps']} steps, {training['seconds'] / 60:.1f} min"
        lines.append("| " + " | ".join((VARIANTS[variant], *parts, *other, spent)) + " |")
    n = next(iter(results.values()))["bound"]["chain"]["total"]["n"]
    return "\n".join([*lines, "", f"bits/dim of {n} test images, with standard errors over the images"])


def information(folder: Path) -> None:
    """The pictures, from the terms of the two fixed-variance variants."""
    steps, cumulated = {}, {}
    for variant in ("linear", "cosine"):
        with open(folder / variant / "bound.csv", newline="", encoding="utf-8") as file:
            terms = [float(row["bits_per_dim"]) for row in csv.DictReader(file)][1:-1]
        lost = np.nan_to_num(np.array(terms))
        position = np.arange(2, len(lost) + 2)
        seen = lost > 0
        steps[variant] = (position[seen], lost[seen])
        cumulated[variant] = (position, np.cumsum(lost) / lost.sum())
    pictures.save_curves(
        steps,
        folder / "information.png",
        x_label="step, from the data to the noise",
        y_label="bits/dim lost by the step",
        title="information lost per step",
        log_y=True,
    )
    pictures.save_curves(
        cumulated,
        folder / "cumulated.png",
        x_label="step, from the data to the noise",
        y_label="lost so far, of all",
        title="information lost up to a step",
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/bound"))
    parser.add_argument("--steps", type=int, help="training steps of each variant (default: the config's)")
    parser.add_argument(
        "--subset", type=int, default=250, help="steps of the chain evaluated per image; 0: all"
    )
    parser.add_argument("--quick", action="store_true", help="everything in miniature")
    given = parser.parse_args()
    folder = given.workdir / "quick" if given.quick else given.workdir
    subset = given.subset if given.subset > 0 and not given.quick else None
    results = {name: run(name, folder, given.steps, subset, given.quick) for name in VARIANTS}
    information(folder)
    text = table(results)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nin {folder}: table.md, information.png, cumulated.png")


if __name__ == "__main__":
    main()
