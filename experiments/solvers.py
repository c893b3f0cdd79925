"""Solvers: quality against network evaluations, from 5 to 1000, and against wall time.

    python experiments/solvers.py                                  # the mixture, with its exact score
    python experiments/solvers.py --targets mixture runs/digits    # and a trained run of images, by its folder
    python experiments/solvers.py --quick                          # the same in miniature
    python experiments/solvers.py --overhead                       # what a step costs beside the network
    python experiments/solvers.py --peers                          # the mixture by diffusers and k-diffusion

Every arm (target, solver, evaluations) is a line of ``runs/solvers/arms.csv``; those that are there are not run
again, so a stopped experiment resumes. Same seeds, so the same initial noise, in all arms. The quality is

* on the mixture (16-D, three components, full covariances): the energy distance to exact samples with its
  standard error, and the Wasserstein distance W2 by exact assignment between blocks of 500, with the standard
  error over blocks;
* on images: the Frechet distance to the test images in the features of a small classifier trained here on the
  training images (standard error by bootstrap), and the kernel two-sample statistic (RBF, MMD^2).

The row ``exact`` shows what exact samples (training images) reach. Evaluations include the one of the final
denoising. Writes ``arms.csv``, ``table.md`` and ``quality_TARGET.png`` into the folder.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from solver_peers import Peer, peers
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion import metrics, pictures
from sde_diffusion.data import from_model

NFE = (5, 8, 10, 15, 20, 35, 50, 100, 1000)
SEED = 0
T_END = 1e-3  # below it a step moves the data by less than their grey levels


@dataclass(frozen=True)
class Solver:
    """A predictor with its grid, and how many evaluations its steps take."""

    predictor: sd.Predictor
    grid: Callable[..., Tensor]
    evaluations: int = 1
    most: int = 100  # beyond which more evaluations change nothing

    def steps(self, nfe: int) -> int:
        """Steps for a budget, one evaluation of which is the final denoising."""
        return (nfe - 1) // self.evaluations


SOLVERS: dict[str, Solver] = {
    "DDIM": Solver(sd.DDIM(), sd.log_snr_times),
    "Heun (EDM)": Solver(sd.EDMHeun(), sd.karras_times, 2),
    "RK4": Solver(sd.RK4(), sd.log_snr_times, 4),
    "DPM-Solver++ 2M": Solver(sd.DPMSolverPP(2), sd.log_snr_times),
    "DPM-Solver++ 3M": Solver(sd.DPMSolverPP(3), sd.log_snr_times),
    "DPM-Solver++ 2S": Solver(sd.DPMSolverPP(2, method="singlestep"), sd.log_snr_times, 2),
    "UniPC 2": Solver(sd.UniPC(2), sd.log_snr_times),
    "UniPC 3": Solver(sd.UniPC(3), sd.log_snr_times),
    "DEIS 3": Solver(sd.DEIS(3), sd.log_snr_times),
    "iPNDM 4": Solver(sd.IPNDM(4), sd.karras_times),
    "SDE-DPM-Solver++ 2": Solver(sd.SDEDPMSolverPP(2), sd.log_snr_times, most=1000),
    "SDE-DPM-Solver++ 3": Solver(sd.SDEDPMSolverPP(3), sd.log_snr_times),
    "SA-Solver 3": Solver(sd.SASolver(3), sd.log_snr_times),
    "ancestral": Solver(sd.Ancestral(), sd.log_snr_times, most=1000),
    "reverse diffusion": Solver(sd.ReverseDiffusion(), sd.uniform_times, most=1000),
    "Euler-Maruyama": Solver(sd.EulerMaruyama(), sd.uniform_times, most=1000),
}


TOLERANCES: dict[str, Callable[[float], sd.Predictor]] = {
    "Dormand-Prince": lambda tolerance: sd.FlowSolver(sd.DormandPrince(tolerance, tolerance)),
    "adaptive SDE": lambda tolerance: sd.AdaptiveSDE(rtol=tolerance, atol=tolerance / 2),
}
"""Solvers that take what steps they need: by the tolerances of ``CHOSEN``."""
CHOSEN = (0.1, 0.03, 0.01, 0.003)


@dataclass(frozen=True)
class Arm:
    """One line of the results."""

    target: str
    solver: str
    nfe: int
    n: int
    quality: float
    quality_error: float
    second: float
    second_error: float
    seconds: float


@dataclass(frozen=True)
class Target:
    """What is sampled, and how samples are judged.

    Attributes:
        names: of the two measures.
        judge: samples -> two (value, standard error).
        exact: samples of the data themselves, or what comes nearest.
    """

    name: str
    sde: sd.SDE
    score: sd.Score
    shape: tuple[int, ...]
    batch: int
    names: tuple[str, str]
    judge: Callable[[Tensor], tuple[metrics.Estimate, metrics.Estimate]]
    exact: Tensor


def mixture(n: int, sde: sd.SDE = sd.VP()) -> Target:  # noqa: B008 - a process is a constant
    """Three components in 16 dimensions with full covariances, of unequal weights, and its exact score."""
    generator = torch.Generator().manual_seed(7)
    k, d = 3, 16
    rotations, _ = torch.linalg.qr(torch.randn(k, d, d, dtype=torch.float64, generator=generator))
    spectra = 0.02 + 0.6 * torch.rand(k, d, dtype=torch.float64, generator=generator).square()
    means = torch.randn(k, d, dtype=torch.float64, generator=generator)
    data = sd.GaussianMixture([0.5, 0.3, 0.2], means, rotations @ torch.diag_embed(spectra) @ rotations.mT)
    reference, exact = (data.sample(n, generator).numpy() for _ in range(2))

    def judge(x: Tensor) -> tuple[metrics.Estimate, metrics.Estimate]:
        count = max(2, n // 500)
        blocks = zip(np.array_split(x.numpy(), count), np.array_split(reference, count), strict=True)
        distances = [metrics.wasserstein2(a, b) for a, b in blocks]
        spread = statistics.stdev(distances) / len(distances) ** 0.5
        return metrics.energy_distance(x.numpy(), reference), metrics.Estimate(
            statistics.mean(distances), spread
        )

    return Target(
        "mixture", sde, data.score(sde), (d,), n, ("energy distance", "W2"), judge, torch.from_numpy(exact)
    )


def images(folder: str, n: int) -> Target:
    """A trained run."""
    run = sd.load(folder)
    data = run.data
    assert data.train_labels is not None and data.test_labels is not None and run.info.levels is not None

    def flat(x: Tensor) -> np.ndarray:
        return (x.flatten(1).double() / (data.levels - 1) * 2 - 1).numpy()

    features = metrics.ClassifierFeatures.fit(flat(data.train[:10_000]), data.train_labels[:10_000].numpy())
    test = flat(data.test[:2000])
    accuracy = features.accuracy(flat(data.test), data.test_labels.numpy())
    print(f"{run!r}; the classifier is right on {accuracy:.1%} of the test images")
    reference, kernel = features(test), metrics.RBF(metrics.median_bandwidth(test))

    def judge(x: Tensor) -> tuple[metrics.Estimate, metrics.Estimate]:
        levels = flat(from_model(x, data.levels)) if x.is_floating_point() else flat(x)
        return metrics.bootstrap_frechet(features(levels), reference), metrics.mmd(levels, test, kernel)

    exact = data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))[:n]]
    names = ("Frechet distance in features", "MMD^2")
    return Target(Path(folder).name, run.sde, run.model, run.info.shape, 250, names, judge, exact)


@torch.inference_mode()
def run_arm(target: Target, predictor: sd.Predictor, times: Tensor, n: int) -> tuple[Tensor, int, float]:
    """Samples, the evaluations they took (those of the slowest sample), and seconds."""
    parts, used, started = [], 0, time.perf_counter()
    for first in range(0, n, target.batch):
        count = min(target.batch, n - first)
        out = sd.sample(
            target.sde, target.score, (count, *target.shape),
            predictor=predictor, times=times, seed=SEED, first_index=first,
        )  # fmt: skip
        parts.append(out.x)
        used = max(used, out.nfe)
    return torch.cat(parts), used, time.perf_counter() - started


def read(path: Path) -> list[Arm]:
    """The arms of an earlier attempt."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], object]] = {"target": str, "solver": str, "nfe": int, "n": int}
    with open(path, newline="", encoding="utf-8") as file:
        return [Arm(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def append(path: Path, arm: Arm) -> None:
    """One more line, at once, so that nothing is lost when the experiment is stopped."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow([f.name for f in fields(Arm)])
        writer.writerow([getattr(arm, f.name) for f in fields(Arm)])


def measure(
    target: Target, path: Path, n: int, budgets: tuple[int, ...], largest: int, chosen: list[str]
) -> list[Arm]:
    """All arms of a target that are not there yet."""
    arms = [a for a in read(path) if a.target == target.name and a.n == n]
    seen = {(a.solver, a.nfe) for a in arms}

    def keep(name: str, nfe: int, x: Tensor, seconds: float) -> None:
        (value, error), (second, second_error) = target.judge(x)
        arm = Arm(target.name, name, nfe, n, value, error, second, second_error, seconds)
        append(path, arm)
        arms.append(arm)
        first, other = f"{value:9.4f} ± {error:.4f}", f"{second:9.4f} ± {second_error:.4f}"
        print(f"{target.name:10} {name:20} {nfe:5}  {first}  {other}  {seconds:7.1f} s", flush=True)

    if ("exact", 0) not in seen:
        keep("exact", 0, target.exact, 0.0)
    for nfe in budgets:
        for name in chosen:
            solver = SOLVERS[name]
            if solver.steps(nfe) >= 1 and nfe <= min(solver.most, largest) and (name, nfe) not in seen:
                times = solver.grid(target.sde, solver.steps(nfe), t_end=T_END)
                x, used, seconds = run_arm(target, solver.predictor, times, n)
                assert used <= nfe, f"{name} took {used} evaluations of {nfe}"
                keep(name, nfe, x, seconds)
    if len(chosen) < len(SOLVERS):
        return arms
    whole = torch.tensor([target.sde.t_max, T_END], dtype=torch.float64)
    names = {a.solver for a in arms}
    for name, make in TOLERANCES.items():
        for tolerance in CHOSEN[: 1 if largest < 100 else None]:
            if f"{name}, {tolerance:g}" not in names:
                x, used, seconds = run_arm(target, make(tolerance), whole, n)
                keep(f"{name}, {tolerance:g}", used, x, seconds)
    return arms


def table(target: Target, arms: list[Arm]) -> str:
    """The first measure of all arms in Markdown, a column for each number of evaluations."""
    found = {(a.solver, a.nfe): a for a in arms}
    fixed = [a for a in arms if a.solver in SOLVERS]
    budgets = sorted({a.nfe for a in fixed})
    exact = found["exact", 0]
    best = {nfe: min(a.quality for a in fixed if a.nfe == nfe) for nfe in budgets}
    lines = [
        f"{target.names[0]} on {target.name}, n = {exact.n}; exact: {exact.quality:.4f} ± {exact.quality_error:.4f}",
        "",
        "| evaluations | " + " | ".join(map(str, budgets)) + " |",
        "|" + "---|" * (len(budgets) + 1),
    ]
    for name in dict.fromkeys(a.solver for a in fixed):
        cells = []
        for nfe in budgets:
            arm = found.get((name, nfe))
            text = "" if arm is None else f"{arm.quality:.3f} ± {arm.quality_error:.3f}"
            cells.append(f"**{text}**" if arm is not None and arm.quality == best[nfe] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| by tolerance | evaluations of the slowest sample | quality | seconds |",
        "|---|---|---|---|",
    ]
    for a in arms:
        if a.nfe and a.solver not in SOLVERS:
            lines.append(
                f"| {a.solver} | {a.nfe} | {a.quality:.3f} ± {a.quality_error:.3f} | {a.seconds:.1f} |"
            )
    return "\n".join(lines)


def draw(target: Target, arms: list[Arm], folder: Path) -> None:
    """Quality against evaluations and against wall time; the exact samples' own distance as the floor."""
    shown = ["Euler-Maruyama", "Heun (EDM)", "DDIM", "SDE-DPM-Solver++ 2", "DPM-Solver++ 2M", "DEIS 3"]
    floor = max(1e-4, next(a.quality_error for a in arms if a.solver == "exact"))
    for what, label in (("nfe", "network evaluations"), ("seconds", f"seconds for {arms[0].n} samples")):
        curves = {}
        for name in shown:
            mine = sorted((a for a in arms if a.solver == name), key=lambda a: a.nfe)
            curves[name] = ([getattr(a, what) for a in mine], [max(a.quality, floor) for a in mine])
        pictures.save_curves(
            {k: v for k, v in curves.items() if len(v[0])},
            folder / f"quality_{target.name}{'' if what == 'nfe' else '_seconds'}.png",
            x_label=label,
            y_label=target.names[0],
            title=f"{target.name}: n = {arms[0].n}, cut off at {floor:.1g}",
            log_x=True,
            log_y=True,
        )


# --------------------------------------------------------------------------------------------------- overhead


def per_call(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of so many calls."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - started))
    return found


@torch.no_grad()
def overhead(repeats: int, steps: int = 50) -> str:
    """Milliseconds a step beside the network, ours and theirs in turn, and the share at the default U-Net."""
    x = torch.randn(16, 3, 32, 32)
    noise = torch.randn_like(x)
    lines = [
        "| a step on 16 images of 3x32x32, ms | library | theirs | ours | ours / theirs |",
        "|---|---|---|---|---|",
    ]

    def free(x: Tensor, t: Tensor) -> Tensor:
        return noise

    for peer in peers():
        times = peer.times(steps)

        def ours(peer: Peer = peer, times: Tensor = times) -> object:
            return sd.sample(
                peer.sde, free, tuple(x.shape), predictor=peer.predictor, times=times, x_init=x, denoise=False
            )

        def theirs(peer: Peer = peer) -> object:
            return peer.run(free, x, steps)

        a, b = [], []
        for _ in range(repeats + 1):
            a += per_call(ours, 1)
            b += per_call(theirs, 1)
        ratios = sorted(m / o for m, o in zip(a[1:], b[1:], strict=True))
        mine, others = statistics.median(a[1:]) / steps, statistics.median(b[1:]) / steps
        spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}"
        ratio = f"{statistics.median(ratios):.2f} ({spread})"
        lines.append(f"| {peer.name} | {peer.package} | {others:.3f} | {mine:.3f} | {ratio} |")
    sde = sd.VP()
    lines += ["", "Median and quartiles of runs of both in turn.", "", share(sde, x, steps, repeats)]
    return "\n".join(lines)


@torch.no_grad()
def compare(n: int, budgets: tuple[int, ...]) -> str:
    """The mixture by other libraries' solvers and ours, on their grid with the same score and initial noise."""
    lines = [
        "| solver | library | evaluations | theirs | ours | largest difference of a coordinate |",
        "|---|---|---|---|---|---|",
    ]
    for peer in peers():
        target = mixture(n, peer.sde)
        stochastic = sd.predictors.is_stochastic(peer.predictor)
        for nfe in budgets:
            steps = nfe // peer.evaluations
            times = peer.times(steps)
            x = sd.SampleNoise(SEED, range(n), target.shape).normal() * float(peer.sde.sigma(times[0]))
            torch.manual_seed(SEED)
            theirs = peer.run(target.score, x, steps)
            ours = sd.sample(
                peer.sde, target.score, (n, *target.shape), predictor=peer.predictor, times=times, x_init=x
            )  # fmt: skip
            a, b = (target.judge(samples)[0] for samples in (theirs, ours.x))
            gap = "other noise" if stochastic else f"{float((theirs - ours.x).abs().max()):.1e}"
            theirs_found, ours_found = (f"{e.value:.4f} ± {e.standard_error:.4f}" for e in (a, b))
            lines.append(
                f"| {peer.name} | {peer.package} | {ours.nfe} | {theirs_found} | {ours_found} | {gap} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines)


def share(sde: sd.SDE, x: Tensor, steps: int, repeats: int) -> str:
    """How much of sampling with the default U-Net at 32x32 is not the network."""
    from sde_diffusion.networks import UNet

    torch.manual_seed(0)
    net = UNet(3, channels=32).eval()
    spent = 0.0

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal spent
        started = time.perf_counter()
        out: Tensor = net(x, torch.zeros(len(x)))
        spent += time.perf_counter() - started
        return out

    shares = []
    for _ in range(max(2, repeats // 5)):
        spent, started = 0.0, time.perf_counter()
        times = sd.log_snr_times(sde, steps // 5)
        sd.sample(sde, score, tuple(x.shape), predictor=sd.UniPC(3), times=times, x_init=x, denoise=False)
        shares.append(1 - spent / (time.perf_counter() - started))
    return (
        f"UniPC 3 with the default U-Net on 16 images of 3x32x32: {statistics.median(shares):.1%} of the time is "
        f"not the network (from {min(shares):.1%} to {max(shares):.1%} over {len(shares)} runs)"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, default=Path("runs/solvers"))
    parser.add_argument(
        "--targets", nargs="+", default=["mixture"], help="mixture, or folders of runs of images"
    )
    parser.add_argument("--n", type=int, help="samples of an arm (default: 2000, or 360 images)")
    parser.add_argument("--largest", type=int, default=1000, help="leave out more evaluations than these")
    parser.add_argument("--nfe", type=int, nargs="+", default=NFE, help="evaluations")
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS), metavar="NAME")
    parser.add_argument("--overhead", action="store_true", help="measure the cost of a step instead")
    parser.add_argument("--peers", action="store_true", help="compare with other libraries' solvers instead")
    parser.add_argument("--repeats", type=int, default=21, help="of --overhead")
    parser.add_argument("--quick", action="store_true", help="in miniature")
    given = parser.parse_args()
    if given.overhead:
        print(overhead(5 if given.quick else given.repeats))
        return
    if given.peers:
        compare(given.n or (200 if given.quick else 2000), (10,) if given.quick else (5, 10, 20, 50))
        return
    folder = given.workdir / "quick" if given.quick else given.workdir
    texts = []
    for name in given.targets:
        n = given.n or (200 if given.quick else 2000 if name == "mixture" else 360)
        target = mixture(n) if name == "mixture" else images(name, n)
        largest = min(given.largest, 20) if given.quick else given.largest
        arms = measure(target, folder / "arms.csv", n, tuple(given.nfe), largest, given.solvers)
        draw(target, arms, folder)
        texts.append(table(target, arms))
    (folder / "table.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    print("\n" + "\n\n".join(texts) + f"\n\nin {folder}: arms.csv, table.md and pictures")


if __name__ == "__main__":
    main()
