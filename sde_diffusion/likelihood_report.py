"""The likelihood of a trained model on its data: every image, with what the error of the mean is made of.

The value of image i with dequantization draws r and probes k is ``mean + a_i + b_ir + c_irk`` and an error of the
solver. The variances of b and c come from repeats on a few pilot images (a nested analysis of variance), that of a
from the spread over images, and the error of solver and precision from the same images at a ten times tighter
tolerance in float32.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sde_diffusion import build, pictures
from sde_diffusion.checkpoint import weights_hash
from sde_diffusion.config import changed
from sde_diffusion.dequantization import off_the_grid
from sde_diffusion.ends import prior_mismatch
from sde_diffusion.evaluation import as_pictures, given_images, mean_and_error, part_of, subset
from sde_diffusion.processes import processes
from sde_diffusion.runs import Run, load
from sde_diffusion.workdir import Workdir

__all__ = ["Components", "Effort", "cheapest", "likelihood", "variance_components"]

_REPEATS = 2
_TIGHTER = 0.1
_PARTIAL = "likelihood_partial.csv"
_LADDER = (1e-1, 1e-2, 1e-3, 1e-4)
_MOST_DRAWS, _MOST_PROBES = 64, 16
_PRODUCT = 0.7  # of the cost of an evaluation of the network, for each probe


# ------------------------------------------------------------ where the error comes from


@dataclass(frozen=True)
class Components:
    """Variances of the value of one image, for one dequantization and one set of probes, and the solver's error.

    Attributes:
        dequantization: the variance between draws of the dequantization noise.
        probe: the variance between sets of probes.
        solver: the mean difference from a tighter tolerance.
        solver_spread: the root mean square of that difference.
        images: on how many images this was measured.
    """

    dequantization: float
    probe: float
    solver: float
    solver_spread: float
    images: int

    @property
    def solver_error(self) -> float:
        """The solver's mean error with the standard error of its measurement: a few images may by chance show
        none."""
        return math.hypot(self.solver, self.solver_spread / math.sqrt(self.images))


def variance_components(values: Tensor) -> tuple[float, float]:
    """The variances between dequantizations and between probes, from values (images, dequantizations, probes).

    ``E var_k = probe`` and ``E var_r(mean_k) = dequantization + probe / K``: the estimates are unbiased before the
    first is cut off at 0.
    """
    probe = float(values.var(2).mean())
    between = float(values.mean(2).var(1).mean())
    return max(0.0, between - probe / values.shape[2]), probe


@dataclass(frozen=True)
class Effort:
    """How much is spent on each image, and the error of the mean that it should have."""

    dequantizations: int
    probes: int
    cost: float
    error: float


def cheapest(components: Components, images: int, wanted: float) -> Effort | None:
    """The least ``R (1 + 0.7 K)`` for which ``((dequantization + probe / K) / R) / images + solver_error^2 <=
    wanted^2``.

    Args:
        components: for a single probe.
        images: over which the mean is taken.
        wanted: error of the mean. None is returned where the solver's error alone is larger, or 64 dequantizations
            with 16 probes are too few.
    """
    best = None
    for draws in range(1, _MOST_DRAWS + 1):
        for probes in range(1, _MOST_PROBES + 1):
            sampling = (components.dequantization + components.probe / probes) / draws / images
            error = math.hypot(math.sqrt(sampling), components.solver_error)
            found = Effort(draws, probes, draws * (1 + _PRODUCT * probes), error)
            if error <= wanted and (best is None or found.cost < best.cost):
                best = found
    return best


def _measure(
    run: Run, x: Tensor, labels: Tensor | None, settings: dict[str, Any]
) -> tuple[Components, float]:
    """The components on pilot images, and the evaluations of one likelihood."""
    seed = int(run.config.seed)
    one, evaluations = settings | {"dequantizations": 1}, []

    def values(draw: int, probe: int, **others: Any) -> Tensor:
        # Seeds that the evaluation itself does not use.
        dequantization = (seed + 1 + draw) * 0x9E3779B97F4A7C15 % 2**63
        out = run.evaluate(
            x, dequantization, y=labels, probe_seed=dequantization + 1 + probe, **(one | others)
        )
        evaluations.append(out.nfe)
        return _in_unit(run, out.log_prob)

    table = torch.stack([torch.stack([values(r, k) for k in range(_REPEATS)], 1) for r in range(_REPEATS)], 1)
    nfe = sum(evaluations) / len(evaluations)
    block = run.config.likelihood.to_dict() | settings
    tight = values(0, 0, rtol=block["rtol"] * _TIGHTER, atol=block["atol"] * _TIGHTER, precision="float32")
    error = table[:, 0, 0] - tight
    good = torch.isfinite(table).all(2).all(1) & torch.isfinite(error)
    if int(good.sum()) < 2:
        raise ValueError("fewer than two pilot images could be evaluated")
    dequantization, probe = variance_components(table[good])
    error = error[good]
    spread = float(error.square().mean().sqrt())
    return Components(dequantization, probe, float(error.mean()), spread, int(good.sum())), nfe


def _planned(
    run: Run, x: Tensor, labels: Tensor | None, images: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that reach ``likelihood.tolerance`` at least cost, and how they were found: evaluations of the network
    times ``R (1 + 0.7 K)``, over a ladder of tolerances, until the next cannot be cheaper."""
    wanted, tried = float(run.config.likelihood.tolerance), []
    best: tuple[float, dict[str, Any], Effort] | None = None
    for tolerance in _LADDER:
        settings: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "probes": 1}
        try:
            components, nfe = _measure(run, x, labels, settings)
        except ValueError:
            if best is None:
                raise
            break  # below the rounding of the network
        effort = cheapest(components, images, wanted)
        tried.append({"rtol": tolerance, "evaluations": nfe, **asdict(components)})
        if effort is not None:
            tried[-1]["cost"] = cost = nfe * effort.cost
            if best is None or cost < best[0]:
                chosen = settings | {"probes": effort.probes, "dequantizations": effort.dequantizations}
                best = cost, chosen, effort
        if best is not None and nfe * (1 + _PRODUCT) >= best[0]:
            break  # tighter ones need more evaluations, and no fewer than one draw and one probe
    if best is not None:
        plan = {"wanted": wanted, "expected_error": best[2].error, "chosen": best[1], "tried": tried}
        return best[1], plan
    raise ValueError(
        f"an error of {wanted:g} cannot be reached with {images} images: at rtol = {_LADDER[-1]:g} the solver is off "
        f"by {tried[-1]['solver']:.2g}, and one dequantization and probe spread by "
        f"{math.sqrt(tried[-1]['dequantization'] + tried[-1]['probe']):.2g}"
    )


