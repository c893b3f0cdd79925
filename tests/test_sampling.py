"""The sampling loop against analytic scores: every process, predictor and corrector, in both orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    CORRECTORS,
    PREDICTORS,
    SDES,
    CallCounter,
    assert_moments,
    gaussian_2d,
    mixture_2d,
    moment_errors,
    queue_noise,
    random_mixture,
    sliced_wasserstein,
    times64,
)
from sde_diffusion.noise import SampleNoise

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
predictors = pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
correctors = pytest.mark.parametrize("correctors", CORRECTORS.values(), ids=CORRECTORS)
orders = pytest.mark.parametrize("order", ["corrector-first", "predictor-first"])

PRODUCT = [(s, p) for s in ("vp", "subvp", "ve", "cosine") for p in PREDICTORS if p != "ddim-half"]
PRODUCT += [("ddpm", "reverse-diffusion"), ("ddpm", "ancestral-small"), ("vp", "ddim-half")]


def torch_noise(shape: tuple[int, ...], seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=torch.float64, generator=generator)


def product_run(name: str, predictor: str, correctors: tuple, n: int, steps: int) -> Tensor:
    sde, shape = SDES[name], (n, 2)
    out = sd.sample(
        sde,
        mixture_2d().score(sde),
        shape,
        predictor=PREDICTORS[predictor],
        correctors=correctors,
        times=sd.uniform_times(sde, steps),
        noise=torch_noise(shape, 1),
        dtype=torch.float64,
    )
    assert out.nfe == steps * (1 + len(correctors)) + 1
    return out.x


@pytest.mark.parametrize(("name", "predictor"), PRODUCT)
@correctors
def test_every_combination_samples_the_mixture(name: str, predictor: str, correctors: tuple) -> None:
    """The full product, quickly. The bias of 100 steps (test_predictors measures it: up to 0.05 in a covariance of
    0.5) is about one standard error of 250 samples; so four are allowed for chance and one for it.
    """
    assert_moments(product_run(name, predictor, correctors, n=250, steps=100), mixture_2d(), 5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "predictor"), PRODUCT)
@correctors
def test_every_combination_samples_the_mixture_closely(name: str, predictor: str, correctors: tuple) -> None:
    """The same with ten times the samples and a bias as small beside their standard error."""
    assert_moments(product_run(name, predictor, correctors, n=2000, steps=250), mixture_2d(), 5)


@sdes
@pytest.mark.parametrize("grid", [sd.uniform_times, sd.quadratic_times, sd.log_snr_times])
def test_every_grid_and_the_other_order_sample_the_mixture(sde: sd.SDE, grid: Callable[..., Tensor]) -> None:
    mixture, n = mixture_2d(), 200
    out = sd.sample(
        sde,
        mixture.score(sde),
        (n, 2),
        predictor=sd.EulerMaruyama(),
        correctors=(sd.Langevin(snr=0.16), sd.AnnealedLangevin(snr=0.1)),
        times=grid(sde, 40),
        noise=torch_noise((n, 2), 2),
        order="predictor-first",
        dtype=torch.float64,
    )
    assert_moments(out.x, mixture, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine"])
def test_thousand_reverse_diffusion_steps_are_as_good_as_exact_samples(name: str) -> None:
    """The sliced Wasserstein distance to exact sets lies within those between exact sets, and so do all moments."""
    sde, mixture, n = SDES[name], mixture_2d(), 4000
    out = sd.sample(
        sde,
        mixture.score(sde),
        (n, 2),
        predictor=sd.ReverseDiffusion(),
        correctors=(sd.Langevin(snr=0.16),),
        times=sd.uniform_times(sde, 1000),
        dtype=torch.float64,
    )
    assert out.nfe == 2001
    assert_moments(out.x, mixture, 4)
    exact = [mixture.sample(n, torch.Generator().manual_seed(i)) for i in range(12)]
    between = torch.tensor([sliced_wasserstein(a, b) for a, b in combinations(exact, 2)])
    ours = torch.tensor([sliced_wasserstein(out.x, e) for e in exact])
    assert float(ours.mean()) < float(between.mean() + 2 * between.std())
    assert float(ours.max()) < 1.25 * float(between.max())


def test_the_plain_snr_rule_ruins_two_dimensional_samples_and_the_default_does_not() -> None:
    sde, mixture, n = sd.VP(), mixture_2d(), 500

    def worst(corrector: sd.Corrector) -> float:
        x = sd.sample(
            sde,
            mixture.score(sde),
            (n, 2),
            predictor=sd.ReverseDiffusion(),
            correctors=(corrector,),
            times=sd.uniform_times(sde, 200),
            noise=torch_noise((n, 2), 3),
            dtype=torch.float64,
        ).x
        return max(moment_errors(x, mixture).values())

    assert worst(sd.Langevin(snr=0.16)) < 4
    assert worst(sd.Langevin(snr=0.16, shrinkage=0.0)) > 5
    assert worst(sd.Langevin(snr=0.16, shrinkage=0.0, cap=None)) > 5


def test_data_of_any_shape() -> None:
    mixture, sde = random_mixture(2, (1, 2, 2)), sd.SubVP()
    out = sd.sample(
        sde,
        mixture.score(sde),
        (300, 1, 2, 2),
        predictor=sd.ReverseDiffusion(),
        correctors=(sd.Langevin(),),
        times=sd.uniform_times(sde, 100),
        dtype=torch.float64,
    )
    assert out.x.shape == (300, 1, 2, 2)
    assert_moments(out.x, mixture, 5)


# Samples and their seeds ---------------------------------------------------------------------------------


def draw(n: int, first: int = 0, **options) -> Tensor:
    sde = options.pop("sde", SDES["vp"])
    settings = {
        "predictor": sd.ReverseDiffusion(),
        "correctors": (sd.Langevin(), sd.AnnealedLangevin(steps=2)),
        "times": sd.uniform_times(sde, 12),
        "dtype": torch.float64,
        "seed": 5,
    } | options
    return sd.sample(sde, mixture_2d().score(sde), (n, 2), first_index=first, **settings).x


@sdes
def test_a_sample_does_not_depend_on_its_batch(sde: sd.SDE) -> None:
    whole = draw(9, sde=sde)
    parts = torch.cat([draw(4, sde=sde), draw(1, first=4, sde=sde), draw(4, first=5, sde=sde)])
    # The same operations on other shapes may round differently in the last digits.
    assert_close(parts, whole, rtol=1e-10, atol=1e-10)


@predictors
def test_a_sample_does_not_depend_on_its_batch_for_any_predictor(predictor: sd.Predictor) -> None:
    whole = draw(6, predictor=predictor)
    assert_close(draw(2, first=3, predictor=predictor), whole[3:5], rtol=1e-10, atol=1e-10)


def test_the_original_rule_does_depend_on_the_batch() -> None:
    original = (sd.Langevin.original(),)
    assert float((draw(2, correctors=original) - draw(6, correctors=original)[:2]).abs().max()) > 1e-3


def test_seeds_give_other_samples_and_repeat_their_own() -> None:
    assert torch.equal(draw(3), draw(3))
    assert float((draw(3) - draw(3, seed=6)).abs().min()) > 1e-6


def test_the_seed_is_the_noise_of_its_stream() -> None:
    """Injecting the same stream by hand gives the same samples: a seed is nothing but a noise source."""
    source = SampleNoise(5, range(3), (2,), dtype=torch.float64)
    assert torch.equal(draw(3, noise=source.normal), draw(3))
    assert source.draws == 1 + 12 * (1 + 1 + 2)


def test_float32_and_float64_agree() -> None:
    assert draw(4, dtype=torch.float32).dtype == torch.float32
    assert_close(draw(4, dtype=torch.float32).double(), draw(4), rtol=1e-3, atol=1e-3)


# The order of things -------------------------------------------------------------------------------------


class Recorder:
    """A predictor or corrector that writes down who was called when and with which noise."""

    def __init__(self, name: str, log: list, steps: int = 1) -> None:
        self.name, self.log, self.steps = name, log, steps


class RecordingPredictor(Recorder):
    def step(self, sde, score, x, t, s, noise):
        self.log.append((self.name, float(t), float(s), float(noise.flatten()[0])))
        return x + noise


class RecordingCorrector(Recorder):
    def step(self, sde, score, x, t, noise):
        self.log.append((self.name, float(t), float(noise.flatten()[0])))
        return x + noise


def record(order: str, **options) -> tuple[list, sd.SampleOutput]:
    log: list = []
    draws = torch.arange(100, dtype=torch.float64).reshape(-1, 1, 1)
    out = sd.sample(
        sd.VP(),
        lambda x, t: torch.zeros_like(x),
        (1, 1),
        predictor=RecordingPredictor("p", log),
        correctors=(RecordingCorrector("a", log, 2), RecordingCorrector("b", log)),
        times=times64(1.0, 0.5, 0.25),
        noise=queue_noise(draws),
        order=order,
        dtype=torch.float64,
        denoise=False,
        **options,
    )
    return log, out


def test_corrector_first_corrects_at_t_and_draws_in_the_order_of_the_steps() -> None:
    log, _ = record("corrector-first")
    assert log == [
        ("a", 1.0, 1.0),
        ("a", 1.0, 2.0),
        ("b", 1.0, 3.0),
        ("p", 1.0, 0.5, 4.0),
        ("a", 0.5, 5.0),
        ("a", 0.5, 6.0),
        ("b", 0.5, 7.0),
        ("p", 0.5, 0.25, 8.0),
    ]


def test_predictor_first_corrects_at_s() -> None:
    log, _ = record("predictor-first")
    assert log == [
        ("p", 1.0, 0.5, 1.0),
        ("a", 0.5, 2.0),
        ("a", 0.5, 3.0),
        ("b", 0.5, 4.0),
        ("p", 0.5, 0.25, 5.0),
        ("a", 0.25, 6.0),
        ("a", 0.25, 7.0),
        ("b", 0.25, 8.0),
    ]


@orders
def test_an_initial_state_takes_the_place_of_the_first_draw(order: str) -> None:
    log, out = record(order, x_init=torch.full((1, 1), 7.0))
    assert log[0][-1] == 0.0
    assert float(out.x) == 7 + sum(range(8))


@orders
def test_the_trajectory_is_the_state_at_every_time(order: str) -> None:
    _, out = record(order, trajectory=True)
    assert out.trajectory is not None and out.trajectory.shape == (3, 1, 1)
    assert out.trajectory.flatten().tolist() == [0.0, 10.0, 36.0] or order == "predictor-first"
    assert float(out.trajectory[-1]) == float(out.x)
    assert record(order)[1].trajectory is None


def test_the_initial_state_is_the_prior() -> None:
    for sde in SDES.values():
        out = sd.sample(
            sde,
            lambda x, t: torch.zeros_like(x),
            (3, 2),
            predictor=sd.DDIM(),
            times=sd.uniform_times(sde, 2),
            noise=lambda: torch.ones(3, 2),
            trajectory=True,
            dtype=torch.float64,
        )
        assert_close(out.trajectory[0], torch.full((3, 2), sde.prior_std, dtype=torch.float64))


@sdes
def test_the_last_step_is_the_posterior_mean_of_the_data(sde: sd.SDE) -> None:
    noisy, clean = (draw(4, sde=sde, times=sd.uniform_times(sde, 12, 0.05), denoise=d) for d in (False, True))
    t = times64(0.05)[0]
    expected = sde.posterior_mean(noisy, mixture_2d().score(sde)(noisy, t), t)
    assert_close(clean, expected, rtol=1e-12, atol=1e-12)
    assert float((clean - noisy).abs().max()) > 1e-3


@orders
@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize(
    ("corrector_list", "per_time"),
    [((), 0), ((sd.Langevin(steps=2),), 2), ((sd.Langevin(steps=3), sd.AnnealedLangevin()), 4)],
)
@predictors
def test_evaluations_are_counted_where_they_happen(
    predictor: sd.Predictor, corrector_list: tuple, per_time: int, order: str, denoise: bool
) -> None:
    score = CallCounter(lambda x, t: -x)
    out = sd.sample(
        sd.VP(),
        score,
        (2, 1),
        predictor=predictor,
        correctors=corrector_list,
        times=sd.uniform_times(sd.VP(), 3),
        order=order,
        denoise=denoise,
    )
    assert out.nfe == score.calls == 3 * (1 + per_time) + denoise


def test_a_predictor_that_asks_twice_is_counted_twice() -> None:
    class Twice:
        def step(self, sde, score, x, t, s, noise):
            return x + 0 * score(x, t) + 0 * score(x, s)

    out = sd.sample(
        sd.VP(), lambda x, t: -x, (1, 1), predictor=Twice(), times=times64(1.0, 0.5, 0.1), denoise=False
    )
    assert out.nfe == 4


def test_the_score_is_asked_at_the_times_of_the_grid() -> None:
    score = CallCounter(lambda x, t: -x)
    times = times64(1.0, 0.6, 0.1)
    sd.sample(sd.VP(), score, (1, 1), predictor=sd.DDIM(), correctors=(sd.Langevin(),), times=times)
    assert [float(t) for t in score.times] == [1.0, 1.0, 0.6, 0.6, 0.1]


def test_the_default_grid_has_a_thousand_uniform_steps() -> None:
    asked = []

    class Stay:
        def step(self, sde, score, x, t, s, noise):
            asked.append(t)
            return x

    sd.sample(sd.VP(), lambda x, t: -x, (1, 1), predictor=Stay(), noise=lambda: torch.zeros(1, 1))
    assert_close(torch.stack(asked), sd.uniform_times(sd.VP(), 1000)[:-1])


def test_nothing_is_differentiated_and_nothing_is_left_of_the_callers_tensors() -> None:
    x_init = torch.ones(2, 2, requires_grad=True)
    before = x_init.detach().clone()
    weight = torch.ones((), requires_grad=True)
    out = sd.sample(
        sd.VP(),
        lambda x, t: -weight * x,
        (2, 2),
        predictor=sd.EulerMaruyama(),
        times=times64(1.0, 0.5),
        x_init=x_init,
    )
    assert not out.x.requires_grad
    assert torch.equal(x_init.detach(), before)


def test_a_zero_score_makes_no_nan() -> None:
    """Far from data a network may return zeros; the plain step size is infinite there."""
    for corrector in (sd.Langevin(), sd.Langevin(shrinkage=0.0), sd.AnnealedLangevin()):
        for sde in SDES.values():
            out = sd.sample(
                sde,
                lambda x, t: torch.zeros_like(x),
                (2, 3),
                predictor=sd.ReverseDiffusion(),
                correctors=(corrector,),
                times=sd.uniform_times(sde, 5),
            )
            assert bool(torch.isfinite(out.x).all())


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
@orders
def test_the_state_keeps_its_type_whatever_the_noise(
    given: torch.dtype, wanted: torch.dtype, order: str
) -> None:
    asked = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x.dtype)
        return -x

    for x_init in (None, torch.zeros(2, 3, dtype=given)):
        out = sd.sample(
            sd.VP(),
            score,
            (2, 3),
            predictor=sd.ReverseDiffusion(),
            correctors=(sd.Langevin(),),
            times=times64(1.0, 0.5, 0.1),
            noise=lambda: torch.ones(2, 3, dtype=given),
            x_init=x_init,
            order=order,
            dtype=wanted,
        )
        assert out.x.dtype == wanted
    assert set(asked) == {wanted}


def test_noise_of_another_shape_is_refused() -> None:
    """Broadcast, a single row would give every sample of the batch the same noise."""
    for first, second in (((2,), (4, 2)), ((4, 2), (1, 2))):
        draws = iter([torch.zeros(first), torch.zeros(second), torch.zeros(second)])
        with pytest.raises(ValueError, match=r"the noise must have shape \(4, 2\), got"):
            sd.sample(
                sd.VP(),
                lambda x, t: -x,
                (4, 2),
                predictor=sd.ReverseDiffusion(),
                times=times64(1.0, 0.5),
                noise=lambda d=draws: next(d),
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4,)}, r"a shape must be \(batch, \*data\) with positive integers, got \(4,\)"),
        ({"shape": (0, 2)}, r"positive integers, got \(0, 2\)"),
        ({"shape": (2.0, 2)}, r"positive integers, got \(2.0, 2\)"),
        ({"order": "corector-first"}, r"unknown order 'corector-first'; did you mean 'corrector-first'\?"),
        ({"dtype": torch.float16}, "state must be float32 or float64, got torch.float16"),
        ({"dtype": torch.int64}, "state must be float32 or float64, got torch.int64"),
        ({"times": times64(0.1, 0.5)}, "must fall strictly"),
        ({"times": times64(2.0, 0.5)}, r"times must lie in \[0, 1.0\]"),
        ({"times": times64(1.0)}, "at least 2 times"),
        ({"seed": -1}, "a seed must be an integer from 0"),
        ({"seed": 0.5}, "a seed must be an integer from 0"),
        ({"first_index": -1}, "sample indices must be"),
        ({"x_init": torch.zeros(3, 2)}, r"x_init must have shape \(2, 2\), got \(3, 2\)"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    settings = {"shape": (2, 2), "predictor": sd.DDIM(), "times": times64(1.0, 0.5)} | options
    shape = settings.pop("shape")
    with pytest.raises(ValueError, match=message):
        sd.sample(sd.VP(), gaussian_2d().score(sd.VP()), shape, **settings)


def test_the_progress_bar_is_off_unless_asked_for(capsys: pytest.CaptureFixture) -> None:
    arguments = {"predictor": sd.DDIM(), "times": times64(1.0, 0.5, 0.1)}
    sd.sample(sd.VP(), lambda x, t: -x, (1, 1), **arguments)
    assert capsys.readouterr().err == ""
    sd.sample(sd.VP(), lambda x, t: -x, (1, 1), progress=True, **arguments)
    assert "sampling" in capsys.readouterr().err
