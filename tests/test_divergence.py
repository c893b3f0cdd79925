"""Divergences against Jacobians by hand, and estimators against the variances of theory, on fields whose Jacobian is
neither symmetric nor diagonal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, CallCounter, random_mixture, times64
from sde_diffusion.divergence import DISTRIBUTIONS, DIVERGENCES, fastest_mode, make_divergence

MODES = ("reverse", "forward")


class Warped:
    """A field that is no gradient, couples all elements, and differs between the samples of a batch."""

    def __init__(self, dims: int) -> None:
        self.a = torch.randn(dims, dims, dtype=torch.float64)
        self.b = torch.randn(dims, dims, dtype=torch.float64)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        rate = (1 + t).to(x.dtype)[:, None]
        bent = torch.sin(rate * (flat @ self.a.to(x.dtype).T)) @ self.b.to(x.dtype).T
        return (bent + flat**2).reshape(x.shape)

    def jacobian(self, t: Tensor, x: Tensor) -> Tensor:
        """(B, D, D), by hand."""
        flat, rate = x.flatten(1), (1 + t)[:, None]
        inner = rate * torch.cos(rate * (flat @ self.a.T))
        return torch.einsum("ik,nk,kj->nij", self.b, inner, self.a) + torch.diag_embed(2 * flat)


class Linear:
    """``v = x A^T``, with any A."""

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.a.T).reshape(x.shape)


def asymmetric(dims: int, seed: int = 0) -> Tensor:
    return torch.randn(dims, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def estimates(divergence: sd.HutchinsonDivergence | sd.HutchPlusPlus, a: Tensor, n: int) -> Tensor:
    """Of the trace of A, by ``n`` samples' own probes."""
    x, t = torch.zeros(n, len(a), dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    return divergence(Linear(a), t, x, divergence.prepare(x, 0, 0))[1]


def variance(distribution: str, a: Tensor, probes: int) -> float:
    """The closed forms of the docstring of the module."""
    s, d = (a + a.T) / 2, len(a)
    traceless = s - s.trace() / d * torch.eye(d, dtype=torch.float64)
    one = {
        "gaussian": 2 * s.square().sum(),
        "rademacher": 2 * (s.square().sum() - s.diag().square().sum()),
        "sphere": 2 * d / (d + 2) * traceless.square().sum(),
    }
    if distribution == "orthogonal":
        return float(one["sphere"]) / probes * (d - probes) / (d - 1)
    return float(one[distribution]) / probes


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (2, 3, 1)])
@pytest.mark.parametrize("chunk", [1, 4, 6, 64])
@pytest.mark.parametrize("mode", MODES)
def test_exact_divergence_is_the_trace_for_every_shape_and_chunk(
    shape: tuple[int, ...], chunk: int, mode: str
) -> None:
    field, x, t = Warped(6), torch.randn(4, *shape, dtype=torch.float64), times64(0.1, 0.4, 0.6, 0.9)
    value, divergence = sd.ExactDivergence(chunk, mode)(field, t, x)
    jacobian = field.jacobian(t, x)
    automatic = torch.func.vmap(torch.func.jacrev(lambda x, t: field(t[None], x[None])[0]))(x, t)
    assert_close(automatic.reshape(4, 6, 6), jacobian, rtol=1e-9, atol=1e-9)
    assert_close(divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-10, atol=1e-10)
    assert_close(value, field(t, x), rtol=0, atol=0)
    assert not value.requires_grad and not divergence.requires_grad


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("probes", [1, 2, 4])
def test_probes_are_unbiased_with_the_variance_of_theory(distribution: str, probes: int) -> None:
    a, n = asymmetric(5), 20_000
    found = estimates(sd.HutchinsonDivergence(probes, distribution), a, n)
    expected = variance(distribution, a, probes)
    assert float(found.mean()) == pytest.approx(float(a.trace()), abs=3 * (expected / n) ** 0.5)
    # The standard error of a variance, with room for the kurtosis of a quadratic form.
    assert float(found.var()) == pytest.approx(expected, rel=5 * (2 / n) ** 0.5 * 2)


def test_a_whole_orthogonal_basis_and_a_whole_sketch_are_exact() -> None:
    a = asymmetric(6)
    for divergence in (sd.HutchinsonDivergence(6, "orthogonal"), sd.HutchPlusPlus(18)):
        exact = a.trace().expand(10)
        assert_close(estimates(divergence, a, 10), exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="6 dimensions have no 7 orthogonal probes"):
        estimates(sd.HutchinsonDivergence(7, "orthogonal"), a, 1)


