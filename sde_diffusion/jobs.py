"""The jobs of the command line: train (and evaluate), sample, train a dequantization, evaluate the likelihood or the
variational bound, import a published model.

Each checks everything that can be checked before it starts, writes its numbers into ``metrics.json`` as soon
as it has them, and prints a summary. Their errors before any work is done are
:class:`~sde_diffusion.config.UsageError`.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from torch import nn

from sde_diffusion import bound_report, build, evaluation, likelihood_report, pictures
from sde_diffusion.build import DataInfo
from sde_diffusion.checkpoint import CheckpointError, config_differences, weights_hash
from sde_diffusion.compare.job import compare_job
from sde_diffusion.config import UsageError, changed, default_config
from sde_diffusion.data import from_model
from sde_diffusion.dequantization_loss import FlowModel
from sde_diffusion.finetuning import load_initial_weights
from sde_diffusion.imported import IMPORTED, import_config, read_source, write_imported
from sde_diffusion.pretrained.native import network_of
from sde_diffusion.runs import Run, Samples, load
from sde_diffusion.score import ScoreModel
from sde_diffusion.summary import duration, summarize
from sde_diffusion.training import Trainer, TrainingResult
from sde_diffusion.workdir import RESUMABLE_CHANGES, Workdir, environment

__all__ = [
    "EvaluationError",
    "bound_job",
    "dequantize_job",
    "import_job",
    "likelihood_job",
    "sample_job",
    "train_job",
]

_PREVIEW = 36  # samples in a picture for TensorBoard
_EVALUATION = ("samples_pc", "samples_ode", "likelihood", "baseline", "quality")
_NAMES = {"pc": "predictor-corrector", "ode": "the probability-flow ODE"}


class EvaluationError(RuntimeError):
    """Parts of an evaluation failed; everything else was done and is in ``metrics.json``."""


def _say(text: str) -> None:
    print(text, flush=True)


def _on_a_terminal() -> bool:
    return sys.stderr.isatty()


def _check_sampling(config: ConfigDict, model: ScoreModel | None = None) -> None:
    build.positive(config, "seed", 0)
    build.positive(config, "sampling.batch_size")
    build.network_precision(config, "sampling", build.device(config))
    build.sampler(config, model=model)


# ------------------------------------------------------------------------------------------------------ train


def train_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains to the end, from where an earlier attempt stopped, then computes what ``config.report`` says.

    Returns:
        All sections of ``metrics.json``.

    Raises:
        UsageError: a value of the config, the data or the folder are wrong; nothing has been done.
        TrainingInterrupted, TrainingDiverged: see :class:`~sde_diffusion.training.Trainer`.
        EvaluationError: the model is trained and saved, but parts of its evaluation failed.
    """
    place = Workdir(workdir)
    process, device = build.sde(config), build.device(config)
    settings, augmentation = build.training_settings(config), build.augmentation(config)
    _check_sampling(config)
    for method in _NAMES:
        build.sampler(changed(config.to_dict() | {"sampling.method": method}))
    build.sampler(config, "report.quality_method")
    build.likelihood(config)
    build.positive(config, "report.quality_samples", 4)
    build.positive(config, "report.permutations")
    place.require_same_run(config)
    if config.report.likelihood and config.likelihood.dequantization == build.VARIATIONAL:
        raise UsageError(
            "a flow of variational dequantization is trained when its model is finished: leave "
            "likelihood.dequantization for now, or report.likelihood, and go on with --mode dequantize"
        )
    data = build.dataset(config)
    info = DataInfo.of(data)
    model = build.score_model(config, info)
    origin = None
    if config.training.init_from is not None and not place.checkpoints.paths():
        origin = load_initial_weights(model, config, info, place)
    size = sum(p.numel() for p in model.parameters())
    try:
        trainer = Trainer(
            model,
            data,
            settings,
            place.folder,
            config.to_dict() | {"data_info": info.plain()},
            augmentation=augmentation,
            may_change=RESUMABLE_CHANGES,
            defaults=default_config().to_dict(),
        )
    except ValueError as error:
        raise UsageError(f"config.training: {error}") from error
    place.write_config(config)
    if origin is not None:
        place.merge_metrics(initial_weights=origin)
        _say(f"beginning with the averaged weights of {origin['folder']} after {origin['step']} steps")
    _say(
        f"training on {info.name} ({len(data.train)} samples of {'x'.join(map(str, info.shape))}, "
        f"{len(data.test)} held out), {process}, {size:,} parameters, on {device.type}; "
        f"results go to {place.folder}"
    )

    def preview(step: int, averaged: nn.Module) -> Any:
        assert isinstance(averaged, ScoreModel)
        run = Run(place.folder, config, info, averaged, step, device)
        return pictures.image_grid(run.sample(_PREVIEW, config.seed, method="ode")) if info.is_image else None

    result = trainer.run(preview if settings.sample_every else None)
    place.drop_metrics(*_EVALUATION)  # of an earlier state of the model
    place.merge_metrics(
        run={
            "config": config.to_dict(),
            "data": info.plain() | {"train": len(data.train), "test": len(data.test)},
            **environment(device),
        },
        training=_training_section(result, size),
    )
    run = load(place.folder, config=config)
    run.data = data  # already loaded
    return _evaluate(run, place)


