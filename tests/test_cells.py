"""Normal noise on grey levels: against quadrature, and the fast ways against the plain one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch.testing import assert_close

from sde_diffusion import cells, narrow_cells
from sde_diffusion.cells import (
    expected_noise,
    series,
    truncated_normal,
    truncated_normals,
    truncated_variance,
)


def plain(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """All cells in float64 as the formula stands."""
    return cells._all_cells(logits.double(), y.double(), s)


@pytest.mark.parametrize("low", [-9.0, -3.0, -0.2, 0.0, 0.4, 6.0])
@pytest.mark.parametrize("width", [1e-4, 0.05, 0.5, 3.0])
def test_a_cell_has_the_mass_and_mean_of_quadrature(low: float, width: float) -> None:
    reference = -0.5 * low**2  # so that quadrature sees numbers of order 1
    density = lambda u: math.exp(-0.5 * u * u - reference)  # noqa: E731
    mass, _ = integrate.quad(density, low, low + width, epsabs=0, epsrel=1e-13)
    first, _ = integrate.quad(lambda u: u * density(u), low, low + width, epsabs=1e-16, epsrel=1e-13)
    a = torch.tensor([low], dtype=torch.float64)
    log_mass, mean = truncated_normal(a, a + width)
    want = math.log(mass) + reference - 0.5 * math.log(2 * math.pi)
    assert float(log_mass) == pytest.approx(want, abs=2e-8)
    assert float(mean) == pytest.approx(first / mass, abs=1e-6 * (1 + abs(low)) * width + 1e-9)


@pytest.mark.parametrize("width", [1e-5, 0.05, 0.5, 3.0])
def test_cells_that_share_their_edges(width: float) -> None:
    """From one tail to the other, with an edge at zero and with zero within a cell."""
    for shift in (0.0, 0.3 * width):
        edges = torch.arange(-40, 41, dtype=torch.float64)[None, :, None] * width + shift
        alone = truncated_normal(edges[:, :-1], edges[:, 1:])
        for found, wanted in zip(truncated_normals(edges), alone, strict=True):
            assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_series_agrees_with_scipy_to_its_order() -> None:
    middle = torch.linspace(-4, 4, 101, dtype=torch.float64)
    errors = []
    for width in (0.5, 0.25):
        log_mass, mean = series(middle, torch.full_like(middle, width))
        a, b = (middle - width / 2).numpy(), (middle + width / 2).numpy()
        # Masses on the negative side, where a difference of two of Phi keeps its digits.
        low, high = np.where(a + b > 0, -b, a), np.where(a + b > 0, -a, b)
        mass = stats.norm.cdf(high) - stats.norm.cdf(low)
        centre = stats.norm.cdf(width / 2) - stats.norm.cdf(-width / 2)
        want = np.log(mass / centre)
        truth = (stats.norm.pdf(a) - stats.norm.pdf(b)) / mass
        errors.append((np.abs(log_mass.numpy() - want).max(), np.abs(mean.numpy() - truth).max()))
    (mass_coarse, mean_coarse), (mass_fine, mean_fine) = errors
    assert mass_coarse < 1e-4 and mean_coarse < 1e-4
    # The first term left out is of the eighth order: a slip in any coefficient costs orders.
    assert mass_coarse / mass_fine > 2**7 and mean_coarse / mean_fine > 2**7


def problem(levels: int, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(levels)
    shape = (len(s), 1, 4, 5)
    logits = 3 * torch.randn(*shape, levels, generator=generator, dtype=torch.float64)
    x0 = 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1
    x0[:, :, 0] = -1 + 1e-3  # at the edge, where most pixels of digits are
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits, x0 + s.reshape(-1, 1, 1, 1) * noise, s


@pytest.mark.parametrize("levels", [34, 100, 256])
def test_the_fast_ways_agree_with_the_plain_one(levels: int) -> None:
    s = torch.logspace(-4, 2, 25, dtype=torch.float64)
    logits, y, s = problem(levels, s)
    smooth = 2 / levels <= 0.5 * s
    assert smooth.any() and not smooth.all(), "both ways are to be tried"
    error = (expected_noise(logits, y, s) - plain(logits, y, s)).abs().amax((1, 2, 3))
    assert float(error[~smooth].max()) < 1e-10
    assert float(error[smooth].max()) < 1e-4
    assert float(error[s > 8 / levels].max()) < 1e-6


def test_float32_logits_lose_what_float32_must() -> None:
    s = torch.logspace(-3.5, 1.5, 25, dtype=torch.float64)
    logits, y, s = problem(256, s)
    single = expected_noise(logits.float(), y, s)
    assert single.dtype == torch.float32
    assert float((single - expected_noise(logits, y, s)).abs().max()) < 1e-4


def test_few_levels_are_nearly_as_they_stand() -> None:
    logits, y, s = problem(17, torch.logspace(-3, 1.5, 40, dtype=torch.float64))
    assert_close(expected_noise(logits, y, s), plain(logits, y, s), rtol=0, atol=2e-6)


def test_gradients_reach_logits_and_state() -> None:
    logits, y, s = problem(40, torch.tensor([1e-3, 0.02, 0.3, 4.0], dtype=torch.float64))
    logits, y = logits[:, :, :1, :1].contiguous(), y[:, :, :1, :1].contiguous()
    logits.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: expected_noise(a, b, s), (logits, y), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("levels", [17, 34, 256])
def test_the_closed_form_of_the_derivatives_is_that_of_the_graph(levels: int) -> None:
    logits, y, s = problem(levels, torch.logspace(-4, 2, 40, dtype=torch.float64))
    widths = 2 / levels / s
    assert (widths > 0.5).any() and (widths < 1 / 16).any() and ((widths < 0.5) & (widths > 1 / 16)).any()
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    gradients = []
    for function in (expected_noise, plain):
        inputs = logits.clone().requires_grad_(), y.clone().requires_grad_()
        gradients.append(torch.autograd.grad((weights * function(*inputs, s)).sum(), inputs))
    for ours, graph in zip(*gradients, strict=True):
        scale = graph.flatten(1).abs().amax(1)
        assert float(((ours - graph).flatten(1).abs().amax(1) / scale.clamp_min(1e-3)).max()) < 1e-5


def test_training_needs_no_derivative_in_the_state() -> None:
    logits, y, s = problem(256, torch.logspace(-3.5, 1, 6, dtype=torch.float64))
    gradients = []
    for state in (y, y.clone().requires_grad_()):
        learned = logits.clone().requires_grad_()
        noise = expected_noise(learned, state, s)
        gradients += [noise.detach(), *torch.autograd.grad(noise.square().sum(), learned)]
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


def layouts(logits: Tensor) -> dict[str, Tensor]:
    """Logits (B, C, H, W, K) in the orders in memory that they may come in."""
    levels_first = logits.movedim(-1, 2).contiguous()
    wider = torch.cat([levels_first, levels_first[:, :, :2]], 2)
    return {
        "as networks give them": levels_first.movedim(2, -1),
        "a part of what a network gives": wider[:, :, : logits.shape[-1]].movedim(2, -1),
        "levels last": logits.contiguous(),
        "channels last": levels_first.flatten(1, 2)
        .contiguous(memory_format=torch.channels_last)
        .unflatten(1, levels_first.shape[1:3])
        .movedim(2, -1),
    }


@pytest.mark.parametrize("in_c", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 4, 4), (2, 1, 7)])
def test_float32_on_cpus_in_any_order_of_memory(
    shape: tuple[int, int, int], in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and derivatives against float64, by C and by torch's operations; what C is for, it does."""
    if in_c and narrow_cells._library() is None:
        pytest.skip("no C compiler here, or it is turned off")
    monkeypatch.setattr(narrow_cells, "_library", narrow_cells._library if in_c else lambda: None)
    generator = torch.Generator().manual_seed(1)
    s = torch.logspace(-4, 2, 30, dtype=torch.float64)
    logits = (3 * torch.randn(30, *shape, 100, generator=generator)).double()
    y = 2 * torch.rand(30, *shape, generator=generator, dtype=torch.float64) - 1
    y += s.reshape(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    y[:, :, 0, 0] = 40.0  # far outside the data
    weights = torch.randn(y.shape, generator=generator)

    def everything(logits: Tensor) -> list[Tensor]:
        inputs = logits.detach().requires_grad_(), y.clone().requires_grad_()
        noise = expected_noise(*inputs, s)
        with torch.no_grad():
            assert torch.equal(expected_noise(*inputs, s), noise)
        return [noise.detach(), *torch.autograd.grad((noise * weights).sum(), inputs)]

    truth = everything(logits)
    done = []
    real = cells.narrow_cells
    monkeypatch.setattr(cells, "narrow_cells", lambda *given: done.append(real(*given)) or done[-1])
    for name, given in layouts(logits.float()).items():
        done.clear()
        for found, wanted in zip(everything(given), truth, strict=True):
            scale = wanted.flatten(1).abs().amax(1).clamp_min(1e-6)
            error = (found.double() - wanted).flatten(1).abs().amax(1) / scale
            assert float(error.max()) < 5e-5, name
        assert set(done) == {in_c and not name.endswith("last")}, name


def test_second_derivatives_go_through_the_operations() -> None:
    logits, y, s = problem(40, torch.tensor([0.02, 0.3, 4.0], dtype=torch.float64))
    logits, y = (tensor[:, :, :1, :1].contiguous().requires_grad_() for tensor in (logits, y))
    assert torch.autograd.gradgradcheck(
        lambda a, b: expected_noise(a, b, s), (logits, y), atol=1e-5, rtol=1e-3
    )


def test_derivatives_by_functions_and_by_batches() -> None:
    """As divergences take them: dual numbers, and several rows at a time through one graph."""
    logits, y, s = problem(40, torch.tensor([1e-3, 0.02, 0.3, 4.0], dtype=torch.float64))
    tangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    value, product = torch.func.jvp(lambda state: expected_noise(logits, state, s), (y,), (tangent,))
    state = y.clone().requires_grad_()
    noise = expected_noise(logits, state, s)
    rows = torch.stack([torch.ones_like(noise), tangent])
    (slopes,) = torch.autograd.grad(noise, state, rows, is_grads_batched=True)
    assert_close(value, noise.detach(), rtol=1e-6, atol=1e-6)
    assert_close(slopes[0] * tangent, product, rtol=1e-4, atol=1e-5)
    assert_close(slopes[1], slopes[0] * tangent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1e-4, 0.05, 0.7, 5.0, 40.0])
