"""From a config to objects: the one place where each name becomes an object and each value is checked.

Every function takes the whole config, reads its own block, and is pure. What is wrong with a value is raised
as a :class:`~sde_diffusion.config.UsageError` that names the block and the value.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from sde_diffusion.build_objective import LOSS_AWARE, objective_settings
from sde_diffusion.chain_losses import LossAwareTime
from sde_diffusion.config import UsageError
from sde_diffusion.correctors import AnnealedLangevin, Corrector, Langevin
from sde_diffusion.data import Augmentation, DataSet, load_dataset
from sde_diffusion.ddpm import DDPM
from sde_diffusion.devices import choose_device, choose_precision
from sde_diffusion.errors import unknown_name
from sde_diffusion.learned_schedule import LearnedSchedule
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.likelihood import Divergence, make_divergence
from sde_diffusion.losses import (
    TIME_DRAWS,
    TIME_SAMPLERS,
    WEIGHTINGS,
    AntitheticDraw,
)
from sde_diffusion.networks import MLP, DiT, UNet
from sde_diffusion.ode import DormandPrince, Heun, Solver
from sde_diffusion.ode_sampling import sample_ode
from sde_diffusion.parametrization import NOISE, parametrization
from sde_diffusion.predictors import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LearnedVariance,
    Predictor,
    ReverseDiffusion,
)
from sde_diffusion.quantized import QuantizedScoreModel
from sde_diffusion.sampling import ORDERS, SampleOutput, sample
from sde_diffusion.schedules import SCHEDULES
from sde_diffusion.score import Score, ScoreModel, conditioning
from sde_diffusion.sdes import SDE, VE, VP, CosineVP, SubVP
from sde_diffusion.times import log_snr_times, quadratic_times, uniform_times
from sde_diffusion.training import TrainingSettings
from sde_diffusion.variances import FixedSmall, ReverseVariance, fixed_variance

T = TypeVar("T")

LEVELS = "levels"
"""The parametrization of :class:`~sde_diffusion.quantized.QuantizedScoreModel`, a model of its own."""


def _chain(schedule: str, steps: int) -> DDPM:
    """A chain as a continuous process that ends at its first step, below which no network is trained."""
    return DDPM(_named("sde.schedule", schedule, SCHEDULES)(steps), t_min=1 / max(steps, 1))


def _learned(log_snr_max: float, log_snr_min: float) -> LearnedSchedule:
    return LearnedSchedule(log_snr_max=log_snr_max, log_snr_min=log_snr_min)


SDES: dict[str, Callable[..., SDE]] = {
    "vp": VP,
    "subvp": SubVP,
    "ve": VE,
    "cosine": CosineVP,
    "ddpm": _chain,
    "learned": _learned,
}
NETWORKS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT, "mlp": MLP}
GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_times,
    "quadratic": quadratic_times,
    "log_snr": log_snr_times,
}


@contextlib.contextmanager
def _block(name: str) -> Iterator[None]:
    """Errors inside become a UsageError that begins with the config block they come from."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UsageError(f"config.{name}: {' '.join(str(error).split())}") from error


def _named(key: str, name: str, table: Mapping[str, T]) -> T:
    if name not in table:
        raise UsageError(str(unknown_name(key, name, table)))
    return table[name]


