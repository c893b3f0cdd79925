"""The objectives of chains and of variational diffusion models: which steps are trained, and what is
minimised there.

A *step sampler* is a time sampler (:mod:`sde_diffusion.losses`) that gives the times of a chain only; with it
and a weighting of 1 the noise-prediction error is ``L_simple`` of DDPM, and on the ladder of a VE process the
loss of SMLD. The *losses* here replace that error by the variational bound or a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sde_diffusion.decoders import Decoder, DiscretizedGaussian, GaussianDecoder
from sde_diffusion.losses import denoising_error
from sde_diffusion.reverse_steps import ReverseSteps
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand
from sde_diffusion.variances import FixedSmall, ReverseVariance

__all__ = [
    "BoundLoss",
    "ChainTime",
    "HybridLoss",
    "LadderTime",
    "Loss",
    "LossAwareSteps",
    "LossAwareTime",
    "NoiseError",
    "VariationalLoss",
]


def _chain_length(sde: Any) -> int:
    steps = getattr(sde, "num_steps", None)
    if not isinstance(steps, int):
        raise ValueError(f"the steps of a chain need a chain, such as DDPM(betas), got {sde!r}")
    return steps


# ------------------------------------------------------------ which steps


@dataclass(frozen=True)
class ChainTime:
    """The times ``i / n`` of a chain, all equally likely (Ho et al. 2020, algorithm 1): weight 1."""

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        n = _chain_length(sde)
        index = (u * n).long().clamp(0, n - 1)
        return (index + 1).to(u.dtype) * (sde.t_max / n), torch.ones_like(u)


@dataclass(frozen=True)
class LadderTime:
    """The times of a ladder of n noise levels, ``i / (n - 1)`` from 0 to ``t_max``, all equally likely:
    weight 1.

    With :class:`~sde_diffusion.sdes.VE` these are the levels ``VE.discretize(n)`` of SMLD, and the
    unit-weighted error ``mean |eps_hat - eps|^2 = sigma^2 mean |s + eps / sigma|^2`` is its loss (Song &
    Ermon 2019, eq. 5 and 6 with ``lambda = sigma^2``).

    Args:
        levels: n >= 2.
    """

    levels: int = 1000

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or self.levels < 2:
            raise ValueError(f"levels must be an integer >= 2, got {self.levels!r}")

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        index = (u * self.levels).long().clamp(0, self.levels - 1)
        return index.to(u.dtype) * (sde.t_max / (self.levels - 1)), torch.ones_like(u)


@dataclass(frozen=True)
class LossAwareTime:
    """Steps of a chain with probability ``sqrt(E[L_i^2])``, weighted by ``1 / (n p_i)`` (Nichol & Dhariwal
    2021, eq. 18).

    The second moments are over the last losses of each step; until every step has ``history`` of them, and in
    evaluations, all steps are equally likely. This object holds the settings; :meth:`start` gives the sampler
    of a run.

    Args:
        history: losses kept of each step.
        uniform: the part of the probability that is spread evenly.
    """

    history: int = 10
    uniform: float = 0.001

    def __post_init__(self) -> None:
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"history must be an integer >= 1, got {self.history!r}")
        if not 0 < self.uniform <= 1:
            raise ValueError(f"uniform must be a number in (0, 1], got {self.uniform!r}")

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        return ChainTime()(sde, u)

    def start(self, sde: Any) -> LossAwareSteps:
        """The sampler of a run, which learns from losses."""
        return LossAwareSteps(self, _chain_length(sde))


class LossAwareSteps:
    """The time sampler of :class:`LossAwareTime`, with its memory."""

    def __init__(self, settings: LossAwareTime, steps: int) -> None:
        self.settings = settings
        self._losses = np.zeros((steps, settings.history))
        self._counts = np.zeros(steps, dtype=np.int64)

    def probabilities(self) -> Tensor:
        """Of the steps, (n,) float64."""
        n = len(self._counts)
        even = torch.full((n,), 1 / n, dtype=torch.float64)
        if (self._counts < self.settings.history).any():
            return even
        root = torch.from_numpy(np.sqrt(np.square(self._losses).mean(1)))
        total = float(root.sum())
        if not 0 < total < math.inf:
            return even
        return (1 - self.settings.uniform) * root / total + self.settings.uniform * even

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        p = self.probabilities().to(u.device)
        n = len(p)
        edges = p.cumsum(0)
        index = torch.searchsorted(edges / edges[-1], u.double(), right=True).clamp_max(n - 1)
        return (index + 1).to(u.dtype) * (sde.t_max / n), (1 / (n * p[index])).to(u.dtype)

    def observe(self, sde: Any, t: Tensor, loss: Tensor) -> None:
        """Remembers the losses (B,) at times (B,), those that are finite."""
        n, history = self._losses.shape
        steps = (t.double() / sde.t_max * n).round().long().cpu().numpy() - 1
        for step, value in zip(steps, loss.detach().double().cpu().numpy(), strict=True):
            if math.isfinite(value):
                self._losses[step, self._counts[step] % history] = value
                self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continues from :meth:`state_dict`."""
        self._losses[...] = state["losses"].numpy()
        self._counts[...] = state["counts"].numpy()


