"""Encoding, decoding and interpolation by the flow; how sampling treats memory, gradients, devices, compilers."""

from __future__ import annotations

import itertools
import math
import shutil
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import CORRECTORS, PREDICTORS, SDES, gaussian_2d, gaussian_flow, mixture_2d, times64

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
TIGHT = sd.DormandPrince(rtol=1e-8, atol=1e-8)
SOLVERS = {
    **PREDICTORS,
    "heun": sd.EDMHeun(),
    "churn": sd.EDMHeun(churn=10),
    "dpm_solver++": sd.DPMSolverPP(3),
    "unipc": sd.UniPC(),
    "deis": sd.DEIS(variable="time"),
    "rk4": sd.RK4(),
    "sde_dpm_solver++": sd.SDEDPMSolverPP(),
    "sa_solver": sd.SASolver(),
    "flow": sd.FlowSolver(),
}


def data(n: int = 6) -> Tensor:
    return mixture_2d().sample(n, torch.Generator().manual_seed(0))


# There and back ------------------------------------------------------------------------------------------


@sdes
def test_decoding_is_the_exact_flow(sde: sd.SDE) -> None:
    gaussian = gaussian_2d()
    z = sde.prior_std * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = sd.decode(sde, gaussian.score(sde), z, solver=TIGHT)
    exact = gaussian_flow(gaussian, sde, z, times64(sde.t_max)[0], times64(sde.t_min)[0])
    assert_close(out.x, exact, rtol=1e-5, atol=1e-5)
    by_steps = sd.decode(sde, gaussian.score(sde), z, predictor=sd.RK4(), times=sd.log_snr_times(sde, 60))
    assert_close(by_steps.x, exact, rtol=1e-3, atol=1e-3)


def test_data_come_back_and_the_error_says_how_nearly() -> None:
    sde, score, x = sd.VP(), mixture_2d().score(sd.VP()), data()
    assert float(sd.round_trip_error(sde, score, x, solver=TIGHT).max()) < 1e-4
    rough = sd.round_trip_error(sde, score, x, predictor=sd.DDIM(), times=sd.log_snr_times(sde, 40))
    assert rough.shape == (6,) and float(rough.min()) > 1e-3
    z = sd.encode(sde, score, x, predictor=sd.DDIM(), times=sd.log_snr_times(sde, 40)).x
    back = sd.decode(sde, score, z, predictor=sd.DDIM(), times=sd.log_snr_times(sde, 40)).x
    assert_close(rough, (back - x).square().mean(1).sqrt())
    # Order 1 there and back: half the step, half the error.
    half = sd.round_trip_error(sde, score, x, predictor=sd.DDIM(), times=sd.log_snr_times(sde, 80))
    assert 1.6 < float(rough.mean() / half.mean()) < 2.4


def test_interpolations_begin_and_end_at_the_data() -> None:
    sde, score, x = sd.VE(), mixture_2d().score(sd.VE()), data(12)
    out = sd.interpolate(sde, score, x[:6], x[6:], 5, solver=TIGHT)
    assert out.x.shape == (5, 6, 2) and out.nfe > 0
    assert_close(out.x[0], x[:6], rtol=1e-3, atol=1e-3)
    assert_close(out.x[-1], x[6:], rtol=1e-3, atol=1e-3)


def test_interpolations_of_normal_data_are_arcs_through_them() -> None:
    """For a normal distribution the flow is a factor, and what is between data is as far from the mean as they."""
    sde, d = sd.VP(), 50
    normal = sd.GaussianMixture(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None])
    a, b = normal.sample(8, torch.Generator().manual_seed(0)).split(4)
    out = sd.interpolate(sde, normal.score(sde), a, b, 4, predictor=sd.RK4(), times=sd.log_snr_times(sde, 40))
    for i, x in enumerate(out.x):
        assert_close(x, sd.slerp(a, b, i / 3), rtol=1e-3, atol=1e-3)
    assert float(out.x[1].norm(dim=1).min()) > 0.9 * float(torch.cat([a, b]).norm(dim=1).min())


