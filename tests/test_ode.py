"""The probability-flow ODE against closed-form flows; solvers by measured order and accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    SDES,
    CallCounter,
    assert_moments,
    gaussian_2d,
    gaussian_flow,
    mixture_2d,
    random_mixture,
    slope,
    times64,
)
from sde_diffusion.ode import _ERROR, _NODES, _STAGES

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)


def flow_error(sde: sd.SDE, solver, data: sd.GaussianMixture, x: Tensor, t0: float, t1: float) -> float:
    """The largest error of a solver beside the closed-form flow of Gaussian data."""
    solution = solver.solve(sd.probability_flow(sde, data.score(sde)), x, t0, t1)
    return float((solution.x - gaussian_flow(data, sde, x, *times64(t0, t1))).abs().max())


def states(sde: sd.SDE, data: sd.GaussianMixture, t: float, n: int = 6) -> Tensor:
    x0 = data.sample(n, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return sde.perturb(x0, t, torch.randn(x0.shape, dtype=torch.float64, generator=generator))


@sdes
def test_the_field_is_half_of_what_the_reverse_sde_takes_from_the_score(sde: sd.SDE) -> None:
    x, t = torch.randn(3, 2, dtype=torch.float64), times64(0.1, 0.5, 0.9)
    score = mixture_2d().score(sde)
    expected = sde.f(t)[:, None] * x - 0.5 * sde.g2(t)[:, None] * score(x, t)
    assert_close(sd.probability_flow(sde, score)(t, x), expected)


@sdes
def test_the_closed_form_flow_solves_the_ode(sde: sd.SDE) -> None:
    """The reference of this module itself: its derivative in time is the field."""
    data = gaussian_2d()
    t, h = times64(0.4)[0], 1e-5
    x = states(sde, data, 0.4)
    ahead, behind = (gaussian_flow(data, sde, x, t, t + d) for d in (h, -h))
    field = sd.probability_flow(sde, data.score(sde))(t.expand(len(x)), x)
    assert_close((ahead - behind) / (2 * h), field, rtol=1e-5, atol=1e-5)


# Dormand and Prince ----------------------------------------------------------------------------------


def test_the_tableau_satisfies_the_order_conditions() -> None:
    """Order 5 of the solution and 4 of the embedded one: the conditions for quadrature, and consistency of rows."""
    nodes = torch.tensor([0.0, *_NODES[:5]], dtype=torch.float64)
    for node, row in zip(_NODES, _STAGES, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    high = torch.tensor(_STAGES[-1], dtype=torch.float64)
    error = torch.tensor(_ERROR, dtype=torch.float64)
    low = torch.cat([high, torch.zeros(1).double()]) - error
    all_nodes = torch.cat([nodes, torch.ones(1).double()])
    for power in range(5):
        assert float(high @ nodes**power) == pytest.approx(1 / (power + 1), abs=1e-14)
        if power < 4:
            assert float(low @ all_nodes**power) == pytest.approx(1 / (power + 1), abs=1e-13)
    assert abs(float(low @ all_nodes**4) - 0.2) > 1e-4  # the two differ at order 5: that is the estimate


@sdes
@pytest.mark.parametrize("backward", [False, True])
def test_the_flow_of_gaussian_data_is_exact_to_the_tolerance(sde: sd.SDE, backward: bool) -> None:
    data = gaussian_2d()
    t0, t1 = (sde.t_max, sde.t_min) if backward else (sde.t_min, sde.t_max)
    x = states(sde, data, t0)
    scale = float(gaussian_flow(data, sde, x, *times64(t0, t1)).abs().max())
    errors = [flow_error(sde, sd.DormandPrince(tol, tol), data, x, t0, t1) for tol in (1e-5, 1e-8)]
    assert errors[0] < 20 * 1e-5 * max(1, scale)
    assert errors[1] < 20 * 1e-8 * max(1, scale)


def test_accuracy_follows_the_tolerance_with_the_work_of_order_five() -> None:
    """Error per tolerance near 1, and evaluations growing as tol^(-1/5): a factor 16 for 6 decades."""
    sde, data = sd.VP(), gaussian_2d()
    x = states(sde, data, sde.t_min)
    field, exact = sd.probability_flow(sde, data.score(sde)), gaussian_flow(data, sde, x, *times64(1e-5, 1.0))
    tolerances, errors, work = [1e-4, 1e-6, 1e-8, 1e-10], [], []
    for tol in tolerances:
        solution = sd.DormandPrince(tol, tol).solve(field, x, sde.t_min, sde.t_max)
        errors.append(float((solution.x - exact).abs().max()))
        work.append(float(solution.evaluations.double().mean()))
    assert all(0.01 * tol < error < 20 * tol for tol, error in zip(tolerances, errors, strict=True)), errors
    exponent = math.log(work[-1] / work[1]) / math.log(1e4)
    assert 0.14 < exponent < 0.24, work


def test_there_and_back_again() -> None:
    sde, mixture, solver = sd.VP(), random_mixture(3, (1, 2, 3)), sd.DormandPrince(1e-9, 1e-9)
    x = mixture.sample(5, torch.Generator().manual_seed(0))
    latent = sd.encode(sde, mixture.score(sde), x, solver=solver)
    assert latent.x.shape == x.shape and latent.nfe > 0
    back = sd.sample_ode(
        sde,
        mixture.score(sde),
        tuple(x.shape),
        x_init=latent.x,
        solver=solver,
        denoise=False,
        dtype=torch.float64,
    )
    assert_close(back.x, x, rtol=1e-6, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    """Mates that need tiny steps change nothing: neither the result nor the evaluations."""
    rates = times64(0.1, 1.0, 30.0, 400.0)

    def field(t: Tensor, x: Tensor, rates: Tensor = rates) -> Tensor:
        return -rates[:, None] * (x - torch.sin(t)[:, None])

    solver, x = sd.DormandPrince(1e-6, 1e-6), torch.randn(4, 3, dtype=torch.float64)
    together = solver.solve(field, x, 0.0, 1.0)
    for i in range(4):
        alone = solver.solve(lambda t, y, i=i: field(t, y, rates[i : i + 1]), x[i : i + 1], 0.0, 1.0)
        assert_close(alone.x[0], together.x[i], rtol=1e-12, atol=1e-12)
        assert int(alone.evaluations) == int(together.evaluations[i])
    assert int(together.evaluations[3]) > 5 * int(together.evaluations[0])


def test_evaluations_are_those_that_happened() -> None:
    calls = CallCounter(lambda t, x: -x * (1 + 5 * torch.sin(30 * t)[:, None]))
    solution = sd.DormandPrince(1e-7, 1e-7).solve(calls, torch.ones(3, 2, dtype=torch.float64), 0.0, 1.0)
    assert int(solution.evaluations.max()) == calls.calls


def test_no_evaluation_lies_outside_the_interval() -> None:
    for t0, t1 in ((1e-5, 0.999), (0.999, 1e-5), (0.2, 0.3)):
        for solver in (sd.DormandPrince(), sd.TorchDiffEq(), sd.TorchDiffEq("rk4", step_size=0.07)):
            seen: list[Tensor] = []

            def field(t: Tensor, x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(t.clone())
                return -x

            solver.solve(field, torch.ones(2, 2, dtype=torch.float64), t0, t1)
            low, high = float(torch.stack(seen).min()), float(torch.stack(seen).max())
            assert min(t0, t1) - 1e-9 < low and high < max(t0, t1) + 1e-9


def test_an_empty_interval_is_the_identity() -> None:
    x = torch.randn(3, 2)
    solution = sd.DormandPrince().solve(lambda t, x: -x, x, 0.5, 0.5)
    assert torch.equal(solution.x, x) and solution.evaluations.tolist() == [0, 0, 0]


def test_a_constant_and_a_zero_field() -> None:
    x = torch.zeros(2, 1, dtype=torch.float64)
    assert torch.equal(sd.DormandPrince().solve(lambda t, x: torch.zeros_like(x), x, 0.0, 1.0).x, x)
    moved = sd.DormandPrince().solve(lambda t, x: torch.ones_like(x), x, 0.0, 2.0).x
    assert_close(moved, x + 2, rtol=1e-12, atol=0)


def test_a_sudden_change_of_the_field_is_noticed() -> None:
    """A step of the right-hand side in the middle: steps are rejected until it is met."""
    solver = sd.DormandPrince(1e-8, 1e-8)
    x = torch.zeros(1, 1, dtype=torch.float64)
    result = solver.solve(lambda t, x: (t > 0.37).to(x)[:, None] + 0 * x, x, 0.0, 1.0).x
    assert float(result) == pytest.approx(0.63, abs=1e-5)


@pytest.mark.parametrize("bad_from", [-1.0, 0.0, 1e-4, 0.5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_that_is_not_finite_names_its_samples_at_once(bad_from: float, bad: float) -> None:
    calls = 0

    def field(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        wrong = (t > bad_from)[:, None] & torch.tensor([[False], [True], [False], [True]])
        return torch.where(wrong, torch.full_like(x, bad), -x)

    with pytest.raises(sd.SolverError, match=r"samples 1, 3"):
        sd.DormandPrince().solve(field, torch.ones(4, 2, dtype=torch.float64), 0.0, 1.0)
    assert calls < 400


def test_a_tolerance_that_cannot_be_met_says_so() -> None:
    solver = sd.DormandPrince(1e-9, 1e-9, max_evaluations=200)
    with pytest.raises(
        sd.SolverError, match=r"samples 0 did not reach t = 1 within 200 evaluations at rtol=1e-09"
    ):
        solver.solve(lambda t, x: torch.cos(300 * t)[:, None] * x, torch.ones(1, 1), 0.0, 1.0)


def test_many_bad_samples_are_counted() -> None:
    with pytest.raises(sd.SolverError, match="0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more"):
        sd.DormandPrince().solve(lambda t, x: x * math.nan, torch.ones(25, 1), 0.0, 1.0)


@pytest.mark.parametrize(("rtol", "atol"), [(0, 1e-5), (1e-5, 0), (-1, 1), (1, 1e-5), (math.nan, 1e-5)])
def test_tolerances_are_checked(rtol: float, atol: float) -> None:
    for build in (sd.DormandPrince, lambda r, a: sd.TorchDiffEq("dopri5", r, a)):
        with pytest.raises(ValueError, match="tolerances must be positive, and rtol below 1, got rtol="):
            build(rtol, atol)


def test_the_state_keeps_its_type_and_shape() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 2, 1, 2, dtype=dtype)
        for solver in (sd.DormandPrince(), sd.Heun(torch.linspace(0, 1, 5)), sd.TorchDiffEq()):
            solution = solver.solve(lambda t, x: -x, x, 0.0, 1.0)
            assert solution.x.dtype == dtype and solution.x.shape == x.shape
            assert_close(solution.x, x / math.e, rtol=0.02, atol=1e-3)


# Heun ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine", "ddpm"])
@pytest.mark.parametrize("backward", [False, True])
def test_heun_converges_at_order_two(name: str, backward: bool) -> None:
    sde, data, sizes = SDES[name], gaussian_2d(), [32, 64, 128]
    t0, t1 = (0.9, 0.05) if backward else (0.05, 0.9)
    x = states(sde, data, t0)
    errors = []
    for n in sizes:
        grid = torch.linspace(t0**0.5, t1**0.5, n + 1, dtype=torch.float64) ** 2
        grid[0], grid[-1] = t0, t1
        errors.append(flow_error(sde, sd.Heun(grid), data, x, t0, t1))
    assert slope(sizes, errors) == pytest.approx(2, abs=0.15), errors


def test_heun_runs_its_grid_either_way_and_counts_two_evaluations_a_step() -> None:
    sde, data = sd.VP(), gaussian_2d()
    times = sd.uniform_times(sde, 40)
    calls = CallCounter(sd.probability_flow(sde, data.score(sde)))
    x = states(sde, data, sde.t_min)
    forward = sd.Heun(times).solve(calls, x, sde.t_min, sde.t_max)
    assert calls.calls == 80 and forward.evaluations.tolist() == [80] * len(x)
    again = sd.Heun(times.flip(0)).solve(calls, x, sde.t_min, sde.t_max)
    assert torch.equal(again.x, forward.x)


def test_heun_is_its_formula() -> None:
    x = times64(2.0)[None]
    step = sd.Heun(times64(0.0, 0.5)).solve(lambda t, x: t[:, None] * x + x, x, 0.0, 0.5)
    ahead = x + 0.5 * x
    assert_close(step.x, x + 0.25 * (x + 1.5 * ahead))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.Heun(times64(0.0)), r"vector of at least 2 times, got shape \(1,\)"),
        (lambda: sd.Heun(torch.zeros(2, 2)), r"got shape \(2, 2\)"),
        (lambda: sd.Heun(times64(0.0, 0.5, 0.2)), "must rise or fall strictly"),
        (lambda: sd.Heun(times64(0.0, math.nan, 1.0)), "must rise or fall strictly"),
        (
            lambda: sd.Heun(times64(0.0, 0.5)).solve(lambda t, x: x, torch.ones(1, 1), 0.0, 1.0),
            "the grid runs from 0.0 to 0.5, not from 0.0 to 1.0",
        ),
    ],
)
def test_grids_of_heun_are_checked(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# torchdiffeq -----------------------------------------------------------------------------------------


@sdes
def test_torchdiffeq_and_our_solver_agree(sde: sd.SDE) -> None:
    mixture = mixture_2d()
    x = states(sde, mixture, sde.t_max)
    field = sd.probability_flow(sde, mixture.score(sde))
    ours, theirs = (
        solver.solve(field, x, sde.t_max, sde.t_min)
        for solver in (sd.DormandPrince(1e-7, 1e-7), sd.TorchDiffEq("dopri5", 1e-7, 1e-7))
    )
    assert_close(ours.x, theirs.x, rtol=2e-5, atol=2e-5)
    assert len(set(theirs.evaluations.tolist())) == 1


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_every_adaptive_method_of_torchdiffeq_works(method: str) -> None:
    solver = sd.TorchDiffEq(method, 1e-6, 1e-6)
    solution = solver.solve(lambda t, x: -x, torch.ones(2, 1, dtype=torch.float64), 0.0, 1.0)
    assert_close(solution.x, torch.full((2, 1), math.exp(-1), dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams"])
def test_every_fixed_method_of_torchdiffeq_works(method: str) -> None:
    calls = CallCounter(lambda t, x: -x)
    x = torch.ones(2, 1, dtype=torch.float64)
    solution = sd.TorchDiffEq(method, step_size=0.01).solve(calls, x, 0.0, 1.0)
    assert_close(solution.x, x * math.exp(-1), rtol=6e-3, atol=0)
    assert int(solution.evaluations[0]) == calls.calls >= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dopri6"}, r"unknown method 'dopri6'; did you mean 'dopri\d'\?"),
        ({"method": "rk4"}, "rk4 needs a step_size > 0, got None"),
        ({"method": "rk4", "step_size": 0.0}, "rk4 needs a step_size > 0, got 0.0"),
        (
            {"method": "dopri5", "step_size": 0.1},
            "dopri5 chooses its own steps and takes no step_size, got 0.1",
        ),
    ],
)
def test_methods_of_torchdiffeq_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.TorchDiffEq(**options)


# Samples ---------------------------------------------------------------------------------------------


@sdes
def test_ode_samples_have_the_moments_of_the_mixture(sde: sd.SDE) -> None:
    """No bias of steps here: four standard errors, at a tolerance whose error is far below them."""
    mixture = mixture_2d()
    out = sd.sample_ode(
        sde,
        mixture.score(sde),
        (1000, 2),
        solver=sd.DormandPrince(1e-4, 1e-4),
        dtype=torch.float64,
        seed=2,
    )
    assert_moments(out.x, mixture, 4)
    assert 50 < out.nfe < 1500


@sdes
def test_samples_of_a_seed_do_not_depend_on_the_batch(sde: sd.SDE) -> None:
    mixture = mixture_2d()

    def draw(n: int, first: int = 0, **options) -> Tensor:
        settings = {"seed": 4, "dtype": torch.float64} | options
        return sd.sample_ode(sde, mixture.score(sde), (n, 2), first_index=first, **settings).x

    whole = draw(5)
    assert_close(torch.cat([draw(2), draw(3, first=2)]), whole, rtol=1e-9, atol=1e-9)
    assert float((draw(5, seed=5) - whole).abs().min()) > 1e-6
    assert_close(draw(5, dtype=torch.float32).double(), whole, rtol=2e-3, atol=2e-3)


def test_ode_and_pc_samplers_start_from_the_same_noise() -> None:
    sde = sd.VP()
    ode = sd.sample_ode(sde, lambda x, t: torch.zeros_like(x), (3, 2), t_end=1 - 1e-9, denoise=False)
    pc = sd.sample(sde, lambda x, t: -x, (3, 2), predictor=sd.DDIM(), times=times64(1, 0.5), trajectory=True)
    assert_close(ode.x, pc.trajectory[0], rtol=1e-5, atol=1e-6)


def test_denoising_is_the_posterior_mean_and_counts() -> None:
    sde, data = sd.VP(), gaussian_2d()
    score = CallCounter(data.score(sde))
    noisy = sd.sample_ode(sde, score, (3, 2), t_end=0.05, denoise=False, dtype=torch.float64)
    assert noisy.nfe == score.calls
    clean = sd.sample_ode(sde, score, (3, 2), t_end=0.05, dtype=torch.float64)
    assert clean.nfe == noisy.nfe + 1
    t = times64(0.05)[0]
    assert_close(clean.x, sde.posterior_mean(noisy.x, data.score(sde)(noisy.x, t), t))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3,)}, r"a shape must be \(batch, \*data\)"),
        ({"x_init": torch.zeros(3, 2)}, r"x_init must have shape \(2, 2\), got \(3, 2\)"),
        ({"t_end": 1.0}, "t_end must lie between 0 and t_max = 1.0, got 1.0"),
        ({"t_end": -0.1}, "t_end must lie between 0"),
        ({"t_end": math.nan}, "t_end must lie between 0"),
        ({"dtype": torch.bfloat16}, "state must be float32 or float64, got torch.bfloat16"),
        ({"seed": -1}, "a seed must be an integer from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    settings = {"shape": (2, 2)} | options
    with pytest.raises(ValueError, match=message):
        sd.sample_ode(sd.VP(), gaussian_2d().score(sd.VP()), settings.pop("shape"), **settings)


def test_encoding_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="state must be float32 or float64, got torch.float16"):
        sd.encode(sd.VP(), lambda x, t: -x, torch.zeros(2, 2, dtype=torch.float16))


def test_the_flow_stays_on_the_device_of_the_data_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the field's mistakes: SciPy's solver copies the state to the host at each step."""
    monkeypatch.setattr(Tensor, "numpy", lambda self, *a, **k: pytest.fail("went through NumPy"))
    started = time.perf_counter()
    sd.sample_ode(sd.VP(), gaussian_2d().score(sd.VP()), (2, 2))
    assert time.perf_counter() - started < 60