# ------------------------------------------------------------ what is minimised


class Loss(Protocol):
    """The loss of each sample before weights: ``loss(model, x0, t, noise, **cond)``, (B,)."""

    def for_data(self, levels: int | None, dequantized: bool) -> Loss:
        """The same loss, knowing what its data are."""
        ...

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor: ...


@dataclass(frozen=True)
class NoiseError:
    """``mean |eps_hat - eps|^2``: see :func:`~sde_diffusion.losses.denoising_error`."""

    def for_data(self, levels: int | None, dequantized: bool) -> NoiseError:
        """Itself: all data are the same to it."""
        return self

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor:
        return denoising_error(model, x0, t, noise, **cond)


@lru_cache(maxsize=8)
def _chain(sde: Any, device: torch.device) -> ReverseSteps:
    _chain_length(sde)
    return ReverseSteps(sde, sde.times(), device)


def _constant(values: Tensor) -> Any:
    return lambda x, t: values


@dataclass(frozen=True)
class BoundLoss:
    """The term of a random step of the bound, in bits per dimension, times n: on average over the steps the
    whole bound but ``L_T``, which no network changes (Ho et al. 2020, eq. 5).

    A model with learned variances trains these too, any other has the fixed ones.

    Args:
        variance: of models without learned variances.
        decoder: of the last step; None for what suits the data: the discretized one for levels, a density for
            vectors and dequantized levels.
    """

    variance: ReverseVariance = field(default_factory=FixedSmall)
    decoder: Decoder | None = None

    def for_data(self, levels: int | None, dequantized: bool) -> BoundLoss:
        """With a decoder that suits the data."""
        if self.decoder is not None:
            return self
        if levels is None or dequantized:
            return replace(self, decoder=GaussianDecoder())
        return replace(self, decoder=DiscretizedGaussian(levels))

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor:
        x = model.sde.perturb(x0, t, noise)
        if hasattr(model, "predict_noise_and_values"):
            predicted, values = model.predict_noise_and_values(x, t, **cond)
            return self.of_prediction(model, x0, x, t, predicted, model.variance(_constant(values)))
        return self.of_prediction(model, x0, x, t, model.predict_noise(x, t, **cond), self.variance)

    def of_prediction(
        self, model: Any, x0: Tensor, x: Tensor, t: Tensor, noise: Tensor, variance: ReverseVariance
    ) -> Tensor:
        """The loss of predicted noise and a variance at the state ``x``."""
        sde = model.sde
        chain = _chain(sde, x.device)
        index = (t.double() / sde.t_max * len(chain)).round().long() - 1
        score = -noise.double() / expand(sde.sigma(t.double()), x.double())
        prediction = chain.predict(score, x, index, variance)
        nats = chain.term(x0, prediction, index, self.decoder or GaussianDecoder())
        return (nats * (len(chain) / (x0[0].numel() * math.log(2)))).to(noise.dtype)