def test_slerp_is_the_arc() -> None:
    a, b = times64(2.0, 0.0)[None], times64(0.0, 2.0)[None]
    for weight in (0.0, 0.25, 0.5, 1.0):
        angle = weight * math.pi / 2
        wanted = 2 * times64(math.cos(angle), math.sin(angle))[None]
        assert_close(sd.slerp(a, b, weight), wanted, rtol=1e-12, atol=1e-12)
    assert_close(sd.slerp(a, 3 * a, 0.5), 2 * a)  # along one line
    near = a + 1e-9 * b
    assert_close(sd.slerp(a, near, 0.5), (a + near) / 2, rtol=1e-12, atol=0)
    z = torch.randn(2, 3, 4, 500, generator=torch.Generator().manual_seed(0))
    lengths = sd.slerp(z[0], z[1], 0.5).flatten(1).norm(dim=1)
    assert_close(lengths, torch.full((3,), 2000**0.5), rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="must have the same shape"):
        sd.slerp(a, z[0], 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, s, x: sd.decode(e, s, x, times=sd.uniform_times(e, 3)), "times are the grid of a predictor"),
        (lambda e, s, x: sd.decode(e, s, x, predictor=sd.DDIM(), solver=TIGHT), "a solver or a predictor, not"),
        (lambda e, s, x: sd.decode(e, s, x, predictor=sd.Ancestral()), "needs a deterministic predictor"),
        (lambda e, s, x: sd.decode(e, s, x.half()), "must be float32 or float64"),
        (lambda e, s, x: sd.interpolate(e, s, x, x, 1), "n >= 2, got 1"),
        (lambda e, s, x: sd.interpolate(e, s, x, x[:2], 3), "data must have the same shape"),
        (lambda e, s, x: sd.sample_ode(e, s, (2, 2), trajectory=times64(0.2, 0.6)), "must fall from t_max = 1.0"),
        (lambda e, s, x: sd.sample_ode(e, s, (2, 2), trajectory=times64(2.0)), "must fall from t_max = 1.0"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(sd.VP(), mixture_2d().score(sd.VP()), data())


def test_a_trajectory_of_the_flow_is_the_flow_at_its_times() -> None:
    sde, gaussian = sd.VP(), gaussian_2d()
    times = times64(1.0, 0.6, 0.3)
    z = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sde.prior_std
    out = sd.sample_ode(
        sde, gaussian.score(sde), (4, 2), solver=TIGHT, x_init=z, trajectory=times, dtype=torch.float64
    )
    assert out.trajectory is not None and out.trajectory.shape == (3, 4, 2)
    for t, state in zip(times, out.trajectory, strict=True):
        assert_close(state, gaussian_flow(gaussian, sde, z, times[0], t), rtol=1e-6, atol=1e-6)
    plain = sd.sample_ode(sde, gaussian.score(sde), (4, 2), solver=TIGHT, x_init=z, dtype=torch.float64)
    assert_close(out.x, plain.x, rtol=1e-5, atol=1e-5)
    assert plain.trajectory is None


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture) -> None:
    sde, score, x = sd.VP(), mixture_2d().score(sd.VP()), data()
    for progress in (False, True):
        sd.sample_ode(sde, score, (2, 2), progress=progress)
        sd.encode(sde, score, x, progress=progress)
        sd.encode(sde, score, x, predictor=sd.DDIM(), times=sd.log_snr_times(sde, 5), progress=progress)
        sd.decode(sde, score, x, progress=progress)
        sd.interpolate(sde, score, x, x, 2, progress=progress)
        shown = capsys.readouterr().err
        assert (("sampling" in shown), ("encoding" in shown)) == (progress, progress)
    quiet = sd.sample_ode(sde, score, (2, 2)).x
    assert torch.equal(quiet, sd.sample_ode(sde, score, (2, 2), progress=True).x)


# What sampling does to memory, gradients, devices -------------------------------------------------------


@sdes
@pytest.mark.parametrize("predictor", SOLVERS.values(), ids=SOLVERS)
def test_everything_works_in_inference_mode(sde: sd.SDE, predictor: sd.Predictor) -> None:
    """With the derivatives of the SDE; and what is made there spoils nothing that is kept."""
    score, times = mixture_2d().score(sde), sd.log_snr_times(sde, 4)
    options = {"predictor": predictor, "correctors": CORRECTORS["langevin"], "times": times}
    usual = sd.sample(sde, score, (3, 2), **options)
    with torch.inference_mode():
        inside = sd.sample(sde, score, (3, 2), **options)
    assert inside.x.is_inference() and not usual.x.is_inference()
    assert torch.equal(inside.x, usual.x)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (sde.alpha(t) + sde.sigma(t)).backward()
    assert bool(torch.isfinite(t.grad))


