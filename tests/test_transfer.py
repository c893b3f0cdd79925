"""Scores of one process on another, thresholds of the expected data, and grids made for a model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import problems
import sde_diffusion as sd

PROCESSES = {**problems.SDES, "edm": sd.EDM()}
PAIRS = list(itertools.permutations(PROCESSES, 2))


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_an_exact_score_stays_exact(old: str, new: str) -> None:
    trained, sampled = PROCESSES[old], PROCESSES[new]
    mixture = problems.random_mixture(3, (4,))
    low = max(float(p.log_snr(p.t_max)) for p in (trained, sampled))
    high = min(float(p.log_snr(p.t_min)) for p in (trained, sampled))
    log_snr = torch.linspace(low + 1e-6, high - 1e-6, 9, dtype=torch.float64)
    t = sampled.time_of_log_snr(log_snr)
    x = mixture.sample(9, torch.Generator().manual_seed(0))
    noise = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = sampled.alpha(t)[:, None] * x + sampled.sigma(t)[:, None] * noise
    got = sd.transfer(mixture.score(trained), trained, sampled, strict=True)(x, t)
    # The inverse of a schedule is good to ten digits or so where it is found by bisection.
    torch.testing.assert_close(got, mixture.score(sampled)(x, t), rtol=1e-6, atol=1e-9)


def test_samples_on_another_process_follow_the_same_path() -> None:
    vp, edm, mixture = sd.VP(), sd.EDM(), problems.mixture_2d()
    score = mixture.score(vp)
    log_snr = torch.linspace(-8, 8, 41, dtype=torch.float64)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def end(sde: sd.SDE, score: sd.Score) -> Tensor:
        times = sde.time_of_log_snr(log_snr)
        start = float(sde.sigma(times[0])) * x
        options = dict(predictor=sd.UniPC(3), denoise=False, dtype=torch.float64)
        return sd.sample(sde, score, (50, 2), times=times, x_init=start, **options).x / sde.alpha(times[-1])

    torch.testing.assert_close(end(edm, sd.transfer(score, vp, edm)), end(vp, score), rtol=1e-8, atol=1e-8)


def test_beyond_the_trained_noise() -> None:
    trained, sampled = sd.VP(t_min=1e-2), sd.EDM(t_min=1e-3, t_max=1e4)
    mixture = problems.mixture_2d()
    moved = sd.transfer(mixture.score(trained), trained, sampled)
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    # Below: the data expected at the smallest noise known, at the same point.
    small = torch.tensor([1e-3], dtype=torch.float64)
    end = torch.tensor([trained.t_min], dtype=torch.float64)
    at_end = trained.alpha(end) * x
    known = trained.posterior_mean(at_end, mixture.score(trained)(at_end, end), end)
    torch.testing.assert_close(sampled.posterior_mean(x, moved(x, small), small), known, rtol=1e-8, atol=1e-8)
    # Above: nearly the mean of the data, as it must be.
    large = torch.tensor([5e3], dtype=torch.float64)
    far = 5e3 * torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    mean = sampled.posterior_mean(far, moved(far, large), large)
    torch.testing.assert_close(mean[0], mixture.mean, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"log-SNRs of .* are asked for, but the score was trained for"):
        sd.transfer(mixture.score(trained), trained, sampled, strict=True)(far, large)


def wild(x: Tensor, t: Tensor) -> Tensor:
    """A score whose expected data are ten times the state."""
    t = torch.as_tensor(t, dtype=torch.float64).expand(len(x))
    vp = sd.VP()
    alpha, variance = vp.alpha(t)[:, None], vp.variance(t)[:, None]
    return (alpha * 10 * x - x) / variance


def test_static_thresholds_clip_the_expected_data() -> None:
    vp = sd.VP()
    x = torch.linspace(-0.3, 0.3, 8, dtype=torch.float64).reshape(2, 4)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    data = vp.posterior_mean(x, sd.Thresholded(wild, vp)(x, t), t)
    torch.testing.assert_close(data, (10 * x).clamp(-1, 1), rtol=0, atol=1e-12)
    wide = sd.Thresholded(wild, vp, bound=100.0)
    assert torch.equal(wide(x, t), wild(x, t)), "within the bounds nothing changes"


def test_dynamic_thresholds_scale_by_a_quantile_of_each_sample() -> None:
    vp = sd.VP()
    x = torch.stack([torch.linspace(-0.5, 0.3, 101), torch.linspace(-0.05, 0.05, 101)]).double()
    t = torch.tensor(0.4, dtype=torch.float64)
    data = vp.posterior_mean(x, sd.Thresholded(wild, vp, "dynamic", quantile=0.9)(x, t), t)
    c = torch.quantile((10 * x[0]).abs(), 0.9)
    torch.testing.assert_close(data[0], (10 * x[0]).clamp(-c, c) / c, rtol=0, atol=1e-12)
    torch.testing.assert_close(data[1], 10 * x[1], rtol=0, atol=1e-12)  # its quantile is within
    alone = sd.Thresholded(wild, vp, "dynamic", quantile=0.9)(x[:1], t)
    torch.testing.assert_close(
        alone, sd.Thresholded(wild, vp, "dynamic", quantile=0.9)(x, t)[:1], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "soft"}, "thresholding"),
        ({"bound": 0.0}, "the bound must be positive, got 0.0"),
        ({"kind": "dynamic", "quantile": 1.5}, r"the quantile must lie in \(0, 1\], got 1.5"),
    ],
)
def test_thresholds_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.Thresholded(wild, sd.VP(), **options)


MIXTURES = {"2-D": problems.mixture_2d, "16-D": lambda: problems.random_mixture(3, (16,))}


@pytest.mark.parametrize("dimensions", MIXTURES)
@pytest.mark.parametrize("predictor", [sd.DDIM(), sd.DPMSolverPP(2)], ids=["ddim", "dpm2"])
def test_an_optimised_grid_is_better_than_all_others(dimensions: str, predictor: sd.Predictor) -> None:
    vp, mixture = sd.VP(), MIXTURES[dimensions]()
    score, shape, n = mixture.score(vp), (512, *mixture.means.shape[1:]), 8
    found = sd.optimal_times(
        vp, score, n, (128, *shape[1:]), predictor=predictor, t_end=1e-3, seed=5, sweeps=6
    )
    assert len(found.times) == n + 1 and found.error <= min(found.standard.values())

    def samples(times: Tensor, solver: sd.Predictor) -> Tensor:
        options = dict(predictor=solver, times=times, seed=1, denoise=False, dtype=torch.float64)
        return sd.sample(vp, score, shape, **options).x

    # On other noise than it was calibrated with.
    truth = samples(sd.log_snr_times(vp, 400, 1e-3), sd.UniPC(3))
    errors = {
        name: float((samples(times, predictor) - truth).norm(dim=1).mean())
        for name, times in {
            "optimal": found.times,
            "uniform": sd.uniform_times(vp, n, 1e-3),
            "quadratic": sd.quadratic_times(vp, n, 1e-3),
            "log_snr": sd.log_snr_times(vp, n, 1e-3),
            "karras": sd.karras_times(vp, n, t_end=1e-3),
        }.items()
    }
    best = errors.pop("optimal")
    assert best < 0.95 * min(errors.values()), f"{best} against {errors}"


def test_the_same_arguments_give_the_same_grid() -> None:
    vp, mixture = sd.VP(), problems.mixture_2d()
    grids = [sd.optimal_times(vp, mixture.score(vp), 4, (8, 2), sweeps=1, fine=50).times for _ in range(2)]
    assert torch.equal(*grids)
    assert bool((grids[0].diff() < 0).all())


def test_grids_are_not_optimised_for_noise() -> None:
    vp, mixture = sd.VP(), problems.mixture_2d()
    with pytest.raises(ValueError, match="deterministic predictor, and EulerMaruyama"):
        sd.optimal_times(vp, mixture.score(vp), 4, (8, 2), predictor=sd.EulerMaruyama())
    with pytest.raises(ValueError, match="sweeps must be an integer >= 0, got -1"):
        sd.optimal_times(vp, mixture.score(vp), 4, (8, 2), sweeps=-1)
