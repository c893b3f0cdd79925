"""What a likelihood costs and how exact it is: our solver against the original method, on the same images and probes.

    python experiments/likelihood.py --workdir runs/digits

The original: SciPy's RK45 over the batch as one float64 state at rtol = atol = 1e-5 in the time t, the network
evaluated once for the drift and once more for the divergence. The truth: RK45 in float64 with an error control for
each image, at 1e-8. The methods take turns, so that what else the machine does falls on all of them. Then what a
likelihood can tell of images that are no digits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import to_model
from sde_diffusion.divergence import Divergence
from sde_diffusion.likelihood import dequantization_noise


class TwoPasses:
    """A divergence as the original computes it: one evaluation of the network for the value, one for the product."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence
        self.prepare = divergence.prepare

    def __call__(self, field: Any, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            value = field(t, x)
        return value, self.divergence(field, t, x, prepared)[1]


def cost(run: Any, images: int, repeats: int) -> dict[str, Any]:
    """Error, evaluations and seconds of each method, measured in turns."""
    levels = run.data.test[:images]
    x = to_model(levels, run.info.levels, dequantization_noise(levels.shape, seed=0))
    probe = sd.HutchinsonDivergence()
    dims = x[0].numel()
    methods: dict[str, Callable[[], sd.Likelihood]] = {
        "original (SciPy RK45, 1e-5, two passes)": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=TwoPasses(probe), solver=sd.ScipyRK45(1e-5, 1e-5)
        ),
        "SciPy RK45, 1e-5, one pass": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=probe, solver=sd.ScipyRK45(1e-5, 1e-5)
        ),
        "ours in t, 1e-2": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=probe, coordinates=sd.TimeCoordinates(), rtol=1e-2, atol=1e-2
        ),
        "ours, 1e-1": lambda: sd.log_likelihood(run.sde, run.model, x, divergence=probe, rtol=0.1, atol=0.1),
        "ours (default), 1e-2": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=probe, rtol=1e-2, atol=1e-2
        ),
        "ours, 1e-3": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=probe, rtol=1e-3, atol=1e-3
        ),
    }
    # The probes of float32 and float64 are the same signs.
    truth = sd.log_likelihood(
        run.sde,
        run.model,
        x.double(),
        divergence=probe,
        solver=sd.DormandPrince(1e-8, 1e-8),
        coordinates=sd.LogSNRCoordinates(),
    )
    bits = sd.bits_per_dim(truth.log_prob, dims, run.info.levels)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in methods}
    print(f"truth: {float(bits.mean()):.5f} bits/dim, {truth.nfe} evaluations", flush=True)
    for _ in range(repeats):
        for name, method in methods.items():
            started = time.perf_counter()
            out = method()
            rows[name]["seconds"].append(time.perf_counter() - started)
            difference = sd.bits_per_dim(out.log_prob.double(), dims, run.info.levels) - bits
            passes = 2 if "two passes" in name else 1
            rows[name] |= {
                "error_of_the_mean": abs(float(difference.mean())),
                "mean_absolute_error": float(difference.abs().mean()),
                "evaluations": float(out.nfe_per_sample.double().mean()) * passes,
                "steps_of_the_field": out.nfe,
            }
    for row in rows.values():
        row["seconds"] = statistics.median(row["seconds"])
    reference = rows["original (SciPy RK45, 1e-5, two passes)"]
    for row in rows.values():
        row["times_faster"] = reference["seconds"] / row["seconds"]
        row["times_fewer_evaluations"] = reference["evaluations"] / row["evaluations"]
    return {"bits_per_dim": float(bits.mean()), "truth_nfe": truth.nfe, "images": images, "methods": rows}


def outliers(run: Any, images: int) -> dict[str, dict[str, float]]:
    """Bits/dim of digits and of images that are none; typicality is how far from the usual bits/dim of digits."""
    levels = run.data.test[:images]
    generator = torch.Generator().manual_seed(0)
    flat = levels.flatten(1)
    order = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
    kinds = {
        "digits": levels,
        "rotated by 180 degrees": levels.flip(-1, -2),
        "pixels shuffled": flat.gather(1, order).reshape(levels.shape),
        "black": torch.zeros_like(levels),
        "constant grey": torch.full_like(levels, run.info.levels // 2),
        "digits at half contrast": levels // 2,
    }
    found = {name: run.bits_per_dim(x, seed=0) for name, x in kinds.items()}
    known = run.bits_per_dim(run.data.train[:images], seed=1)
    centre, spread = float(known.median()), float(known.std())

    def separation(high: Tensor, low: Tensor) -> float:
        """The probability that a value of the first is above one of the second (the area under the curve)."""
        return float(((high[:, None] > low) + 0.5 * (high[:, None] == low)).double().mean())

    digits = found["digits"]
    return {
        name: {
            "bits_per_dim": float(value.mean()),
            "auc_by_likelihood": separation(value, digits),
            "auc_by_typicality": separation(
                (value - centre).abs() / spread, (digits - centre).abs() / spread
            ),
        }
        for name, value in found.items()
    }


def main() -> None:
    """Prints both tables as Markdown, and everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    run = sd.load(arguments.workdir)
    found = cost(run, arguments.images, arguments.repeats)
    print(f"truth {found['bits_per_dim']:.5f} bits/dim, {found['truth_nfe']} evaluations\n")
    print("| method | error of the mean | per image | evaluations | seconds | faster | fewer |")
    print("|---|---|---|---|---|---|---|")
    for name, row in found["methods"].items():
        print(
            f"| {name} | {row['error_of_the_mean']:.1e} | {row['mean_absolute_error']:.1e} | "
            f"{row['evaluations']:.0f} | {row['seconds']:.1f} | {row['times_faster']:.1f} x | "
            f"{row['times_fewer_evaluations']:.1f} x |"
        )
    ood = outliers(run, arguments.images)
    print("\n| images | bits/dim | AUC by likelihood | AUC by typicality |\n|---|---|---|---|")
    for name, row in ood.items():
        print(
            f"| {name} | {row['bits_per_dim']:.3f} | {row['auc_by_likelihood']:.2f} | "
            f"{row['auc_by_typicality']:.2f} |"
        )
    print(json.dumps({"cost": found, "outliers": ood}))


if __name__ == "__main__":
    main()
