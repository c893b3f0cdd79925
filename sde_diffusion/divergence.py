"""The divergence of a field: exact, or estimated from products of its Jacobian with random probes.

``div v = tr J``, ``J = dv/dx``. Estimators average ``z^T J z`` over probes with ``E z z^T = I`` (Hutchinson
1990; Grathwohl et al. 2019), so they are unbiased whatever J, and K probes cost K products. For one probe, with
S the symmetric part of J, ``S' = S - tr(S)/D I`` and Frobenius norms, the variance is

    gaussian      2 |S|^2
    rademacher    2 (|S|^2 - sum_i S_ii^2)
    sphere        2 D / (D + 2) |S'|^2           z uniform on the sphere of radius sqrt(D)

and K independent probes divide it by K. ``orthogonal`` takes K <= D orthogonal directions on the sphere, uniformly
distributed: the sum over a whole basis is the trace, so the variance is ``(D - K) / (D - 1)`` of that of as many
independent ones. The value and all products share one evaluation of the field.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import DIVERGENCE, SampleNoise
from sde_diffusion.ode import Field

__all__ = [
    "DISTRIBUTIONS",
    "DIVERGENCES",
    "Divergence",
    "ExactDivergence",
    "HutchPlusPlus",
    "HutchinsonDivergence",
    "fastest_mode",
    "make_divergence",
]

MODES = ("reverse", "forward")
DISTRIBUTIONS = ("rademacher", "gaussian", "sphere", "orthogonal")


class Divergence(Protocol):
    """The value and divergence of a field from one evaluation."""

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor | None:
        """What stays fixed along the path, such as random probes."""
        ...

    def __call__(self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v(t, x)``, (B, *D), and its divergence, (B,)."""
        ...


# ------------------------------------------------------------ products with the Jacobian


