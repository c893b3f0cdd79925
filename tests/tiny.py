"""The command line with a network and settings that take a second: for tests of what surrounds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sde_diffusion import run

STEPS = 4
SETTINGS: dict[str, Any] = {
    "training.steps": STEPS,
    "training.batch_size": 16,
    "training.eval_size": 16,
    "training.checkpoint_every": 2,
    "sde.t_min": 1e-2,  # short paths for the ODE
    "model.parametrization": "noise",
    "model.channels": 16,
    "model.channel_multipliers": (1,),
    "model.attention_levels": (),
    "model.middle_attention": False,
    "model.blocks_per_level": 1,
    "sampling.steps": 3,
    "sampling.rtol": 0.1,
    "sampling.atol": 0.1,
    "likelihood.rtol": 0.9,
    "likelihood.atol": 5.0,
    "likelihood.test_images": 8,
    "report.quality_samples": 30,
    "report.permutations": 10,
}
NO_REPORT = {f"report.{name}": False for name in ("pc", "ode", "likelihood", "baseline", "quality")}
POINTS = {
    "data.name": "gaussians8",
    "data.size": 400,
    "model.name": "mlp",
    "model.width": 16,
    "model.depth": 1,
}


def arguments(mode: str, workdir: Path, **changes: Any) -> list[str]:
    """A command line; ``changes`` are keys with ``__`` for the dot, or ``config`` for a config file."""
    words = ["--mode", mode, "--workdir", str(workdir)]
    if "config" in changes:
        words += ["--config", str(changes.pop("config"))]
    settings = SETTINGS | {key.replace("__", "."): value for key, value in changes.items()}
    return [*words, *(f"--config.{key}={value}" for key, value in settings.items())]


def command(mode: str, workdir: Path, **changes: Any) -> int:
    """Runs it in this process; the exit status."""
    return run.main(arguments(mode, workdir, **changes))


def keywords(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as keyword arguments of :func:`command`."""
    return {key.replace(".", "__"): value for key, value in settings.items()}
