"""Coefficients and runs of the ODE solvers: against quadrature, polynomials, short runs, runs the other way."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import SDES, CallCounter, gaussian_2d, gaussian_flow, mixture_2d, slope, times64
from sde_diffusion.predictors.multistep import Coefficients

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)

SINGLE: dict[str, sd.Predictor] = {
    "heun": sd.EDMHeun(),
    "rk4": sd.RK4(),
    "dpm++1s": sd.DPMSolverPP(1, "singlestep"),
    "dpm++2s": sd.DPMSolverPP(2, "singlestep"),
    "dpm++3s": sd.DPMSolverPP(3, "singlestep"),
}
STAGES = {"heun": 2, "rk4": 4, "dpm++1s": 1, "dpm++2s": 2, "dpm++3s": 3}
MULTI: dict[str, sd.Predictor] = {
    "ddim": sd.DDIM(),
    "dpm++1m": sd.DPMSolverPP(1),
    "dpm++2m": sd.DPMSolverPP(2),
    "dpm++3m": sd.DPMSolverPP(3),
    "dpm++3m-published": sd.DPMSolverPP(3, as_published=True),
    **{f"unipc{k}-{v}": sd.UniPC(k, v) for k in (1, 2, 3) for v in ("bh1", "bh2")},
    **{f"deis{k}-{v}": sd.DEIS(k, v) for k in (2, 3, 4) for v in ("log_rho", "rho", "time")},
    **{f"ipndm{k}": sd.IPNDM(k) for k in (1, 2, 3, 4)},
}
ALL = MULTI | SINGLE
solvers = pytest.mark.parametrize("name", ALL)
multistep = pytest.mark.parametrize("name", [n for n in MULTI if n != "ddim"])

IRREGULAR = (1.0, 0.9, 0.84, 0.62, 0.5, 0.31, 0.26, 0.1)
"""Falling times whose steps stand in no simple ratio."""


def levels(sde: sd.SDE, times: Tensor) -> tuple[list[float], list[float], list[float]]:
    """alpha, sigma and lambda, each by its own definition."""
    alpha, sigma = sde.log_alpha(times).exp(), sde.variance(times).sqrt()
    return alpha.tolist(), sigma.tolist(), (alpha / sigma).log().tolist()


def lagrange(nodes: list[float], j: int, v: float) -> float:
    return math.prod((v - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)


def integral(kind: str, sde: sd.SDE, times: Tensor, i: int, f: Callable[[float], float]) -> float:
    """``alpha_s int f d rho`` or ``alpha_s int e^(lambda - lambda_s) f d lambda`` over step i, by SciPy.

    ``f`` is a function of lambda. The integral is over rho or e^lambda, not over lambda as in the package.
    """
    alpha, sigma, _ = levels(sde, times)
    start, end = (sigma[k] / alpha[k] for k in (i, i + 1))

    if kind == "noise":
        return alpha[i + 1] * quad(lambda rho: f(-math.log(rho)), start, end, epsabs=1e-13, epsrel=1e-12)[0]
    # e^(lambda - lambda_s) d lambda = rho_s d(1 / rho)
    whole = quad(lambda snr: f(math.log(snr)), 1 / start, 1 / end, epsabs=1e-13, epsrel=1e-12)[0]
    return alpha[i + 1] * end * whole


def variable_of(predictor: sd.Predictor, sde: sd.SDE) -> Callable[[float], float]:
    """In which the polynomials of a solver are polynomials, as a function of lambda."""

    def time(lam: float) -> float:
        return float(sde.time_of_log_snr(torch.tensor(2 * lam, dtype=torch.float64)))

    variables = {"log_rho": lambda lam: lam, "rho": lambda lam: math.exp(-lam), "time": time}
    return variables[getattr(predictor, "variable", "log_rho")]


def table(predictor: sd.Predictor, sde: sd.SDE, times: Tensor) -> Coefficients:
    return predictor.coefficients(sde, times)


@pytest.mark.parametrize(
    "predictor",
    [
        sd.DPMSolverPP(3, lower_order_final=False),
        sd.UniPC(3, "bh1", lower_order_final=False),
        *(sd.DEIS(4, v, lower_order_final=False) for v in ("log_rho", "rho", "time")),
    ],
    ids=repr,
)
@sdes
def test_weights_are_integrals_of_lagranges_polynomials(sde: sd.SDE, predictor: sd.Predictor) -> None:
    """Orders 3 and 4 of the predictors and all that join the end of the step to them, by SciPy's quadrature."""
    times = times64(*IRREGULAR[1:6]) * sde.t_max
    kind = "noise" if isinstance(predictor, sd.DEIS) else "data"
    coefficients, v = table(predictor, sde, times), variable_of(predictor, sde)
    lam = levels(sde, times)[2]
    places = [v(x) for x in lam]
    for q in range(3 if kind == "data" else 2, predictor.order + 1):
        for i in range(q - 1, len(times) - 1):
            nodes = [places[i - j] for j in range(q)]
            want = [
                integral(kind, sde, times, i, lambda x, n=nodes, j=j: lagrange(n, j, v(x))) for j in range(q)
            ]
            assert coefficients.weights[q][i] == pytest.approx(want, rel=1e-8, abs=1e-11)
    if not isinstance(predictor, sd.UniPC):
        assert not coefficients.corrections
        return
    for q in (2, 3):
        for i in range(q - 1, len(times) - 1):
            nodes = [places[i + 1 - j] for j in range(q + 1)]
            joined = [
                integral(kind, sde, times, i, lambda x, n=nodes, j=j: lagrange(n, j, v(x)))
                for j in range(q + 1)
            ]
            predicted = [0.0, *coefficients.weights[q][i]]
            want = [new - old for new, old in zip(joined, predicted, strict=True)]
            assert coefficients.corrections[q][i] == pytest.approx(want, rel=1e-8, abs=1e-11)


