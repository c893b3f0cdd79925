"""The whole comparison: every arm once, kept in a file of its own, within a budget of time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sde_diffusion.compare.arms import CORRECTORS, RATIOS, Arm, plan, run_arm
from sde_diffusion.compare.measures import measure
from sde_diffusion.compare.stationarity import stationarity
from sde_diffusion.compare.targets import TARGETS, target
from sde_diffusion.correctors import CORRECTORS as KNOWN
from sde_diffusion.errors import unknown_name
from sde_diffusion.processes import processes

VERSION = 2
"""Of what an arm's file means; raised when results would change."""
_CLOUD, _PICTURES = 500, 16


def pictured(evaluations: Sequence[int]) -> int:
    """The number of evaluations whose samples are kept for pictures."""
    return 50 if 50 in evaluations else evaluations[0]


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        targets: names of :data:`~sde_diffusion.compare.targets.TARGETS`, and folders of trained runs.
        evaluations: per sample.
        correctors, ratios: see :func:`~sde_diffusion.compare.arms.plan`.
        samples: per arm; at least 256.
        seed: of noise and exact samples.
        budget: minutes after which no arm is begun.
        jobs: processes.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    evaluations: tuple[int, ...] = (20, 50, 200, 1000)
    correctors: tuple[str, ...] = CORRECTORS
    ratios: tuple[float, ...] = RATIOS
    samples: int = 1024
    seed: int = 0
    budget: float = 15.0
    jobs: int = 2

    def __post_init__(self) -> None:
        for name in self.targets:
            if "/" not in name and name not in TARGETS:
                raise unknown_name("target", name, TARGETS)
        for name in self.correctors:
            if name not in KNOWN:
                raise unknown_name("corrector", name, KNOWN)
        for what in ("targets", "evaluations", "correctors", "ratios"):
            if not getattr(self, what):
                raise ValueError(f"{what} must not be empty")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 12 for n in self.evaluations):
            raise ValueError(f"evaluations must be integers >= 12, got {self.evaluations}")
        if any(not 0 < r < float("inf") for r in self.ratios):
            raise ValueError(f"step sizes must be positive, got {self.ratios}")
        if self.samples < 256:
            raise ValueError(f"an arm needs at least 256 samples, got {self.samples}")
        if not self.budget > 0:
            raise ValueError(f"the budget must be positive, in minutes, got {self.budget}")
        if self.jobs < 1:
            raise ValueError(f"the number of processes must be at least 1, got {self.jobs}")


Task = tuple[str, dict[str, Any]]
"""``("arm", fields of an Arm)`` or ``("chain", target, corrector, ratio)``."""


def tasks(settings: Settings) -> list[Task]:
    """All there is to do: the arms in the order of :func:`plan`, the chains after those with an exact score."""
    exact = [name for name in settings.targets if "/" not in name]
    chains: list[Task] = [
        ("chain", {"target": name, "corrector": corrector, "ratio": ratio})
        for name in exact
        for corrector in settings.correctors
        for ratio in settings.ratios
    ]
    arms: list[Task] = [
        ("arm", asdict(arm))
        for arm in plan(
            settings.targets, settings.evaluations, correctors=settings.correctors, ratios=settings.ratios
        )
    ]
    first = next((i for i, (_, arm) in enumerate(arms) if arm["score"] != "exact"), len(arms))
    return arms[:first] + chains + arms[first:]


def _file(folder: Path, task: Task, settings: Settings) -> Path:
    kind, fields = task
    kept = fields.get("nfe") == pictured(settings.evaluations)
    version = [VERSION, target(fields["target"]).version, kept]
    key = json.dumps([version, kind, settings.samples, settings.seed, *sorted(fields.items())])
    name = Arm.digest(key)
    return folder / "arms" / f"{kind}-{name}.json"


