"""Measures steps in turns, and takes notes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sde_diffusion.allocator import return_freed_memory

__all__ = ["Bench", "Side"]


@dataclass(frozen=True)
class Side:
    """One contestant: its ``train`` and ``infer`` each do one step of ``batch`` images."""

    name: str
    batch: int
    train: Callable[[], Any]
    infer: Callable[[], Any]
    allocate: Callable[[], Any] = return_freed_memory


class Bench:
    """Measures and takes notes.

    Args:
        repeats: of each measurement.
        warmup: steps before it.
        settle: steps that do not count before each one that does, where the sides differ in what they do with
            freed memory.
        clock: "wall", or "cpu" for the seconds of the processor, on a machine that is not alone.
    """

    def __init__(self, repeats: int, warmup: int, settle: int, clock: str) -> None:
        self.repeats, self.warmup, self.settle = repeats, warmup, settle
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.results: dict[str, Any] = {}
        self.spreads: list[float] = []
        self.lines: list[str] = []

    def say(self, *lines: str) -> None:
        """Prints lines of the report and keeps them."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one step."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        start = self.now()
        step()
        if cuda:
            torch.cuda.synchronize()
        return self.now() - start

    def alternate(
        self, steps: list[Callable[[], Any]], before: list[Callable[[], Any]] | None = None
    ) -> list[float]:
        """Median seconds of each, taken in turns; ``spreads`` then has the quartiles' distance over it.

        Where something comes ``before`` the turns of a step, steps that do not count follow it.
        """
        for step in steps:
            for _ in range(self.warmup):
                step()
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(self.repeats):
            for i, (taken, step) in enumerate(zip(times, steps, strict=True)):
                if before is not None:
                    before[i]()
                    for _ in range(self.settle):
                        step()
                taken.append(self.seconds(step))
        medians = [statistics.median(taken) for taken in times]
        self.spreads = []
        for taken, middle in zip(times, medians, strict=True):
            low, _, high = statistics.quantiles(taken, n=4) if len(taken) > 1 else (middle,) * 3
            self.spreads.append((high - low) / middle)
        return medians

    def compare(self, title: str, sides: list[Side], memory: dict[str, float]) -> dict[str, dict[str, float]]:
        """A table of the sides: the first is what the others are compared with."""
        before = [side.allocate for side in sides]
        train, spread = self.alternate([side.train for side in sides], before), self.spreads
        infer, infer_spread = self.alternate([side.infer for side in sides], before), self.spreads
        rows: dict[str, dict[str, float]] = {}
        self.say("", f"## {title}", "")
        self.say("| | training, images/s | ratio | inference, images/s | ratio | peak memory, MiB |")
        self.say("|---|---|---|---|---|---|")
        for side, t, i, dt, di in zip(sides, train, infer, spread, infer_spread, strict=True):
            row = {
                "train_spread": dt,
                "infer_spread": di,
                "train_images_per_second": side.batch / t,
                "train_ratio": train[0] / t * side.batch / sides[0].batch,
                "infer_images_per_second": side.batch / i,
                "infer_ratio": infer[0] / i * side.batch / sides[0].batch,
                "peak_mib": memory.get(side.name, 0.0),
            }
            rows[side.name] = row
            peak = f"{row['peak_mib']:.0f}" if row["peak_mib"] else "not measured"
            self.say(
                f"| {side.name} | {row['train_images_per_second']:.1f} ± {100 * dt:.0f}% | "
                f"{row['train_ratio']:.2f} | {row['infer_images_per_second']:.1f} ± {100 * di:.0f}% | "
                f"{row['infer_ratio']:.2f} | {peak} |"
            )
        self.results[title] = rows
        return rows