@pytest.mark.parametrize("low", [-60.0, -3.0, -0.4, 2.0])
def test_the_variance_in_a_cell_is_that_of_quadrature(low: float, width: float) -> None:
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(low + width, dtype=torch.float64)
    got = float(truncated_variance(a, b, *truncated_normal(a, b)))
    # The density falls from where it is largest within a few of its own scales.
    peak = min(max(0.0, low), low + width)
    scale = 1 / max(abs(peak), 1.0)
    start, end = max(low, peak - 40 * scale), min(low + width, peak + 40 * scale)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u = (start + end) / 2 + (end - start) / 2 * nodes
    density = weights * np.exp(-(u**2 - peak**2) / 2)
    mean = (density * u).sum() / density.sum()
    want = (density * (u - mean) ** 2).sum() / density.sum()
    assert got == pytest.approx(want, rel=2e-5, abs=1e-8)  # of a variance of u, which is 1


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    logits, y, s = problem(64, torch.logspace(-3, 1, 9, dtype=torch.float64))
    together = expected_noise(logits, y, s)
    for i in range(len(s)):
        alone = expected_noise(logits[i : i + 1], y[i : i + 1], s[i : i + 1])
        assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [17, 256])
def test_a_state_that_is_not_a_number_spoils_itself_only(levels: int) -> None:
    logits, y, s = problem(levels, torch.logspace(-3, 1, 6, dtype=torch.float64))
    whole = expected_noise(logits, y, s)
    broken = y.clone()
    broken[::2, 0, 0, 0] = math.nan
    found = expected_noise(logits, broken, s)
    assert bool(found[::2, 0, 0, 0].isnan().all()) and not bool(found[1::2].isnan().any())
    assert_close(found[1::2], whole[1::2], rtol=1e-12, atol=1e-12)


def test_an_empty_batch() -> None:
    logits, y, s = problem(40, torch.ones(1, dtype=torch.float64))
    assert expected_noise(logits[:0], y[:0], s[:0]).shape == y[:0].shape


def test_autocast_does_not_reach_it() -> None:
    logits, y, s = problem(256, torch.logspace(-2, 1, 6, dtype=torch.float64))
    logits = logits.float()
    with torch.autocast("cpu", torch.bfloat16):
        low = expected_noise(logits, y, s)
    assert torch.equal(low, expected_noise(logits, y, s))


def test_a_state_far_outside_the_data_is_finite() -> None:
    s = torch.tensor([1e-4, 1e-2, 1.0], dtype=torch.float64)
    y = torch.tensor([-30.0, 30.0], dtype=torch.float64).reshape(1, 1, 1, 2).expand(3, 1, 1, 2)
    logits = torch.zeros(3, 1, 1, 2, 256, dtype=torch.float64)
    noise = expected_noise(logits, y, s)
    assert bool(torch.isfinite(noise).all())
    # The noise then points from the nearest cell to the state.
    assert bool((noise.sign() == y.sign()).all())
