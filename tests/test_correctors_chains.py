"""Correctors as chains in the sampling loop: memory, reports, evaluations, step-size policies, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import FIXTURES, KERNELS, SDES, CallCounter, mixture_2d, queue_noise, times64
from sde_diffusion.correctors import Chain, start_chain
from sde_diffusion.correctors.langevin import langevin_step

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
kernels = pytest.mark.parametrize("name", KERNELS)
T = times64(0.4)[0]
PER_SAMPLE = {name: k for name, k in KERNELS.items() if name != "langevin-batch"}


def draws_of(n: int, d: int = 2, seed: int = 0) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(n, d, dtype=torch.float64, generator=generator)


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    """Sample 3 of a batch of 5 is sample 3 alone: velocities, acceptances, learned steps and all."""
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    corrector = PER_SAMPLE[name]

    def draw(count: int, first: int) -> Tensor:
        options = {"times": sd.uniform_times(sde, 6), "seed": 4, "dtype": torch.float64}
        chain = (type(corrector)(**{**vars(corrector), "steps": 2}),)
        return sd.sample(
            sde, score, (count, 2), predictor=sd.DDIM(), correctors=chain, first_index=first, **options
        ).x

    together = draw(5, 0)
    assert_close(draw(2, 3), together[3:], rtol=1e-9, atol=1e-10)
    assert_close(draw(1, 1), together[1:2], rtol=1e-9, atol=1e-10)


@sdes
@kernels
def test_every_chain_keeps_shape_and_type_for_every_process(sde: sd.SDE, name: str) -> None:
    for shape in ((2, 1), (2, 3, 4, 4)):
        for dtype in (torch.float32, torch.float64):
            generator = torch.Generator().manual_seed(0)

            def draw(shape=shape, dtype=dtype, generator=generator) -> Tensor:
                return torch.randn(shape, dtype=dtype, generator=generator)

            class Normal:
                def __call__(self, x: Tensor, t: Tensor) -> Tensor:
                    return -x

                def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
                    return -x.square().flatten(1).sum(1) / 2

            for t in (times64(1e-5)[0], times64(0.3, 0.9)):
                chain, x = KERNELS[name].start(sde, draw), draw()
                for _ in range(2):
                    x = chain.step(sde, Normal(), x, t, draw())
                assert x.shape == shape and x.dtype == dtype and bool(torch.isfinite(x).all())


@kernels
def test_reports_say_what_was_done(name: str) -> None:
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    times = sd.uniform_times(sde, 5)
    options = {
        "predictor": sd.DDIM(),
        "correctors": (KERNELS[name], sd.Langevin()),
        "times": times,
        "dtype": torch.float64,
    }
    out = sd.sample(sde, score, (3, 2), reports=True, **options)
    silent = sd.sample(sde, score, (3, 2), **options)
    assert_close(out.x, silent.x, rtol=0, atol=0)  # looking changes nothing
    assert silent.reports == () and len(out.reports) == 2 and out.nfe == silent.nfe
    for record in out.reports:
        assert [float(r.t[0]) for r in record] == times[:-1].tolist()
    for r in out.reports[0]:
        values = (r.step_size, r.snr, r.displacement)
        assert all(v.shape == (3,) and bool(torch.isfinite(v).all()) for v in values)
        accepts = KERNELS[name].__class__ in (sd.MALA, sd.Barker) and name != "barker-unadjusted"
        assert (r.acceptance is not None) == accepts
        if accepts:
            assert bool((r.acceptance >= 0).all()) and bool((r.acceptance <= 1).all())


def test_reported_numbers_are_their_definitions() -> None:
    sde, score = sd.VE(), mixture_2d().score(sd.VE())
    x, z = torch.randn(2, 4, 2, dtype=torch.float64)
    record: list[sd.Report] = []
    after = sd.SGLD(sd.SigmaScaled(0.1)).start(sde, lambda: z, record.append).step(sde, score, x, T, z)
    eta = 0.1 * sde.variance(T)
    assert_close(record[0].step_size, eta.expand(4))
    signal, noise = eta * score(x, T).norm(dim=1), (2 * eta).sqrt() * z.norm(dim=1)
    assert_close(record[0].snr, signal / noise)
    assert_close(record[0].displacement, (after - x).norm(dim=1) / (sde.sigma(T) * math.sqrt(2)))
    # Song's rule does what it promises.
    record.clear()
    sd.Langevin(0.2, shrinkage=0.0, cap=None).start(sde, lambda: z, record.append).step(sde, score, x, T, z)
    assert_close(record[0].snr, torch.full((4,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("corrector", "steps", "expected"),
    [
        (sd.SGLD(), 5, 5),
        (sd.PreconditionedSGLD(), 5, 5),
        (sd.Underdamped(), 5, 6),
        (sd.SGHMC(), 5, 5),
        (sd.MALA(), 5, 6),
        (sd.MALA(points=3), 5, 11),
        (sd.Barker(), 5, 6),
        (sd.Barker(adjusted=False), 5, 5),
        (sd.TamedLangevin(), 5, 5),
        (sd.ImplicitLangevin(iterations=3), 5, 20),
        (sd.Renoise(), 5, 5),
        (sd.Renoise(predictor=sd.Ancestral()), 5, 5),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, sd.correctors.Kernel) else str(v),
)
def test_evaluations_of_a_chain(corrector: sd.Corrector, steps: int, expected: int) -> None:
    """What is known of the last step is not asked again, unless the state or the time has changed since."""
    sde, draw = sd.VP(), draws_of(3)
    score = CallCounter(mixture_2d().score(sde))
    chain, x = start_chain(corrector, sde, draw), draw()
    for _ in range(steps):
        x = chain.step(sde, score, x, T, draw())
    assert score.calls == expected
    again = score.calls
    moved = chain.step(sde, score, x + 0, T, draw())
    remembers = isinstance(corrector, (sd.MALA, sd.Underdamped)) or corrector == sd.Barker()
    assert score.calls - again == (expected // steps) + remembers
    again = score.calls
    chain.step(sde, score, moved, T + 0.1, draw())
    assert score.calls - again == (expected // steps) + remembers


def test_a_rejected_sample_keeps_its_state_and_its_score() -> None:
    """The second step of a chain in which some were rejected is that of a chain started where it stands."""
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    x, z1, u1, z2, u2 = torch.randn(5, 50, 2, dtype=torch.float64)
    corrector = sd.MALA(sd.SigmaScaled(1.0), energy="exact")
    chain = corrector.start(sde, queue_noise(torch.stack([u1, u2])))
    first = chain.step(sde, score, x, T, z1)
    stayed = (first == x).all(1)
    assert 0 < int(stayed.sum()) < 50
    second = chain.step(sde, score, first, T, z2)
    assert_close(second, corrector.step(sde, score, first, T, torch.stack([z2, u2])))


def test_velocities_survive_a_change_of_the_noise_level() -> None:
    """A chain keeps its velocity (a standard normal at every level) while the predictor moves the state."""
    sde, score = sd.VP(), mixture_2d().score(sd.VP())
    x, v, z1, z2 = torch.randn(4, 3, 2, dtype=torch.float64)
    chain = sd.Underdamped(sd.SigmaScaled(0.1), friction=0.01).start(sde, lambda: v)
    assert isinstance(chain, Chain)
    y = chain.step(sde, score, x, T, z1)
    speed = chain.memory.chain.velocity
    s = T - 0.1
    moved = chain.step(sde, score, y + 1, s, z2)
    h = (2 * 0.1 * sde.variance(s)).sqrt()
    assert_close(moved, y + 1 + h * (speed + h / 2 * score(y + 1, s)), rtol=0.02, atol=0.02)


# Step sizes ---------------------------------------------------------------------------------------------------------


@sdes
def test_fixed_and_scaled_steps(sde: sd.SDE) -> None:
    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    t, score = times64(0.2, 0.5, 0.8), mixture_2d().score(sde)
    for policy, eta in (
        (sd.Fixed(0.03), times64(0.03, 0.03, 0.03)),
        (sd.SigmaScaled(0.2), 0.2 * sde.variance(t)),
    ):
        assert_close(sd.SGLD(policy).step(sde, score, x, t, z), langevin_step(x, score(x, t), z, eta))


def step_sizes(corrector: sd.Corrector, sde: sd.SDE, times: list[Tensor], n: int = 2) -> Tensor:
    record: list[sd.Report] = []
    draw = draws_of(n)
    chain, x = corrector.start(sde, draw, record.append), draw()
    for t in times:
        x = chain.step(sde, mixture_2d().score(sde), x, t, draw())
    return torch.stack([r.step_size for r in record])


def test_decaying_steps_follow_their_law_and_begin_anew_at_every_time() -> None:
    sde, other = sd.VP(), times64(0.2)[0]
    policy = sd.Decaying(sd.SigmaScaled(0.1), power=0.6, offset=4.0)
    eta = step_sizes(sd.SGLD(policy), sde, [T, T, T + 0, other, other])[:, 0]
    decay = (1 + torch.tensor([0.0, 1, 2, 0, 1]).double() / 4) ** -0.6
    assert_close(eta, 0.1 * decay * sde.variance(torch.stack([T, T, T, other, other])))


@pytest.mark.parametrize("target", [0.4, 0.8])
def test_dual_averaging_reaches_its_acceptance(target: float) -> None:
    """Over many chains, each with a step of its own, the mean acceptance after adaptation is the target."""
    sde, data = sd.VP(), mixture_2d()
    score, draw = data.score(sde), draws_of(400)
    record: list[sd.Report] = []
    policy = sd.DualAveraging(target, adapt=150)
    x = sde.perturb(data.sample(400, torch.Generator().manual_seed(1)), T, draw())
    chain = sd.MALA(policy, energy="exact").start(sde, draw, record.append)
    for _ in range(200):
        x = chain.step(sde, score, x, T, draw())
    assert_close(record[-1].step_size, record[-40].step_size)  # adaptation has ended
    assert float((record[0].step_size / sde.variance(T)).std()) == 0
    assert float((record[-1].step_size / sde.variance(T)).std()) > 0
    late = torch.stack([r.acceptance for r in record[-50:]])
    assert float(late.mean()) == pytest.approx(target, abs=0.06)


def test_dual_averaging_reaches_its_displacement() -> None:
    sde, data = sd.VE(), mixture_2d()
    score, draw = data.score(sde), draws_of(200)
    record: list[sd.Report] = []
    policy = sd.DualAveraging(0.5, of="displacement", adapt=100, initial=0.01)
    x = sde.perturb(data.sample(200, torch.Generator().manual_seed(1)), T, draw())
    chain = sd.SGLD(policy).start(sde, draw, record.append)
    for _ in range(140):
        x = chain.step(sde, score, x, T, draw())
    assert float(torch.stack([r.displacement for r in record[-40:]]).mean()) == pytest.approx(0.5, abs=0.05)


# Scores of zero, and of subsets -------------------------------------------------------------------------------------


@sdes
@kernels
def test_a_score_of_zero_gives_finite_steps(sde: sd.SDE, name: str) -> None:
    """Song's rule divides by its norm; the original has nothing to stop it."""

    class Flat:
        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x)

        def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.zeros_like(x[:, 0])

    draw = draws_of(3)
    x = draw()
    assert bool(torch.isfinite(KERNELS[name].start(sde, draw).step(sde, Flat(), x, T, draw())).all())
    if "langevin" in name:
        tiny = 1e-170 * x  # whose square is 0 in float64
        assert bool(torch.isfinite(KERNELS[name].step(sde, lambda x, t: tiny, x, T, draw())).all())


