"""What the results say, in numbers and in plain words: where evaluations are best spent, on which corrector, and
whether the paper's finding is seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sde_diffusion.compare.ranking import (
    Entry,
    after_a_predictor,
    best,
    entries,
    of_kind,
    of_method,
)

Results = dict[str, Any]
_DRAWS = 2000
CLEAR = 2.0
"""A difference of so many standard errors is called one."""


def scores_of(results: Results) -> list[str]:
    """The kinds of score that there are results for, exact (or trained) first."""
    there = {arm["score"] for arm in results["arms"]}
    return [score for score in ("exact", "biased", "minibatch") if score in there]


def cells(results: Results, score: str) -> Iterator[tuple[str, int, list[Entry]]]:
    """Every target and number of evaluations with its methods, the best first."""
    settings = results["settings"]
    for name in settings["targets"]:
        for nfe in settings["evaluations"]:
            found = entries(results["arms"], name, score, nfe)
            if found:
                yield name, nfe, found


def standard_errors(a: Entry, b: Entry) -> float:
    """``(a - b) / error``: by how many standard errors ``a`` is worse; infinite where only one is finite."""
    if np.isfinite(a.value) and np.isfinite(b.value):
        error = float(np.hypot(a.error, b.error))
        return (a.value - b.value) / error if error else float("nan")
    return float("nan") if a.value == b.value else float("inf") if b.value < a.value else -float("inf")


def answers(results: Results) -> list[dict[str, Any]]:
    """For each target, score and number of evaluations the best of each family, and which family is first.

    ``verdict``: ``predictor`` or ``corrector`` where the best of P and of PC differ by two standard errors,
    else ``tie``.
    """
    found = []
    for score in ("exact", "biased"):
        for name, nfe, ranked in cells(results, score):
            kinds = {kind: best(ranked, of_kind(kind)) for kind in ("P", "PC", "C")}
            p, pc = kinds["P"], kinds["PC"]
            if p is None or pc is None:
                continue
            z = standard_errors(p, pc)
            verdict = "corrector" if z > CLEAR else "predictor" if z < -CLEAR else "tie"
            found.append({"target": name, "score": score, "nfe": nfe, "z": z, "verdict": verdict, **kinds})
    return found


def places(results: Results, score: str) -> list[dict[str, Any]]:
    """The correctors by their mean place, each after its best predictor, over all targets and numbers of evaluations.

    Returns:
        Best first: ``corrector``, ``place`` (1 is first), its standard ``error`` and ``first``, the probability of
        the best mean place, all by drawing the energy distances anew with their errors.
    """
    correctors = results["settings"]["correctors"]
    rng, ranks = np.random.default_rng(0), []
    for _, _, ranked in cells(results, score):
        found = [best(ranked, after_a_predictor(name)) for name in correctors]
        if any(e is None for e in found):
            continue
        value = np.array([e.value if np.isfinite(e.value) else 1e9 for e in found if e is not None])
        error = np.array([e.error for e in found if e is not None])
        drawn = rng.normal(value, error, (_DRAWS, len(value)))
        ranks.append(np.stack([value, *drawn]).argsort(1).argsort(1) + 1)
    if not ranks:
        return []
    mean = np.mean(ranks, 0)
    chances = np.bincount(mean[1:].argmin(1), minlength=len(correctors)) / _DRAWS
    rows = [
        {
            "corrector": name,
            "place": float(mean[0, i]),
            "error": float(mean[1:, i].std(ddof=1)),
            "first": float(chances[i]),
        }
        for i, name in enumerate(correctors)
    ]
    return sorted(rows, key=lambda row: row["place"])


def paper(results: Results) -> list[dict[str, Any]]:
    """Song et al.'s comparison (2021, table 1): ``P`` with N/2 and with N predictor steps, ``PC`` with N/2 of each,
    ``C`` with N, all with Langevin by their rule, each at its best step size."""
    found = []
    for name, nfe, ranked in cells(results, "exact"):
        half = entries(results["arms"], name, "exact", nfe // 2)
        row: dict[str, Any] = {"target": name, "nfe": nfe}
        for predictor in ("reverse_diffusion", "ddim"):
            row[f"{predictor} P N/2"] = best(half, of_method(predictor))
            row[f"{predictor} P N"] = best(ranked, of_method(predictor))
            row[f"{predictor} PC"] = best(ranked, of_method(f"{predictor} + langevin"))
        row["C"] = best(ranked, of_method("langevin alone"))
        found.append(row)
    return found


def _tally(pairs: Iterable[tuple[Entry | None, Entry | None]]) -> tuple[int, int, int]:
    """How often the first is clearly better, clearly worse, and neither."""
    z = [standard_errors(a, b) for a, b in pairs if a is not None and b is not None]
    better, worse = sum(v < -CLEAR for v in z), sum(v > CLEAR for v in z)
    return better, worse, len(z) - better - worse


def _counted(better: int, worse: int, open_: int) -> str:
    return f"better in {better}, worse in {worse}, no clear difference in {open_} of {better + worse + open_}"


def _seen(better: int, worse: int, open_: int) -> str:
    """Whether a finding that the first is better is seen."""
    if better + worse + open_ == 0:
        return "not tested"
    if better > worse:
        return "reproduced" if better > open_ and not worse else "reproduced in part"
    return "contradicted" if worse > better else "not seen"


def statements(results: Results) -> list[str]:
    """Plain sentences: where evaluations are best spent, on which corrector, and the paper's finding.

    A clear difference is one of two standard errors, so one in twenty is chance.
    """
    said = []
    for score in scores_of(results):
        found = [a for a in answers(results) if a["score"] == score]
        by_nfe: dict[int, list[str]] = {}
        for a in found:
            by_nfe.setdefault(a["nfe"], []).append(a["verdict"])
        for nfe, verdicts in by_nfe.items():
            count = {v: verdicts.count(v) for v in ("predictor", "corrector", "tie")}
            said.append(
                f"{nfe} evaluations, {_score(results, score)}: {_better(count)} "
                f"(predictor {count['predictor']}, corrector {count['corrector']}, no clear difference "
                f"{count['tie']} of {len(verdicts)} targets)."
            )
        ranked = places(results, score)
        if ranked:
            first, second = ranked[0], ranked[min(1, len(ranked) - 1)]
            said.append(
                f"Which corrector, {_score(results, score)}: {first['corrector']}, mean place "
                f"{first['place']:.1f} ± {first['error']:.1f} of {len(ranked)}, the best with probability "
                f"{first['first']:.2f}; then {second['corrector']}, {second['place']:.1f} ± {second['error']:.1f}."
            )
    return said + _finding(paper(results))


def _score(results: Results, score: str) -> str:
    trained = all("/" in name for name in results["settings"]["targets"])
    return "trained score" if trained else f"{score} score"


def _better(count: dict[str, int]) -> str:
    if count["predictor"] == count["corrector"] == 0:
        return "no clear difference between predictor and corrector steps"
    if count["predictor"] and count["corrector"]:
        return "it depends on the target"
    return f"better spent on {'predictor' if count['predictor'] else 'corrector'} steps, where there is a difference"


def _finding(rows: list[dict[str, Any]]) -> list[str]:
    """The paper's finding: PC beats P at equal predictor steps; correctors alone are worst."""

    said = []
    for predictor in ("reverse_diffusion", "ddim"):
        equal, more = (
            _tally((row[f"{predictor} PC"], row[f"{predictor} {other}"]) for row in rows)
            for other in ("P N/2", "P N")
        )
        said.append(
            f"The paper's finding that PC beats P at equal predictor steps, {predictor} with Langevin: "
            f"{_seen(*equal)} ({_counted(*equal)}). Against P with the same evaluations: {_counted(*more)}."
        )

    for predictor in ("reverse_diffusion", "ddim"):
        others = [[row[f"{predictor} P N"], row[f"{predictor} PC"]] for row in rows]
        worst = [
            max((e for e in pair if e is not None), key=lambda e: e.value, default=None) for pair in others
        ]
        better, worse, open_ = _tally((row["C"], w) for row, w in zip(rows, worst, strict=True))
        said.append(
            "The paper's finding that correctors alone are worst, against the worse of P and PC with as many "
            f"evaluations, {predictor}: {_seen(worse, better, open_)} ({_counted(better, worse, open_)})."
        )
    return said