def _accepted(constructor: Callable[..., Any], block: ConfigDict) -> dict[str, Any]:
    """The keys of a block that a constructor takes; the others belong to other names."""
    return {name: block[name] for name in inspect.signature(constructor).parameters if name in block}


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of its data, and what a run keeps of them.

    Attributes:
        name: of the data set.
        shape: of one sample.
        levels: grey levels of images; None for vectors.
        num_classes: None without labels.
    """

    name: str
    shape: tuple[int, ...]
    levels: int | None
    num_classes: int | None

    @property
    def is_image(self) -> bool:
        """Whether samples are images of grey levels rather than vectors."""
        return self.levels is not None

    def plain(self) -> dict[str, Any]:
        """As a dict of plain values, which ``DataInfo.of_plain`` reads back."""
        return asdict(self) | {"shape": list(self.shape)}

    @staticmethod
    def of_plain(values: Mapping[str, Any]) -> DataInfo:
        """The inverse of :meth:`plain`."""
        return DataInfo(values["name"], tuple(values["shape"]), values["levels"], values["num_classes"])

    @staticmethod
    def of(data: DataSet) -> DataInfo:
        """What is true of a data set."""
        return DataInfo(data.name, data.sample_shape, data.levels, data.num_classes)


# ------------------------------------------------------------------------------------------------------- data

_AUGMENTATION = ("flip", "shift", "augment_probability")


def dataset(config: ConfigDict) -> DataSet:
    """The data set; keys that are none are not passed on, any other must be one that this data set takes."""
    block = config.data
    with _block("data"):
        return load_dataset(block.name, **{k: block[k] for k in block if k not in ("name", *_AUGMENTATION)})


def augmentation(config: ConfigDict) -> Augmentation:
    """The augmentation of the training images."""
    with _block("data"):
        return Augmentation(config.data.flip, config.data.shift, config.data.augment_probability)


# ------------------------------------------------------------------------------------------------------ model


def sde(config: ConfigDict) -> SDE:
    """The forward process."""
    constructor = _named("sde.name", config.sde.name, SDES)
    with _block("sde"):
        return constructor(**_accepted(constructor, config.sde))


def network(config: ConfigDict, info: DataInfo) -> nn.Module:
    """The network, with initial weights from ``config.seed``; the global random state is left as it was."""
    block = config.model
    constructor = _named("model.name", block.name, NETWORKS)
    for key, value in block.items():
        if isinstance(value, tuple) and any(not isinstance(n, (int, float)) for n in value):
            raise UsageError(f"config.model.{key} must be a tuple of numbers, such as (1,2), got {value!r}")
    dimensions, kind = (1, "vectors") if constructor is MLP else (3, "images")
    with _block("model"):
        if len(info.shape) != dimensions:
            fitting = "mlp" if len(info.shape) == 1 else "unet"
            raise ValueError(
                f"name {block.name!r} is for {kind}, but samples of data set {info.name!r} have the shape "
                f"{info.shape}; "
                f"use name {fitting!r}"
            )
        if block.class_conditional and info.num_classes is None:
            raise ValueError(f"class_conditional is True, but data set {info.name!r} has no labels")
        classes = info.num_classes if block.class_conditional else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return constructor(
                info.shape[0],
                num_classes=classes,
                **_outputs(config, info),
                **_augmented(constructor, config),
                **_accepted(constructor, block),
            )


def _outputs(config: ConfigDict, info: DataInfo) -> dict[str, int]:
    """How many channels the network gives, where not as many as it gets."""
    if config.model.learned_variance:
        key = "out_channels" if len(info.shape) == 3 else "out_dim"
        return {key: 2 * info.shape[0]}
    if config.model.parametrization != LEVELS:
        return {}
    if info.levels is None:
        raise ValueError(
            f"parametrization {LEVELS!r} is for images, not for data set {info.name!r}; use 'noise'"
        )
    return {"out_channels": info.shape[0] * info.levels}


def _augmented(constructor: Callable[..., nn.Module], config: ConfigDict) -> dict[str, int]:
    """What a network must know to be told of the augmentation."""
    if not config.training.condition_on_augmentation:
        return {}
    if "augment_dim" not in inspect.signature(constructor).parameters:
        raise ValueError(f"name {config.model.name!r} cannot be told of the augmentation")
    return {"augment_dim": augmentation(config).size}


def score_model(config: ConfigDict, info: DataInfo) -> ScoreModel:
    """The network, the SDE and the parametrization together."""
    block = config.model
    predicted = NOISE
    with _block("model"):
        told = conditioning(block.conditioning)
        if block.learned_variance and block.parametrization == LEVELS:
            raise ValueError(
                f"learned_variance goes with any parametrization but {LEVELS!r}, such as 'noise'"
            )
        if block.parametrization != LEVELS:
            predicted = parametrization(block.parametrization, block.sigma_data, others=(LEVELS,))
    net = network(config, info)
    with _block("model"):
        if block.parametrization == LEVELS:
            assert info.levels is not None
            return QuantizedScoreModel(
                net, sde(config), info.levels, conditioning=told, sigma_data=block.sigma_data
            )
        kind = LearnedVarianceModel if block.learned_variance else ScoreModel
        return kind(net, sde(config), predicted, conditioning=told, sigma_data=block.sigma_data)


# --------------------------------------------------------------------------------------------------- training


def training_settings(config: ConfigDict) -> TrainingSettings:
    """What a training run is told."""
    block = config.training
    chosen = objective_settings(config)
    weighting = _named("training.weighting", block.weighting, WEIGHTINGS)
    samplers = {**TIME_SAMPLERS, LOSS_AWARE: LossAwareTime}
    time_sampler = _named("training.time_sampler", block.time_sampler, samplers)
    if block.time_sampler == LOSS_AWARE and config.sde.name != "ddpm":
        raise UsageError(
            f"config.training.time_sampler {LOSS_AWARE!r} needs sde.name 'ddpm', got {config.sde.name!r}"
        )
    time_draw = _named("training.time_draw", block.time_draw, TIME_DRAWS)
    parameters = ConfigDict(
        {
            "gamma": block.min_snr_gamma,
            "sigma_data": config.model.sigma_data,
            "mean": block.log_normal_mean,
            "std": block.log_normal_std,
        }
    )
    objects = ("loss", "weighting", "time_sampler", "time_draw", "conditional", "seed", "device")
    plain = {k: v for k, v in _accepted(TrainingSettings, block).items() if k not in objects}
    with _block("training"):
        draw = time_draw()
        objectives: dict[str, Any] = {
            "weighting": weighting(**_accepted(weighting, parameters)),
            "time_sampler": time_sampler(**_accepted(time_sampler, parameters)),
        }
        return TrainingSettings(
            **objectives | chosen,
            time_draw=AntitheticDraw(draw) if block.antithetic else draw,
            conditional=config.model.class_conditional,
            seed=config.seed,
            device=config.device,
            **plain,
        )


def device(config: ConfigDict) -> torch.device:
    """The device of ``config.device``.

    Raises:
        UsageError: an unknown name, or a GPU is asked for and there is none.
    """
    try:
        return choose_device(config.device)
    except ValueError as error:
        raise UsageError(f"config.device: {error}") from error


# --------------------------------------------------------------------------------------------------- sampling


def predictor(config: ConfigDict, model: ScoreModel | None = None) -> Predictor:
    """The predictor of the predictor-corrector sampler; ``model`` is needed to run one with learned variances."""
    block = config.sampling

    def learned() -> Predictor:
        if not config.model.learned_variance:
            raise ValueError("predictor 'learned_variance' needs a model with model.learned_variance=True")
        return LearnedVariance(reverse_variance(config, model))

    table: dict[str, Callable[[], Predictor]] = {
        "reverse_diffusion": ReverseDiffusion,
        "euler_maruyama": EulerMaruyama,
        "ancestral": lambda: Ancestral(block.ancestral_variance),
        "learned_variance": learned,
        "ddim": lambda: DDIM(block.eta),
    }
    make = _named("sampling.predictor", block.predictor, table)
    with _block("sampling"):
        return make()


def correctors(config: ConfigDict) -> tuple[Corrector, ...]:
    """The correctors of the predictor-corrector sampler: one or none."""
    block = config.sampling
    table: dict[str, Callable[[], tuple[Corrector, ...]]] = {
        "none": lambda: (),
        "langevin": lambda: (Langevin(block.snr, block.corrector_steps),),
        "annealed_langevin": lambda: (AnnealedLangevin(block.snr, block.corrector_steps),),
    }
    make = _named("sampling.corrector", block.corrector, table)
    with _block("sampling"):
        return make()


def sampling_precision(config: ConfigDict, device: torch.device) -> torch.dtype:
    """The precision of the network in sampling."""
    with _block("sampling"):
        return choose_precision(config.sampling.precision, device)


def times(config: ConfigDict, steps: int, model: ScoreModel | None = None) -> Tensor:
    """The grid of times with so many steps, of the config's process, or of the model's where that is its own."""
    block = config.sampling
    grid = _named("sampling.grid", block.grid, GRIDS)
    process = sde(config) if model is None or config.sde.name in SDES else model.sde
    with _block("sampling"):
        return grid(process, steps, block.t_end)


@dataclass(frozen=True)
class PCSampler:
    """:func:`~sde_diffusion.sampling.sample` with its settings."""

    predictor: Predictor
    correctors: Sequence[Corrector]
    times: Tensor
    order: str
    denoise: bool

    def __call__(self, sde: SDE, score: Score, shape: Sequence[int], **where: Any) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ..."""
        return sample(
            sde,
            score,
            shape,
            predictor=self.predictor,
            correctors=self.correctors,
            times=self.times,
            order=self.order,
            denoise=self.denoise,
            **where,
        )


