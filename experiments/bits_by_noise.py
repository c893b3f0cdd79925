"""Where the bits of grey levels are: the variational bound by the noise that hides them.

    python experiments/bits_by_noise.py --workdirs runs/mnist runs/mnist_before --precision bfloat16

A level known, uniform dequantization leaves an error of the expected noise all the same, that of a truncated normal.
What the model's error exceeds it by is what it does not know of the levels (Guo, Shamai, Verdu 2005, "Mutual
information and minimum mean-square error in Gaussian channels", eq. 24, used for both): in bits/dim

    integral over the log-SNR of  mean (|eps_hat - eps|^2 - |eps_cell - eps|^2) / (2 log 2),

up to what is left at the two ends. Same test images, noise and log-SNR (stratified) for all runs, so that their
differences are more accurate than the figures; those from the first run are printed with their standard error.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.cells import truncated_normal
from sde_diffusion.data import to_model
from sde_diffusion.devices import PRECISIONS, choose_precision
from sde_diffusion.losses import LogSNRUniformTime, StratifiedDraw
from sde_diffusion.tensors import expand

BATCH = 64


def known_level_error(
    x: Tensor, levels: Tensor, count: int, alpha: Tensor, sigma: Tensor, noise: Tensor
) -> Tensor:
    """The error (B,) of the expected noise for one who knows the grey levels."""
    y, s = x.double() / expand(alpha, x.double()), expand(sigma / alpha, x.double())
    low = 2 * levels.double() / count - 1
    _, mean = truncated_normal((low - y) / s, (low + 2 / count - y) / s)
    return (-mean - noise).square().flatten(1).mean(1)


@torch.no_grad()
def excess(run: sd.runs.Run, n: int, precision: str, seed: int) -> tuple[Tensor, Tensor]:
    """Log-SNRs (n,) and the errors' excess (n,) of test images drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(run.data.test), generator=generator)[:n]
    u = StratifiedDraw()(len(index), generator)[torch.randperm(len(index), generator=generator)]
    t, _ = LogSNRUniformTime()(run.sde, u)
    found = []
    with run.model.computing_in(choose_precision(precision, torch.device("cpu"))):
        for rows, time in zip(index.split(BATCH), t.split(BATCH), strict=True):
            levels = run.data.test[rows]
            x0 = to_model(levels, run.data.levels, torch.rand(levels.shape, generator=generator))
            noise = torch.randn(levels.shape, generator=generator)
            x, alpha, sigma = run.sde.perturb(x0, time, noise), run.sde.alpha(time), run.sde.sigma(time)
            error = (run.model.predict_noise(x, time) - noise).square().flatten(1).mean(1)
            found.append(error - known_level_error(x, levels, run.data.levels, alpha, sigma, noise))
    return run.sde.log_snr(t), torch.cat(found).double()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdirs", type=Path, nargs="+", required=True, help="runs of the same data and SDE"
    )
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--width", type=float, default=2.0, help="of a band of log-SNR")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS, help="of the network")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    runs = [sd.load(folder, device="cpu") for folder in given.workdirs]
    for folder, run in zip(given.workdirs, runs, strict=True):
        if run.info.levels is None or run.model.net.condition.num_classes is not None:
            parser.error(f"{folder} is no run of images without labels")
        if run.sde != runs[0].sde or not torch.equal(run.data.test, runs[0].data.test):
            parser.error(f"{folder} has another SDE or other test images than {given.workdirs[0]}")
    found = [excess(run, given.images, given.precision, given.seed) for run in runs]
    log_snr = found[0][0]
    sde = runs[0].sde
    span = float(-sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).diff())
    bits = [values * span / (2 * math.log(2)) for _, values in found]
    print("| log-SNR |", " | ".join(folder.name for folder in given.workdirs), "|")
    print("|---|" + "---|" * len(bits))
    band = (log_snr / given.width).floor().long()
    for number in band.unique().tolist():
        inside = band == number
        shares = [float(values[inside].sum()) / len(values) for values in bits]
        low = number * given.width
        print(f"| {low:g} to {low + given.width:g} |", " | ".join(f"{share:.4f}" for share in shares), "|")
    print("| all |", " | ".join(f"{float(values.mean()):.4f}" for values in bits), "|")
    for folder, values in zip(given.workdirs[1:], bits[1:], strict=True):
        difference = (values - bits[0])[log_snr.argsort()]
        # Neighbours in log-SNR differ by chance only, not by what depends on the noise.
        error = float(difference.diff().square().mean() / 2 / len(difference)) ** 0.5
        print(f"{folder.name}: {float(difference.mean()):+.4f} ± {error:.4f} from {given.workdirs[0].name}")


if __name__ == "__main__":
    main()
