"""What the results say: the best step size of each method, chosen and judged on different samples; who is first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Result = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A method at one target, score and number of evaluations.

    Attributes:
        method: such as ``ddim + mala``.
        kind: P, PC or C.
        result: of the arm with the best step size by the even samples.
        value, error: its energy distance by the odd samples.
        first: the probability that it is the best of all, by resampling the errors.
    """

    method: str
    kind: str
    result: Result
    value: float
    error: float
    first: float = float("nan")

    def of(self, measure: str) -> tuple[float, float]:
        """Another measure of the arm, and its error."""
        return _value(self.result, measure)


def method(result: Result) -> str:
    """The name of an arm but for its step size."""
    parts = [result["predictor"]] if result["predictor"] != "none" else []
    if result["corrector"] != "none":
        parts.append(result["corrector"] + (f" x{result['steps']}" if result["steps"] > 1 else ""))
    return " + ".join(parts) if result["predictor"] != "none" else f"{parts[0]} alone"


def entries(arms: Iterable[Result], target: str, score: str, nfe: int) -> list[Entry]:
    """Each method at its best step size, the best first; those that diverge at every step size last, at infinity."""
    chosen: dict[str, Result] = {}
    for arm in arms:
        if (arm["target"], arm["score"], arm["nfe"]) != (target, score, nfe):
            continue
        name = method(arm)
        if name not in chosen or _value(arm, "energy_a")[0] < _value(chosen[name], "energy_a")[0]:
            chosen[name] = arm
    found = [Entry(name, arm["kind"], arm, *_value(arm, "energy_b")) for name, arm in chosen.items()]
    found.sort(key=lambda e: e.value)
    return _with_chances(found)


def _value(arm: Result, name: str) -> tuple[float, float]:
    measured = arm["measures"].get(name)
    return (float("inf"), 0.0) if measured is None else (measured["value"], measured["error"])


def _with_chances(found: Sequence[Entry], draws: int = 4000) -> list[Entry]:
    finite = [e for e in found if np.isfinite(e.value)]
    if not finite:
        return list(found)
    rng = np.random.default_rng(0)
    drawn = rng.normal([e.value for e in finite], [e.error for e in finite], (draws, len(finite)))
    chances = np.bincount(drawn.argmin(1), minlength=len(finite)) / draws
    judged = {e.method: float(p) for e, p in zip(finite, chances, strict=True)}
    return [Entry(e.method, e.kind, e.result, e.value, e.error, judged.get(e.method, 0.0)) for e in found]


def best(found: Sequence[Entry], chosen: Callable[[Entry], bool]) -> Entry | None:
    """The first entry that is chosen."""
    return next((e for e in found if chosen(e)), None)


def of_kind(kind: str) -> Callable[[Entry], bool]:
    """Whether an entry is of a kind: P, PC or C."""
    return lambda e: e.kind == kind


def of_method(name: str) -> Callable[[Entry], bool]:
    """Whether an entry is of a method."""
    return lambda e: e.method == name


def after_a_predictor(corrector: str) -> Callable[[Entry], bool]:
    """Whether an entry has the corrector, after any predictor."""
    return lambda e: e.kind == "PC" and e.result["corrector"] == corrector


def ratio_of(
    arms: Iterable[Result], corrector: str, nfe: int, kind: str = "PC"
) -> dict[tuple[str, float], float]:
    """Energy distance by target and step size of a corrector after DDIM, one step a time, exact score."""
    found = {}
    for arm in arms:
        fits = arm["corrector"] == corrector and arm["nfe"] == nfe and arm["kind"] == kind
        if fits and arm["predictor"] == "ddim" and arm["steps"] == 1 and arm["score"] == "exact":
            found[arm["target"], arm["ratio"]] = _value(arm, "energy")[0]
    return found