@dataclass(frozen=True)
class ODESampler:
    """:func:`~sde_diffusion.ode_sampling.sample_ode` with its settings."""

    solver: Solver
    t_end: float | None
    denoise: bool

    def __call__(
        self, sde: SDE, score: Score, shape: Sequence[int], *, progress: bool = False, **where: Any
    ) -> SampleOutput:
        """Samples; ``where`` is ``seed``, ``first_index``, ``device``, ... There is no progress to show."""
        return sample_ode(
            sde, score, shape, solver=self.solver, t_end=self.t_end, denoise=self.denoise, **where
        )


def solver(config: ConfigDict, model: ScoreModel | None = None) -> Solver:
    """The solver of the probability-flow ODE for sampling; ``model`` as in :func:`sampler`."""
    block = config.sampling
    table: dict[str, Callable[[], Solver]] = {
        "dopri5": lambda: DormandPrince(rtol=block.rtol, atol=block.atol),
        "heun": lambda: Heun(times(config, block.ode_steps, model)),
    }
    make = _named("sampling.solver", block.solver, table)
    with _block("sampling"):
        return make()


def sampler(
    config: ConfigDict, key: str = "sampling.method", model: ScoreModel | None = None
) -> PCSampler | ODESampler:
    """The sampler of the method, ``pc`` or ``ode``, that the config has under a key.

    ``model`` is needed to run a predictor with learned variances, and for the process of an imported model.
    """
    block = config.sampling
    if block.order not in ORDERS:
        raise UsageError(str(unknown_name("sampling.order", block.order, ORDERS)))
    table: dict[str, Callable[[], PCSampler | ODESampler]] = {
        "pc": lambda: PCSampler(
            predictor(config, model),
            correctors(config),
            times(config, block.steps, model),
            block.order,
            block.denoise,
        ),
        "ode": lambda: ODESampler(solver(config, model), block.t_end, block.denoise),
    }
    return _named(key, config[key], table)()