def _training_section(result: TrainingResult, parameters: int) -> dict[str, Any]:
    return {
        "steps": result.step,
        "seconds": round(result.seconds, 3),
        "samples_per_second": round(result.samples_per_second, 1),
        "parameters": parameters,
        "loss": result.loss,
        "train_loss": result.train_loss,
        "heldout_loss": result.heldout_loss,
        "skipped_steps": result.skipped,
        "checkpoint": str(result.checkpoint.relative_to(result.checkpoint.parents[1])),
    }


class _Sections:
    """Computes sections and writes each when it is done; one that fails does not stop the others."""

    def __init__(self, place: Workdir) -> None:
        self.place = place
        self.failed: list[str] = []

    def add(self, name: str, what: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The section, or None where it failed."""
        _say(f"{what} ...")
        started = time.perf_counter()
        try:
            section = compute()
        except Exception as error:  # the checkpoint is safe, and the other sections can still be had
            traceback.print_exc()
            self.failed.append(name)
            reason = " ".join(str(error).split()) or "no message"
            self.place.merge_metrics(**{name: {"error": f"{type(error).__name__}: {reason}"}})
            return None
        self.place.merge_metrics(**{name: section})
        _say(f"{what}: done in {duration(time.perf_counter() - started)}")
        return section


def _evaluate(run: Run, place: Workdir) -> dict[str, Any]:
    report = run.config.report
    sections = _Sections(place)
    drawn: dict[str, Samples] = {}

    def draw(method: str) -> dict[str, Any]:
        # Points are cheap, and a picture of them needs many.
        many = not run.info.is_image or (report.quality and method == report.quality_method)
        count = max(evaluation.GRID, report.quality_samples if many else 0)
        drawn[method] = run.draw(count, run.config.seed, method=method, progress=_on_a_terminal())
        picture = evaluation.save_samples_picture(run, drawn[method], place / f"samples_{method}.png")
        return evaluation.samples_section(run, drawn[method], method, picture)

    for method, what in _NAMES.items():
        if report[method] or (report.quality and method == report.quality_method):
            sections.add(f"samples_{method}", f"sampling by {what}", partial(draw, method))
    references: dict[str, float] = {}
    if report.baseline:
        what = "fitting the Gaussian mixture baseline"
        fitted = sections.add("baseline", what, lambda: evaluation.baseline(run))
        if fitted and "test_bits_per_dim" in fitted:
            references["Gaussian mixture, test"] = fitted["test_bits_per_dim"]
    if report.likelihood:
        what = "evaluating likelihoods"
        sections.add("likelihood", what, lambda: likelihood_report.likelihood(run, place, references))
    if report.quality and report.quality_method in drawn:
        method, what = report.quality_method, "comparing samples with data"
        x, y = drawn[method].x[: report.quality_samples], drawn[method].y
        labels = None if y is None else y[: len(x)]
        sections.add("quality", what, lambda: evaluation.quality(run, place, x, method, labels))
    return _finish(run, place, sections, ("initial_weights", "training", *_EVALUATION))


def _finish(run: Run, place: Workdir, sections: _Sections, shown: tuple[str, ...]) -> dict[str, Any]:
    metrics = place.read_metrics()
    _say(
        f"\n{run.info.name}, {run.sde}, {run.history}\n{summarize(metrics, shown)}\n  everything   "
        f"{place.metrics_file}"
    )
    if sections.failed:
        raise EvaluationError(
            f"failed: {', '.join(sections.failed)} (see above). The model is safe in "
            f"{place / 'checkpoints'}, all other results in "
            f"{place.metrics_file}"
        )
    return metrics


# --------------------------------------------------------------------------------------------------- the rest


def _load(config: ConfigDict, workdir: str | Path) -> Run:
    try:
        return load(workdir, config=config)
    except CheckpointError as error:
        raise UsageError(" ".join(str(error).split())) from error


def sample_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Draws ``config.sampling.n`` samples from the trained model: ``samples.npz``, ``samples.png``, and the
    section ``samples``.

    ``samples.npz`` holds ``x`` (float32, as the model has them), for images ``levels`` (grey levels), and for
    class-conditional models ``y``.

    Raises:
        UsageError: the config or the folder are wrong; nothing has been done.
        EvaluationError: sampling failed.
    """
    place = Workdir(workdir)
    count = build.positive(config, "sampling.n")
    run = _load(config, workdir)
    _check_sampling(config, run.model)
    method = run.config.sampling.method
    sections = _Sections(place)

    def draw() -> dict[str, Any]:
        samples = run.draw(count, config.seed, progress=_on_a_terminal())
        arrays = {"x": samples.x.cpu().numpy()}
        if run.info.levels is not None:
            arrays["levels"] = from_model(samples.x.cpu(), run.info.levels).numpy()
        if samples.y is not None:
            arrays["y"] = samples.y.cpu().numpy()
        np.savez_compressed(place / "samples.npz", **arrays)  # type: ignore[arg-type]
        picture = evaluation.save_samples_picture(run, samples, place / "samples.png")
        section = evaluation.samples_section(run, samples, method, picture)
        return {**section, "file": "samples.npz", **environment(run.device)}

    sections.add("samples", f"drawing {count} samples by {_NAMES[method]}", draw)
    return _finish(run, place, sections, ("samples",))


def likelihood_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the likelihood of test and training data: ``likelihood.csv``, ``likelihood.png``, and the
    section ``likelihood``.

    Raises:
        UsageError: the config, the data or the folder are wrong; nothing has been done.
        EvaluationError: the evaluation failed.
    """
    place = Workdir(workdir)
    build.positive(config, "seed", 0)
    build.likelihood(config)
    run = _load(config, workdir)
    # Loaded now: what is wrong with the data or the flow is an error of usage.
    if config.likelihood.images is None:
        assert run.data is not None
    else:
        evaluation.given_images(config.likelihood.images, run.info)
    if run.info.is_image and run.config.likelihood.dequantization == build.VARIATIONAL:
        assert run.flow is not None
    fitted = place.read_metrics().get("baseline", {}).get("test_bits_per_dim")
    references = {} if fitted is None else {"Gaussian mixture, test": float(fitted)}
    sections = _Sections(place)

    def evaluate() -> dict[str, Any]:
        return {**likelihood_report.likelihood(run, place, references), **environment(run.device)}

    sections.add("likelihood", "evaluating likelihoods", evaluate)
    return _finish(run, place, sections, ("likelihood", "baseline"))


def dequantize_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains the flow of variational dequantization for the model in a folder, or goes on where an earlier attempt
    stopped: ``dequantization/``, and the section ``dequantization``. The model stays as it is.

    Raises:
        UsageError: the config, the data or the folder are wrong, or there is a flow of another kind or for other
            weights of the model; nothing has been done.
        TrainingInterrupted, TrainingDiverged: see :class:`~sde_diffusion.training.Trainer`.
    """
    place = Workdir(workdir)
    build.positive(config, "seed", 0)
    run = _load(config, workdir)
    flow = build.dequantization_flow(config, run.info)
    data, levels = run.data, run.info.levels
    assert levels is not None
    settings = build.dequantization_training(config, run.model, levels)
    own, folder = {"flow": flow.config, "model": weights_hash(run.model)}, place.dequantization.folder
    try:
        there = place.dequantization.checkpoints.load()
        differences = [] if there is None else config_differences(there[1]["config"], own)
        if differences:
            raise UsageError(
                f"the flow in {folder} is another ({'; '.join(differences)}): delete that folder to train a new one"
            )
        trainer = Trainer(FlowModel(flow, run.sde), data, settings, folder, own)
        size = sum(p.numel() for p in flow.parameters())
        _say(
            f"training a dequantization flow of {size:,} parameters for {run.info.name}, {run.sde}, {run.history}; "
            f"results go to {folder}"
        )
        uniform = trainer.evaluate()  # a new flow is uniform
        result = trainer.run()
    except CheckpointError as error:
        raise UsageError(f"{' '.join(str(error).split())}; or delete {folder} to begin anew") from error
    place.merge_metrics(
        dequantization={
            **_training_section(result, size),
            "unit": "bits/dim",
            "uniform_train_loss": uniform["eval/train_loss"],
            "uniform_heldout_loss": uniform["eval/heldout_loss"],
            "model_step": run.step,
            "settings": run.config.dequantize.to_dict(),
            **environment(run.device),
        }
    )
    return _finish(run, place, _Sections(place), ("dequantization",))


def bound_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the variational bound of test data, term by term, beside its limit in continuous time and the ODE's
    likelihood: ``bound.csv``, ``bound.png``, and the section ``bound``.

    Raises:
        UsageError: the config, the data or the folder are wrong; nothing has been done.
        EvaluationError: the evaluation failed.
    """
    place = Workdir(workdir)
    build.positive(config, "seed", 0)
    build.bound(config)
    build.likelihood(config)
    run = _load(config, workdir)
    if tuple(run.model.data_range) != (-1.0, 1.0):
        raise UsageError(
            f"the bound is for models of data in (-1, 1), and this one has {run.model.data_range}"
        )
    assert run.data is not None  # loaded now: what is wrong with the data is an error of usage
    sections = _Sections(place)

    def evaluate() -> dict[str, Any]:
        return {**bound_report.bound(run, place, _on_a_terminal()), **environment(run.device)}

    sections.add("bound", "evaluating the variational bound", evaluate)
    return _finish(run, place, sections, ("bound", "likelihood"))


def import_job(
    config: ConfigDict,
    workdir: str | Path,
    *,
    source: str,
    format: str | None = None,
    model_config: str | None = None,
    raw: bool = False,
) -> dict[str, Any]:
    """Makes a folder the run of a published model, which the other modes then know like a trained one; and the
    section ``import``.

    Args:
        config: of :func:`~sde_diffusion.imported.import_config`, with other data, sampling, and so on.
        workdir: the folder, which holds no other run.
        source, format: as in :func:`~sde_diffusion.pretrained.load_pretrained`.
        model_config: its ``config``: a JSON file, or the name of a preset.
        raw: the last weights instead of the averaged ones, where the source has both.

    Raises:
        UsageError: the source, the config or the folder are wrong; nothing has been done.
    """
    place, started = Workdir(workdir), time.perf_counter()
    expected, device = import_config(), build.device(config)
    for block in ("sde", "model"):
        if config[block] != expected[block]:
            raise UsageError(f"the source says what config.{block} would: leave out --config.{block}.*")
    found = read_source(source, config, format=format, model_config=model_config, ema=not raw)
    config.model.class_conditional = found.info.num_classes is not None
    if config.data.name == IMPORTED:  # they told of the model, not of data
        config.data.image_size = config.data.levels = None
    write_imported(place, config, found)
    model = found.model
    place.merge_metrics(
        **{
            "import": {
                **found.record,
                "parameters": sum(p.numel() for p in model.parameters()),
                "network": type(network_of(model)).__name__,
                "sde": str(model.sde),
                "parametrization": model.parametrization.name,
                "conditioning": model.conditioning.name,
                "data_range": list(model.data_range),
                "data": found.info.plain(),
                "file": place.model_file.name,
                "seconds": round(time.perf_counter() - started, 3),
                **environment(device),
            }
        }
    )
    return _finish(load(place.folder), place, _Sections(place), ("import",))


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "train": train_job,
    "sample": sample_job,
    "dequantize": dequantize_job,
    "likelihood": likelihood_job,
    "bound": bound_job,
    "compare": compare_job,
    "import": import_job,
}
"""The jobs by the name of their mode."""