@sdes
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_the_weights_that_unipc_chooses(sde: sd.SDE, variant: str) -> None:
    """Where one weight is left it is 1/2: the integral is ``(1 - e^-h) m_0 + B(h) (m_1 - m_0) / (2 r)`` for UniP of
    order 2, r being negative, and with r = 1 for UniC of order 1 (Zhao et al. 2023, section 3)."""
    times = times64(*IRREGULAR) * sde.t_max
    alpha, _, lam = levels(sde, times)
    got = table(sd.UniPC(2, variant, lower_order_final=False), sde, times)
    for i in range(1, len(times) - 1):
        h, r = lam[i + 1] - lam[i], (lam[i - 1] - lam[i]) / (lam[i + 1] - lam[i])
        whole = 1 - math.exp(-h)
        b = h if variant == "bh1" else whole
        want = [alpha[i + 1] * (whole - b / (2 * r)), alpha[i + 1] * b / (2 * r)]
        assert got.weights[2][i] == pytest.approx(want, rel=1e-10)
        change = [alpha[i + 1] * b / 2, -alpha[i + 1] * b / 2]
        assert got.corrections[1][i] == pytest.approx(change, rel=1e-10)


@sdes
def test_multistep_dpm_solver_of_order_two_is_its_formula(sde: sd.SDE) -> None:
    """Lu et al. (2022b), algorithm 2: ``D = (1 + 1 / (2 r)) m_0 - m_1 / (2 r)``, r being the ratio of the steps."""
    times = times64(*IRREGULAR) * sde.t_max
    alpha, sigma, lam = levels(sde, times)
    got = table(sd.DPMSolverPP(2, lower_order_final=False), sde, times)
    for i in range(1, len(times) - 1):
        h, r = lam[i + 1] - lam[i], (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
        whole = -alpha[i + 1] * (math.exp(-h) - 1)
        assert got.weights[2][i] == pytest.approx([whole * (1 + 0.5 / r), -whole * 0.5 / r], rel=1e-10)
        assert got.keep[i] == pytest.approx(sigma[i + 1] / sigma[i], rel=1e-12)
        on_state, on_score = got.outputs[i]
        assert on_state == pytest.approx(1 / alpha[i], rel=1e-12)
        assert on_score == pytest.approx(sigma[i] ** 2 / alpha[i], rel=1e-12)


@sdes
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_deis_in_rho_for_equal_steps_in_rho(sde: sd.SDE, order: int) -> None:
    rho = torch.linspace(12, 0.5, 9, dtype=torch.float64)
    times = sde.time_of_log_snr(-2 * rho.log())
    ours = table(sd.IPNDM(order), sde, times)
    theirs = table(sd.DEIS(order, "rho", lower_order_final=False), sde, times)
    for q in range(1, order + 1):
        for a, b in zip(ours.weights[q], theirs.weights[q], strict=True):
            assert a == pytest.approx(b, rel=1e-9)


def polynomial_score(kind: str, sde: sd.SDE, degree: int, v: Callable[[float], float]) -> tuple:
    """A score whose expected noise or data is a polynomial, whatever the state; and the polynomial."""

    def value(lam: float) -> float:
        return sum((0.7 - 0.4 * k) * v(lam) ** k for k in range(degree + 1))

    def score(x: Tensor, t: Tensor) -> Tensor:
        lam, variance = float(sde.log_snr(t)) / 2, sde.variance(t)
        if kind == "noise":
            return torch.full_like(x, value(lam)) * -1 / variance.sqrt()
        return (sde.alpha(t) * value(lam) - x) / variance

    return score, value


EXACT: list[sd.Predictor] = [
    sd.DDIM(),
    sd.DPMSolverPP(1),
    sd.DPMSolverPP(3, lower_order_final=False),
    sd.UniPC(3, "bh1", lower_order_final=False),
    sd.UniPC(3, "bh2", lower_order_final=False),
    *(sd.DEIS(k, v, lower_order_final=False) for k in (1, 2, 3, 4) for v in ("log_rho", "rho", "time")),
    sd.DPMSolverPP(3, "singlestep"),
]


@sdes
@pytest.mark.parametrize("predictor", EXACT, ids=repr)
def test_runs_are_exact_for_polynomials_of_one_degree_less_than_their_order(
    sde: sd.SDE, predictor: sd.Predictor
) -> None:
    """Steps of full order, on an irregular grid, with an output that is a polynomial."""
    kind = "noise" if isinstance(predictor, sd.DEIS) else "data"
    order = getattr(predictor, "order", 1)
    single = getattr(predictor, "method", "") == "singlestep"
    # Its third-order step holds the slope between two of its stages.
    v, degree = variable_of(predictor, sde), 1 if single else order - 1
    score, value = polynomial_score(kind, sde, degree, v)
    # Away from the noise end, where rho reaches e^6 and its powers take the digits.
    times = times64(*IRREGULAR[3:], 0.07, 0.05) * sde.t_max
    out = sd.sample(
        sde,
        score,
        (1, 1),
        predictor=predictor,
        times=times,
        x_init=torch.tensor([[0.3]]),
        trajectory=True,
        denoise=False,
        dtype=torch.float64,
    )
    states = out.trajectory.flatten().tolist()
    alpha, sigma, _ = levels(sde, times)
    # UniC of less than full order still changes the states of the first steps.
    first = 0 if single else order if isinstance(predictor, sd.UniPC) else order - 1
    for i in range(first, len(times) - 1):
        ratio = alpha[i + 1] / alpha[i] if kind == "noise" else sigma[i + 1] / sigma[i]
        want = ratio * states[i] + integral(kind, sde, times, i, value)
        assert states[i + 1] == pytest.approx(want, rel=1e-8, abs=1e-8), i


# The end of a run --------------------------------------------------------------------------------------------


def short_run(predictor: sd.Predictor, sde: sd.SDE, times: Tensor, n: int = 3, **options) -> sd.SampleOutput:
    settings = {"dtype": torch.float64, "trajectory": True, "denoise": False, "seed": 3} | options
    return sd.sample(sde, mixture_2d().score(sde), (n, 2), predictor=predictor, times=times, **settings)


@solvers
@pytest.mark.parametrize("process", ["vp", "subvp", "cosine", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_a_step_to_the_data_is_the_expected_data(name: str, process: str, steps: int) -> None:
    """Where sigma is 0 every method takes a step of order 1: the expected data at the last noisy state."""
    sde, times = SDES[process], sd.uniform_times(SDES[process], steps, 0.0)
    out = short_run(ALL[name], sde, times)
    last, t = out.trajectory[-2], times[-2]
    want = sde.posterior_mean(last, mixture_2d().score(sde)(last, t), t)
    if not name.startswith("unipc") or steps == 1:  # UniC corrects the last noisy state within the step
        assert_close(out.x, want, rtol=1e-9, atol=1e-9)
    assert bool(torch.isfinite(out.trajectory).all())
    assert out.nfe == STAGES.get(name, 1) * (steps - 1) + 1


@solvers
@sdes
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_runs_of_few_steps(name: str, sde: sd.SDE, steps: int) -> None:
    times = sd.log_snr_times(sde, steps, 0.01 * sde.t_max)
    out = short_run(ALL[name], sde, times)
    assert bool(torch.isfinite(out.trajectory).all())
    assert out.nfe == STAGES.get(name, 1) * steps
    if name in MULTI:  # the first step of all is the same
        assert_close(out.trajectory[1], short_run(sd.DDIM(), sde, times).trajectory[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 14, 15, 20])
@pytest.mark.parametrize("clean", [False, True])
def test_orders_rise_at_the_beginning_and_fall_at_the_end_of_short_runs(steps: int, clean: bool) -> None:
    sde = sd.VP()
    times = sd.uniform_times(sde, steps, 0.0 if clean else 0.01)
    rising = [min(3, i + 1) for i in range(steps)]
    falling = [min(r, steps - i) for i, r in enumerate(rising)]
    to_data = [*rising[:-1], 1 if clean else rising[-1]]
    for make in (sd.DPMSolverPP, sd.DEIS, sd.UniPC):
        assert table(make(3), sde, times).orders == (falling if steps < 15 else to_data)
        assert table(make(3, lower_order_final=True), sde, times).orders == falling
        assert table(make(3, lower_order_final=False), sde, times).orders == to_data
    assert table(sd.IPNDM(3), sde, times).orders == to_data


@multistep
def test_a_run_without_history_is_its_first_step(name: str) -> None:
    sde, times = sd.VP(), times64(0.8, 0.6)
    x = torch.randn(3, 2, dtype=torch.float64)
    score = mixture_2d().score(sde)
    alone = MULTI[name].step(sde, score, x, times[0], times[1], torch.zeros_like(x))
    assert_close(alone, sd.DDIM().step(sde, score, x, times[0], times[1], x), rtol=1e-10, atol=1e-10)
    # Times of each sample, too.
    t, s = times64(0.8, 0.5, 0.2), times64(0.6, 0.4, 0.1)
    batch = MULTI[name].step(sde, score, x, t, s, x)
    for i in range(3):
        one = MULTI[name].step(sde, score, x[i : i + 1], t[i], s[i], x[:1])
        assert_close(one[0], batch[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SINGLE)
@sdes
def test_a_single_step_is_that_of_a_run_and_treats_samples_alone(name: str, sde: sd.SDE) -> None:
    predictor, score = SINGLE[name], mixture_2d().score(sde)
    x, times = torch.randn(3, 2, dtype=torch.float64), times64(0.7, 0.4)
    run = short_run(predictor, sde, times, x_init=x).x
    assert_close(predictor.step(sde, score, x, *times, x), run, rtol=1e-10, atol=1e-10)
    t, s = times64(0.8, 0.5, 0.2), times64(0.6, 0.4, 0.1)
    batch = predictor.step(sde, score, x, t, s, x)
    for i in range(3):
        one = predictor.step(sde, score, x[i : i + 1], t[i], s[i], x[:1])
        assert_close(one[0], batch[i], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="must go to times that all have noise, or all have none"):
        predictor.step(sd.VP(), score, x, t, times64(0.6, 0.0, 0.1), x)


# Runs --------------------------------------------------------------------------------------------------------


@solvers
def test_a_predictor_serves_any_number_of_runs(name: str) -> None:
    """Runs share nothing, one after the other or at the same time; a run that is over says so."""
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    times = sd.log_snr_times(sde, 6, 0.05)
    want = short_run(ALL[name], sde, times).trajectory
    assert torch.equal(short_run(ALL[name], sde, times).trajectory, want)
    runs = [ALL[name].start(sde, times, lambda: torch.zeros(3, 2)) for _ in range(2)]
    states = [want[0], want[0]]
    for i in range(6):
        for k, run in enumerate(runs):
            states[k] = run.step(sde, score, states[k], times[i], times[i + 1], torch.zeros(3, 2))
            assert torch.equal(states[k], want[i + 1])
    with pytest.raises(RuntimeError, match="has taken all the steps of its grid"):
        runs[0].step(sde, score, states[0], times[5], times[6], torch.zeros(3, 2))


@solvers
def test_a_sample_does_not_depend_on_its_batch_and_hardly_on_precision(name: str) -> None:
    sde = sd.VP()
    times = sd.log_snr_times(sde, 12, 0.01)
    whole = short_run(ALL[name], sde, times, 5).x
    part = short_run(ALL[name], sde, times, 2, first_index=2).x
    assert_close(part, whole[2:4], rtol=1e-9, atol=1e-9)
    single = short_run(ALL[name], sde, times, 5, dtype=torch.float32).x
    assert single.dtype == torch.float32
    assert_close(single.double(), whole, rtol=2e-4, atol=2e-4)


@solvers
@pytest.mark.parametrize("steps", [8, 64])
def test_memory_does_not_grow_with_the_steps(name: str, steps: int) -> None:
    """Of all that the score and the steps gave, hardly more is alive than the method has evaluations."""
    sde, alive, most = sd.VP(), weakref.WeakSet(), 0
    exact = mixture_2d().score(sde)

    class Kept:
        """Lives as long as the tensor that it hangs on."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        for value in (x, exact(x, t)):
            value.kept = Kept()
            alive.add(value.kept)
        gc.collect(0)
        most = max(most, len(alive))
        return value

    sd.sample(sde, score, (2, 2), predictor=ALL[name], times=sd.log_snr_times(sde, steps), denoise=False)
    assert most <= 8


# The other way -----------------------------------------------------------------------------------------------


@solvers
@pytest.mark.parametrize(
    "sde", [p if n == "vp" else pytest.param(p, marks=pytest.mark.slow) for n, p in SDES.items()], ids=SDES
)
def test_encoding_goes_the_other_way_and_comes_back(name: str, sde: sd.SDE) -> None:
    """Every deterministic solver, along the grid of the sampler: close to the exact latent, and back to the data."""
    data, n = gaussian_2d(), 100
    score = data.score(sde)
    times = sd.log_snr_times(sde, n, 0.05 * sde.t_max)
    x = data.sample(4, torch.Generator().manual_seed(0))
    latent = sd.encode(sde, score, x, predictor=ALL[name], times=times)
    exact = gaussian_flow(data, sde, x, times[-1], times[0])
    first = name in ("ddim", "dpm++1m", "dpm++1s", "ipndm1")
    scale = float(exact.abs().max())
    assert float((latent.x - exact).abs().max()) < (0.1 if first else 0.01) * scale
    assert latent.nfe == STAGES.get(name, 1) * n
    back = sd.sample(
        sde,
        score,
        (4, 2),
        predictor=ALL[name],
        times=times,
        x_init=latent.x,
        denoise=False,
        dtype=torch.float64,
    ).x
    assert float((back - x).abs().max()) < (0.1 if first else 0.02)


@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("dpm++2m", 2), ("heun", 2), ("dpm++2s", 2), ("dpm++3s", 3), ("rk4", 4)]
)
def test_encoding_has_the_order_of_the_solver(name: str, order: int) -> None:
    """Multistep methods of order 3 begin with a step of order 1, here where the flow is curved: they have order 2."""
    sde, data, sizes = sd.VP(), gaussian_2d(), [32, 64, 128]
    x, errors = data.sample(4, torch.Generator().manual_seed(0)), []
    for n in sizes:
        times = sd.log_snr_times(sde, n, 0.15)
        latent = sd.encode(sde, data.score(sde), x, predictor=ALL[name], times=times)
        exact = gaussian_flow(data, sde, x, times[-1], times[0])
        errors.append(float((latent.x - exact).square().mean().sqrt()))
    assert slope(sizes, errors) == pytest.approx(order, abs=0.2), errors


def test_what_encoding_refuses() -> None:
    sde, x = sd.VP(), torch.zeros(2, 2)
    score = mixture_2d().score(sde)
    for predictor in (sd.DDIM(eta=0.5), sd.EDMHeun(churn=1.0), sd.EulerMaruyama()):
        with pytest.raises(ValueError, match="encoding needs a deterministic predictor, and .* adds noise"):
            sd.encode(sde, score, x, predictor=predictor)
    with pytest.raises(ValueError, match="encoding must begin where there is noise, and there is none at 0"):
        sd.encode(sde, score, x, predictor=sd.DDIM(), times=times64(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="a solver or a predictor, not both"):
        sd.encode(sde, score, x, predictor=sd.DDIM(), solver=sd.DormandPrince())
    with pytest.raises(ValueError, match="times are the grid of a predictor"):
        sd.encode(sde, score, x, times=times64(1.0, 0.5))


# Correctors --------------------------------------------------------------------------------------------------


class Shift:
    """A corrector that moves every state by a constant, or hands it back."""

    steps = 1

    def __init__(self, by: float) -> None:
        self.by = by

    def step(self, sde, score, x, t, noise):
        return x + self.by if self.by else x


@solvers
def test_a_corrector_that_does_nothing_changes_nothing(name: str) -> None:
    times = sd.log_snr_times(sd.VP(), 6, 0.05)
    want = short_run(ALL[name], sd.VP(), times, noise=lambda: torch.ones(3, 2)).x
    still = short_run(ALL[name], sd.VP(), times, noise=lambda: torch.ones(3, 2), correctors=(Shift(0.0),)).x
    assert torch.equal(still, want)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_a_state_that_a_corrector_moved_is_not_corrected_by_unipc_too(variant: str) -> None:
    """Then only its predictor is left; for bh2 and order 2 that is DPM-Solver++(2M)."""
    times = sd.log_snr_times(sd.VP(), 8, 0.05)
    options = {"noise": lambda: torch.ones(3, 2), "correctors": (Shift(0.01),)}
    for order in (1, 2, 3):
        unipc = sd.UniPC(order, variant)
        moved = short_run(unipc, sd.VP(), times, **options).x
        if order != 2 or variant == "bh2":
            predictor_alone = short_run(sd.DPMSolverPP(order), sd.VP(), times, **options).x
            if order < 3 or variant == "bh2":
                assert_close(moved, predictor_alone, rtol=1e-9, atol=1e-9)
        free, plain = (short_run(p, sd.VP(), times).x for p in (unipc, sd.DPMSolverPP(order)))
        assert float((free - plain).abs().max()) > 1e-5


# What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.DPMSolverPP(4), "the order must be an integer from 1 to 3, got 4"),
        (lambda: sd.DPMSolverPP(0), "integer from 1 to 3, got 0"),
        (lambda: sd.DPMSolverPP(True), "integer from 1 to 3, got True"),
        (lambda: sd.DPMSolverPP(2.0), "integer from 1 to 3, got 2.0"),
        (lambda: sd.UniPC(4), "integer from 1 to 3, got 4"),
        (lambda: sd.DEIS(5), "integer from 1 to 4, got 5"),
        (lambda: sd.IPNDM(5), "integer from 1 to 4, got 5"),
        (lambda: sd.DPMSolverPP(2, "multi"), "unknown method 'multi'; did you mean 'multistep'"),
        (lambda: sd.UniPC(2, "bh3"), r"unknown variant 'bh3'; did you mean 'bh\d'"),
        (lambda: sd.DEIS(2, "logrho"), "unknown variable 'logrho'; did you mean 'log_rho'"),
        (
            lambda: sd.DPMSolverPP(2, "singlestep", lower_order_final=True),
            "it takes no lower_order_final, got True",
        ),
        (
            lambda: sd.DPMSolverPP(2, as_published=True),
            "as_published differs for the multistep order 3 only, got order 2",
        ),
        (lambda: sd.EDMHeun(churn=-1.0), "churn must be at least 0, got -1.0"),
        (lambda: sd.EDMHeun(churn=math.nan), "churn must be at least 0, got nan"),
        (lambda: sd.EDMHeun(s_min=2.0, s_max=1.0), "need 0 <= s_min < s_max, got 2.0 and 1.0"),
        (lambda: sd.EDMHeun(s_noise=0.0), "s_noise must be positive, got 0.0"),
    ],
)
def test_wrong_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_flow_solver_refuses_times_of_each_sample_and_the_data_themselves() -> None:
    sde, x = sd.VP(), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"for the whole batch, got times of shape \(2,\) and \(\)"):
        sd.FlowSolver().step(sde, lambda x, t: -x, x, times64(0.5, 0.4), times64(0.1)[0], x)
    with pytest.raises(ValueError, match="needs noise at the end of a step, and there is none at 0"):
        sd.FlowSolver().step(sde, lambda x, t: -x, x, times64(0.5)[0], times64(0.0)[0], x)


def test_a_flow_solver_counts_its_evaluations() -> None:
    score = CallCounter(mixture_2d().score(sd.VP()))
    out = sd.sample(
        sd.VP(),
        score,
        (2, 2),
        predictor=sd.FlowSolver(sd.DormandPrince(1e-3, 1e-3)),
        times=times64(1, 0.5, 0.1),
    )
    assert out.nfe == score.calls > 20


# Churn -------------------------------------------------------------------------------------------------------


@sdes
def test_churn_adds_the_noise_between_its_two_levels(sde: sd.SDE) -> None:
    """For a score of unit data at rest the raised state is known: ``x alpha' / alpha + noise`` of that variance."""
    seen: list[tuple[Tensor, float]] = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, float(t)))
        return torch.zeros_like(x)

    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    t, s = times64(0.5, 0.3) * sde.t_max
    sd.EDMHeun(churn=0.2, s_noise=1.5).step(sde, score, x, t, s, z)
    state, raised = seen[0]
    rho, rho_raised = (
        float(sde.sigma(time) / sde.alpha(time)) for time in (t, torch.tensor(raised, dtype=torch.float64))
    )
    assert rho_raised == pytest.approx(1.2 * rho, rel=1e-7)
    alpha = float(sde.alpha(torch.tensor(raised, dtype=torch.float64)))
    want = alpha * (x / sde.alpha(t) + 1.5 * math.sqrt(rho_raised**2 - rho**2) * z)
    assert_close(state, want, rtol=1e-7, atol=1e-7)
    # Outside its range nothing is added, nor beyond the beginning of the schedule.
    for still in (sd.EDMHeun(churn=0.2, s_max=rho / 2), sd.EDMHeun(churn=0.2, s_min=2 * rho)):
        calm = sd.EDMHeun().step(sde, mixture_2d().score(sde), x, t, s, z)
        assert torch.equal(still.step(sde, mixture_2d().score(sde), x, t, s, z), calm)
    top = torch.tensor(sde.t_max, dtype=torch.float64)
    seen.clear()
    sd.EDMHeun(churn=0.2).step(sde, score, x, top, s, z)
    assert torch.equal(seen[0][0], x) and seen[0][1] == sde.t_max
