"""Score-based generative modelling with stochastic differential equations."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

from sde_diffusion.analytic import GaussianMixture, MixtureScore
from sde_diffusion.bound import Bound, continuous_bound, ode_bound, variational_bound
from sde_diffusion.coordinates import LogSNRCoordinates, TimeCoordinates
from sde_diffusion.correctors import (
    MALA,
    SGHMC,
    SGLD,
    SNR,
    AnnealedLangevin,
    Barker,
    Corrector,
    Decaying,
    DualAveraging,
    Fixed,
    ImplicitLangevin,
    Langevin,
    PreconditionedSGLD,
    Renoise,
    Report,
    SigmaScaled,
    TamedLangevin,
    Underdamped,
)
from sde_diffusion.ddpm import DDPM
from sde_diffusion.decoders import DiscretizedGaussian, GaussianDecoder
from sde_diffusion.dequantization import (
    TruncatedNormalDequantization,
    UniformDequantization,
    VariationalDequantization,
)
from sde_diffusion.divergence import ExactDivergence, HutchinsonDivergence, HutchPlusPlus
from sde_diffusion.ends import prior_mismatch, truncation_offset
from sde_diffusion.importance_bound import PathWeights, importance_bound
from sde_diffusion.learned_schedule import LearnedSchedule
from sde_diffusion.learned_variance import LearnedVarianceModel
from sde_diffusion.level_features import level_counts, level_feature_count, level_features
from sde_diffusion.likelihood import (
    Likelihood,
    bits_per_dim,
    log_likelihood,
)
from sde_diffusion.minibatch import MinibatchScore
from sde_diffusion.noise import SampleNoise
from sde_diffusion.ode import (
    DormandPrince,
    Heun,
    SolverError,
    TorchDiffEq,
    probability_flow,
)
from sde_diffusion.ode_sampling import (
    decode,
    encode,
    interpolate,
    round_trip_error,
    sample_ode,
    slerp,
)
from sde_diffusion.optimal_times import OptimalTimes, optimal_times
from sde_diffusion.parametrization import DATA, NOISE, SCORE, Parametrization, V, edm
from sde_diffusion.predictors import (
    DDIM,
    DEIS,
    IPNDM,
    RK4,
    AdaptiveSDE,
    Ancestral,
    DPMSolverPP,
    EDMHeun,
    EulerMaruyama,
    FlowSolver,
    LearnedVariance,
    Predictor,
    Restart,
    RestartInterval,
    ReverseDiffusion,
    SASolver,
    SDEDPMSolverPP,
    TorchSDE,
    UniPC,
)
from sde_diffusion.quantized import QuantizedScoreModel
from sde_diffusion.sampling import SampleOutput, sample
from sde_diffusion.scipy_ode import ScipyRK45
from sde_diffusion.score import Score, ScoreModel
from sde_diffusion.sdes import EDM, SDE, VE, VP, CosineVP, SubVP, VariancePreserving
from sde_diffusion.thresholding import Thresholded
from sde_diffusion.times import (
    explicit_times,
    karras_times,
    log_snr_times,
    quadratic_times,
    uniform_times,
)
from sde_diffusion.transfer import transfer

if TYPE_CHECKING:
    from sde_diffusion.runs import Run as _Run

__version__ = "0.1.0"


def load_pretrained(
    path_or_repo: str | _Path,
    *,
    format: str | None = None,
    config: _Any = None,
    ema: bool = True,
) -> ScoreModel:
    """The score of a published model: see :func:`sde_diffusion.pretrained.load_pretrained`."""
    # Imported here, so that ``import sde_diffusion`` does not import every network.
    from sde_diffusion import pretrained

    return pretrained.load_pretrained(path_or_repo, format=format, config=config, ema=ema)


def load(workdir: str | _Path, **options: _Any) -> _Run:
    """A trained run from its folder: see :func:`sde_diffusion.runs.load`."""
    from sde_diffusion import runs

    return runs.load(workdir, **options)


_LAZY = {
    "DequantizationFlow": "networks.dequantization_flow",
    "MLP": "networks",
    "Trainer": "training",
    "TrainingSettings": "training_settings",
    "UNet": "networks",
    "load_dataset": "data",
}
"""Names of what is imported when it is first asked for, and their modules."""


def __getattr__(name: str) -> _Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
