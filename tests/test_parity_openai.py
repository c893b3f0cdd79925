"""Steps, losses and the bound of the OpenAI implementation, on its networks with synthetic weights."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import FIXTURES
from sde_diffusion.bound import variational_bound
from sde_diffusion.chain_losses import BoundLoss, HybridLoss, NoiseError
from sde_diffusion.decoders import DiscretizedGaussian, TanhGaussian
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.predictors import LearnedVariance
from sde_diffusion.presets import chain_step, rescaled_chain_step
from sde_diffusion.reverse_steps import ReverseSteps, normal_kl
from sde_diffusion.schedules import SCHEDULES
from sde_diffusion.score import UNSCALED, ScoreModel
from sde_diffusion.tensors import expand
from sde_diffusion.variances import FixedLarge, FixedSmall, LearnedLog, LearnedRange
from shared_data import shared_path

N = 50
SETUPS = {
    "guided": {"linear": "linear", "cosine": "cosine"},
    "improved": {"linear_fixedlarge": "linear", "cosine_fixedsmall": "cosine"},
}
PAIRS = [(net, setup) for net, setups in SETUPS.items() for setup in setups]
KINDS = {"EPSILON": sd.NOISE, "START_X": sd.DATA}
VARIANCES = {"LEARNED_RANGE": LearnedRange, "LEARNED": LearnedLog}
FIXED = {"FIXED_SMALL": FixedSmall(), "FIXED_LARGE": FixedLarge()}
setups = pytest.mark.parametrize(("net", "setup"), PAIRS)


@lru_cache
def network(net: str) -> torch.nn.Module:
    flags = {"diffusion_steps": N, "rescale_timesteps": net == "improved"}
    score = sd.load_pretrained(shared_path("fixtures", "openai", net), format="openai", config=flags)
    # The loader keeps the mean only of a network with learned variances.
    return getattr(score.net, "net", score.net).eval().requires_grad_(False)


@lru_cache
def arrays(net: str, name: str) -> dict[str, Tensor]:
    with np.load(shared_path("fixtures", "openai", net, name), allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def model(net: str, setup: str, kind: str = "EPSILON", variance: str = "LEARNED_RANGE") -> ScoreModel:
    chain = sd.DDPM(SCHEDULES[SETUPS[net][setup]](N), t_min=1 / N)
    options = {
        "conditioning": (rescaled_chain_step if net == "improved" else chain_step)(N),
        "input_scaling": UNSCALED,
    }
    if net == "improved":
        return ScoreModel(network(net), chain, KINDS[kind], **options)
    return LearnedVarianceModel(network(net), chain, KINDS[kind], variance=VARIANCES[variance], **options)


def cond(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": values["y"]} if "y" in values else {}


def relative(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
    assert error < tolerance, error


def test_decoder_is_the_published_approximation() -> None:
    with np.load(FIXTURES / "openai" / "schedules.npz", allow_pickle=False) as file:
        x, means, scales, expected = (
            torch.from_numpy(file[f"discretized_gaussian/{k}"])
            for k in ("x", "means", "log_scales", "log_likelihood")
        )
    ours = TanhGaussian(256)(x, means, 2 * scales)
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # The exact mass is near it wherever the approximation does not meet its floor.
    exact = DiscretizedGaussian(256, ends=True)(x, means, 2 * scales).float()
    seen = expected > -9
    assert int(seen.sum()) > 100
    assert_close(exact[seen], expected[seen], rtol=0.05, atol=0.05)


def test_kl_is_theirs() -> None:
    with np.load(FIXTURES / "openai" / "schedules.npz", allow_pickle=False) as file:
        m1, v1, m2, v2, kl = (
            torch.from_numpy(file[f"normal_kl/{k}"]).double()
            for k in ("mean1", "logvar1", "mean2", "logvar2", "kl")
        )
    assert_close(normal_kl(m1 - m2, v1, v2), kl, rtol=1e-5, atol=1e-6)


@setups
def test_forward_process_and_posterior(net: str, setup: str) -> None:
    values, chain = arrays(net, "losses.npz"), model(net, setup).sde
    steps, index = ReverseSteps(chain, chain.times()), values["t"]
    x_t = chain.perturb(values["x_start"], steps.times[index], values["noise"])
    relative(x_t, values[f"{setup}/x_t"], 1e-6)
    mean, log_variance = steps.posterior(values["x_start"], x_t, index)
    relative(mean, values[f"{setup}/q_posterior/mean"], 1e-5)
    expected = values[f"{setup}/q_posterior/log_variance"]
    assert_close(log_variance.expand_as(expected), expected, rtol=1e-5, atol=1e-5)
    var = torch.where(index == 0, 0, log_variance.flatten().exp())
    assert_close(
        expand(var, x_t).expand_as(x_t), values[f"{setup}/q_posterior/variance"], rtol=1e-5, atol=1e-9
    )


@setups
def test_p_mean_variance(net: str, setup: str) -> None:
    values, seen = arrays(net, "losses.npz"), 0
    for kind in KINDS:
        for name in VARIANCES if net == "guided" else FIXED:
            for clip in (True, False):
                folder = f"{setup}/p_mean_variance/{kind}/{name}/clip={clip}"
                if f"{folder}/mean" not in values:
                    continue
                net_model = model(net, setup, kind, name)
                chain, index, x = net_model.sde, values["t"], values[f"{setup}/x_t"]
                steps = ReverseSteps(chain, chain.times())
                with torch.no_grad():
                    score = net_model(x, steps.times[index], **cond(values))
                    variance = net_model.reverse_variance(**cond(values)) if net == "guided" else FIXED[name]
                    out = steps.predict(score, x, index, variance, clip=clip)
                data = values[f"{folder}/pred_xstart"]
                assert float((out.data - data).abs().max()) < (
                    1e-3 if clip else 1e-3 * float(data.abs().max())
                )
                expected = values[f"{folder}/mean"]
                assert float((out.mean - expected).abs().max()) < 1e-3 * max(1.0, float(expected.abs().max()))
                shape = values[f"{folder}/log_variance"].shape
                assert_close(
                    out.log_variance.expand(shape).float(),
                    values[f"{folder}/log_variance"],
                    rtol=1e-4,
                    atol=1e-4,
                )
                seen += 1
    assert seen == 5


def clipped(net_model: ScoreModel, **conditions: Tensor):
    """The score whose predicted data are clipped to [-1, 1], as ``clip_denoised`` does."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        sde = net_model.sde
        data = sde.posterior_mean(x.double(), net_model(x, t, **conditions).double(), t).clamp(-1, 1)
        return -(x - expand(sde.alpha(t), data) * data) / expand(sde.variance(t), data)

    return score