# ------------------------------------------------------------------------------------------------- likelihood


@dataclass(frozen=True)
class LikelihoodSettings:
    """How likelihoods are evaluated, and of how many samples (None: all of test, as many of training)."""

    divergence: Divergence
    rtol: float
    atol: float
    dequantizations: int
    batch_size: int
    test_images: int | None
    train_images: int | None


def likelihood(config: ConfigDict) -> LikelihoodSettings:
    """How likelihoods are evaluated."""
    block = config.likelihood
    with _block("likelihood"):
        DormandPrince(block.rtol, block.atol)  # says what is wrong with tolerances
        return LikelihoodSettings(
            make_divergence(block.divergence, block.probes),
            block.rtol,
            block.atol,
            positive(config, "likelihood.dequantizations"),
            positive(config, "likelihood.batch_size"),
            None if block.test_images is None else positive(config, "likelihood.test_images"),
            None if block.train_images is None else positive(config, "likelihood.train_images", 0),
        )


# ------------------------------------------------------------------------------------------------------ bound


def reverse_variance(config: ConfigDict, model: ScoreModel | None) -> ReverseVariance:
    """The variance of reverse steps: the model's own, where it has learned one, else that of ``bound.variance``."""
    with _block("bound"):
        fixed = fixed_variance(config.bound.variance)
    if not config.model.learned_variance:
        return fixed
    # Without a model the config is only checked.
    own = getattr(model, "reverse_variance", None)
    return FixedSmall() if own is None else own()


@dataclass(frozen=True)
class BoundSettings:
    """How the variational bound is evaluated, and of how many test images (None: all)."""

    steps: int
    subset: int | None
    clip: bool
    draws: int
    ode: bool
    test_images: int | None
    batch_size: int


def bound(config: ConfigDict) -> BoundSettings:
    """How the variational bound is evaluated."""
    block = config.bound
    reverse_variance(config, None)
    return BoundSettings(
        positive(config, "bound.steps", 2),
        None if block.subset is None else positive(config, "bound.subset"),
        block.clip,
        positive(config, "bound.draws"),
        block.ode,
        None if block.test_images is None else positive(config, "bound.test_images"),
        positive(config, "bound.batch_size"),
    )


def positive(config: ConfigDict, key: str, least: int = 1) -> int:
    """The integer of a dotted key, which must be at least ``least``.

    Raises:
        UsageError: it is not.
    """
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"config.{key} must be an integer >= {least}, got {value!r}")
    return value
