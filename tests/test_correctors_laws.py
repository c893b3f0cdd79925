"""The stationary laws of the correctors: exact where that is claimed, else off by the stated order in the step
size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import KERNELS, SDES, assert_moments, gaussian_2d, marginal_moments, mixture_2d, times64
from sde_diffusion.correctors import LogRatio, Memory, start_chain
from sde_diffusion.correctors.preconditioned import _Squares
from sde_diffusion.correctors.underdamped import Kinetic

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
T = times64(0.3)[0]
RATIOS = (0.01, 0.02, 0.04)


def order(sizes: tuple[float, ...], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# Gaussians: the affine map of a step gives the stationary covariance exactly --------------------------------------


def affine(step: Callable[[Tensor, Tensor], Tensor], d: int, draws: int) -> tuple[Tensor, Tensor]:
    """``(A, B)`` of ``u, z -> A u + B z + b``, for ``u`` of d and ``z`` of ``draws`` numbers."""
    u = torch.cat([torch.zeros(1 + draws, d), torch.eye(d)]).double()
    z = torch.cat([torch.zeros(1, draws), torch.eye(draws), torch.zeros(d, draws)]).double()
    y = step(u, z)
    return (y[1 + draws :] - y[0]).T, (y[1 : 1 + draws] - y[0]).T


def stationary(a: Tensor, b: Tensor) -> Tensor:
    """The solution of ``C = A C A' + B B'``."""
    d = len(a)
    assert float(torch.linalg.eigvals(a).abs().max()) < 1
    flat = torch.linalg.solve(torch.eye(d * d).double() - torch.kron(a, a), (b @ b.T).flatten())
    return flat.reshape(d, d)


def stationary_covariance(corrector: sd.Corrector, sde: sd.SDE, velocity: bool = False) -> Tensor:
    """Of the chain on the diffused Gaussian in the plane; exact, for its steps are affine."""
    score = gaussian_2d().score(sde)

    def step(u: Tensor, z: Tensor) -> Tensor:
        memory = Memory(chain=Kinetic(u[:, 2:])) if velocity else Memory(chain=frozen(u))
        done, after = corrector.move(sde, score, u[:, :2], T, lambda: z, memory)
        return torch.cat([done.x, after.chain.velocity], 1) if velocity else done.x

    def frozen(u: Tensor) -> object:
        if not isinstance(corrector, sd.PreconditionedSGLD):
            return None
        return _Squares(times64(0.5, 2.0).expand(len(u), 2), 10)

    return stationary(*affine(step, 4 if velocity else 2, 2))[:2, :2]


def relative_bias(corrector: sd.Corrector, sde: sd.SDE, velocity: bool = False) -> float:
    _, want = marginal_moments(gaussian_2d(), sde, T)
    return float((stationary_covariance(corrector, sde, velocity) - want).norm() / want.norm())


@sdes
@pytest.mark.parametrize(
    ("build", "velocity", "expected"),
    [
        (lambda r: sd.SGLD(sd.SigmaScaled(r)), False, 1.0),
        (lambda r: sd.AnnealedLangevin(snr=math.sqrt(r / 2)), False, 1.0),
        (lambda r: sd.PreconditionedSGLD(sd.SigmaScaled(r), adapt=10), False, 1.0),
        (lambda r: sd.ImplicitLangevin(sd.SigmaScaled(r), theta=1.0, iterations=60), False, 1.0),
        (lambda r: sd.SGHMC(sd.SigmaScaled(r), friction=0.3), True, 1.0),
        (lambda r: sd.SGHMC(sd.SigmaScaled(r), friction=math.sqrt(r)), True, 1.0),
    ],
    ids=["sgld", "annealed", "psgld", "implicit-euler", "sghmc", "sghmc-constant-friction"],
)
def test_the_covariance_of_a_gaussian_is_wrong_by_the_stated_order(
    sde: sd.SDE, build: Callable[[float], sd.Corrector], velocity: bool, expected: float
) -> None:
    """Of order eta: for SGHMC, too, the square of its time step, also where the friction per unit of time is kept."""
    errors = [relative_bias(build(r), sde, velocity) for r in RATIOS]
    assert errors[0] > 1e-5
    assert order(RATIOS, errors) == pytest.approx(expected, abs=0.12)


@sdes
def test_sgld_has_the_stationary_variance_of_its_docstring(sde: sd.SDE) -> None:
    mean_cov = marginal_moments(gaussian_2d(), sde, T)[1]
    v, vectors = torch.linalg.eigh(mean_cov)
    eta = 0.3 * sde.variance(T)
    want = vectors @ torch.diag(v / (1 - eta / (2 * v))) @ vectors.T
    assert_close(stationary_covariance(sd.SGLD(sd.SigmaScaled(0.3)), sde), want, rtol=1e-9, atol=1e-12)


@sdes
@pytest.mark.parametrize("ratio", [0.02, 0.5, 1.5])
@pytest.mark.parametrize("friction", [0.5, 2.0, math.inf])
def test_baoab_has_no_bias_for_gaussians(sde: sd.SDE, ratio: float, friction: float) -> None:
    """Its remarkable property, and a sum over every coefficient of the step: half a kick wrong, and it is gone."""
    corrector = sd.Underdamped(sd.SigmaScaled(ratio), friction=friction)
    assert relative_bias(corrector, sde, velocity=True) < 1e-9


@sdes
@pytest.mark.parametrize("ratio", [0.1, 2.0, 10.0])
def test_the_trapezoidal_rule_has_no_bias_for_gaussians_and_is_stable(sde: sd.SDE, ratio: float) -> None:
    corrector = sd.ImplicitLangevin(sd.SigmaScaled(ratio), theta=0.5, iterations=400)
    assert relative_bias(corrector, sde) < 1e-6
    # SGLD is not stable there: its map stretches the narrowest direction.
    if ratio > 2:
        with pytest.raises(AssertionError):
            narrow = sd.GaussianMixture(torch.ones(1), torch.zeros(1, 2), 1e-8 * torch.eye(2)[None])
            score = narrow.score(sde)
            step = sd.SGLD(sd.SigmaScaled(ratio)).step
            stationary(*affine(lambda x, z: step(sde, score, x, T, z), 2, 2))


# A mixture on the line: how far one step from p_t moves the expectations of some functions, by quadrature ---------


def line() -> sd.GaussianMixture:
    return sd.GaussianMixture(
        torch.tensor([0.6, 0.4]), torch.tensor([[-0.6], [0.8]]), torch.tensor([[[0.2]], [[0.1]]])
    )


def defect(step: Callable[[Tensor, list[Tensor]], Tensor], sde: sd.SDE, draws: int) -> float:
    """The largest change of ``E f`` by one step from ``p_t``, over a few bounded ``f`` in units of its scale.

    The trapezoidal rule in x and Gauss and Hermite's in each draw; both converge exponentially here.
    """
    mixture, score = line(), line().score(sde)
    scale = float(marginal_moments(mixture, sde, T)[1].sqrt())
    centre = float(sde.alpha(T) * mixture.mean)
    x = torch.linspace(centre - 8 * scale, centre + 8 * scale, 601, dtype=torch.float64)
    density = score.log_prob(x[:, None], T).exp() * (x[1] - x[0])
    nodes, weights = (
        torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(36 if draws == 1 else 20)
    )
    grids = torch.meshgrid(x, *[nodes] * draws, indexing="ij")
    product = torch.einsum("i,j->ij", density, weights / weights.sum())
    if draws == 2:
        product = torch.einsum("ij,k->ijk", product, weights / weights.sum())
    state, z = grids[0].reshape(-1, 1), [g.reshape(-1, 1) for g in grids[1:]]
    after = step(state, z)
    functions = (torch.tanh, torch.cos, lambda u: torch.exp(-u * u))
    total = product.reshape(-1, 1)
    return max(
        abs(float((total * (f((after - centre) / scale) - f((state - centre) / scale))).sum()))
        for f in functions
    )


def one_draw(corrector: sd.Corrector, sde: sd.SDE) -> Callable[[Tensor, list[Tensor]], Tensor]:
    score = line().score(sde)
    return lambda x, z: corrector.step(sde, score, x, T, z[0])


def with_velocity(corrector: sd.Corrector, sde: sd.SDE) -> Callable[[Tensor, list[Tensor]], Tensor]:
    score = line().score(sde)
    return lambda x, z: corrector.step(sde, score, x, T, torch.stack([z[0], z[1]]))


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize(
    ("build", "make", "expected"),
    [
        (lambda r: sd.SGLD(sd.SigmaScaled(r)), one_draw, 2.0),
        (lambda r: sd.TamedLangevin(sd.SigmaScaled(r)), one_draw, 2.0),
        (lambda r: sd.ImplicitLangevin(sd.SigmaScaled(r), theta=1.0, iterations=8), one_draw, 2.0),
        (lambda r: sd.ImplicitLangevin(sd.SigmaScaled(r), theta=0.5, iterations=20), one_draw, 3.0),
        (lambda r: sd.Renoise(r), one_draw, 2.0),
        (lambda r: sd.Renoise(r, predictor=sd.EDMHeun()), one_draw, 3.0),
        (lambda r: sd.Underdamped(sd.SigmaScaled(r)), with_velocity, 2.0),
    ],
    ids=["sgld", "tamed", "implicit-euler", "trapezoidal", "renoise", "renoise-heun", "baoab"],
)
def test_one_step_moves_a_mixture_by_the_stated_order(
    name: str, build: Callable[[float], sd.Corrector], make: Callable, expected: float
) -> None:
    """One step from p_t is off by ``eta^2``, which over the ``1 / eta`` steps of a relaxation adds up to a
    bias of ``eta``.

    The trapezoidal rule and a way back of second order are one order better. For BAOAB from a fresh velocity the
    defect is ``h^4 = eta^2``, too.
    """
    sde = SDES[name]
    ratios = (0.02, 0.04, 0.08)
    draws = 2 if make is with_velocity else 1
    errors = [defect(make(build(r), sde), sde, draws) for r in ratios]
    assert errors[0] > 1e-11
    assert order(ratios, errors) == pytest.approx(expected, abs=0.25)


def test_unadjusted_barker_moves_a_mixture_by_the_order_of_langevin() -> None:
    """The direction is chance too: the expectation over it is taken with the two outcomes and their probability."""
    sde = sd.VP()
    score = line().score(sde)
    ratios = (0.02, 0.04, 0.08)

    def expected(ratio: float) -> float:
        corrector = sd.Barker(sd.SigmaScaled(ratio), adjusted=False)
        certain = 40.0  # a normal draw whose distribution function is 1: never below any probability

        def outcome(x: Tensor, z: list[Tensor], sign: float) -> Tensor:
            direction = torch.full_like(x, -sign * certain)
            return corrector.step(sde, score, x, T, torch.stack([z[0], direction]))

        # 2 sigmoid(w score) of the forward move and of the backward move: E f = sum over both, weighted in x.
        def total(f: Callable[[Tensor], Tensor]) -> float:
            return float(weigh(f, outcome, score, sde, ratio))

        return max(abs(total(f)) for f in (torch.tanh, torch.cos))

    def weigh(f: Callable, outcome: Callable, score: sd.MixtureScore, sde: sd.SDE, ratio: float) -> float:
        x = torch.linspace(-7, 7, 1201, dtype=torch.float64)
        nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(36))
        grid_x, grid_z = (g.reshape(-1, 1) for g in torch.meshgrid(x, nodes, indexing="ij"))
        density = score.log_prob(grid_x, T).exp()[:, None] * (x[1] - x[0])
        mass = density * (weights / weights.sum()).repeat(len(x))[:, None]
        w = math.sqrt(2 * ratio) * sde.sigma(T) * grid_z
        forward = torch.sigmoid(w * score(grid_x, T))
        up, down = (outcome(grid_x, [grid_z], sign) for sign in (1.0, -1.0))
        assert_close(up, grid_x + w)
        assert_close(down, grid_x - w)
        return float((mass * (forward * f(up) + (1 - forward) * f(down) - f(grid_x))).sum())

    assert order(ratios, [expected(r) for r in ratios]) == pytest.approx(2.0, abs=0.25)


# Preconditioned SGLD: what leaving out Gamma costs ------------------------------------------------


def psgld_density(corrector: sd.PreconditionedSGLD, eta: float, gamma: bool) -> tuple[Tensor, Tensor]:
    """Points and the stationary density of pSGLD without a memory (``decay = 0``, so that ``G`` is a function of the
    state) on ``p_t = N(0, 1)``, from its transition on a grid; with the term ``eta dG/dx`` or as it is."""
    x = torch.linspace(-8, 8, 321, dtype=torch.float64)[:, None]

    def score(x: Tensor, t: Tensor) -> Tensor:
        return -x

    zero, one = torch.zeros_like(x), torch.ones_like(x)
    mean = corrector.step(sd.VP(), score, x, T, zero)
    spread = corrector.step(sd.VP(), score, x, T, one) - mean
    if gamma:
        h = 1e-5  # G from the noise that a step adds, sqrt(2 eta G)
        g = [
            (corrector.step(sd.VP(), score, y, T, one) - corrector.step(sd.VP(), score, y, T, zero)).square()
            for y in (x - h, x + h)
        ]
        mean = mean + (g[1] - g[0]) / (2 * h) / 2
    kernel = torch.exp(-0.5 * ((x[:, 0] - mean) / spread).square())
    kernel /= kernel.sum(1, keepdim=True)
    # pi K = pi and sum(pi) = 1 in one system.
    share = torch.linalg.solve(torch.eye(len(x)).double() - kernel.T + 1, torch.ones(len(x)).double())
    return x[:, 0], share / (x[1] - x[0])


def psgld_bias(eta: float, gamma: bool) -> float:
    """``E cos x`` of the stationary law, less that of N(0, 1)."""
    policy = sd.Fixed(eta)
    x, density = psgld_density(sd.PreconditionedSGLD(policy, decay=0.0, damping=1.0), eta, gamma)
    return float((density * x.cos()).sum() * (x[1] - x[0])) - math.exp(-0.5)


def test_psgld_is_biased_at_any_step_size_and_gamma_is_what_it_lacks() -> None:
    """Where ``G`` follows the state the law is not p but ``p / G`` (up to its normalization), whatever the step size.
    With ``Gamma = dG/dx`` the bias is of order eta again."""
    sizes = (0.05, 0.1, 0.2)
    lacking = [psgld_bias(eta, gamma=False) for eta in sizes]
    whole = [psgld_bias(eta, gamma=True) for eta in sizes]
    assert order(sizes, [abs(b) for b in whole]) == pytest.approx(1.0, abs=0.25)
    # In the limit of small steps: G is proportional to 1 / (sigma |x| + damping).
    x = torch.linspace(-9, 9, 18001, dtype=torch.float64)
    limit = torch.exp(-0.5 * x.square()) * (sd.VP().sigma(T) * x.abs() + 1)
    bias = float((limit * x.cos()).sum() / limit.sum()) - math.exp(-0.5)
    assert abs(bias) > 0.05
    extrapolated = 2 * lacking[0] - lacking[1]
    assert extrapolated == pytest.approx(bias, abs=0.1 * abs(bias))
    assert min(abs(b) for b in lacking) > 10 * abs(2 * whole[0] - whole[1])


def test_psgld_with_a_long_memory_is_nearly_unbiased() -> None:
    """As its docstring says: averaging over much more than the chain's memory, ``G`` hardly follows the state."""
    n, steps, eta = 4000, 300, 0.1
    generator = torch.Generator().manual_seed(0)

    def end(decay: float) -> float:
        corrector = sd.PreconditionedSGLD(sd.Fixed(eta), decay=decay, damping=1.0)
        x = torch.randn(n, 1, dtype=torch.float64, generator=generator)
        chain = corrector.start(sd.VP(), lambda: torch.randn(n, 1, dtype=torch.float64, generator=generator))
        total = 0.0
        for i in range(steps):
            x = chain.step(
                sd.VP(), lambda x, t: -x, x, T, torch.randn(n, 1, dtype=torch.float64, generator=generator)
            )
            total += float(x.cos().mean()) / 100 if i >= steps - 100 else 0.0
        return total - math.exp(-0.5)

    # One average of 4,000 chains has the error sqrt(var cos x / n) = 0.0071, that over 100 steps no more.
    assert abs(end(0.0)) > 7 * 0.0071
    assert abs(end(0.99)) < 4 * 0.0071