@setups
@torch.no_grad()
def test_ancestral_and_ddim_steps(net: str, setup: str) -> None:
    values, net_model = arrays(net, "losses.npz"), model(net, setup)
    chain, conditions = net_model.sde, cond(values)
    s, t = chain.step_times(values["t"] + 1)
    x, noise = values[f"{setup}/x_t"].double(), values["noise"].double()
    if net == "guided":
        ancestral = LearnedVariance(net_model.reverse_variance(**conditions))
    else:
        ancestral = sd.Ancestral("large" if setup == "linear_fixedlarge" else "small")
    last = expand(values["t"] == 0, x)
    ours = ancestral.step(chain, clipped(net_model, **conditions), x, t, s, torch.where(last == 1, 0, noise))
    relative(ours, values[f"{setup}/p_sample"])
    ours = sd.DDIM().step(chain, clipped(net_model, **conditions), x, t, s, noise)
    relative(ours, values[f"{setup}/ddim_sample_eta0"])

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return net_model(x, t, **conditions)

    relative(sd.DDIM(0.7).step(chain, plain, x, t, s, noise), values[f"{setup}/ddim_sample_eta0.7"])


@setups
@torch.no_grad()
def test_training_losses(net: str, setup: str) -> None:
    """L_simple, the hybrid with and without T / 1000, and the bound; in bits/dim, with their decoder."""
    values = arrays(net, "losses.npz")
    for kind in KINDS:
        net_model = model(net, setup, kind)
        _, t = net_model.sde.step_times(values["t"] + 1)
        given = (net_model, values["x_start"], t, values["noise"])
        fixed = FixedLarge() if setup == "linear_fixedlarge" else FixedSmall()
        bound = BoundLoss(fixed, TanhGaussian(256))
        simple, whole = NoiseError()(*given, **cond(values)), bound(*given, **cond(values))
        folder = f"{setup}/training_losses/{kind}"
        relative(whole / N, values[f"{folder}/KL/loss"])
        relative(whole, values[f"{folder}/RESCALED_KL/loss"])
        if kind == "EPSILON":  # with START_X theirs is the error of the data
            relative(simple, values[f"{folder}/MSE/mse"])
        if net == "guided":
            vb = {"MSE": 1 / N, "RESCALED_MSE": 0.001}
            for name, weight in vb.items():
                hybrid = HybridLoss(weight, bound)(*given, **cond(values))
                relative(hybrid - simple, values[f"{folder}/{name}/vb"])
                if kind == "EPSILON":
                    relative(hybrid, values[f"{folder}/{name}/loss"])


@setups
@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_every_term_of_the_bound(net: str, setup: str, clip: bool) -> None:
    values, net_model = arrays(net, "elbo.npz"), model(net, setup)
    folder = f"{setup}/clip_denoised={clip}"
    fixed = FixedLarge() if setup == "linear_fixedlarge" else FixedSmall()
    bound = variational_bound(
        net_model.sde,
        net_model,
        values["x_start"],
        variance=net_model.reverse_variance() if net == "guided" else fixed,
        decoder=TanhGaussian(256),
        clip=clip,
        prior_std=1.0,
        noise=lambda step: values["noise"][N - step],
        cond=cond(values),
        batch_size=20,
    )
    ours = torch.cat([bound.decoder[:, None], bound.terms], 1) / (bound.dims * np.log(2))
    theirs = values[f"{folder}/vb"].flip(1).double()
    # Term by term; where theirs is a small difference of large numbers, next to the whole.
    assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.sum(1).max()))
    assert_close(
        bound.bits_per_dim(bound.prior), values[f"{folder}/prior_bpd"].double(), rtol=1e-4, atol=1e-6
    )
    assert_close(bound.bits_per_dim(), values[f"{folder}/total_bpd"].double(), rtol=1e-4, atol=1e-5)
