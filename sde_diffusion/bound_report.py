"""The variational bound of a trained model on its test data: term by term, in continuous time, and beside the ODE."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sde_diffusion import build, pictures
from sde_diffusion.bound import Bound, clipped_score, continuous_bound, ode_bound, variational_bound
from sde_diffusion.data import to_model
from sde_diffusion.decoders import Decoder, DiscretizedGaussian, GaussianDecoder
from sde_diffusion.evaluation import mean_and_error, subset
from sde_diffusion.importance_bound import PathWeights, importance_bound
from sde_diffusion.likelihood import dequantization_noise
from sde_diffusion.runs import Run
from sde_diffusion.times import log_snr_times, uniform_times
from sde_diffusion.workdir import Workdir

__all__ = ["bound"]

Convert = Callable[..., Tensor]
"""``convert(nats, levels=None)``."""


def bound(run: Run, place: Workdir, progress: bool = False) -> dict[str, Any]:
    """The bound of test data with its parts, each with its standard error over samples.

    A model trained on the centres of grey levels (``training.dequantize=False``) codes these, by the discretized
    decoder; any other has densities, of dequantized images or of vectors. All totals are of the same data and
    network: the chain's, its limit in continuous time, the importance-weighted bound of a chain with equal steps in
    log-SNR (beside it, of the same paths, that of one path), and the probability-flow ODE's.

    The first three bound the likelihood of the stochastic model, and the third is the tightest of its chain. The
    ODE's is that of another model, equal to it where the score is the exact one
    (:mod:`sde_diffusion.importance_bound`).

    Writes ``bound.csv``, a line for each term, and ``bound.png``.
    """
    settings, data = build.bound(run.config), run.data
    chosen = subset(len(data.test), settings.test_images)
    x, decoder, levels = _data(run, chosen)
    cond: dict[str, Tensor] = {}
    if run.config.model.class_conditional and data.test_labels is not None:
        cond["y"] = data.test_labels[chosen].to(run.device)
    times = getattr(run.sde, "times", partial(uniform_times, run.sde, settings.steps - 1))()
    learned = bool(run.config.model.learned_variance)
    common: dict[str, Any] = {"decoder": decoder, "seed": int(run.config.seed)}
    inner = len(times) - 1 if settings.subset is None else min(settings.subset, len(times) - 1)

    def chain() -> Bound:
        with tqdm(total=len(x) * (inner + 1), unit="state", disable=not progress, leave=False) as bar:
            return variational_bound(
                run.sde,
                run.model,
                x,
                times=times,
                variance=build.reverse_variance(run.config, run.model),
                steps=settings.subset,
                clip=settings.clip,
                cond=cond,
                batch_size=settings.batch_size,
                progress=bar.update,
                **common,
            )

    score = clipped_score(run.sde, run.model) if settings.clip else run.model

    def continuous() -> Bound:
        return continuous_bound(
            run.sde,
            score,
            x,
            draws=settings.draws,
            cond=cond,
            batch_size=settings.batch_size,
            **common,
        )

    def ode() -> Bound:
        likelihood = build.likelihood(run.config)
        parts = [
            ode_bound(
                run.sde,
                partial(score, **{k: v[part] for k, v in cond.items()}),
                x[part],
                first_index=int(part[0]),
                divergence=likelihood.divergence,
                solver=likelihood.solver,
                coordinates=likelihood.coordinates,
                **common,
            )
            for part in torch.arange(len(x), device=x.device).split(likelihood.batch_size)
        ]
        prior, decoded = torch.cat([p.prior for p in parts]), torch.cat([p.decoder for p in parts])
        nfe = sum(p.nfe * len(p.prior) for p in parts) / len(x)
        return Bound(prior, prior.new_zeros(len(x), 0), decoded, prior.new_zeros(0), parts[0].dims, nfe)

    def weighted() -> PathWeights:
        steps = settings.path_steps
        with tqdm(
            total=len(x) * settings.paths * steps, unit="state", disable=not progress, leave=False
        ) as bar:
            return importance_bound(
                run.sde,
                run.model,
                x,
                times=log_snr_times(run.sde, steps - 1),
                paths=settings.paths,
                variance=build.reverse_variance(run.config, run.model) if learned else None,
                clip=settings.clip,
                cond=cond,
                batch_size=settings.batch_size,
                progress=bar.update,
                **common,
            )

    kinds: dict[str, Callable[[], Bound]] = {"chain": chain, "continuous": continuous}
    if settings.ode:
        kinds["ode"] = ode
    section: dict[str, Any] = {
        "unit": "nats" if run.info.levels is None else "bits/dim",
        "step": run.step,
        "steps": len(times),
        "levels": run.info.levels,
        "decoder": repr(decoder),
        "seed": int(run.config.seed),
    }
    results: dict[str, Bound] = {}
    for name, compute in kinds.items():
        started = time.perf_counter()
        results[name] = result = compute()
        section[name] = {
            **{
                part: mean_and_error(value)
                for part, value in _parts(result, _unit(result, run), levels).items()
            },
            "nfe": result.nfe,
            "seconds": round(time.perf_counter() - started, 3),
        }
    if settings.paths:
        started = time.perf_counter()
        found = weighted()
        section["importance"] = _importance(found, _unit(results["chain"], run), levels) | {
            "steps": settings.path_steps,
            "nfe": found.nfe,
            "seconds": round(time.perf_counter() - started, 3),
        }
    section["settings"] = run.config.bound.to_dict()
    section["files"] = _files(results["chain"], run, place)
    return section


def _data(run: Run, chosen: Tensor) -> tuple[Tensor, Decoder, int | None]:
    """The test data as the model has them, their decoder, and the levels if that gives densities of them."""
    x, levels = run.data.test[chosen].to(run.device), run.info.levels
    if levels is None:
        return x.float(), GaussianDecoder(), None
    if not run.config.training.dequantize:
        return to_model(x, levels), DiscretizedGaussian(levels), None
    noise = dequantization_noise(x.shape, seed=int(run.config.seed), device=run.device)
    return to_model(x, levels, noise), GaussianDecoder(), levels


def _importance(found: PathWeights, convert: Convert, levels: int | None) -> dict[str, Any]:
    """The bound by all paths, by one, and what all gain over one, in the unit of the section."""
    one, together = convert(-found.bound(1), levels=levels), convert(-found.bound(), levels=levels)
    return {
        "total": mean_and_error(together),
        "one_path": mean_and_error(one),
        "gain": mean_and_error(one - together),
        "paths": found.log_weights.shape[1],
        "effective_paths": float(found.effective_paths.mean()),
    }


def _unit(result: Bound, run: Run) -> Convert:
    """From nats to the unit of the section."""
    return result.bits_per_dim if run.info.levels is not None else lambda nats, levels=None: nats


def _parts(result: Bound, convert: Convert, levels: int | None) -> dict[str, Tensor]:
    """The total and its parts in the unit of the section; what is not of the data goes with the decoder."""
    return {
        "total": convert(result.total, levels=levels),
        "prior": convert(result.prior),
        "diffusion": convert(result.diffusion),
        "decoder": convert(result.decoder, levels=levels),
    }


def _files(result: Bound, run: Run, place: Workdir) -> list[str]:
    assert result.times is not None
    scale = 1.0 if run.info.levels is None else float(result.bits_per_dim(torch.ones(1)))
    unit = "nats" if run.info.levels is None else "bits_per_dim"
    terms = result.by_step() * scale
    place.folder.mkdir(parents=True, exist_ok=True)
    with open(place / "bound.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("term", "t", "log_snr", unit))
        times = torch.cat([result.times, result.times[-1:]])
        columns = (times.tolist(), run.sde.log_snr(times).tolist(), terms.tolist())
        names = [*(f"L_{i}" for i in range(len(terms) - 1)), "L_T"]
        writer.writerows(
            (name, *(f"{v:.8g}" for v in row)) for name, *row in zip(names, *columns, strict=True)
        )
    inner = terms[1:-1]
    here = torch.isfinite(inner) & (inner > 0)
    pictures.save_curves(
        {"L_{t-1}": (result.times[1:][here].cpu(), inner[here])},
        place / "bound.png",
        x_label="t",
        y_label=f"{unit.replace('_per_', '/')} of a step",
        title=f"terms of the bound: L_0 {float(terms[0]):.3g}, L_T {float(terms[-1]):.3g}",
        log_y=True,
    )
    return ["bound.csv", "bound.png"]
