"""Images between images: test images are encoded by the probability flow, their latents interpolated, and decoded.

    python experiments/interpolation.py --workdir runs/digits

Writes ``interpolation.png``, a row for each pair, its two ends the images after a round trip, and says how far data
come back from where they were encoded to, by several solvers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import sde_diffusion as sd
from sde_diffusion import pictures
from sde_diffusion.data import to_model

WAYS = {
    "DDIM, 50 steps": dict(predictor=sd.DDIM(), times=50),
    "EDM's Heun, 50 steps": dict(predictor=sd.EDMHeun(), times=50),
    "Dormand-Prince, 1e-3": dict(solver=sd.DormandPrince(1e-3, 1e-3)),
    "Dormand-Prince, 1e-5": dict(solver=sd.DormandPrince(1e-5, 1e-5)),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="folder of a trained run of images")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--points", type=int, default=11, help="images in a row")
    parser.add_argument("--output", type=Path, default=Path("interpolation.png"))
    given = parser.parse_args()
    run = sd.load(given.workdir)
    levels = run.data.test[: 2 * given.pairs]
    x = to_model(levels, run.info.levels)  # the centres of their grey levels
    for name, way in WAYS.items():
        options = dict(way)
        if "times" in options:
            options["times"] = sd.log_snr_times(run.sde, options["times"])
        error = sd.round_trip_error(run.sde, run.model, x, **options)
        nfe = sd.encode(run.sde, run.model, x, **options).nfe
        print(
            f"{name:22} there and back: {float(error.mean()):.2e} on average, {float(error.max()):.2e} at most (root "
            f"mean square over pixels, data in [-1, 1]); {nfe} evaluations a way"
        )
    between = sd.interpolate(
        run.sde,
        run.model,
        x[: given.pairs],
        x[given.pairs :],
        given.points,
        solver=sd.DormandPrince(1e-3, 1e-3),
    )
    rows = between.x.transpose(0, 1).flatten(0, 1)
    pictures.save_image_grid(rows.clamp(-1, 1), given.output, columns=given.points)
    print(f"{between.nfe} evaluations; {given.output}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