def test_a_score_may_differentiate_and_samples_may_be_differentiated() -> None:
    """Why sampling itself is not in inference mode."""
    sde, mixture = sd.VP(), mixture_2d()

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(-x.square().sum() / 2, x)
        return gradient

    for out in (
        sd.sample(sde, guided, (2, 2), predictor=sd.DDIM(), times=sd.uniform_times(sde, 3)),
        sd.sample_ode(sde, guided, (2, 2)),
    ):
        x = out.x.requires_grad_()
        (x * mixture.score(sde)(x, times64(0.5)[0]).to(x.dtype)).sum().backward()
        assert bool(torch.isfinite(x.grad).all())


def most_states(predictor: sd.Predictor, n: int, trajectory: bool = False) -> int:
    """The largest number of states and scores of a run that are alive when the score is asked."""
    most, seen, sde = 0, [], sd.VP()

    def score(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        gradient = -x
        seen.extend((weakref.ref(x), weakref.ref(gradient)))
        most = max(most, len({id(o) for r in seen if (o := r()) is not None}))
        return gradient

    times = sd.uniform_times(sde, n, 1e-3)
    sd.sample(sde, score, (7, 11), predictor=predictor, times=times, trajectory=trajectory)
    return most


@pytest.mark.parametrize("name", ["reverse-diffusion", "ddim", "dpm_solver++", "unipc", "heun", "sa_solver"])
def test_memory_does_not_grow_with_the_steps(name: str) -> None:
    predictor = SOLVERS[name]
    few, many = most_states(predictor, 8), most_states(predictor, 40)
    assert many <= few < 8
    assert most_states(predictor, 40, trajectory=True) >= 40  # it would be seen


def test_samples_are_made_where_the_network_is() -> None:
    class Meta(torch.nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), device=device))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -self.weight * x

    from sde_diffusion.sampling import device_of

    assert device_of(Meta("meta")).type == "meta"
    assert device_of(Meta("cpu")).type == "cpu"
    assert device_of(lambda x, t: -x).type == "cpu"
    assert device_of(torch.nn.Identity()).type == "cpu"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on CPUs")
def test_a_compiled_score_gives_the_same_samples() -> None:
    sde = sd.VP()
    torch.manual_seed(0)
    model = sd.ScoreModel(sd.MLP(2, width=16, depth=1), sde)
    for predictor in (sd.ReverseDiffusion(), sd.UniPC()):
        options = {"predictor": predictor, "times": sd.log_snr_times(sde, 6)}
        plain = sd.sample(sde, model, (5, 2), **options)
        compiled = sd.sample(sde, model, (5, 2), compile=True, **options)
        assert compiled.nfe == plain.nfe
        assert_close(compiled.x, plain.x, rtol=1e-4, atol=1e-5)


def test_the_score_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f: seen.append(f) or f)
    score = mixture_2d().score(sd.VP())
    for wanted in (False, True):
        sd.sample(
            sd.VP(), score, (1, 2), predictor=sd.DDIM(), times=sd.uniform_times(sd.VP(), 2), compile=wanted
        )
        assert seen == [score] * wanted


# The front ----------------------------------------------------------------------------------------------


def test_the_front_offers_training_when_asked() -> None:
    from sde_diffusion.networks import MLP
    from sde_diffusion.training import Trainer

    assert sd.MLP is MLP and sd.Trainer is Trainer
    assert {"MLP", "UNet", "Trainer", "TrainingSettings", "load_dataset"} <= set(dir(sd))
    assert sd.load_dataset("moons", size=20).sample_shape == (2,)
    assert all(hasattr(sd, name) for name in itertools.chain(sd._LAZY, ["sample", "VP"]))
    with pytest.raises(AttributeError, match="has no attribute 'Trainerr'"):
        _ = sd.Trainerr
