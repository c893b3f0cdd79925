"""Fine-tuning: training that begins with the averaged weights of another run."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from sde_diffusion.build import DataInfo
from sde_diffusion.checkpoint import CheckpointError, config_differences, load_weights, weights_hash
from sde_diffusion.config import UsageError
from sde_diffusion.runs import load
from sde_diffusion.score import ScoreModel
from sde_diffusion.workdir import Workdir

__all__ = ["load_initial_weights"]

_MAY_DIFFER = ("model.dropout", "model.checkpointing", "sde.t_min")
"""What changes neither the weights nor what they mean."""


def load_initial_weights(
    model: ScoreModel, config: ConfigDict, info: DataInfo, place: Workdir
) -> dict[str, Any]:
    """Loads the averaged weights of the run in ``training.init_from`` into ``model``, which is in training mode and
    on the CPU. Nothing else is taken over: optimizer, averages, order of the data and schedules begin anew.

    Args:
        model: as ``config`` says, for the data of ``info``.
        config: of the new run.
        info: of the new run's data.
        place: the new run's folder.

    Returns:
        Where they came from, for ``metrics.json``: folder, step, hash of the weights, objective.

    Raises:
        UsageError: there is no such run, it was imported, it cannot be read, or its network, process or data are of
            another kind; the message says which keys differ.
    """
    source = Workdir(config.training.init_from)
    try:
        if source.folder.resolve() == place.folder.resolve():
            raise UsageError("this is the folder of the new run itself; choose another --workdir")
        run = load(source.folder, device="cpu")
        if run.step is None:
            raise UsageError(
                f"the model in {str(source.folder)!r} was imported, and only trained ones go on training"
            )
        differences = config_differences(
            {name: run.config[name].to_dict() for name in ("model", "sde")},
            {name: config[name].to_dict() for name in ("model", "sde")},
            _MAY_DIFFER,
        )
        differences += [
            f"{name} of the data: {theirs} there, {mine} now"
            for name, theirs, mine in (
                ("shape", run.info.shape, info.shape),
                ("levels", run.info.levels, info.levels),
                ("number of classes", run.info.num_classes, info.num_classes),
            )
            if theirs != mine and (name != "number of classes" or config.model.class_conditional)
        ]
        if differences:
            raise UsageError(
                f"the run in {str(source.folder)!r} is of another model: "
                + "; ".join(line.replace("in the checkpoint", "there") for line in differences)
            )
        load_weights(model, run.model.state_dict(), source.folder)
    except (UsageError, CheckpointError) as error:
        raise UsageError(f"config.training.init_from: {' '.join(str(error).split())}") from None
    return {
        "folder": str(source.folder),
        "step": run.step,
        "weights_sha256": weights_hash(run.model),
        "objective": {
            key: run.config.training[key] for key in ("objective", "weighting", "time_sampler", "steps")
        },
    }
