"""What a likelihood costs and how exact it is: our solver against the original method, on the same images and probes.

    python experiments/likelihood.py --workdir runs/digits
    python experiments/likelihood.py --workdir runs/mnist --parts outliers --images 100     # any run on images

The original: SciPy's RK45 over the batch as one float64 state at rtol = atol = 1e-5 in the time t, the network
evaluated once for the drift and once more for the divergence. The truth: RK45 in float64 with an error control for
each image, at ``--truth``. The methods take turns, so that what else the machine does falls on all of them; where
that is much, ``--clock cpu`` counts the seconds of the process alone. Then what a likelihood can tell of images that
are none of the data: turned upside down, shuffled, constant, faint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.data import to_model
from sde_diffusion.devices import choose_precision
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


ORIGINAL = "original (SciPy RK45, 1e-5, two passes)"


def cost(run: Any, images: int, repeats: int, truth_tolerance: float, clock: str) -> dict[str, Any]:
    """Error, evaluations and seconds of each method, measured in turns."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    levels = run.data.test[:images]
    x = to_model(levels, run.info.levels, dequantization_noise(levels.shape, seed=0))
    probe = sd.HutchinsonDivergence()
    dims = x[0].numel()
    angle = sd.LogSNRCoordinates()
    methods: dict[str, Callable[[], sd.Likelihood]] = {
        ORIGINAL: lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=TwoPasses(probe), solver=sd.ScipyRK45(1e-5, 1e-5)
        ),
        "SciPy RK45, 1e-5, one pass": lambda: sd.log_likelihood(
            run.sde, run.model, x, divergence=probe, solver=sd.ScipyRK45(1e-5, 1e-5)
        ),
    }
    for name, options in (
        ("angle, errors of the state", {"solver": sd.DormandPrince(1e-3, 1e-3), "coordinates": angle}),
        ("ours in t, 1e-2", {"coordinates": sd.TimeCoordinates(), "rtol": 1e-2, "atol": 1e-2}),
        *(
            (f"ours, {tolerance:g}", {"rtol": tolerance, "atol": tolerance})
            for tolerance in (1e-1, 1e-2, 1e-3)
        ),
    ):
        methods[name] = partial(sd.log_likelihood, run.sde, run.model, x, divergence=probe, **options)
    if choose_precision("auto", x.device) == torch.bfloat16:
        methods["ours, 0.01, the network in bfloat16"] = partial(_in_bfloat16, run, methods["ours, 0.01"])
    # The probes of float32 and float64 are the same signs.
    truth = sd.log_likelihood(
        run.sde,
        run.model,
        x.double(),
        divergence=probe,
        solver=sd.DormandPrince(truth_tolerance, truth_tolerance),
        coordinates=angle,
    )
    bits = sd.bits_per_dim(truth.log_prob, dims, run.info.levels)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in methods}
    print(f"truth: {float(bits.mean()):.5f} bits/dim, {truth.nfe} evaluations", flush=True)
    for _ in range(repeats):
        for name, method in methods.items():
            started = now()
            out = method()
            rows[name]["seconds"].append(now() - started)
            difference = sd.bits_per_dim(out.log_prob.double(), dims, run.info.levels) - bits
            passes = 2 if "two passes" in name else 1
            rows[name] |= {
                "error_of_the_mean": abs(float(difference.mean())),
                "rms_per_image": float(difference.square().mean().sqrt()),
                "largest_error": float(difference.abs().max()),
                "evaluations": float(out.nfe_per_sample.double().mean()) * passes,
                "steps_of_the_field": out.nfe,
            }
    for row in rows.values():
        row["seconds"] = statistics.median(row["seconds"])
    reference = rows[ORIGINAL]
    for row in rows.values():
        row["times_faster"] = reference["seconds"] / row["seconds"]
        row["times_fewer_evaluations"] = reference["evaluations"] / row["evaluations"]
    return {"bits_per_dim": float(bits.mean()), "truth_nfe": truth.nfe, "images": images, "methods": rows}


def _in_bfloat16(run: Any, method: Callable[[], sd.Likelihood]) -> sd.Likelihood:
    with run.model.computing_in(torch.bfloat16):
        return method()


def outliers(run: Any, images: int, precision: str) -> dict[str, dict[str, float]]:
    """Bits/dim of test images and of others; typicality is how far from the median bits/dim of training images."""
    levels = run.data.test[:images]
    generator = torch.Generator().manual_seed(0)
    flat = levels.flatten(1)
    order = torch.stack([torch.randperm(flat.shape[1], generator=generator) for _ in flat])
    kinds = {
        "test": levels,
        "rotated by 180 degrees": levels.flip(-1, -2),
        "pixels shuffled": flat.gather(1, order).reshape(levels.shape),
        "black": torch.zeros_like(levels),
        "constant grey": torch.full_like(levels, run.info.levels // 2),
        "at half contrast": levels // 2,
    }
    found = {name: run.bits_per_dim(x, seed=0, precision=precision) for name, x in kinds.items()}
    known = run.bits_per_dim(run.data.train[:images], seed=1, precision=precision)
    centre, spread = float(known.median()), float(known.std())

    def separation(high: Tensor, low: Tensor) -> float:
        """The probability that a value of the first is above one of the second (the area under the curve)."""
        return float(((high[:, None] > low) + 0.5 * (high[:, None] == low)).double().mean())

    usual = found["test"]
    return {
        name: {
            "bits_per_dim": float(value.mean()),
            "auc_by_likelihood": separation(value, usual),
            "auc_by_typicality": separation((value - centre).abs() / spread, (usual - centre).abs() / spread),
        }
        for name, value in found.items()
    }


def main() -> None:
    """Prints both tables as Markdown, and everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/digits")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=("cost", "outliers"), default=("cost", "outliers"))
    parser.add_argument("--truth", type=float, default=1e-8, help="tolerance of what counts as the truth")
    parser.add_argument("--precision", default="float32", help="of the network, for the outliers")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    arguments = parser.parse_args()
    run = sd.load(arguments.workdir)
    if not run.info.is_image:
        parser.error(f"{arguments.workdir} is a run on vectors; this needs images")
    found: dict[str, Any] = {}
    if "cost" in arguments.parts:
        found["cost"] = cost(run, arguments.images, arguments.repeats, arguments.truth, arguments.clock)
        _print_cost(found["cost"], arguments.clock)
    if "outliers" in arguments.parts:
        found["outliers"] = outliers(run, arguments.images, arguments.precision)
        _print_outliers(found["outliers"])
    print(json.dumps(found))


def _print_cost(found: dict[str, Any], clock: str) -> None:
    print(
        f"truth {found['bits_per_dim']:.5f} bits/dim, {found['truth_nfe']} evaluations, {found['images']} images\n"
    )
    print(f"| method | error of the mean | rms | largest | evaluations | {clock} seconds | faster | fewer |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found["methods"].items():
        print(
            f"| {name} | {row['error_of_the_mean']:.1e} | {row['rms_per_image']:.1e} | "
            f"{row['largest_error']:.1e} | {row['evaluations']:.0f} | {row['seconds']:.1f} | "
            f"{row['times_faster']:.1f} x | {row['times_fewer_evaluations']:.1f} x |"
        )


def _print_outliers(found: dict[str, dict[str, float]]) -> None:
    print("\n| images | bits/dim | AUC by likelihood | AUC by typicality |\n|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['bits_per_dim']:.3f} | {row['auc_by_likelihood']:.2f} | "
            f"{row['auc_by_typicality']:.2f} |"
        )


if __name__ == "__main__":
    main()
