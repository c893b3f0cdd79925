"""Solvers that remember: linear multistep methods for the exact solution of the ODE, in either of its forms.

Step ``i`` of a run asks for the score once, takes from it an output ``m_i`` (the expected noise or data) and gives

    x_{i+1} = keep_i x_i + sum_{j < q} weights[q][i][j] m_{i-j},        q = min(order, i + 1, ..) ,

where the outputs before the first are not known: the order grows with the first steps. At the noise end that costs
nothing one could measure, for there ``D`` hardly depends on time (its derivative falls as ``(alpha / sigma)^2``).

The order falls to 1 in a step to the data themselves, where ``lambda`` is infinite, and, with ``lower_order_final``,
to 2 and 1 in the last two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from sde_diffusion.predictors.exponential import Form, Level, combine, next_step
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE

FEW_STEPS = 15
"""Runs of fewer steps end with steps of lower order, unless told otherwise (the rule of Lu et al. 2022b)."""

Rule: TypeAlias = Callable[[list[Tensor], Level, Level], list[Tensor]]
"""``(nodes, start, end) -> weights``: those of the outputs at the nodes (lambda, newest first), shape (n,) each."""

Row: TypeAlias = "list[float]"


def check_order(order: int, highest: int = 3) -> None:
    """A clear error for an order that there is not."""
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"the order must be an integer from 1 to {highest}, got {order!r}")


@dataclass(frozen=True)
class Coefficients:
    """What a run steps with; see the module.

    Attributes:
        outputs: ``(on_state, on_score)`` of the output of each step.
        keep: the factor on the state of each step.
        weights: by order q, the q weights of each step; empty where the step cannot have that order.
        orders: the highest order of each step.
        corrections: by order q, the q + 1 weights with which the outputs (the newest among them, at the end of the
            step) correct the state that the step gave; only for methods with a corrector of their own.
    """

    outputs: list[tuple[float, float]]
    keep: Row
    weights: dict[int, list[Row]]
    orders: list[int]
    corrections: dict[int, list[Row]] = field(default_factory=dict)


def _rows(columns: list[Tensor], before: int, after: int) -> list[Row]:
    """Weights of some steps, one column for each output, as a row for each step of the run."""
    return [[] for _ in range(before)] + torch.stack(columns, -1).tolist() + [[] for _ in range(after)]


def _part(levels: Level, first: int, last: int) -> Level:
    return Level(*(v[first:last] for v in (levels.t, levels.alpha, levels.sigma, levels.lam)))


def coefficients(
    form: Form,
    sde: SDE,
    times: Tensor,
    order: int,
    rule: Rule,
    *,
    lower_order_final: bool | None,
    corrector: Rule | None = None,
) -> Coefficients:
    """The coefficients of a run along ``times``, (n + 1,).

    Args:
        form: of the integral.
        sde: the forward process.
        times: of the grid.
        order: the highest order.
        rule: the weights of the outputs up to the start of a step; one output gives the step of order 1.
        lower_order_final: whether the last steps have lower order; None for "in runs of fewer than 15 steps".
        corrector: the weights of the outputs of which the first is that at the end of the step.
    """
    n = len(times) - 1
    levels = Level.at(sde, times)
    clean = bool(levels.sigma[-1] == 0)
    start, end = _part(levels, 0, n), _part(levels, 1, n + 1)
    falls = n < FEW_STEPS if lower_order_final is None else lower_order_final
    orders = [min(order, i + 1, n - i if falls else order) for i in range(n)]
    if clean:
        orders[-1] = 1
    weights = {1: _rows([form.whole(start, end)], 0, 0)}
    corrections: dict[int, list[Row]] = {}
    for q in range(1, min(order, n) + 1):
        first, last = q - 1, n - clean
        if first >= last:
            break
        here, there = _part(start, first, last), _part(end, first, last)
        nodes = [levels.lam[first - j : last - j] for j in range(q)]
        predicted = rule(nodes, here, there)
        weights[q] = _rows(predicted, first, n - last) if q > 1 else weights[1]
        if corrector is not None:
            corrected = corrector([there.lam, *nodes], here, there)
            change = [corrected[0], *(c - p for c, p in zip(corrected[1:], predicted, strict=True))]
            corrections[q] = _rows(change, first, n - last)
    on_state, on_score = form.output(start)
    outputs = list(zip(on_state.tolist(), on_score.tolist(), strict=True))
    return Coefficients(outputs, form.keep(start, end).tolist(), weights, orders, corrections)


class MultistepRun:
    """One run along a grid: the coefficients, and the outputs of the steps before, newest first.

    A state that is not the one the last step gave has been moved by another hand (a Langevin corrector): then the
    method's own corrector is left out, for what it would correct is no longer there. The outputs before are kept,
    although they belong to another trajectory: with Langevin steps of the usual size the slope that they tell is
    worth more than the noise that they bring.
    """

    def __init__(self, table: Coefficients) -> None:
        self._table = table
        self._outputs: list[Tensor] = []
        self._given: Tensor | None = None  # the state of the last step
        self._order = 0  # of the last step
        self._steps = iter(range(len(table.keep)))
        self._memory = max(table.weights) - (0 if table.corrections else 1)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, the next time of the grid."""
        table, i = self._table, next_step(self._steps)
        on_state, on_score = table.outputs[i]
        outputs = [combine([(on_score, score(x, t)), (on_state, x)]), *self._outputs]
        keep, order = table.keep[i], table.orders[i]
        weights = list(table.weights[order][i])
        if table.corrections and x is self._given:
            # The state corrected with its own output, and the step from there, are one sum of the same terms.
            change = table.corrections[self._order][i - 1]
            weights += [0.0] * (len(change) - len(weights))
            for j, c in enumerate(change):
                weights[j] += keep * c
        given = combine([(keep, x), *zip(weights, outputs, strict=False)])
        self._outputs, self._given, self._order = outputs[: self._memory], given, order
        return given