def _reverse(field: Field, t: Tensor, x: Tensor, rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``v(t, x)`` and ``J^T r`` for stacks ``r`` of rows, each (k, B, *D), from one evaluation of the field."""
    with _Linearized(field, t, x) as linear:
        products = [linear.transposed(r, last=i + 1 == len(rows)) for i, r in enumerate(rows)]
    return linear.value, products


class _Linearized:
    """One evaluation of a field, and as many products of the transposed Jacobian as are asked for.

    Where ``x`` is differentiated by the caller, everything stays differentiable.
    """

    def __init__(self, field: Field, t: Tensor, x: Tensor) -> None:
        self.differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            self._x = x if self.differentiable else x.detach().requires_grad_()
            self._value = field(t, self._x)

    def __enter__(self) -> _Linearized:
        return self

    def __exit__(self, *_: object) -> None:
        self._x = self._x.detach()  # nothing holds the graph any longer
        self._value = self.value

    @property
    def value(self) -> Tensor:
        return self._value if self.differentiable else self._value.detach()

    def transposed(self, rows: Tensor, *, last: bool) -> Tensor:
        """``J^T r`` for each of the rows (k, B, *D); after the ``last`` the graph may go."""
        if not self._value.requires_grad:
            return torch.zeros_like(rows)  # a field that does not depend on x
        with torch.enable_grad():
            # One row alone needs no vmap, which some operations lack.
            single = len(rows) == 1
            (products,) = torch.autograd.grad(
                self._value,
                self._x,
                rows[0] if single else rows,
                retain_graph=self.differentiable or not last,
                create_graph=self.differentiable,
                is_grads_batched=not single,
                materialize_grads=True,
            )
        return products[None] if single else products


def _forward(field: Field, t: Tensor, x: Tensor, rows: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """``v(t, x)`` and ``J r``, by dual numbers: for the first stack and the value from one evaluation of the field,
    one more for each further stack."""

    differentiable = torch.is_grad_enabled() and x.requires_grad
    state = x if differentiable else x.detach()
    # Derivatives in t, which some fields need, are not for the inside of functorch's transforms.
    at_time = field.at(t) if hasattr(field, "at") else partial(field, t)

    def product(tangent: Tensor) -> tuple[Tensor, Tensor]:
        pair: tuple[Tensor, Tensor] = torch.func.jvp(at_time, (state,), (tangent,))  # type: ignore[assignment]
        return pair

    out_dims: Any = (None, 0)  # the value is the same for every tangent
    values, products = [], []
    with torch.set_grad_enabled(differentiable):
        for stack in rows:
            if len(stack) == 1:
                value, slopes = product(stack[0])
                slopes = slopes[None]
            else:
                value, slopes = torch.func.vmap(product, out_dims=out_dims)(stack)
            values.append(value)
            products.append(slopes)
    return values[0], products


def _products(
    mode: str, field: Field, t: Tensor, x: Tensor, rows: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    return (_reverse if mode == "reverse" else _forward)(field, t, x, rows)


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise unknown_name("mode", mode, MODES)


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


# ------------------------------------------------------------ the divergences


@dataclass(frozen=True)
class ExactDivergence:
    """The trace of the Jacobian by D products, vectorised in chunks that bound the memory.

    Args:
        chunk: how many products are taken at once; memory grows with ``chunk * B``.
        mode: ``"reverse"`` (vector-Jacobian products, the network evaluated once) or ``"forward"`` (dual
            numbers, evaluated once for each chunk).
    """

    chunk: int = 64
    mode: str = "reverse"

    def __post_init__(self) -> None:
        _at_least("chunk", self.chunk, 1)
        _check_mode(self.mode)

    def prepare(self, x: Tensor, seed: int, first_index: int) -> None:
        """Nothing: the trace is exact."""
        return None

    def __call__(
        self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``v(t, x)`` and ``sum_i d v_i / d x_i``."""
        batch, dims = x.shape[0], x[0].numel()
        basis = torch.eye(dims, dtype=x.dtype, device=x.device)
        rows = [part[:, None].expand(-1, batch, -1).reshape(-1, *x.shape) for part in basis.split(self.chunk)]
        value, products = _products(self.mode, field, t, x, rows)
        jacobian = torch.cat([p.flatten(2) for p in products])
        return value, jacobian.diagonal(dim1=0, dim2=2).sum(1)


def _orthonormal(normals: Tensor) -> Tensor:
    """Uniformly distributed orthonormal frames from normals, (K, B, D) -> (K, B, D), K <= D."""
    q, r = torch.linalg.qr(normals.movedim(0, -1).double())
    # The signs that make the decomposition unique, and so the distribution uniform (Mezzadri 2007).
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    frame: Tensor = (q * signs[:, None]).movedim(-1, 0)
    return frame.to(normals.dtype)


@dataclass(frozen=True)
class HutchinsonDivergence:
    """The unbiased estimate ``mean_k z_k^T J z_k`` with random probes of unit covariance, fixed along the
    path.

    Args:
        probes: how many probes are averaged.
        distribution: ``"rademacher"`` (random signs: the least variance among independent entries),
            ``"gaussian"``, ``"sphere"``, or ``"orthogonal"`` (at most as many probes as dimensions); their
            variances are in the docstring of the module.
        mode: ``"reverse"`` (vector-Jacobian products) or ``"forward"`` (dual numbers), one evaluation of the
            network either way.
    """

    probes: int = 1
    distribution: str = "rademacher"
    mode: str = "reverse"

    def __post_init__(self) -> None:
        _at_least("probes", self.probes, 1)
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("probe distribution", self.distribution, DISTRIBUTIONS)
        _check_mode(self.mode)

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor:
        """The probes, (K, B, *D); those of a sample depend on ``(seed, first_index + i)`` only."""
        rows = range(first_index, first_index + x.shape[0])
        noise = SampleNoise(seed, rows, x.shape[1:], dtype=x.dtype, device=x.device, stream=DIVERGENCE)
        if self.distribution == "rademacher":
            return torch.stack([noise.rademacher() for _ in range(self.probes)])
        normals = torch.stack([noise.normal() for _ in range(self.probes)])
        if self.distribution == "gaussian":
            return normals
        flat, dims = normals.flatten(2), x[0].numel()
        if self.distribution == "orthogonal":
            if self.probes > dims:
                raise ValueError(f"{dims} dimensions have no {self.probes} orthogonal probes")
            directions = _orthonormal(flat)
        else:
            directions = flat / flat.norm(dim=2, keepdim=True)
        return (math.sqrt(dims) * directions).reshape(normals.shape)

    def __call__(self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v(t, x)`` and ``mean_k z_k^T J z_k``."""
        assert prepared is not None
        value, (products,) = _products(self.mode, field, t, x, [prepared])
        return value, (products * prepared).flatten(2).sum(2).mean(0)


@dataclass(frozen=True)
class HutchPlusPlus:
    """Hutch++: the trace on the range of a random sketch of J exactly, on the rest by probes (Meyer, Musco, Musco,
    Woodruff 2021).

    With ``Q`` an orthonormal basis of the range of ``J^T S``, ``tr J = tr(Q^T J Q) + tr(P J P)`` with ``P = I -
    Q Q^T``, and the second trace is estimated by Rademacher probes: unbiased, with a variance that falls like ``1 /
    K^2`` where the spectrum of J decays. Sketch S and probes are fixed along the path; Q follows J.

    Args:
        products: products with J each evaluation: a third for the sketch, a third for its range, a third for
            probes.
    """

    products: int = 3

    def __post_init__(self) -> None:
        _at_least("products", self.products, 3)

    def prepare(self, x: Tensor, seed: int, first_index: int) -> Tensor:
        """Sketch and probes, random signs (k + m, B, *D), of which at most D for the sketch."""
        rows = range(first_index, first_index + x.shape[0])
        noise = SampleNoise(seed, rows, x.shape[1:], dtype=x.dtype, device=x.device, stream=DIVERGENCE)
        sketch = min(self.products // 3, x[0].numel())
        count = sketch + self.products - 2 * (self.products // 3)
        return torch.stack([noise.rademacher() for _ in range(count)])

    def __call__(self, field: Field, t: Tensor, x: Tensor, prepared: Tensor | None) -> tuple[Tensor, Tensor]:
        """``v(t, x)`` and the estimate; the network is evaluated once."""
        assert prepared is not None
        count = min(self.products // 3, x[0].numel())
        with _Linearized(field, t, x) as linear:
            sketched = linear.transposed(prepared[:count], last=False).flatten(2)
            basis = torch.linalg.qr(sketched.movedim(0, -1))[0].movedim(-1, 0)  # (k, B, D)
            probes = prepared[count:].flatten(2)
            probes = probes - torch.einsum("kbd,kbe,mbe->mbd", basis, basis, probes)
            rows = torch.cat([basis, probes])
            products = linear.transposed(rows.reshape(-1, *x.shape), last=True).flatten(2)
            forms = (products * rows).sum(2)
        return linear.value, forms[:count].sum(0) + forms[count:].mean(0)


def _hutchinson(distribution: str) -> Any:
    return lambda probes, mode: HutchinsonDivergence(probes, distribution, mode)


DIVERGENCES = {
    "exact": lambda probes, mode: ExactDivergence(mode=mode),
    "hutchinson": _hutchinson("rademacher"),
    "gaussian": _hutchinson("gaussian"),
    "sphere": _hutchinson("sphere"),
    "orthogonal": _hutchinson("orthogonal"),
    "hutch++": lambda probes, mode: HutchPlusPlus(max(3, probes)),
}


def make_divergence(name: str, probes: int = 1, mode: str = "reverse") -> Divergence:
    """The divergence of a name: ``exact``, ``hutchinson`` (Rademacher probes), ``gaussian``, ``sphere``,
    ``orthogonal``, or ``hutch++`` (with so many products, at least 3).

    Raises:
        ValueError: an unknown name or mode, or fewer than one probe.
    """
    if name not in DIVERGENCES:
        raise unknown_name("divergence", name, tuple(DIVERGENCES))
    _at_least("probes", probes, 1)
    _check_mode(mode)
    divergence: Divergence = DIVERGENCES[name](probes, mode)
    return divergence


def fastest_mode(divergence: Divergence, field: Field, t: Tensor, x: Tensor) -> Divergence:
    """The divergence in the mode, reverse or forward, that takes less time for this field, measured here and now.

    A mode that an operation of the field lacks is not taken. Divergences without a mode come back as they are.
    """
    if not hasattr(divergence, "mode"):
        return divergence
    seconds: dict[str, float] = {}
    for mode in MODES:
        candidate: Any = dataclasses.replace(divergence, mode=mode)  # type: ignore[type-var]
        prepared = candidate.prepare(x, 0, 0)
        try:
            with torch.no_grad():
                for _ in range(2):  # the first run warms up
                    started = time.perf_counter()
                    float(candidate(field, t, x, prepared)[1].sum())  # waits for the device
                    seconds[mode] = time.perf_counter() - started
        except (RuntimeError, NotImplementedError):
            if mode == "reverse":
                raise
    chosen: Divergence = dataclasses.replace(divergence, mode=min(seconds, key=lambda m: seconds[m]))  # type: ignore[type-var]
    return chosen
