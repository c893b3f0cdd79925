"""The likelihood of a whole test set from the bound of every image and the ODE of some.

    python experiments/whole_split.py --workdir runs/mnist --ode 2000 --jobs 2 --precision bfloat16

The variational bound in continuous time costs a few evaluations of the network an image, the likelihood of the
probability-flow ODE some sixty with their derivatives. Both are of the same dequantized images; the mean over all by
the ODE is estimated from blocks of images drawn at random, with the bound as a covariate (a regression estimator:
how the drawn blocks' bounds differ from the whole's). With few draws of the bound it helps little.
What has been computed is kept in ``whole_split.jsonl`` in the folder; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter, deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

import sde_diffusion as sd
from sde_diffusion.allocator import keep_freed_memory
from sde_diffusion.checkpoint import weights_hash
from sde_diffusion.data import to_model
from sde_diffusion.devices import choose_precision
from sde_diffusion.evaluation import mean_and_error
from sde_diffusion.likelihood import dequantization_noise
from sde_diffusion.processes import processes

BLOCK = 25
"""Images that follow each other and are evaluated together; the ODE's are drawn by blocks."""
_run: Any = None


def begin(folder: str) -> None:
    """Loads the run of a process."""
    global _run
    keep_freed_memory()
    _run = sd.load(folder, device="cpu")


def work(task: tuple[str, list[int], int, str, float]) -> list[tuple[str, int, float, int]]:
    """Bits/dim of some test images by the ``bound`` or by the ``ode``: what, index, value, evaluations of each."""
    kind, indices, draws, precision, tolerance = task
    levels, first = _run.data.test[indices], indices[0]
    if kind == "bound":
        x = to_model(levels, _run.data.levels, dequantization_noise(levels.shape, first_index=first))
        with _run.model.computing_in(choose_precision(precision, x.device)):
            bound = sd.continuous_bound(
                _run.sde, _run.model, x, draws=draws, first_index=first, batch_size=64
            )
        values, spent = bound.bits_per_dim(levels=_run.data.levels), [draws] * len(indices)
    else:
        out = _run.evaluate(levels, first_index=first, precision=precision, rtol=tolerance, atol=tolerance)
        values, spent = _run.in_bits(out.log_prob), out.nfe_per_sample.tolist()
    return [(kind, *row) for row in zip(indices, values.tolist(), spent, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--ode", type=int, default=2000, help="images by the ODE")
    parser.add_argument("--draws", type=int, default=16, help="of the bound for each image")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the ODE")
    parser.add_argument("--precision", default="float32", help="of the network: float32, bfloat16 or auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many")
    given = parser.parse_args()
    run = sd.load(given.workdir, device="cpu")
    total = len(run.data.test)
    if not 2 <= given.ode <= total:
        parser.error(f"--ode must be from 2 to {total}, got {given.ode}")
    settings = [weights_hash(run.model), given.draws, given.tolerance, given.precision]
    file, kept = given.workdir / "whole_split.jsonl", []
    if file.is_file():
        lines = file.read_text(encoding="utf-8").split("\n")
        if lines[0] == json.dumps(settings):
            kept = whole_blocks([json.loads(line) for line in lines[1:-1]], total)
    file.write_text("".join(json.dumps(line) + "\n" for line in [settings, *kept]), encoding="utf-8")
    done = {(kind, index) for kind, index, *_ in kept}
    blocks = [list(range(i, min(i + BLOCK, total))) for i in range(0, total, BLOCK)]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    wanted = [("bound", block) for block in blocks]
    wanted += [("ode", blocks[i]) for i in order[: math.ceil(given.ode / BLOCK)]]
    tasks = [
        (kind, block, given.draws, given.precision, given.tolerance)
        for kind, block in wanted
        if (kind, block[0]) not in done
    ]
    deadline = time.monotonic() + 60 * given.minutes
    with (
        processes(given.jobs, begin, (str(given.workdir),)) as pool,
        open(file, "a", encoding="utf-8") as out,
    ):

        def keep(rows: list[Any]) -> None:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
            out.flush()
            kept.extend(rows)

        pending: deque[Future[list[Any]]] = deque()
        for task in tasks:
            if time.monotonic() > deadline:
                break
            pending.append(pool.submit(work, task))
            if len(pending) > 2 * given.jobs:  # so many ahead that no process waits for another
                keep(pending.popleft().result())
        while pending:
            keep(pending.popleft().result())
    report(kept, total)


def whole_blocks(rows: list[Any], total: int) -> list[Any]:
    """The results but those of blocks that were not written to their end."""
    count = Counter((kind, index // BLOCK) for kind, index, *_ in rows)
    return [
        row for row in rows if count[row[0], row[1] // BLOCK] == min(BLOCK, total - row[1] // BLOCK * BLOCK)
    ]


def report(rows: list[Any], total: int) -> None:
    """Prints the means and the estimate for the whole."""
    found = {kind: {i: value for k, i, value, _ in rows if k == kind} for kind in ("bound", "ode")}
    both = sorted(found["bound"].keys() & found["ode"].keys())
    for kind, values in found.items():
        if len(values) > 1:
            mean = mean_and_error(torch.tensor(list(values.values()), dtype=torch.float64))
            print(f"{kind}: {mean['mean']:.4f} ± {mean['standard_error']:.4f} bits/dim, {len(values)} images")
    blocks = sorted({i // BLOCK for i in both})
    if len(found["bound"]) == total and len(blocks) > 2:
        pairs = torch.tensor([[found["ode"][i], found["bound"][i]] for i in both], dtype=torch.float64)
        place = torch.tensor([i // BLOCK for i in both])
        ode, bound = torch.stack([pairs[place == b].mean(0) for b in blocks]).unbind(1)
        slope = float(torch.cov(torch.stack([ode, bound]))[0, 1] / bound.var())
        ahead = sum(found["bound"].values()) / total - float(pairs[:, 1].mean())
        error = float((ode - slope * bound).std()) / math.sqrt(len(blocks)) * math.sqrt(1 - len(both) / total)
        print(
            f"all {total} by the ODE: {float(pairs[:, 0].mean()) + slope * ahead:.4f} ± {error:.4f}, "
            f"slope {slope:.2f}, {len(blocks)} blocks"
        )
    evaluations = [spent for kind, _, _, spent in rows if kind == "ode"]
    if evaluations:
        print(f"{sum(evaluations) / len(evaluations):.1f} evaluations an image by the ODE")


if __name__ == "__main__":
    main()