# ------------------------------------------------------------ every image, once


def _in_unit(run: Run, log_prob: Tensor) -> Tensor:
    return run.in_bits(log_prob) if run.info.is_image else log_prob


Row = tuple[str, int, str, float, int, float]
"""Part, index, label, value, evaluations, seconds (its share of its batch's)."""


class _Rows:
    """What has been computed, kept on disk after each batch, so that a killed evaluation goes on where it was."""

    def __init__(self, place: Workdir, key: str) -> None:
        self.path = place / _PARTIAL
        self.rows: list[Row] = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").split("\n")
            if lines[0] == key:  # the last line may have been cut off
                self.rows = [_row(line) for line in lines[1:-1]]
        self.path.write_text(key + "\n" + _lines(self.rows), encoding="utf-8")

    def add(self, rows: Sequence[Row]) -> None:
        """Keeps the rows of a batch."""
        self.rows += rows
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_lines(rows))

    def done(self, part: str) -> int:
        """How many of a part there are; they come in their order."""
        return sum(row[0] == part for row in self.rows)


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _row(line: str) -> Row:
    part, index, label, value, nfe, seconds = json.loads(line)
    return part, index, label, value, nfe, seconds


@dataclass(frozen=True)
class _Part:
    """Samples to be evaluated: their indices in their set, themselves, and their labels if there are any.

    ``wrong`` marks images with values that are no grey levels; they are named, and not evaluated.
    """

    indices: Tensor
    x: Tensor
    labels: Tensor | None
    wrong: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def piece(self, where: slice) -> _Part:
        """Some of them, in their order; copies, so that no more than they is sent to another process."""
        labels = None if self.labels is None else self.labels[where].clone()
        return _Part(self.indices[where].clone(), self.x[where].clone(), labels, self.wrong[where].clone())

    def rows(self, chosen: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        return self.x[chosen], None if self.labels is None else self.labels[chosen]


def _parts(run: Run) -> dict[str, _Part]:
    """What is evaluated: test and training data, or the images of ``likelihood.images``."""
    block, data = run.config.likelihood, run.data if run.config.likelihood.images is None else None
    if data is None:
        x = given_images(block.images, run.info)
        wrong = off_the_grid(x, run.info.levels or 2).flatten(1).any(1)
        count = len(x) if block.test_images is None else min(len(x), block.test_images)
        levels = torch.where(wrong.reshape(-1, *(1,) * (x.ndim - 1)), 0, x).long()
        return {"images": _Part(torch.arange(count), levels[:count], None, wrong[:count])}
    indices = {"test": subset(len(data.test), block.test_images)}
    train_count = len(indices["test"]) if block.train_images is None else block.train_images
    if train_count:
        indices["train"] = subset(len(data.train), train_count)
    return {
        name: _Part(chosen, *part_of(data, name, chosen), torch.zeros(len(chosen), dtype=torch.bool))
        for name, chosen in indices.items()
    }


def likelihood(run: Run, place: Workdir, references: dict[str, float] | None = None) -> dict[str, Any]:
    """Test and training bits/dim (images) or nats (vectors) with their standard errors over samples, and what the
    error of the test mean is made of; or the same of the images in the file ``likelihood.images``.

    Writes ``likelihood.csv``, a line for each sample, ``likelihood.png``, and for images the best and worst.
    Samples that fail are named in the section, and are NaN in the file; the others are finished.
    """
    block, settings = run.config.likelihood, build.likelihood(run.config)
    unit = "bits/dim" if run.info.is_image else "nats"
    conditional = bool(run.config.model.class_conditional)
    parts = _parts(run)
    first_name, first_part = next(iter(parts.items()))
    section: dict[str, Any] = {
        "unit": unit,
        "step": run.step,
        "weights_sha256": weights_hash(run.model),
        "levels": run.info.levels,
        "seed": int(run.config.seed),
    }
    if run.info.is_image and block.dequantization == build.VARIATIONAL:
        section["flow"] = weights_hash(run.flow)
    x, labels = first_part.rows((~first_part.wrong).nonzero().flatten()[: settings.pilot_images])
    labels = labels if conditional else None
    chosen: dict[str, Any] = {}
    if settings.tolerance is not None:
        if len(x) < 2:
            raise ValueError(f"a tolerance needs at least 2 pilot_images, got {len(x)}")
        chosen, section["plan"] = _planned(run, x, labels, len(first_part))
    place.folder.mkdir(parents=True, exist_ok=True)
    key = {name: section.get(name) for name in ("seed", "step", "weights_sha256", "flow")}
    data = {name: hashlib.sha256(part.x.numpy().tobytes()).hexdigest() for name, part in parts.items()}
    shared = {key: value for key, value in block.to_dict().items() if key not in ("jobs", "batch_size")}
    shared["precision"] = str(build.network_precision(run.config, "likelihood", run.device))
    everything = key | {"block": shared, "chosen": chosen, "data": data}
    rows = _Rows(place, hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest())
    draws = chosen.get("dequantizations", settings.dequantizations)
    values: dict[str, Tensor] = {}
    for name, part in parts.items():
        before = rows.done(name)
        for batch in _batches(run, name, part, before, settings, chosen, conditional):
            rows.add(batch)
        mine = [row for row in rows.rows if row[0] == name]
        values[name] = torch.tensor([row[3] for row in mine], dtype=torch.float64)
        section[name] = _summary(mine, part, draws) | ({"resumed_after": before} if before else {})
        if name in ("test", "train") and not run.info.is_image and run.data.density is not None:
            finite = torch.isfinite(values[name])
            exact = run.data.density.log_prob(part.x.double())
            section[name]["exact"] = mean_and_error(exact)
            section[name]["mean_absolute_difference"] = float((values[name] - exact)[finite].abs().mean())
    if settings.pilot_images > 1 and len(x) > 1:
        section["error_of_the_mean"] = _error(run, x, labels, chosen, values[first_name], draws)
    section["settings"] = block.to_dict() | chosen
    if block.images is None:
        section["prior_mismatch"] = _prior(run)
    with open(place / "likelihood.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("part", "index", "label", unit.replace("/", "_per_"), "evaluations"))
        writer.writerows((*row[:3], f"{row[3]:.6f}", row[4]) for row in rows.rows)
    section["files"] = ["likelihood.csv", *_pictures(run, place, first_part, values, references or {})]
    rows.path.unlink()
    return section


def _batches(
    run: Run,
    name: str,
    part: _Part,
    done: int,
    settings: build.LikelihoodSettings,
    chosen: dict[str, Any],
    conditional: bool,
) -> Iterator[list[Row]]:
    """The rows of the samples after the first ``done``, batch by batch in their order."""
    size = max(1, min(settings.batch_size, math.ceil((len(part) - done) / settings.jobs)))
    tasks = [
        (name, part.piece(slice(first, first + size)), first, chosen, conditional)
        for first in range(done, len(part), size)
    ]
    if settings.jobs == 1 or len(tasks) < 2:
        yield from (_batch(run, *task) for task in tasks)
        return
    flow = run.flow.state_dict() if run.config.likelihood.dequantization == build.VARIATIONAL else None
    here = (str(run.folder), run.config.to_dict(), run.model.state_dict(), flow)
    with processes(settings.jobs, _load_here, here) as pool:
        for rows in pool.map(_batch_here, tasks):
            # As long as it took all of them together.
            yield [(*row[:-1], row[-1] / settings.jobs) for row in rows]


_here: Run | None = None
"""The run of a process that only evaluates."""


def _load_here(
    folder: str, config: dict[str, Any], weights: dict[str, Tensor], flow: dict[str, Tensor] | None
) -> None:
    global _here
    _here = load(folder, config=changed(config), device="cpu")
    # Not those of the newest checkpoint, which may be another by now.
    _here.model.load_state_dict(weights)
    if flow is not None:
        _here.flow.load_state_dict(flow)


def _batch_here(task: tuple[Any, ...]) -> list[Row]:
    assert _here is not None
    return _batch(_here, *task)


def _batch(
    run: Run, name: str, part: _Part, first: int, chosen: dict[str, Any], conditional: bool
) -> list[Row]:
    """The rows of the samples from ``first`` on; of those that cannot be evaluated the value is NaN."""
    started, labels = time.perf_counter(), part.labels
    out = run.evaluate(
        part.x, run.config.seed, y=labels if conditional else None, first_index=first, **chosen
    )
    value = _in_unit(run, out.log_prob).masked_fill(part.wrong, math.nan)
    names = [""] * len(part) if labels is None else [str(label) for label in labels.tolist()]
    seconds = (time.perf_counter() - started) / len(part)
    columns = (part.indices.tolist(), names, value.tolist(), out.nfe_per_sample.tolist())
    return [(name, *row, seconds) for row in zip(*columns, strict=True)]


def _summary(rows: list[Row], part: _Part, draws: int) -> dict[str, Any]:
    """The numbers of a part: mean with its error, evaluations of one likelihood, time, and who failed and why."""
    value = torch.tensor([row[3] for row in rows], dtype=torch.float64)
    evaluations = torch.tensor([row[4] for row in rows]).double() / draws
    finite = torch.isfinite(value)
    section = {
        **mean_and_error(value[finite]),
        "nfe": float(evaluations.mean()),
        "nfe_quartiles": torch.quantile(evaluations, torch.linspace(0, 1, 5).double()).tolist(),
        "seconds": round(sum(row[5] for row in rows), 3),
    }
    if not bool(finite.all()):
        section["failed"] = part.indices[~finite].tolist()
    if bool(part.wrong.any()):
        section["off_the_grid"] = part.indices[part.wrong].tolist()
    return section


def _error(
    run: Run, x: Tensor, labels: Tensor | None, chosen: dict[str, Any], values: Tensor, draws: int
) -> dict[str, Any]:
    """Contributions to the error of the test mean: standard errors by their source, and the solver's bias."""
    found, _ = _measure(run, x, labels, chosen)
    draws, n = chosen.get("dequantizations", draws), int(torch.isfinite(values).sum())
    within = (found.dequantization + found.probe) / draws
    total = float(values[torch.isfinite(values)].var()) if n > 1 else math.nan
    return {
        "between_images": math.sqrt(max(0.0, total - within) / n),
        "dequantization": math.sqrt(found.dequantization / draws / n),
        "probes": math.sqrt(found.probe / draws / n),
        "solver": found.solver,
        "solver_per_image": found.solver_spread,
        "pilot_images": found.images,
    }


def _prior(run: Run) -> dict[str, float]:
    """What the prior costs on average, in the unit of the section, from the training data."""
    x = run.data.train[:4096].double()
    if run.info.levels is not None:
        x = (2 * x + 1) / run.info.levels - 1
    found = prior_mismatch(run.sde, x)
    scale = 1.0 if run.info.levels is None else 1 / (math.log(2) * math.prod(run.info.shape))
    return {"gaussian": found.gaussian * scale, "most": found.most * scale}


def _pictures(
    run: Run, place: Workdir, first: _Part, values: dict[str, Tensor], references: dict[str, float]
) -> list[str]:
    path = place / "likelihood.png"
    kept = {part: torch.isfinite(value) for part, value in values.items()}
    shown = {part: value[kept[part]] for part, value in values.items() if bool(kept[part].any())}
    if not shown:
        return []
    if not run.info.is_image:
        pictures.save_histogram(shown, path, x_label="log-likelihood of a sample, nats")
        return [path.name]
    pictures.save_bits_per_dim_histogram(shown, path, baselines=references)
    name, extremes = next(iter(values)), place / "likelihood_extremes.png"
    if name not in shown:
        return [path.name]
    pictures.save_best_and_worst(as_pictures(first.x[kept[name]], run), shown[name], extremes)
    return [path.name, extremes.name]