@sdes
def test_the_original_rule_without_a_score_steps_as_if_it_were_noise(sde: sd.SDE) -> None:
    zero, z = torch.zeros(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    eta = sd.Langevin.original(snr=0.2).step_size(sde, zero, T, z)
    assert_close(eta, (2 * 0.2**2 * sde.variance(T)).expand(4))


def test_the_score_of_all_components_is_exact_and_of_some_a_noisy_one() -> None:
    mixture, sde = mixture_2d(), sd.VP()
    x, t = torch.randn(400, 2, dtype=torch.float64), T
    source = sd.SampleNoise(0, range(400), (3,)).normal
    exact = mixture.score(sde)(x, t)
    assert_close(sd.MinibatchScore(mixture, sde, 3, source)(x, t), exact, rtol=1e-9, atol=1e-9)
    some = sd.MinibatchScore(mixture, sde, 2, source)
    first, second = some(x, t), some(x, t)
    assert not torch.equal(first, second)
    # With two of three, each sample has the score of a mixture of the two that its keys chose.
    keys = sd.SampleNoise(0, range(400), (3,))
    for _ in range(3):
        keys.normal()
    left_out = keys.normal().argmin(1)
    third = some(x, t)
    for k in range(3):
        rows = left_out == k
        kept = [i for i in range(3) if i != k]
        rest = sd.GaussianMixture(mixture.weights[kept], mixture.means[kept], mixture.covariances[kept])
        assert_close(third[rows], rest.score(sde)(x[rows], t), rtol=1e-6, atol=1e-9)
    source = sd.SampleNoise(0, [7], (3,)).normal
    source()
    alone = sd.MinibatchScore(mixture, sde, 2, source)
    assert_close(alone(x[7:8], t), first[7:8])


def test_minibatch_noise_keeps_sgld_from_its_target() -> None:
    """What the 2-D study shows: single components at a time forget the weights, all of them keep them."""
    mixture, sde, n = mixture_2d(), sd.VP(), 1000
    t, weights = times64(0.05)[0], mixture.weights
    draw = draws_of(n)
    start = sde.perturb(mixture.sample(n, torch.Generator().manual_seed(0)), t, draw())

    def end(size: int) -> Tensor:
        score = sd.MinibatchScore(mixture, sde, size, sd.SampleNoise(1, range(n), (3,)).normal)
        x, step = start, sd.SGLD(sd.SigmaScaled(0.3)).step
        for _ in range(40):
            x = step(sde, score, x, t, draw())
        return mixture.posterior_weights(x / sde.alpha(t)).mean(0)

    se = 0.5 / math.sqrt(n)
    assert float((end(3) - weights).abs().max()) < 4 * se
    assert float((end(1) - weights).abs().max()) > 8 * se


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sd.Fixed(-0.1), "the step size must be positive, got -0.1"),
        (lambda: sd.Fixed(math.nan), "the step size must be positive, got nan"),
        (lambda: sd.Fixed(True), "the step size must be positive, got True"),
        (lambda: sd.SigmaScaled(-1.0), "variance of the noise must be positive, got -1.0"),
        (lambda: sd.SigmaScaled(math.inf), "must be positive, got inf"),
        (lambda: sd.SNR(math.nan), "signal-to-noise ratio must be positive, got nan"),
        (lambda: sd.Decaying(power=0.4), r"power of the decay must lie in \(1/2, 1\], got 0.4"),
        (lambda: sd.Decaying(offset=0.0), "offset of the decay must be positive, got 0.0"),
        (
            lambda: sd.DualAveraging(of="acceptence"),
            r"unknown target of the step size 'acceptence'; did you mean 'acceptance'\?",
        ),
        (lambda: sd.DualAveraging(1.2), r"target acceptance must lie in \(0, 1\), got 1.2"),
        (lambda: sd.DualAveraging(adapt=0), "number of adapting steps must be an integer >= 1, got 0"),
        (lambda: sd.SGLD(sd.DualAveraging()), "SGLD accepts every step"),
        (lambda: sd.Underdamped(sd.Decaying(sd.DualAveraging())), "Underdamped accepts every step"),
        (lambda: sd.SGLD(steps=0), "integer number of steps >= 1, got 0"),
        (lambda: sd.PreconditionedSGLD(decay=1.0), r"the decay must lie in \[0, 1\), got 1.0"),
        (lambda: sd.PreconditionedSGLD(damping=-1.0), "the damping must be positive, got -1.0"),
        (lambda: sd.PreconditionedSGLD(adapt=-1), "adapt must be an integer number of steps >= 0"),
        (lambda: sd.Underdamped(friction=0.0), "the friction must be positive, got 0.0"),
        (lambda: sd.Underdamped(friction=math.nan), "the friction must be positive, got nan"),
        (lambda: sd.SGHMC(friction=1.5), r"the friction must lie in \(0, 1\], got 1.5"),
        (lambda: sd.MALA(sd.SNR()), "MALA needs a step size that does not depend on the state.*SNR does"),
        (lambda: sd.Barker(sd.Decaying(sd.SNR())), "Barker needs a step size that does not depend"),
        (lambda: sd.MALA(energy="exakt"), "unknown energy 'exakt'; did you mean 'exact'"),
        (lambda: sd.MALA(points=6), "points of a path must be 2, 3, 4 or 5, got 6"),
        (lambda: sd.Barker(sd.DualAveraging(), adjusted=False), "accepts every step"),
        (lambda: sd.ImplicitLangevin(theta=1.1), "theta must lie between 0 and 1, got 1.1"),
        (lambda: sd.ImplicitLangevin(iterations=0), "needs at least 1 iteration"),
        (lambda: sd.Renoise(-0.1), "drop of the log-SNR must be positive, got -0.1"),
        (lambda: sd.Renoise(math.nan), "drop of the log-SNR must be positive, got nan"),
        (lambda: sd.Renoise(predictor="ddim"), "way back must be a predictor, got 'ddim'"),
        (
            lambda: sd.MinibatchScore(mixture_2d(), sd.VP(), 4, lambda: torch.zeros(1, 3)),
            "a subset of 3 components has 1 to 3, got 4",
        ),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", [sd.MALA, sd.Barker])
