"""The configuration of a run: every key with its default and what it means, and how changes to it are read
and checked.

A config is a locked ``ml_collections.ConfigDict`` of small blocks. :data:`SCHEMA` is the one place where its
keys are stated; the defaults, ``--help``, and the error for a key that does not exist all come from it. Names
in a config (of an SDE, a predictor, ...) become objects in :mod:`sde_diffusion.build`, which is also where
values are checked. Keys that do not apply to the chosen name, such as ``sde.sigma_max`` with
``sde.name="vp"``, have no effect.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

__all__ = [
    "SCHEMA",
    "UsageError",
    "changed",
    "config_keys",
    "default_config",
    "load_config",
    "set_key",
    "unknown_key",
]


class UsageError(ValueError):
    """What was asked for cannot be done; the message says why in one line, which the command line prints."""


class Key(NamedTuple):
    """A config key: its default, what it means, and, where ``none`` is a value, its type otherwise."""

    default: Any
    help: str
    optional: type | None = None


_DATA_HELP = (
    "digits; the 2-D sets gaussians8, gaussians25, moons, checkerboard; folder, arrays, idx (MNIST), "
    "cifar10, parquet, which need data.path; or hf:owner/name of the Hugging Face hub"
)

SCHEMA: dict[str, Key | dict[str, Key]] = {
    "seed": Key(0, "of everything random: initial weights, order of the data, noise"),
    "device": Key("auto", "auto (a GPU if there is one), cpu or cuda"),
    "data": {
        "name": Key("digits", _DATA_HELP),
        "path": Key(None, "file or folder of the data", str),
        "image_size": Key(
            None, "N or (H,W): images are resized and cropped to it; none: as they are", object
        ),
        "channels": Key(None, "1 (grey) or 3 (colour); none: as they are", int),
        "levels": Key(None, "grey levels of arrays; none: 256", int),
        "layout": Key(None, "order of the dimensions of arrays, such as NHWC; none: found out", str),
        "image_column": Key(None, "of parquet and Hugging Face data; none: found out", str),
        "label_column": Key(None, "of parquet and Hugging Face data; none: found out", str),
        "limit": Key(None, "read at most so many images", int),
        "size": Key(None, "samples of a toy set", int),
        "test_fraction": Key(None, "held out, where the data come in one part", float),
        "split_seed": Key(None, "of that split, and of toy samples", int),
        "flip": Key(False, "augment by horizontal flips"),
        "shift": Key(0, "augment by shifts of up to so many pixels"),
        "augment_probability": Key(1.0, "of augmenting a sample at all"),
    },
    "sde": {
        "name": Key(
            "vp", "vp, subvp, ve, cosine, ddpm (a chain of steps), learned (a learned schedule) or imported"
        ),
        "beta_min": Key(0.1, "vp, subvp: the noise rate at t = 0"),
        "beta_max": Key(20.0, "vp, subvp: the noise rate at t = 1"),
        "sigma_min": Key(0.01, "ve: the smallest noise"),
        "sigma_max": Key(50.0, "ve: the largest noise"),
        "s": Key(0.008, "cosine: the offset"),
        "schedule": Key("linear", "ddpm: linear, scaled_linear, cosine or sigmoid"),
        "steps": Key(1000, "ddpm: length of the chain; ve with the objective smld: levels of the ladder"),
        "log_snr_max": Key(13.0, "learned: the log-SNR at t = 0"),
        "log_snr_min": Key(-10.0, "learned: the log-SNR at t = 1"),
        "t_min": Key(
            1e-5,
            "where training begins, and sampling and likelihoods end; a ddpm chain has its first step for it, a "
            "learned schedule 0",
        ),
    },
    "model": {
        "name": Key("unet", "unet or dit (images), mlp (vectors); imported: the published model's own"),
        "parametrization": Key(
            "levels",
            "what the network predicts: noise, data, score, v, edm, or levels (grey levels, for images of few)",
        ),
        "level_features": Key(
            False,
            "parametrization levels: show the network what each pixel says of its level, sharp to the digit",
        ),
        "level_counts": Key(False, "parametrization levels: levels that the image has become more likely"),
        "conditioning": Key("log_noise", "what the network is told of the time: log_noise or time"),
        "sigma_data": Key(0.7, "standard deviation of the data in [-1, 1], for input scaling and edm"),
        "learned_variance": Key(False, "the network also gives the variances of a chain's reverse steps"),
        "class_conditional": Key(False, "give labels to the network"),
        "dropout": Key(0.2, "probability"),
        "embedding": Key("sinusoidal", "of the time: sinusoidal or fourier"),
        "embedding_scale": Key(30.0, "of its frequencies; none: 1000 (sinusoidal), 16 (fourier)", float),
        "embedding_channels": Key(
            None, "width of the condition vector; none: 4 channels (unet), width (dit, mlp)", int
        ),
        "input_fourier": Key(None, "(n_min,n_max): add sin and cos of 2^n pi x to the input", tuple),
        "channels": Key(32, "unet: base width"),
        "channel_multipliers": Key((1, 2), "unet: width of each level over the base width, finest first"),
        "blocks_per_level": Key(1, "unet: residual blocks per level"),
        "attention_levels": Key((-1,), "unet: levels with self-attention; -1 is the coarsest"),
        "middle_attention": Key(True, "unet: self-attention in the middle"),
        "heads": Key(None, "unet, dit: attention heads; none: by their width", int),
        "head_channels": Key(None, "unet, dit: width of an attention head; none: about 64", int),
        "time_injection": Key("scale_shift", "unet: scale_shift or shift"),
        "resampling": Key("strided", "unet: strided or resampled"),
        "groups": Key(32, "unet: at most so many groups in GroupNorm"),
        "coordinates": Key(False, "unet: add pixel coordinates to the input"),
        "unshuffle": Key(1, "unet: squares of so many pixels a side become channels: cheaper"),
        "checkpointing": Key(False, "unet, dit: save memory by recomputing activations"),
        "skip_rescale": Key(False, "unet: divide residual sums by sqrt(2)"),
        "width": Key(128, "dit, mlp: hidden width"),
        "depth": Key(3, "dit, mlp: residual blocks"),
        "patch_size": Key(2, "dit: side of a patch, dividing those of the images"),
        "mlp_ratio": Key(4.0, "dit: width of the hidden layers over width"),
    },
    "training": {
        "steps": Key(1200, "optimizer steps"),
        "minutes": Key(None, "end after so many minutes, whatever steps says", float),
        "batch_size": Key(128, "samples per step"),
        "accumulate": Key(1, "micro-batches per step"),
        "learning_rate": Key(2e-3, "peak learning rate"),
        "schedule": Key("cosine", "of the learning rate: constant or cosine"),
        "warmup_steps": Key(100, "linear warm-up"),
        "optimizer": Key(
            "adam", "adam, adamw or muon (layers' matrices orthogonalised; learning rates of about 1e-2)"
        ),
        "weight_decay": Key(0.0, "decoupled for adamw and muon"),
        "beta1": Key(0.9, "of Adam"),
        "beta2": Key(0.99, "of Adam"),
        "gradient_clip": Key(1.0, "largest gradient norm; none: no clipping", float),
        "ema_decay": Key(0.999, "of the averaged weights, which all results use"),
        "objective": Key(
            "score_matching",
            "score_matching, as the next keys say; on the steps of a ddpm chain: simple, bound, or hybrid (with "
            "learned variances); smld (ve); variational (for a learned schedule)",
        ),
        "weighting": Key("likelihood", "of the loss over noise levels: simple, likelihood, edm or min_snr"),
        "min_snr_gamma": Key(5.0, "of the min_snr weighting"),
        "time_sampler": Key(
            "log_snr",
            "which times are trained: uniform, log_snr or log_normal; chains: loss_aware, or else all steps alike",
        ),
        "log_normal_mean": Key(-1.2, "log_normal: mean of log(sigma/alpha)"),
        "log_normal_std": Key(1.2, "log_normal: standard deviation of log(sigma/alpha)"),
        "time_draw": Key("stratified", "random, or stratified (low discrepancy over the batch)"),
        "antithetic": Key(False, "draw half of the times as mirror images of the other half"),
        "density_correction": Key(True, "divide the loss by the density of the times"),
        "dequantize": Key(
            True,
            "images are uniform within their grey levels; False: their centres, for chains with a decoder",
        ),
        "label_dropout": Key(0.0, "probability of hiding a label from a class-conditional network"),
        "condition_on_augmentation": Key(False, "tell the network what the augmentation did"),
        "init_from": Key(None, "begin with the averaged weights of the run in this folder: fine-tuning", str),
        "precision": Key(
            "auto", "of the network: float32, bfloat16, or auto: bfloat16 where the device has it"
        ),
        "compile": Key(False, "compile the network"),
        "channels_last": Key(None, "memory format of images and weights; none: where it is faster", bool),
        "log_every": Key(50, "steps between lines of the log"),
        "eval_every": Key(250, "steps between held-out losses; 0: at the end"),
        "eval_size": Key(None, "samples in a held-out loss; none: all", int),
        "sample_every": Key(0, "steps between sample grids in TensorBoard; 0: none"),
        "checkpoint_every": Key(250, "steps between checkpoints; 0: at the end"),
        "keep_checkpoints": Key(2, "how many checkpoints to keep"),
        "max_skipped_steps": Key(20, "stop after so many steps with a non-finite loss or gradient"),
    },
    "sampling": {
        "method": Key(
            "pc", "pc (predictor-corrector) or ode (probability flow), of --mode sample and Run.sample"
        ),
        "n": Key(100, "samples of --mode sample"),
        "batch_size": Key(500, "samples at a time; it does not change them"),
        "steps": Key(250, "pc: predictor steps"),
        "grid": Key(
            "uniform",
            "pc and ode by heun: times, uniform, quadratic, log_snr, karras, list (sampling.times), or optimal (pc "
            "without noise: made for the model and predictor before sampling)",
        ),
        "rho": Key(None, "grid karras: exponent; none: 7", float),
        "times": Key(None, "grid list: the times, falling from t_max (1); in place of steps", tuple),
        "t_end": Key(None, "pc and ode by heun: last time; none: sde.t_min", float),
        "predictor": Key(
            "reverse_diffusion",
            "pc: reverse_diffusion, euler_maruyama, ancestral, learned_variance, sde_dpm_solver++, sa_solver, "
            "adaptive_sde, restart, torchsde; without noise ddim, edm_heun, rk4, dpm_solver++, unipc, deis, ipndm, "
            "or flow (sampling.solver between the times)",
        ),
        "solver_order": Key(
            None,
            "dpm_solver++, unipc, deis, ipndm, sde_dpm_solver++, sa_solver: order; none: the usual one",
            int,
        ),
        "solver_method": Key(
            None,
            "dpm_solver++: multistep (none) or singlestep; torchsde: its method, such as srk (none) or euler",
            str,
        ),
        "variant": Key(None, "unipc: bh2 (none) or bh1", str),
        "variable": Key(None, "deis: polynomials in log_rho (none), rho or time", str),
        "lower_order_final": Key(
            None, "multistep solvers: last steps of lower order; none: as each has it", bool
        ),
        "stochasticity": Key(
            None, "of solvers of the SDE: noise, from 0 (the ODE) over 1 (none) to more", float
        ),
        "sde_rtol": Key(None, "adaptive_sde, torchsde: relative tolerance; none: theirs", float),
        "sde_atol": Key(None, "adaptive_sde, torchsde: absolute tolerance; none: theirs", float),
        "adaptive": Key(None, "torchsde: adaptive steps; none: no", bool),
        "restart": Key(
            None, "restart: (low,high,iterations,steps) in sigma / alpha; none: (0.06,0.3,2,3)", tuple
        ),
        "churn": Key(None, "edm_heun: S_churn; none: 0", float),
        "s_min": Key(None, "edm_heun, sa_solver: smallest sigma / alpha with churn or noise", float),
        "s_max": Key(None, "edm_heun, sa_solver: largest sigma / alpha with churn or noise", float),
        "s_noise": Key(None, "edm_heun: S_noise; none: 1", float),
        "ancestral_variance": Key("small", "ancestral: small or large"),
        "eta": Key(0.0, "ddim: 0 (deterministic) to 1"),
        "corrector": Key(
            "langevin",
            "pc: langevin, langevin_original, annealed_langevin, sgld, sgld_decaying, psgld, underdamped, "
            "sghmc, mala, barker, tamed, implicit, renoise or none",
        ),
        "corrector_steps": Key(1, "pc: corrector steps per predictor step"),
        "snr": Key(0.16, "pc: signal-to-noise ratio of a corrector step, of size 2 snr² sigma²"),
        "order": Key("corrector-first", "pc: corrector-first or predictor-first"),
        "denoise": Key(True, "remove the noise of the last time"),
        "precision": Key(
            "float32",
            "of the network: float32, bfloat16, or auto: bfloat16 where the device has it, faster and coarser",
        ),
        "compile": Key(False, "pc: compile the score; pays on GPUs, and needs a C++ compiler on CPUs"),
        "solver": Key(
            "dopri5",
            "ode: dopri5 (adaptive, each sample by itself), heun (fixed steps), or a method of torchdiffeq: "
            "torchdiffeq_dopri5, dopri8, bosh3, ...; rk4, midpoint, ...",
        ),
        "rtol": Key(1e-3, "adaptive solvers: relative tolerance"),
        "atol": Key(1e-3, "adaptive solvers: absolute tolerance"),
        "ode_steps": Key(50, "ode by solvers of fixed step: steps"),
        "sde": Key(
            None, "sample along another process: vp, subvp, ve, cosine, ddpm or edm; none: as trained", str
        ),
        "threshold": Key("none", "keep the expected data in bounds: none, static or dynamic"),
        "threshold_bound": Key(1.0, "the bound"),
        "threshold_quantile": Key(0.995, "dynamic: of the absolute values of a sample"),
    },
    "likelihood": {
        "divergence": Key(
            "hutchinson",
            "exact (few dimensions), or an estimate with random probes: hutchinson, gaussian, sphere, orthogonal or "
            "hutch++",
        ),
        "probes": Key(1, "random probes of an estimate"),
        "mode": Key("reverse", "products with the Jacobian: reverse or forward"),
        "solver": Key(
            "dopri5", "dopri5 (each image its own steps) or scipy (as the original: one for the batch)"
        ),
        "coordinates": Key(
            "angle", "variables of the ODE: angle or log_snr (the linear part solved exactly), or time"
        ),
        "rtol": Key(1e-2, "accuracy of the log-likelihood, nats per dimension"),
        "atol": Key(1e-2, "absolute accuracy of the log-likelihood, nats"),
        "precision": Key(
            "float32",
            "of the network: float32, bfloat16, or auto: bfloat16 where the device has it, faster and coarser",
        ),
        "max_evaluations": Key(10_000, "an image that needs more has failed, and is named"),
        "tolerance": Key(
            None,
            "wanted error of the mean in its unit, by probes, dequantization and solver: chooses probes, "
            "dequantizations, rtol and atol",
            float,
        ),
        "dequantization": Key(
            "uniform",
            "uniform; truncated_normal, for models trained on the centres of levels; or variational, by the flow of "
            "--mode dequantize",
        ),
        "dequantizations": Key(1, "dequantization draws per image"),
        "importance": Key(
            False,
            "weight the draws by importance instead of averaging: a tighter bound, with divergence exact (the noise "
            "of an estimate would pass for probability)",
        ),
        "pilot_images": Key(8, "test images evaluated again to take the error apart; 0: none"),
        "test_images": Key(None, "evaluate the first so many test images; none: all", int),
        "images": Key(
            None, "a .npy file of images as grey levels, evaluated instead of test and training data", str
        ),
        "train_images": Key(None, "and so many training images beside them; none: as many; 0: none", int),
        "batch_size": Key(360, "images at a time; it does not change the result"),
        "jobs": Key(1, "on a CPU: processes of one thread, which share the images"),
    },
    "dequantize": {
        "layers": Key(4, "of the flow: coupling layers"),
        "channels": Key(32, "of the flow: width of its networks"),
        "blocks": Key(1, "of the flow: residual blocks in each network"),
        "bins": Key(8, "of the flow: bins of its splines"),
        "steps": Key(600, "optimizer steps"),
        "minutes": Key(None, "end after so many minutes, whatever steps says", float),
        "batch_size": Key(64, "images per step"),
        "learning_rate": Key(3e-3, "peak learning rate, which decays to 0"),
        "warmup_steps": Key(20, "linear warm-up"),
        "log_every": Key(25, "steps between points of the curves"),
        "eval_every": Key(200, "steps between held-out bounds; 0: at the end"),
        "eval_size": Key(None, "images in a held-out bound; none: all, at least 1024", int),
        "checkpoint_every": Key(100, "steps between checkpoints; 0: at the end"),
    },
    "bound": {
        "steps": Key(1000, "of the chain, unless sde.name=ddpm says it"),
        "variance": Key("small", "of its reverse steps where it is not learned: small or large"),
        "subset": Key(None, "evaluate so many steps for each image, at random; none: all", int),
        "clip": Key(False, "clip predicted data to [-1, 1]"),
        "draws": Key(100, "of the time for each image, of the bound in continuous time"),
        "paths": Key(4, "of the chain for each image, of the importance-weighted bound; 0: none"),
        "path_steps": Key(250, "of these paths, equal in log-SNR; the bound is of the chain that they make"),
        "ode": Key(True, "the likelihood of the probability-flow ODE beside, by the keys of likelihood.*"),
        "test_images": Key(None, "the first so many test images; none: all", int),
        "batch_size": Key(1024, "states at a time; it does not change the result"),
    },
    "compare": {
        "targets": Key(
            ("ring", "grid", "gaussian", "funnel"),
            "ring, grid, gaussian, funnel, and folders of runs (with a slash)",
        ),
        "evaluations": Key((20, 50, 200, 1000), "per sample"),
        "correctors": Key(None, "names as of sampling.corrector; none: all", tuple),
        "ratios": Key((0.02, 0.1, 0.4), "step sizes, in units of the variance of the noise"),
        "samples": Key(1024, "of every arm"),
        "budget": Key(15.0, "minutes after which nothing more is begun"),
        "jobs": Key(2, "processes"),
    },
    "report": {
        "pc": Key(True, "a sample grid by predictor-corrector"),
        "ode": Key(True, "a sample grid by the probability-flow ODE"),
        "likelihood": Key(True, "test and train bits/dim (images) or nats (vectors)"),
        "baseline": Key(True, "bits/dim of the best Gaussian mixture (small images only)"),
        "quality": Key(
            True, "classifier, two-sample and nearest-neighbour reports (small images), distances (vectors)"
        ),
        "quality_samples": Key(1000, "samples behind the quality reports"),
        "quality_method": Key("ode", "their sampler, pc or ode"),
        "permutations": Key(1000, "relabellings behind the p-values of two-sample tests"),
    },
}
"""Every config key. The train mode ends with what ``report`` says."""


def _blocks() -> Iterator[tuple[str, dict[str, Key]]]:
    for name, entry in SCHEMA.items():
        if isinstance(entry, dict):
            yield name, entry


def config_keys() -> dict[str, Key]:
    """Every key by its dotted name, such as ``training.steps``."""
    keys = {name: entry for name, entry in SCHEMA.items() if isinstance(entry, Key)}
    return keys | {f"{block}.{name}": key for block, entries in _blocks() for name, key in entries.items()}


def _initial(key: Key) -> Any:
    if key.optional is None:
        return key.default
    holder = config_dict.placeholder(key.optional)
    holder.set(key.default)
    return holder


def default_config() -> ConfigDict:
    """A fresh copy of the default config (handwritten digits, VP), locked: keys can be changed, not added."""
    config = ConfigDict()
    for name, entry in SCHEMA.items():
        if isinstance(entry, Key):
            config[name] = _initial(entry)
        else:
            config[name] = ConfigDict({k: _initial(key) for k, key in entry.items()})
    return config.lock()


def unknown_key(name: str) -> UsageError:
    """The error for a config key that does not exist, with the nearest one that does."""
    keys = list(config_keys())
    block, _, leaf = name.rpartition(".")
    if isinstance(SCHEMA.get(name), dict):
        return UsageError(f"config key {name!r} is a block of keys; set one of them: {_inside(name)}")
    leaves = [key.rpartition(".")[2] for key in keys]
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.8)
    if not near:  # the right key in no or another block, or nearly
        close = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)
        near = [key for key in keys if key.rpartition(".")[2] in close]
    hint = f"; did you mean {' or '.join(repr(key) for key in near)}?" if near else ";"
    allowed = _inside(block) if isinstance(SCHEMA.get(block), dict) else _inside("")
    return UsageError(f"unknown config key {name!r}{hint} allowed: {allowed}")


def _inside(block: str) -> str:
    """The keys of a block, or of the whole config, in a line."""
    if not block:
        return ", ".join(
            name if isinstance(entry, Key) else f"{name}.*" for name, entry in sorted(SCHEMA.items())
        )
    return ", ".join(sorted(key for key in config_keys() if key.startswith(f"{block}.")))


def set_key(config: ConfigDict, name: str, value: Any) -> None:
    """Sets one key by its dotted name.

    Raises:
        UsageError: there is no such key, or the value is of another type.
    """
    key = config_keys().get(name)
    if key is None:
        raise unknown_key(name)
    if value is None and key.optional is None:
        raise UsageError(f"config key {name!r} cannot be none; its default is {key.default!r}")
    block, _, leaf = name.rpartition(".")
    try:
        (config[block] if block else config)[leaf] = value
    except TypeError:
        kind = key.optional or type(key.default)
        raise UsageError(f"config key {name!r} must be of type {kind.__name__}, got {value!r}") from None


def changed(changes: Mapping[str, Any] | ConfigDict) -> ConfigDict:
    """The default config with ``changes`` (a whole config, or nested or dotted keys).

    Raises:
        UsageError: an unknown key, or a value of the wrong type.
    """
    config = default_config()
    for name, value in _leaves(changes):
        set_key(config, name, value)
    return config


def _leaves(values: Mapping[str, Any] | ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load_config(source: str) -> ConfigDict:
    """The config of ``FILE`` or ``FILE:name``: a Python file with ``get_config()``, or the ``config.json`` of
    a run.

    ``get_config`` returns what it changes, as a dict or as a changed :func:`default_config`; ``name`` is its
    argument.

    Raises:
        UsageError: there is no such file, it fails, or it sets keys that do not exist.
    """
    name: tuple[str, ...] = ()
    path = Path(source)
    if not path.is_file() and ":" in source:
        file, _, variant = source.rpartition(":")
        path, name = Path(file), (variant,)
    if not path.is_file():
        raise _no_such_file(path)
    if path.suffix == ".json":
        if name:
            raise UsageError(f"{path} is a JSON file and has no variant {name[0]!r}")
        return _from_json(path)
    module = _run_file(path, lambda: _import(path))
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise UsageError(f"{path} has no function get_config()")
    try:
        inspect.signature(function).bind(*name)
    except TypeError:
        wanted = f"takes no name, got {name[0]!r}" if name else f"needs a name: --config {path}:NAME"
        raise UsageError(f"get_config of {path} {wanted}") from None
    result = _run_file(path, lambda: function(*name))
    if not isinstance(result, (Mapping, ConfigDict)):
        raise UsageError(f"get_config of {path} must return a config or a dict, got {type(result).__name__}")
    try:
        return changed(result)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _from_json(path: Path) -> ConfigDict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold an object, got {type(content).__name__}")
    return changed(content)


def _no_such_file(path: Path) -> UsageError:
    folder = path.parent
    there = [str(p) for p in sorted(folder.glob("*.py"))] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), there, n=1, cutoff=0.6)
    return UsageError(
        f"there is no config file {str(path)!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"a config file must be a Python (.py) or JSON (.json) file, got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run_file(path: Path, action: Callable[[], Any]) -> Any:
    """What ``action`` returns; its errors become one line that names the file and the line."""
    try:
        return action()
    except UsageError:
        raise
    except Exception as error:  # a config file is code, and may fail in any way
        here = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = here[-1].lineno if here else getattr(error, "lineno", None)
        where = f"{path}, line {line}" if line else str(path)
        locked = str(error).partition('Key "')[2].partition('" does not exist')
        if locked[1]:  # ConfigDict's message repeats the whole config
            block = (
                here[-1].line.partition(locked[0])[0].rpartition(".")[0].partition(".")[2]
                if here and here[-1].line
                else ""
            )
            name = f"{block}.{locked[0]}" if isinstance(SCHEMA.get(block), dict) else locked[0]
            raise UsageError(f"{where}: {unknown_key(name)}") from None
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{where}: {kind}{reason}") from None