@dataclass(frozen=True)
class HybridLoss:
    """``L_simple + 0.001 L_vlb``, the bound with the predicted mean detached, so that it trains the variance
    alone (Nichol & Dhariwal 2021, eq. 16; ``RESCALED_MSE`` of their code, L_vlb in bits per dimension).

    Args:
        weight: of the bound.
        bound: its loss, with the decoder.
    """

    weight: float = 0.001
    bound: BoundLoss = field(default_factory=BoundLoss)

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight must be a finite number > 0, got {self.weight!r}")

    def for_data(self, levels: int | None, dequantized: bool) -> HybridLoss:
        """With a decoder that suits the data."""
        return replace(self, bound=self.bound.for_data(levels, dequantized))

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor:
        if not hasattr(model, "predict_noise_and_values"):
            raise ValueError(
                f"the hybrid loss is for a model with learned variances, got {type(model).__name__}"
            )
        x = model.sde.perturb(x0, t, noise)
        predicted, values = model.predict_noise_and_values(x, t, **cond)
        simple = (predicted - noise).square().flatten(1).mean(1)
        variance = model.variance(_constant(values))
        return simple + self.weight * self.bound.of_prediction(model, x0, x, t, predicted.detach(), variance)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p, before in wanted:
            p.requires_grad_(before)


@dataclass(frozen=True)
class VariationalLoss:
    """``-1/2 d log_snr / dt mean |eps_hat - eps|^2`` at uniform times: the bound in continuous time, whose
    gradient trains the network, while the schedule is trained to reduce its variance (Kingma et al. 2021, eq.
    17 and section 5.1).

    The value's mean over t does not depend on a :class:`~sde_diffusion.learned_schedule.LearnedSchedule` (but
    through its ends), so the gradient of its variance is that of ``E[L^2]``: ``2 L dL/d(schedule)``, which is
    put in the place of ``dL/d(schedule)``. It needs the derivative of the error by the log-SNR: one more
    backward pass through the network, to its input only. In nats per dimension. The model must tell its
    network the log-SNR and not the time, or else the error would depend on the schedule in two ways.
    """

    def for_data(self, levels: int | None, dequantized: bool) -> VariationalLoss:
        """Itself: all data are the same to it."""
        return self

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor:
        sde: SDE = model.sde
        learned = getattr(sde, "network", None)
        told = getattr(getattr(model, "conditioning", None), "name", "log_noise")
        if told != "log_noise":
            raise ValueError(f"a learned schedule needs the conditioning 'log_noise', got {told!r}")
        training = learned is not None and torch.is_grad_enabled()
        with torch.enable_grad():
            here = t.detach().double().requires_grad_()
            log_snr = sde.log_snr(here)
            (slope,) = torch.autograd.grad(log_snr.sum(), here, create_graph=training)
        rate = -slope
        if not training:
            return (0.5 * rate.detach()).to(noise.dtype) * denoising_error(model, x0, t, noise, **cond)
        assert learned is not None
        with _frozen(learned):
            at = t.detach().double().requires_grad_()
            error = denoising_error(model, x0, at, noise, **cond)
            (by_time,) = torch.autograd.grad(error.sum(), at, retain_graph=True)
        by_log_snr = by_time / slope.detach()
        loss = 0.5 * rate.detach() * error
        # Zero in value; its gradient is that of the squared loss by the schedule.
        schedule = 0.5 * (error.detach().double() * rate + rate.detach() * by_log_snr * log_snr)
        schedule = 2 * loss.detach() * schedule
        return (loss + schedule - schedule.detach()).to(noise.dtype)
