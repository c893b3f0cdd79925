"""Solvers of one step: Runge-Kutta methods for the exact solution of the ODE, in either of its forms.

A step from ``t`` to ``s`` goes through stages. Each asks for the score once, at a state ``u_k`` and time ``t_k``,
takes from it an output ``m_k = on_state u_k + on_score score`` (the expected noise or data), and gives the next state

    u_{k+1} = keep x + sum_{j <= k} weights_j m_j

from the state ``x`` at the start; the last is the state at ``s``. A run has all its coefficients ready as Python
floats, so that a step is a few tensor operations; without a run they are tensors of the shape of ``t``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sde_diffusion.predictors.exponential import Coefficient, Form, Level, combine, next_step
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import as_time, expand


@dataclass(frozen=True)
class Stage:
    """One evaluation of a step and the state that it gives; see the module."""

    t: Tensor
    on_state: Coefficient
    on_score: Coefficient
    keep: Coefficient
    weights: tuple[Coefficient, ...]

    @classmethod
    def of(cls, form: Form, here: Level, start: Level, end: Level, weights: Sequence[Tensor]) -> Stage:
        """The stage that evaluates at ``here`` and gives the state at ``end``."""
        return cls(here.t, *form.output(here), form.keep(start, end), tuple(weights))

    def like(self, x: Tensor) -> Stage:
        """The same stage with coefficients shaped to multiply ``x``."""
        on_state, on_score, keep, *weights = (
            expand(torch.as_tensor(c), x) for c in (self.on_state, self.on_score, self.keep, *self.weights)
        )
        return Stage(self.t, on_state, on_score, keep, tuple(weights))


Method: TypeAlias = Callable[[SDE, Level, Level], list[Stage]]
"""``(sde, start, end) -> stages`` of a step, for levels of any shape, with noise at the end."""


def first_order(form: Form, start: Level, end: Level) -> list[Stage]:
    """The step of order 1, DDIM, which also goes to the data themselves (``sigma = 0``)."""
    return [Stage.of(form, start, start, end, [form.whole(start, end)])]


def take(stages: Sequence[Stage], score: Score, x: Tensor) -> Tensor:
    """The state at the end of a step."""
    state, outputs = x, list[Tensor]()
    for stage in stages:
        outputs.append(combine([(stage.on_score, score(state, stage.t)), (stage.on_state, state)]))
        state = combine([(stage.keep, x), *zip(stage.weights, outputs, strict=True)])
    return state


def step_between(method: Method, form: Form, sde: SDE, t: Tensor, s: Tensor) -> list[Stage]:
    """The stages between times of shape () or (B,), of first order where they lead to the data themselves.

    Raises:
        ValueError: some samples of the batch go to the data and others do not.
    """
    start, end = (Level.at(sde, as_time(time)) for time in (t, s))
    clean = end.sigma == 0
    if bool(clean.all()):
        return first_order(form, start, end)
    if bool(clean.any()):
        raise ValueError("the samples of a batch must go to times that all have noise, or all have none")
    return method(sde, start, end)


def steps_along(method: Method, form: Form, sde: SDE, t: Tensor, s: Tensor) -> list[list[Stage]]:
    """The stages of the steps from times ``t`` to ``s``, (n,) each, with Python floats for coefficients."""
    start, end = Level.at(sde, t), Level.at(sde, s)
    clean = bool(end.sigma[-1] == 0)
    noisy = len(t) - clean

    def rows(levels: Level, part: slice) -> Level:
        return Level(levels.t[part], levels.alpha[part], levels.sigma[part], levels.lam[part])

    steps: list[list[Stage]] = []
    if noisy:
        part = slice(0, noisy)
        steps += _as_floats(method(sde, rows(start, part), rows(end, part)))
    if clean:
        part = slice(noisy, noisy + 1)
        steps += _as_floats(first_order(form, rows(start, part), rows(end, part)))
    return steps


def _as_floats(stages: Sequence[Stage]) -> list[list[Stage]]:
    columns = []
    for stage in stages:
        coefficients = torch.stack(
            [torch.as_tensor(c) for c in (stage.on_state, stage.on_score, stage.keep, *stage.weights)], -1
        )
        columns.append(
            [
                Stage(t, row[0], row[1], row[2], tuple(row[3:]))
                for t, row in zip(stage.t.unbind(), coefficients.tolist(), strict=True)
            ]
        )
    return [list(step) for step in zip(*columns, strict=True)]


class StagesRun:
    """One run of a solver of one step along a grid."""

    def __init__(self, method: Method, form: Form, sde: SDE, times: Tensor) -> None:
        self._steps = iter(steps_along(method, form, sde, times[:-1], times[1:]))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, the next time of the grid."""
        return take(next_step(self._steps), score, x)