def run_task(task: Task, settings: Settings) -> dict[str, Any]:
    """The result of one task, for JSON."""
    kind, fields = task
    chosen = target(fields["target"])
    if kind == "chain":
        return fields | stationarity(
            chosen, fields["corrector"], fields["ratio"], n=settings.samples, seed=settings.seed
        )
    arm = Arm(**fields)
    out = run_arm(arm, chosen, settings.samples, settings.seed)
    result = fields | {"kind": arm.kind, "used": out.nfe, "seconds": out.seconds, "levels": arm.levels}
    result |= {"acceptance": out.acceptance, "snr": out.snr, "displacement": out.displacement}
    if arm.nfe == pictured(settings.evaluations) and chosen.shape == (2,):
        result["cloud"] = np.round(torch.nan_to_num(out.x[:_CLOUD]).numpy(), 3).tolist()
    if arm.nfe == pictured(settings.evaluations) and len(chosen.shape) == 3:
        grey = 127.5 * (chosen.observe(torch.nan_to_num(out.x[:_PICTURES])) + 1)
        result["pictures"] = grey.round().int().tolist()
    return result | {"measures": measure(out.x, chosen, settings.seed + 1)}


def _work(task: Task, settings: Settings, path: str) -> None:
    torch.set_num_threads(1)
    begin = time.process_time()
    result = json.dumps(run_task(task, settings) | {"cpu": time.process_time() - begin})
    draft = Path(path).with_suffix(f".{os.getpid()}")
    draft.write_text(result, encoding="utf-8")
    draft.replace(path)  # whole or not at all


def run_study(
    settings: Settings, folder: str | Path, *, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Does what is not yet done, as long as the budget lasts, and returns everything that is.

    Every task is kept in ``folder/arms`` as soon as it is done: the same settings go on where they stopped.

    Returns:
        ``arms``, ``chains`` (lists of results), ``missing`` (tasks that the budget left out), ``seconds`` of this
        run, ``cpu_seconds`` of all tasks, ``settings``.

    Raises:
        UsageError: a folder that is no run; nothing has been done.
    """
    for name in settings.targets:
        target(name)
    place = Path(folder)
    (place / "arms").mkdir(parents=True, exist_ok=True)
    everything = tasks(settings)
    files = [_file(place, task, settings) for task in everything]
    todo = [(task, file) for task, file in zip(everything, files, strict=True) if not file.exists()]
    say(f"{len(everything)} arms and chains, {len(everything) - len(todo)} done before")
    begin = time.monotonic()
    deadline = begin + 60 * settings.budget
    # Progress in evaluations, so that the time left is that of the dear arms too.
    total = sum(_weight(task) for task, _ in todo)
    with tqdm(
        total=total, unit="ev", unit_scale=True, disable=not sys.stderr.isatty(), desc="compare"
    ) as bar:
        for task in _done(todo, settings, deadline):
            bar.update(_weight(task))
    seconds = time.monotonic() - begin
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    results: dict[str, Any] = {
        "arms": [r for r in found if "measures" in r],
        "chains": [r for r in found if "drift" in r],
        "missing": len(everything) - len(found),
        "seconds": seconds,
        "cpu_seconds": sum(r["cpu"] for r in found),
        "settings": asdict(settings),
    }
    results["floor"] = floor(settings)
    (place / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return results


def floor(settings: Settings) -> dict[str, Any]:
    """What real samples would get: by target."""
    n, seed = settings.samples, settings.seed
    return {name: measure(target(name).floor(n, seed), target(name), seed + 1) for name in settings.targets}


def _weight(task: Task) -> int:
    # Measuring costs as much as fifty evaluations.
    return 50 + task[1].get("nfe", 60)


def _done(todo: Sequence[tuple[Task, Path]], settings: Settings, deadline: float) -> Iterator[Task]:
    """Does the tasks and gives them as they are done; begins none after the deadline."""
    if settings.jobs == 1:
        for task, file in todo:
            if time.monotonic() > deadline:
                return
            _work(task, settings, str(file))
            yield task
        return
    left = iter(todo)
    with processes(settings.jobs) as pool:
        running: dict[Any, Task] = {}
        while True:
            while len(running) < 2 * settings.jobs and time.monotonic() < deadline:
                following = next(left, None)
                if following is None:
                    break
                running[pool.submit(_work, following[0], settings, str(following[1]))] = following[0]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