def test_acceptance_by_energy_is_refused_for_a_score_without_one(kind: type) -> None:
    """By name, with what to do instead; the path works for any score."""
    sde, x = sd.VP(), torch.zeros(2, 2)
    options = {"predictor": sd.DDIM(), "times": sd.uniform_times(sde, 2)}
    with pytest.raises(ValueError, match=rf"{kind.__name__}\(energy='exact'\) needs a score with an energy"):
        sd.sample(sde, lambda x, t: -x, (2, 2), correctors=(kind(energy="exact"),), **options)
    out = sd.sample(sde, lambda x, t: -x, (2, 2), correctors=(kind(energy="path"),), **options)
    assert bool(torch.isfinite(out.x).all())
    with pytest.raises(ValueError, match=rf"a step of {kind.__name__} needs more draws"):
        kind().step(sde, lambda x, t: -x, x, T, x)


# Public reference runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Tensor]:
    with np.load(FIXTURES / "score_sde" / "pc_runs.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]).double() for key in arrays.files}


def reference_score(sde: sd.SDE) -> Callable[[Tensor, Tensor], Tensor]:
    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = sde.alpha(t), sde.variance(t)
        return -(x - alpha * 0.3) / (alpha**2 * 0.25 + variance)

    return score


@pytest.mark.parametrize("name", ["vp/reverse_diffusion+langevin", "ve/ancestral_sampling+langevin"])
def test_langevin_equals_the_reference_along_a_run(runs: dict[str, Tensor], name: str) -> None:
    """Every corrector step of a run: from the state it was asked at to that at which the predictor was.

    For VP with the reference's factor ``1 - beta_i`` on the step, see ``test_correctors``.
    """
    kind = name[:2]
    sde = SDES[kind]
    states, noise = runs[f"{name}/model_inputs"], runs[f"{name}/noise"]
    times = torch.linspace(1, 1e-3 if kind == "vp" else 1e-5, 32, dtype=torch.float64)
    original, score = sd.Langevin.original(snr=0.16), reference_score(sde)
    betas = sd.VP().discretize(32)
    for i, t in enumerate(times):
        x, z = states[2 * i], noise[2 * i]
        if kind == "ve":
            ours = original.step(sde, score, x, t, z)
        else:
            gradient = score(x, t)
            index = int(t.float() * 31)
            eta = original.step_size(sde, gradient, t, z) * (1 - betas[index])
            ours = langevin_step(x, gradient, z, eta)
        want = states[2 * i + 1]
        # The reference's float32 standard deviation of VP is wrong by 1e-4 near t = 1e-3, and its score with it.
        rtol = 1e-5 if kind == "ve" or float(t) > 0.1 else 1e-4
        assert float((ours - want).abs().max() / want.abs().max()) < rtol, float(t)


def test_a_whole_run_with_annealed_langevin_equals_the_reference(runs: dict[str, Tensor]) -> None:
    """Through ``sample``: corrector first, its draw before the predictor's. The reference's steps are 1/N long, on a
    grid that is spaced otherwise."""
    name, sde = "ve/euler_maruyama+ald", sd.VE()
    grid = torch.linspace(1, 1e-5, 32, dtype=torch.float64)

    class ReferenceEuler:
        def step(
            self, sde: sd.SDE, score: sd.Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor
        ) -> Tensor:
            return sd.EulerMaruyama().step(sde, score, x, t, t - 1 / 32, noise)

    out = sd.sample(
        sde,
        reference_score(sde),
        (2, 3, 4, 4),
        predictor=ReferenceEuler(),
        correctors=(sd.AnnealedLangevin(snr=0.16),),
        times=torch.cat([grid, torch.zeros(1, dtype=torch.float64)]),
        noise=queue_noise(runs[f"{name}/noise"]),
        x_init=runs[f"{name}/x_init"],
        denoise=False,
        trajectory=True,
        dtype=torch.float64,
    )
    assert out.nfe == 64
    for i in range(1, 32):
        want = runs[f"{name}/model_inputs"][2 * i]
        assert float((out.trajectory[i] - want).abs().max() / want.abs().max()) < 1e-5
    want = runs[f"{name}/final_x"]
    assert float((out.x - want).abs().max() / want.abs().max()) < 1e-5