def test_hutch_plus_plus_is_unbiased_and_wins_where_the_spectrum_decays() -> None:
    """``A = U diag(2^-i) V^T``: neither symmetric nor normal."""
    d, n = 24, 4000
    u, v = (torch.linalg.qr(asymmetric(d, seed)).Q for seed in (1, 2))
    a = u @ torch.diag(2.0 ** -torch.arange(d, dtype=torch.float64)) @ v.T
    spread = {}
    for products in (3, 6, 12):
        found = estimates(sd.HutchPlusPlus(products), a, n)
        spread[products] = float(found.std())
        assert float(found.mean()) == pytest.approx(float(a.trace()), abs=3 * spread[products] / n**0.5)
    # Plain probes: the root of the number. Here a product more halves the error, or nearly.
    assert spread[3] > 1.6 * spread[6] > 1.6 * 2 * spread[12]
    assert spread[12] < 0.4 * variance("rademacher", a, 12) ** 0.5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_one_evaluation_and_the_right_value(name: str) -> None:
    field, x, t = Warped(6), torch.randn(3, 1, 2, 3, dtype=torch.float64), times64(0.1, 0.4, 0.9)
    counter = CallCounter(field)  # called as f(t, x) here
    divergence = make_divergence(name, 4)
    value, _ = divergence(counter, t, x, divergence.prepare(x, 0, 0))
    assert counter.calls == 1
    assert_close(value, field(t, x), rtol=0, atol=0)
    assert not value.requires_grad


@pytest.mark.parametrize("name", ["exact", "hutchinson", "gaussian", "sphere", "orthogonal"])
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_forward_mode_is_reverse_mode(name: str, sde: sd.SDE) -> None:
    """In the coordinates of the time, whose drift is itself a derivative, and in those of the log-SNR."""
    score = random_mixture(2, (6,)).score(sde)
    x, u = torch.randn(3, 6, dtype=torch.float64), times64(0.3, 0.5, 0.8)
    for coordinates in (sd.TimeCoordinates(), sd.LogSNRCoordinates()):
        field, found = coordinates.field(sde, score), []
        for mode in MODES:
            divergence = make_divergence(name, 3, mode)
            found.append(divergence(field, u, x, divergence.prepare(x, 1, 0)))
        for forward, reverse in zip(*found, strict=True):
            assert_close(forward, reverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_derivatives_of_the_divergence_itself(name: str) -> None:
    """Where the caller differentiates, the divergence and the value do not fall out of the graph."""
    field, t = Warped(4), times64(0.3, 0.6)
    start = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    divergence = make_divergence(name, 3)
    prepared = divergence.prepare(start.detach(), 0, 0)
    assert torch.autograd.gradcheck(lambda x: divergence(field, t, x, prepared), start)


def test_a_field_that_does_not_depend_on_the_state() -> None:
    x, t = torch.randn(3, 4), torch.zeros(3)
    for name in DIVERGENCES:
        divergence = make_divergence(name, 3)
        _, zero = divergence(lambda t, x: torch.ones_like(x), t, x, divergence.prepare(x, 0, 0))
        assert_close(zero, torch.zeros(3))


def test_the_faster_mode_is_measured() -> None:
    """A field that makes forward mode impossible, and one that makes it slow, leave reverse mode."""

    class NoForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    x, t = torch.randn(3, 4), torch.zeros(3)
    for divergence in (sd.ExactDivergence(), sd.HutchinsonDivergence(2, mode="forward")):
        assert fastest_mode(divergence, lambda t, x: NoForward.apply(x), t, x).mode == "reverse"
    # Many outputs from few numbers: forward mode needs one pass, reverse mode goes back through every output.
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))
    chosen = fastest_mode(sd.ExactDivergence(), lambda t, x: net(x), t, x)
    assert chosen.mode in MODES and chosen.chunk == 64
    assert fastest_mode(sd.HutchPlusPlus(3), lambda t, x: x, t, x) == sd.HutchPlusPlus(3)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"exact"}))
def test_probes_belong_to_the_sample(name: str) -> None:
    divergence, x = make_divergence(name, 3), torch.zeros(6, 2, 3)
    whole = divergence.prepare(x, 4, 0)
    assert_close(divergence.prepare(x[2:5], 4, 2), whole[:, 2:5], rtol=1e-6, atol=1e-6)
    assert not torch.equal(divergence.prepare(x, 5, 0), whole)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.ExactDivergence(chunk=0), "chunk must be an integer >= 1, got 0"),
        (lambda: sd.ExactDivergence(chunk=2.5), "chunk must be an integer >= 1, got 2.5"),
        (lambda: sd.ExactDivergence(mode="backward"), "unknown mode 'backward'"),
        (lambda: sd.HutchinsonDivergence(probes=1.5), "probes must be an integer >= 1, got 1.5"),
        (lambda: sd.HutchinsonDivergence(distribution="normal"), "unknown probe distribution 'normal'"),
        (lambda: sd.HutchPlusPlus(2), "products must be an integer >= 3, got 2"),
        (lambda: make_divergence("trace"), "unknown divergence 'trace'"),
        (lambda: make_divergence("exact", mode="fastest"), "unknown mode 'fastest'"),
        (lambda: make_divergence("sphere", 0), "probes must be an integer >= 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