# Acceptance: detailed balance, to the last digits ------------------------------------------------------------------


@sdes
@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_mala_satisfies_detailed_balance(sde: sd.SDE, ratio: float) -> None:
    """``p(x) q(y | x) a(x, y)`` is symmetric in x and y, with the acceptance that the step reports."""
    score = mixture_2d().score(sde)
    x, z = torch.randn(2, 200, 2, dtype=torch.float64)
    eta = ratio * sde.variance(T)
    corrector = sd.MALA(sd.SigmaScaled(ratio), energy="exact")

    def flux(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p q a of the proposal from x by z, and the proposal."""
        proposal = x + eta * score(x, T) + (2 * eta).sqrt() * z
        draws = iter([z, torch.full_like(z, -40.0)])  # accepted, whatever the probability
        done, _ = corrector.move(sde, score, x, T, lambda: next(draws), Memory())
        assert_close(done.x, torch.where((done.acceptance > 0)[:, None], proposal, x))
        return score.log_prob(x, T) - z.square().sum(1) / 2 + done.acceptance.log(), proposal

    forward, y = flux(x, z)
    back = (x - y - eta * score(y, T)) / (2 * eta).sqrt()
    backward, again = flux(y, back)
    assert_close(again, x, rtol=1e-9, atol=1e-9)
    assert_close(forward, backward, rtol=1e-9, atol=1e-9)


@sdes
def test_barker_satisfies_detailed_balance(sde: sd.SDE) -> None:
    """With ``q(y | x) = prod_i 2 phi(d_i) / (1 + exp(-d_i score_i(x)))``, ``d = y - x``, coded here once more."""
    score = mixture_2d().score(sde)
    x, z = torch.randn(2, 200, 2, dtype=torch.float64)
    length = (2 * 0.4 * sde.variance(T)).sqrt()
    corrector = sd.Barker(sd.SigmaScaled(0.4), energy="exact")

    def flux(x: Tensor, d: Tensor) -> Tensor:
        draws = iter([d / length, torch.full_like(d, -40.0), torch.full_like(d, -40.0)])
        done, _ = corrector.move(sde, score, x, T, lambda: next(draws), Memory())
        assert_close(done.x, x + d)
        log_q = -(1 + torch.exp(-d * score(x, T))).log().sum(1)
        return score.log_prob(x, T) + log_q + done.acceptance.log()

    d = length * z
    assert_close(flux(x, d), flux(x + d, -d), rtol=1e-8, atol=1e-8)


def test_a_proposal_is_accepted_as_often_as_reported() -> None:
    """The second draw decides: of many samples in one place with one proposal, the reported share moves."""
    sde, n = sd.VP(), 20_000
    score = mixture_2d().score(sde)
    x = times64(0.9, 0.2).expand(n, 2)
    z = times64(-1.4, 1.0).expand(n, 2)
    for corrector in (
        sd.MALA(sd.SigmaScaled(0.8), energy="exact"),
        sd.MALA(sd.SigmaScaled(0.8), points=5),
    ):
        draws = iter([z, torch.randn(n, 2, dtype=torch.float64)])
        done, _ = corrector.move(sde, score, x, T, lambda d=draws: next(d), Memory())
        share = float((done.x != x).any(1).double().mean())
        rate = float(done.acceptance[0])
        assert 0.05 < rate < 0.95
        assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize(("points", "expected"), [(2, 3), (3, 5), (4, 7)])
def test_the_path_integral_converges_to_the_energy(points: int, expected: int) -> None:
    """Gauss and Lobatto's rule with m points is off by the (2 m - 1)th power of the step; by nothing for
    Gaussians."""
    sde = sd.VP()
    score = mixture_2d().score(sde)
    x = torch.tensor([[0.3, 0.1], [1.0, -0.5]], dtype=torch.float64)
    direction = torch.tensor([[0.8, -0.6], [0.6, 0.8]], dtype=torch.float64)
    exact, path = LogRatio("exact").of(score, "test"), LogRatio("path", points).of(score, "test")
    errors, sizes = [], (0.1, 0.2)
    for h in sizes:
        y = x + h * direction
        here, there = score(x, T), score(y, T)
        errors.append(float((path(x, y, T, here, there) - exact(x, y, T, here, there)).abs().max()))
    assert order(sizes, errors) == pytest.approx(expected, abs=0.9)
    gaussian = gaussian_2d().score(sde)
    y = x + direction
    arguments = (x, y, T, gaussian(x, T), gaussian(y, T))
    assert_close(
        LogRatio("path", points).of(gaussian, "test")(*arguments),
        LogRatio("exact").of(gaussian, "test")(*arguments),
        rtol=1e-10,
        atol=1e-10,
    )


# Limits ---------------------------------------------------------------------------------------------------------


@sdes
def test_underdamped_with_infinite_friction_is_overdamped(sde: sd.SDE) -> None:
    """``x + eta score + sqrt(2 eta) (z_k + z_{k-1}) / 2``: Langevin with the averaged noise of Leimkuhler and
    Matthews."""
    score, eta = mixture_2d().score(sde), 0.1 * sde.variance(T)
    x, *z = torch.randn(6, 3, 2, dtype=torch.float64)
    corrector = sd.Underdamped(sd.SigmaScaled(0.1), friction=math.inf)
    chain = corrector.start(sde, lambda: z[0])
    # The first velocity has had no half kick yet.
    ours = theirs = chain.step(sde, score, x, T, z[1])
    for k in range(2, 5):
        ours = chain.step(sde, score, ours, T, z[k])
        theirs = theirs + eta * score(theirs, T) + (2 * eta).sqrt() * (z[k] + z[k - 1]) / 2
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@sdes
def test_sghmc_without_momentum_and_theta_0_are_sgld(sde: sd.SDE) -> None:
    score, (x, z) = mixture_2d().score(sde), torch.randn(2, 3, 2, dtype=torch.float64)
    policy = sd.SigmaScaled(0.1)
    want = sd.SGLD(policy).step(sde, score, x, T, z)
    assert_close(sd.SGHMC(policy, friction=1.0).step(sde, score, x, T, z), want)
    assert_close(sd.ImplicitLangevin(policy, theta=0.0, iterations=0).step(sde, score, x, T, z), want)
    flat = sd.PreconditionedSGLD(policy, adapt=0)
    assert_close(flat.step(sde, score, x, T, z), want)


def test_tamed_steps_never_move_far_by_their_drift() -> None:
    sde, x = sd.VP(), torch.zeros(2, 4, dtype=torch.float64)
    step = sd.TamedLangevin(sd.SigmaScaled(0.5)).step
    moved = step(sde, lambda x, t: torch.full_like(x, 1e12), x, T, x)
    assert_close(moved.norm(dim=1), (sde.sigma(T) * 2).expand(2))


def test_implicit_steps_solve_their_equation() -> None:
    sde = sd.VP()
    score, eta = gaussian_2d().score(sde), 0.5 * sde.variance(T)
    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    end = sd.ImplicitLangevin(sd.SigmaScaled(0.5), theta=0.7, iterations=60).step(sde, score, x, T, z)
    want = x + eta * (0.3 * score(x, T) + 0.7 * score(end, T)) + (2 * eta).sqrt() * z
    assert_close(end, want, rtol=1e-9, atol=1e-9)


# All of them, started in p_t, stay there ----------------------------------------------------------


@functools.lru_cache
def diffused(name: str) -> sd.GaussianMixture:
    """p_t of the mixture in the plane."""
    data, sde = mixture_2d(), SDES[name]
    alpha, variance = sde.alpha(T), sde.variance(T)
    covariances = alpha**2 * data.covariances + variance * torch.eye(2, dtype=torch.float64)
    return sd.GaussianMixture(data.weights, alpha * data.means, covariances)


def after(corrector: sd.Corrector, name: str, n: int, steps: int) -> Tensor:
    """Samples of p_t after some steps of a chain."""
    sde, score = SDES[name], mixture_2d().score(SDES[name])
    generator = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.randn(n, 2, dtype=torch.float64, generator=generator)

    x = diffused(name).sample(n, generator)
    chain = start_chain(corrector, sde, draw)
    for _ in range(steps):
        x = chain.step(sde, score, x, T, draw())
    return x


@pytest.mark.parametrize("sde_name", SDES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_started_in_p_t_stays_there(sde_name: str, name: str) -> None:
    """Within Monte Carlo error, with steps small enough that the bias is below it."""
    assert_moments(after(KERNELS[name], sde_name, n=2000, steps=12), diffused(sde_name), 5)


@pytest.mark.slow
@pytest.mark.parametrize("corrector", [sd.MALA, sd.Barker])
def test_chains_with_acceptance_have_no_bias_at_large_steps(corrector: type) -> None:
    """Steps at which SGLD is off by many standard errors: those that accept and reject are not."""
    policy = sd.SigmaScaled(0.9)
    assert_moments(after(corrector(policy, energy="exact"), "vp", n=20_000, steps=30), diffused("vp"), 5)
    with pytest.raises(AssertionError):
        assert_moments(after(sd.SGLD(policy), "vp", n=20_000, steps=30), diffused("vp"), 15)
