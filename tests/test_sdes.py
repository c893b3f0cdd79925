"""The forward processes against closed forms, quadrature, each other, and a public implementation."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import FIXTURES, SDES, gaussian_2d, log_grid, marginal_moments, times64

QUANTITIES = ("alpha", "sigma", "variance", "log_alpha", "log_snr", "f", "g2")
sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)

# Formulas of the papers, written here a second time in NumPy --------------------------------------


def vp_beta(t):
    return 0.1 + 19.9 * t


def vp_integral(t):
    return 0.1 * t + 19.9 * t**2 / 2


def cosine_angle(t):
    return (t + 0.008) / 1.008 * np.pi / 2


CLOSED_FORMS: dict[str, dict[str, Callable]] = {
    "vp": {
        "alpha": lambda t: np.exp(-vp_integral(t) / 2),
        "variance": lambda t: -np.expm1(-vp_integral(t)),
        "f": lambda t: -vp_beta(t) / 2,
        "g2": vp_beta,
    },
    "subvp": {
        "alpha": lambda t: np.exp(-vp_integral(t) / 2),
        "variance": lambda t: np.expm1(-vp_integral(t)) ** 2,
        "f": lambda t: -vp_beta(t) / 2,
        "g2": lambda t: -vp_beta(t) * np.expm1(-2 * vp_integral(t)),
    },
    "ve": {
        "alpha": lambda t: np.ones_like(t),
        "variance": lambda t: (0.01 * 5000.0**t) ** 2,
        "f": lambda t: np.zeros_like(t),
        "g2": lambda t: (0.01 * 5000.0**t) ** 2 * 2 * np.log(5000),
    },
    "cosine": {
        "alpha": lambda t: np.cos(cosine_angle(t)) / np.cos(cosine_angle(0)),
        "variance": lambda t: (
            (np.sin(cosine_angle(t)) ** 2 - np.sin(cosine_angle(0)) ** 2) / np.cos(cosine_angle(0)) ** 2
        ),
        "f": lambda t: -np.pi / 2 / 1.008 * np.tan(cosine_angle(t)),
        "g2": lambda t: np.pi / 1.008 * np.tan(cosine_angle(t)),
    },
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("quantity", ["alpha", "variance", "f", "g2"])
def test_quantities_are_the_closed_forms_of_the_papers(name: str, quantity: str) -> None:
    t = log_grid(SDES[name], 200)
    expected = torch.from_numpy(CLOSED_FORMS[name][quantity](t.numpy()))
    # The cosine's own closed form of the variance subtracts: it is good to 1e-9 near t = 0.
    rtol = 1e-9 if (name, quantity) == ("cosine", "variance") else 2e-12
    assert_close(getattr(SDES[name], quantity)(t), expected, rtol=rtol, atol=0)


@sdes
def test_sigma_alpha_and_log_snr_follow_from_the_two_formulas(sde: sd.SDE) -> None:
    t = log_grid(sde)
    assert_close(sde.sigma(t) ** 2, sde.variance(t), rtol=1e-14, atol=0)
    assert_close(sde.alpha(t).log(), sde.log_alpha(t), rtol=1e-9, atol=1e-15)
    assert_close(sde.log_snr(t).exp(), (sde.alpha(t) / sde.sigma(t)) ** 2, rtol=1e-11, atol=0)
    assert bool((sde.log_snr(t).diff() < 0).all())


@sdes
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_float32_is_within_1e_6_of_float64(sde: sd.SDE, quantity: str) -> None:
    t = log_grid(sde, 400).float()
    single, double = getattr(sde, quantity)(t), getattr(sde, quantity)(t.double())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert_close(single.double(), double, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
@pytest.mark.parametrize("quantity", ["alpha", "sigma", "variance", "f", "g2"])
def test_float32_with_the_time_itself_rounded_is_still_within_1e_6(name: str, quantity: str) -> None:
    # Not so for the cosine schedule near its end, where tan(phi) turns the rounding of t itself into 3e-5.
    t = log_grid(SDES[name], 400)
    single, double = getattr(SDES[name], quantity)(t.float()), getattr(SDES[name], quantity)(t)
    assert_close(single.double(), double, rtol=1e-6, atol=0)


@sdes
def test_single_precision_formulas_would_fail_where_ours_do_not(sde: sd.SDE) -> None:
    """The mistake this guards against: ``1 - exp(.)`` in float32 is 1% wrong near t = 0."""
    if sde.alpha(0.0) != 1 or sde.variance(0.0) != 0:
        pytest.skip("no cancellation in this schedule")
    t = torch.tensor([1e-5])
    naive = (1 - sde.alpha(t) ** 2).sqrt()
    right = (-torch.expm1(2 * sde.log_alpha(t.double()))).sqrt()
    assert abs(float(naive / right) - 1) > 1e-4


@sdes
def test_f_and_g2_are_the_derivatives_by_reverse_mode(sde: sd.SDE) -> None:
    t = log_grid(sde).requires_grad_()
    (f,) = torch.autograd.grad(sde.log_alpha(t).sum() + 0 * t.sum(), t)
    (slope,) = torch.autograd.grad(sde.variance(t).sum(), t)
    t = t.detach()
    assert_close(sde.f(t), f, rtol=1e-13, atol=0)
    assert_close(sde.g2(t), slope - 2 * f * sde.variance(t), rtol=1e-13, atol=0)
    both = sde.f_and_g2(t)
    assert_close(both[0], sde.f(t), rtol=0, atol=0)
    assert_close(both[1], sde.g2(t), rtol=0, atol=0)
    assert bool((sde.g2(t) > 0).all())


@sdes
def test_derivatives_are_finite_at_both_ends(sde: sd.SDE) -> None:
    for t in (0.0, 1e-12, sde.t_max):
        f, g2 = sde.f_and_g2(t)
        assert math.isfinite(f) and math.isfinite(g2) and g2 >= 0


@sdes
def test_times_may_be_numbers_scalars_or_batches(sde: sd.SDE) -> None:
    t = times64(0.1, 0.5, 0.9)
    for quantity in QUANTITIES:
        function = getattr(sde, quantity)
        values = function(t)
        assert values.shape == (3,)
        for i, value in enumerate(t):
            # Vectorised library functions may round a scalar and a vector differently in the last digit.
            assert_close(function(value), values[i], rtol=1e-14, atol=0)
            assert_close(function(float(value)), values[i], rtol=1e-14, atol=0)
            assert function(value).shape == ()


@sdes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_times_in_half_precision_or_integers_are_refused(sde: sd.SDE, dtype: torch.dtype) -> None:
    for quantity in (*QUANTITIES, "f_and_g2"):
        with pytest.raises(TypeError, match=f"float32 or float64, got {dtype}"):
            getattr(sde, quantity)(torch.ones(2, dtype=dtype))


# Transition kernels -------------------------------------------------------------------------------


@sdes
def test_transitions_compose(sde: sd.SDE) -> None:
    times = torch.cat([times64(1e-5, 1e-3), torch.linspace(0.05, sde.t_max, 9, dtype=torch.float64)])
    for s, u, t in zip(times[:-2], times[1:-1], times[2:], strict=True):
        ratio_su, var_su = sde.transition(s, u)
        ratio_ut, var_ut = sde.transition(u, t)
        ratio, var = sde.transition(s, t)
        assert_close(ratio_su * ratio_ut, ratio, rtol=1e-12, atol=0)
        assert_close(ratio_ut**2 * var_su + var_ut, var, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("s", "t"), [(1e-5, 0.01), (0.2, 0.2005), (0.3, 0.9)])
def test_transition_moments_solve_their_odes(name: str, s: float, t: float) -> None:
    """``m' = f m`` and ``V' = 2 f V + g^2`` from (1, 0), with the derived ``f`` and ``g^2``."""
    sde = SDES[name]

    def moments(u: float, y: np.ndarray) -> list[float]:
        f, g2 = (float(c) for c in sde.f_and_g2(u))
        return [f * y[0], 2 * f * y[1] + g2]

    solution = solve_ivp(moments, (s, t), [1.0, 0.0], rtol=1e-8, atol=1e-13)
    ratio, var = sde.transition(*times64(s, t))
    assert_close(torch.stack([ratio, var]), torch.from_numpy(solution.y[:, -1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_transition_moments_by_quadrature(name: str) -> None:
    """``log ratio = int f`` and ``var = int g^2(u) (alpha_t / alpha_u)^2 du``, with the closed forms."""
    forms, s, t = CLOSED_FORMS[name], 0.05, 0.6
    log_ratio = quad(forms["f"], s, t, epsabs=1e-13, epsrel=1e-12)[0]
    var = quad(
        lambda u: forms["g2"](u) * (forms["alpha"](t) / forms["alpha"](u)) ** 2,
        s,
        t,
        epsabs=1e-13,
        epsrel=1e-12,
    )[0]
    ratio, variance = SDES[name].transition(s, t)
    assert float(ratio) == pytest.approx(math.exp(log_ratio), rel=1e-11)
    assert float(variance) == pytest.approx(var, rel=1e-10)


@sdes
def test_a_transition_to_the_same_time_is_the_identity(sde: sd.SDE) -> None:
    ratio, var = sde.transition(0.3, 0.3)
    assert float(ratio) == 1 and float(var) == pytest.approx(0, abs=1e-12)


@sdes
def test_transitions_between_close_times_keep_their_digits(sde: sd.SDE) -> None:
    """For a short step ``var`` is nearly ``g^2 h``, though it is a difference of larger numbers."""
    t, h = 0.50025, 1e-7
    _, var = sde.transition(t - h, t)
    assert float(var) == pytest.approx(float(sde.g2(t)) * h, rel=1e-5)


@sdes
def test_clean_data_is_the_start_of_a_transition_where_s_is_none(sde: sd.SDE) -> None:
    t = log_grid(sde, 7)
    ratio, var = sde.transition(None, t)
    assert_close(ratio, sde.alpha(t), rtol=0, atol=0)
    assert_close(var, sde.variance(t), rtol=0, atol=0)


@sdes
def test_perturb_has_the_marginal_moments(sde: sd.SDE) -> None:
    x0 = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    noise = torch.randn_like(x0)
    t = times64(0.1, 0.4, 0.9)
    x = sde.perturb(x0, t, noise)
    for i in range(3):
        assert_close(x[i], sde.alpha(t[i]) * x0[i] + sde.sigma(t[i]) * noise[i], rtol=1e-14, atol=1e-14)
    assert_close(sde.perturb(x0[:1], t[0], noise[:1]), x[:1], rtol=1e-14, atol=1e-14)
    assert sde.perturb(x0.float(), t.float(), noise.float()).dtype == torch.float32


@sdes
def test_coefficients_of_another_batch_size_are_refused(sde: sd.SDE) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"shape \(\) or \(3,\), got \(2,\)"):
        sde.perturb(x, torch.tensor([0.1, 0.2]), x)


@sdes
@pytest.mark.parametrize("s", [0.2, None])
def test_posterior_mean_is_the_conditional_expectation(sde: sd.SDE, s: float | None) -> None:
    """For Gaussian data (x_s, x_t) is Gaussian; conditioning it is linear algebra with no score in it."""
    data, t = gaussian_2d(), times64(0.7)[0]
    eye = torch.eye(2, dtype=torch.float64)
    if s is None:
        ratio, var, mean_s, cov_s = sde.alpha(t), sde.variance(t), data.mean, data.covariance
    else:
        ratio, var = sde.transition(s, t)
        mean_s, cov_s = marginal_moments(data, sde, times64(s)[0])
    cov_t = ratio**2 * cov_s + var * eye
    x = 2 * torch.randn(5, 2, dtype=torch.float64)
    expected = mean_s + (x - ratio * mean_s) @ torch.linalg.solve(cov_t, ratio * cov_s)
    assert_close(sde.posterior_mean(x, data.score(sde)(x, t), t, s), expected, rtol=1e-9, atol=1e-9)


@sdes
def test_posterior_given_both_ends_is_gaussian_conditioning(sde: sd.SDE) -> None:
    """``q(x_s | x_t, x_0)`` from the joint covariance of ``x_s`` and ``x_t`` given ``x_0``."""
    s, t = times64(0.3, 0.8)
    on_data, on_state, var = sde.posterior(s, t)
    ratio, _ = sde.transition(s, t)
    covariance = ratio * sde.variance(s)
    gain = covariance / sde.variance(t)
    assert_close(on_state, gain, rtol=1e-12, atol=0)
    assert_close(on_data, sde.alpha(s) - gain * sde.alpha(t), rtol=1e-8, atol=1e-12)
    assert_close(var, sde.variance(s) - gain * covariance, rtol=1e-8, atol=0)
    single = sde.posterior(s.float(), t.float())
    assert all(c.dtype == torch.float32 for c in single)


# The prior ----------------------------------------------------------------------------------------


@sdes
def test_prior_log_prob_is_that_of_a_normal(sde: sd.SDE) -> None:
    x = 3 * torch.randn(4, 3, 2, 2, dtype=torch.float64)
    std = float(sde.sigma(sde.t_max))
    assert sde.prior_std == std
    expected = torch.distributions.Normal(times64(0.0), times64(std)).log_prob(x).flatten(1).sum(1)
    assert_close(sde.prior_log_prob(x), expected, rtol=1e-13, atol=0)
    single = sde.prior_log_prob(x.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), expected, rtol=1e-6, atol=0)


# Discretization -----------------------------------------------------------------------------------


def test_vp_discretizes_to_the_betas_of_ddpm() -> None:
    expected = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert_close(sd.VP().discretize(1000), expected, rtol=1e-14, atol=0)


def test_ve_discretizes_to_the_geometric_ladder_of_smld() -> None:
    expected = torch.from_numpy(np.geomspace(0.01, 50.0, 1000))
    assert_close(sd.VE().discretize(1000), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sde", [sd.VP(), sd.CosineVP()], ids=["vp", "cosine"])
def test_exact_betas_have_the_marginals_of_the_sde(sde: sd.VariancePreserving) -> None:
    betas = sde.discretize(50, "exact")
    assert betas.dtype == torch.float64 and bool((betas > 0).all()) and bool((betas < 1).all())
    t = torch.arange(1, 51, dtype=torch.float64) / 50 * sde.t_max
    assert_close((1 - betas).cumprod(0), sde.alpha(t) ** 2, rtol=1e-10, atol=0)


def test_a_linear_chain_with_few_steps_says_that_beta_would_reach_one() -> None:
    with pytest.raises(ValueError, match=r"20 steps are too few .* largest beta would be 1,"):
        sd.VP().discretize(20)
    assert float(sd.VP().discretize(20, "exact").max()) < 1


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.CosineVP()], ids=["vp", "ve", "cosine"])
@pytest.mark.parametrize("n", [1, 0, -3, 10.0, "10", None])
def test_a_chain_needs_at_least_two_steps(sde: sd.VP, n: object) -> None:
    with pytest.raises(ValueError, match="integer number of steps n >= 2, got"):
        sde.discretize(n)


def test_an_unknown_discretization_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown discretization 'songs'; did you mean 'song'.*exact, song"):
        sd.VP().discretize(10, "songs")
    with pytest.raises(ValueError, match=r"unknown discretization 'song'.*exact"):
        sd.CosineVP().discretize(10, "song")


# The inverse of the log-SNR -----------------------------------------------------------------------


@sdes
def test_time_of_log_snr_inverts_log_snr(sde: sd.SDE) -> None:
    t = log_grid(sde, 100)
    # The cosine's closed form subtracts the offset s = 0.008, with a rounding error of 1e-14.
    assert_close(sde.time_of_log_snr(sde.log_snr(t)), t, rtol=1e-11, atol=2e-14)
    closed, bisected = sde.time_of_log_snr(sde.log_snr(t)), sd.SDE.time_of_log_snr(sde, sde.log_snr(t))
    assert_close(closed, bisected, rtol=1e-11, atol=2e-14)
    single = sde.time_of_log_snr(sde.log_snr(t).float())
    assert single.dtype == torch.float32


@sdes
def test_log_snr_beyond_the_schedule_gives_the_nearest_end(sde: sd.SDE) -> None:
    ends = sde.time_of_log_snr(times64(1e3, -1e3))
    assert ends.tolist() == pytest.approx([0, sde.t_max], abs=1e-12)
    assert float(sde.time_of_log_snr(0.0)) == pytest.approx(float(sde.time_of_log_snr(times64(0.0))[0]))


# Construction -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.VP(beta_min=-1.0), "0 < beta_min <= beta_max, got -1.0 and 20.0"),
        (lambda: sd.VP(beta_min=5.0, beta_max=1.0), "0 < beta_min <= beta_max, got 5.0 and 1.0"),
        (lambda: sd.VP(beta_max=math.inf), "0 < beta_min <= beta_max"),
        (lambda: sd.VP(beta_min=math.nan), "0 < beta_min <= beta_max"),
        (lambda: sd.SubVP(beta_min=0.0), "0 < beta_min <= beta_max, got 0.0"),
        (lambda: sd.VE(sigma_min=0.0), "0 < sigma_min < sigma_max, got 0.0"),
        (lambda: sd.VE(sigma_min=60.0), "0 < sigma_min < sigma_max, got 60.0 and 50.0"),
        (lambda: sd.CosineVP(s=-0.1), "offset s must be at least 0, got -0.1"),
        (lambda: sd.CosineVP(t_max=1.0), "t_max must be below 1, got 1.0"),
        (lambda: sd.VP(t_min=2.0), "t_min=2.0, t_max=1.0"),
        (lambda: sd.VP(t_min=-0.1), "0 <= t_min < t_max"),
        (lambda: sd.VP(t_max=math.inf), "0 <= t_min < t_max"),
    ],
)
def test_parameters_are_checked_at_construction(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@sdes
def test_an_sde_is_an_immutable_value(sde: sd.SDE) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.t_min = 0.5
    for other in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde)), dataclasses.replace(sde)):
        assert other == sde and hash(other) == hash(sde)
        assert float(other.sigma(0.3)) == float(sde.sigma(0.3))
    assert dataclasses.replace(sde, t_min=0.25) != sde


def test_a_new_process_is_two_formulas() -> None:
    """An Ornstein-Uhlenbeck process written from outside gets everything else from the base class."""

    class OrnsteinUhlenbeck(sd.SDE):
        def log_alpha(self, t: Tensor) -> Tensor:
            return -3 * torch.as_tensor(t)

        def variance(self, t: Tensor) -> Tensor:
            return -0.5 * torch.expm1(-6 * torch.as_tensor(t))

    sde = OrnsteinUhlenbeck()
    t = times64(0.1, 0.8)
    assert_close(sde.f(t), -3 * torch.ones_like(t))
    assert_close(sde.g2(t), 3 * torch.ones_like(t))  # 2 theta times the stationary variance
    assert float(sde.time_of_log_snr(sde.log_snr(0.4))) == pytest.approx(0.4, rel=1e-12)
    with pytest.raises(TypeError, match="abstract"):
        sd.SDE()


def test_a_formula_may_be_a_constant() -> None:
    class Still(sd.SDE):
        def log_alpha(self, t: Tensor) -> Tensor:
            return torch.zeros_like(torch.as_tensor(t))

        def variance(self, t: Tensor) -> Tensor:
            return torch.ones_like(torch.as_tensor(t))

    f, g2 = Still().f_and_g2(times64(0.1, 0.8))
    assert f.tolist() == [0, 0] and g2.tolist() == [0, 0]


@sdes
def test_coefficients_in_inference_mode_and_without_gradients(sde: sd.SDE) -> None:
    t = times64(0.2, 0.7)
    expected = sde.f_and_g2(t)
    with torch.inference_mode():
        assert_close(sde.f_and_g2(t), expected, rtol=0, atol=0)
        assert_close(sde.f_and_g2(t.clone()), expected, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(sde.f_and_g2(t), expected, rtol=0, atol=0)
    assert not any(c.requires_grad for c in sde.f_and_g2(t.clone().requires_grad_()))


# A public reference implementation ----------------------------------------------------------------

song = pytest.mark.parametrize("name", ["vp", "subvp", "ve"])


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with np.load(FIXTURES / "score_sde" / "sde_quantities.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@song
def test_quantities_equal_the_reference_in_float64(name: str, reference: dict[str, Tensor]) -> None:
    sde = SDES[name]
    want = {k.rsplit("/", 1)[1]: v for k, v in reference.items() if k.startswith(f"{name}/f64/")}
    t = want["t"]
    assert len(t) == 66 and float(t.min()) == pytest.approx(1e-5) and float(t.max()) == 1
    assert_close(sde.alpha(t), want["mean_coeff"], rtol=1e-12, atol=0)
    assert_close(sde.f(t), want["drift_coeff"], rtol=1e-12, atol=0)
    assert_close(sde.g2(t), want["diffusion"] ** 2, rtol=2e-12 if name != "subvp" else 1e-9, atol=0)
    # The reference subtracts from 1, whose rounding 1e-16 is 1e-10 of the VP variance at t = 1e-5.
    assert_close(sde.sigma(t), want["std"], rtol=1e-9, atol=0)
    late = t > 0.01
    assert_close(sde.sigma(t)[late], want["std"][late], rtol=2e-12, atol=0)


@song
def test_prior_equals_the_reference(name: str, reference: dict[str, Tensor]) -> None:
    z, expected = reference[f"{name}/prior_z_f64"], reference[f"{name}/prior_logp_f64"]
    sde = SDES[name]
    if name == "ve":
        assert_close(sde.prior_log_prob(z), expected, rtol=1e-12, atol=0)
    else:
        # The reference's prior is N(0, I); ours has the standard deviation sigma(1), 2e-5 less.
        assert_close(sde.prior_log_prob(z), expected, rtol=1e-3, atol=0)
        assert sde.prior_std == pytest.approx(1, abs=5e-5)
        normal = -0.5 * (z.flatten(1).square() + math.log(2 * math.pi)).sum(1)
        assert_close(normal, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [100, 1000])
def test_discretizations_equal_the_reference(n: int, reference: dict[str, Tensor]) -> None:
    def close(ours: Tensor, key: str, rtol: float = 1e-5) -> None:
        assert_close(ours.float(), reference[key], rtol=rtol, atol=0)

    betas = sd.VP().discretize(n)
    chain = sd.DDPM(betas)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    close(betas, f"vp/N{n}/discrete_betas", rtol=1e-6)
    close(chain.alpha(t) ** 2, f"vp/N{n}/alphas_cumprod", rtol=1e-4 if n == 100 else 1e-5)
    close(chain.alpha(t), f"vp/N{n}/sqrt_alphas_cumprod", rtol=1e-4 if n == 100 else 1e-5)
    close(chain.sigma(t), f"vp/N{n}/sqrt_1m_alphas_cumprod", rtol=3e-4)  # its float32 1 - product
    close(sd.VE().discretize(n), f"ve/N{n}/discrete_sigmas", rtol=1e-5)


def test_pairs_of_grid_times_give_the_reference_ladder_steps(reference: dict[str, Tensor]) -> None:
    """SMLD's ``G^2 = sigma_i^2 - sigma_{i-1}^2`` is our transition between times ``t_i = i / (N - 1)``."""
    n, sde = 100, sd.VE()
    t = torch.arange(n, dtype=torch.float64) / (n - 1)
    index, g = reference[f"ve/N{n}/timestep_index"], reference[f"ve/N{n}/G"].double()
    assert bool((index > 0).any())
    for i, (s, u) in enumerate(pairwise(t), start=1):
        _, var = sde.transition(s, u)
        for value in g[index == i]:
            assert float(var.sqrt()) == pytest.approx(float(value), rel=1e-4)
