"""The text of ``--help``."""

from __future__ import annotations

import textwrap

from sde_diffusion.config import SCHEMA, Key

__all__ = ["help_text"]

_HEAD = """\
Score models through stochastic differential equations: train or import one, sample, evaluate its likelihood.

  python -m sde_diffusion.run --mode MODE [--config FILE[:NAME]] [--workdir DIR] [--config.KEY=VALUE ...]

MODE
  train        trains, or resumes where an earlier attempt stopped (Ctrl-C is safe, the same command goes on);
               then draws sample grids by predictor-corrector and by ODE, evaluates bits/dim and quality
  sample       draws sampling.n samples from the trained model in DIR: samples.npz, samples.png
  likelihood   evaluates bits/dim of test and training data: likelihood.csv (each image), likelihood.png;
               the same command goes on after a kill
    --tolerance ERROR               wanted error of the mean, such as 0.01: chooses probes, dequantizations
                                    and the solver's tolerance at least cost, and says how
  dequantize   trains the flow of variational dequantization for the model in DIR, which stays as it is; for
               --mode likelihood --config.likelihood.dequantization=variational
  bound        evaluates the variational bound term by term, beside its limit in continuous time, the
               importance-weighted bound and the likelihood by the ODE: bound.csv (each term), bound.png
  compare      predictors and correctors at equal numbers of evaluations, on targets known exactly and on runs
               (compare.targets): report.html, results.json in DIR (runs/correctors); the same command goes on
  import       makes DIR the run of a published model, for the modes above and sde_diffusion.load:
    --source PATH_OR_REPO           its file or folder, or owner/name on the Hugging Face hub
    --workdir DIR                   where it goes; must hold no other run
    --format FORMAT                 sde_diffusion, score_sde, openai, diffusers or edm; default: recognised
    --model-config FILE_OR_PRESET   its architecture, where it is not in the source or beside it
    --raw                           the last weights instead of the averaged ones, where it has both
    --config.data.image_size=N      the size of its images, where the source does not say it

--config FILE[:NAME]
  A Python file with get_config() or get_config(NAME) that returns what differs from the defaults below (see
  configs/), or the config.json of a run. Without it: handwritten digits and the VP SDE; in the modes sample
  and likelihood the config that DIR was trained with.
--workdir DIR
  Where everything goes. Default: runs/ and the name of the config file, or else of the data set: runs/digits.
    metrics.json            every number, with config, versions and machine
    *.png *.npz *.csv       pictures, samples, values for each image
    config.json             the config in full
    model.safetensors       an imported model
    dequantization/         the flow of variational dequantization
    checkpoints/            in Python: run = sde_diffusion.load("DIR"); run.sample(64); run.bits_per_dim(x)
    tensorboard/            tensorboard --logdir runs
--config.KEY=VALUE
  Any key below. Switches: --config.data.flip or --noconfig.data.flip. Tuples:
  --config.model.channel_multipliers=1,2,2

Examples
  python -m sde_diffusion.run --mode train
  python -m sde_diffusion.run --mode train --config configs/digits_ve.py --config.training.steps=3000
  python -m sde_diffusion.run --mode sample --config.sampling.n=1000 --config.sampling.method=ode
  python -m sde_diffusion.run --mode sample --workdir runs/digits_ve --config.sampling.predictor=ddim
  python -m sde_diffusion.run --mode likelihood --workdir runs/digits --config.likelihood.dequantizations=4
  python -m sde_diffusion.run --mode compare --config.compare.budget=3
  python -m sde_diffusion.run --mode import --source checkpoint_8.pth --workdir runs/cifar10_ve

Exit status
  0; 1: training diverged or an evaluation failed; 2: a mistake in what was asked, found before any work;
  130 and 143: stopped by Ctrl-C or SIGTERM

Config keys, their defaults and what they mean"""

_WIDTH = 110


def help_text() -> str:
    """What ``--help`` prints: modes, files, examples, and every config key with its default and meaning."""
    lines = [_HEAD]
    for name, entry in SCHEMA.items():
        if isinstance(entry, Key):
            lines += _line(name, entry)
        else:
            lines.append("")
            for key, value in entry.items():
                lines += _line(f"{name}.{key}", value)
    return "\n".join(lines)


def _line(name: str, key: Key) -> list[str]:
    default = "none" if key.default is None else str(key.default).replace(" ", "")
    head = f"  {f'{name}={default}':<45} "
    return textwrap.wrap(key.help, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
