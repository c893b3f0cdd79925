"""What the solvers of the probability-flow ODE share: its exact solution, and integrals of polynomials.

With ``rho = sigma / alpha`` and ``lambda = -log rho``, half the log-SNR, the ODE has lost its linear part:

    d(x / alpha) = eps d rho,        d(x / sigma) = e^lambda D d lambda,

where ``eps = -sigma score`` is the expected noise and ``D = (x + sigma^2 score) / alpha`` the expected data at
(x, t). Between two times, therefore, for every linear SDE and in either direction,

    x_s = (alpha_s / alpha_t) x_t + alpha_s int_{rho_t}^{rho_s} eps d rho                       ("noise")
        = (sigma_s / sigma_t) x_t + alpha_s int_{lambda_t}^{lambda_s} e^(lambda - lambda_s) D d lambda      ("data")

and a solver is a rule for the integral of ``eps`` or of ``D`` (Lu et al. 2022a, "DPM-Solver", proposition 3.1; Lu et
al. 2022b, "DPM-Solver++", proposition 4.1; Zhang and Chen 2022, "DEIS", section 3). Holding ``eps`` or ``D``
constant gives the same first-order step, DDIM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.sdes import SDE

T = TypeVar("T")

Coefficient: TypeAlias = "float | Tensor"
Variable: TypeAlias = Callable[[Tensor], Tensor]
"""The variable in which an evaluation is taken for a polynomial, as a function of lambda."""

# Exact to rounding for steps of up to about 20 in lambda; whole schedules have 10 to 12.
_POINTS, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))


@dataclass(frozen=True)
class Level:
    """``alpha``, ``sigma`` and ``lambda = log(alpha / sigma)`` at times of any shape, float64."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @classmethod
    def at(cls, sde: SDE, t: Tensor) -> Level:
        """Those of an SDE at times ``t``."""
        t = t.double()
        return cls(t, sde.alpha(t), sde.sigma(t), 0.5 * sde.log_snr(t))

    @property
    def rho(self) -> Tensor:
        """``sigma / alpha``."""
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Form:
    """Which of the two integrals a solver approximates: see the module.

    Attributes:
        output: ``level -> (on_state, on_score)``, of the quantity in the integral.
        keep: ``(start, end) -> `` the factor on the state.
        whole: ``(start, end) -> `` the factor on a constant; finite where ``sigma`` of the end is 0.
        density: ``(lambda, start, end) -> `` the weight of the integral over lambda.
    """

    output: Callable[[Level], tuple[Tensor, Tensor]]
    keep: Callable[[Level, Level], Tensor]
    whole: Callable[[Level, Level], Tensor]
    density: Callable[[Tensor, Level, Level], Tensor]


def per_step(values: Tensor) -> Tensor:
    """A value for each step, (..), beside the points of its integral: (.., 1)."""
    return values.unsqueeze(-1)


NOISE = Form(
    output=lambda level: (torch.zeros_like(level.sigma), -level.sigma),
    keep=lambda start, end: end.alpha / start.alpha,
    whole=lambda start, end: end.alpha * (end.rho - start.rho),
    density=lambda lam, start, end: -per_step(end.alpha) * torch.exp(-lam),
)
"""The integral of the expected noise."""

DATA = Form(
    output=lambda level: (1 / level.alpha, level.sigma.square() / level.alpha),
    keep=lambda start, end: end.sigma / start.sigma,
    whole=lambda start, end: -end.alpha * torch.expm1(start.lam - end.lam),
    density=lambda lam, start, end: per_step(end.alpha) * torch.exp(lam - per_step(end.lam)),
)
"""The integral of the expected data."""


def integrate(form: Form, integrand: Variable, start: Level, end: Level) -> Tensor:
    """``int density(lambda) integrand(lambda) d lambda`` from start to end, by Gauss and Legendre.

    Args:
        form: gives the density.
        integrand: from lambda of shape (.., points) to (.., points) or (k, .., points).
        start: of shape (..).
        end: of shape (..).

    Returns:
        (..) or (k, ..).
    """
    points, weights = _POINTS.to(start.lam.device), _WEIGHTS.to(start.lam.device)
    half = 0.5 * (end.lam - start.lam)
    lam = per_step(0.5 * (start.lam + end.lam)) + per_step(half) * points
    return (form.density(lam, start, end) * integrand(lam) * weights).sum(-1) * half


def polynomial_weights(
    form: Form, nodes: list[Tensor], start: Level, end: Level, variable: Variable | None = None
) -> list[Tensor]:
    """The weights ``int density L_j`` of the values at the nodes, where ``L_j`` are Lagrange's polynomials.

    With the nodes at past times this is Adams and Bashforth's rule for the integral, with the end among them
    Adams and Moulton's, on any grid.

    Args:
        form: gives the density.
        nodes: lambda of each node, tensors of shape (..).
        start: of shape (..).
        end: of shape (..).
        variable: in which the polynomials are polynomials; default lambda itself.
    """
    if len(nodes) == 1:
        return [form.whole(start, end)]

    def basis(lam: Tensor) -> Tensor:
        v = lam if variable is None else variable(lam)
        places = [per_step(n if variable is None else variable(n)) for n in nodes]
        rows = []
        for j, here in enumerate(places):
            factors = [(v - other) / (here - other) for k, other in enumerate(places) if k != j]
            rows.append(torch.stack(factors).prod(0))
        return torch.stack(rows)

    return list(integrate(form, basis, start, end))


def next_step(steps: Iterator[T]) -> T:
    """The next step of a run, or a clear error where its grid has ended."""
    for step in steps:
        return step
    raise RuntimeError("this run has taken all the steps of its grid; start another for more")


def combine(terms: Iterable[tuple[Coefficient, Tensor]]) -> Tensor:
    """The sum of ``coefficient * tensor``; Python floats take one pass over memory for each term."""
    total: Tensor | None = None
    for coefficient, value in terms:
        if total is None:
            total = coefficient * value
        elif isinstance(coefficient, float):
            if coefficient:
                total.add_(value, alpha=coefficient)  # a tensor made here, so nobody else sees it change
        else:
            total = total + coefficient * value
    assert total is not None
    return total
