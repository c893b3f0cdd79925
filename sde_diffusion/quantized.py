"""A score that knows its data are grey levels: the network predicts levels, arithmetic does the rest.

Uniformly dequantized data lie uniformly in cells ``[lo_k, hi_k]`` of width ``2 / levels``. Given ``x_t =
alpha x_0 + sigma eps``, the posterior of one pixel's level depends on the other pixels through a
distribution over levels only, and all else is known:

    p(k | x_t) ~ exp(logit_k) (Phi(b_k) - Phi(a_k)),     a_k = (lo_k - y) / s,  b_k = (hi_k - y) / s,  y =
    x_t / alpha,  s = sigma / alpha, eps_hat = -sum_k p(k | x_t) E[u | a_k < u < b_k],    u ~ N(0, 1).

The network gives the logits (a distribution over levels given the *other* pixels would make this exact, and
the loss asks for it); the pixel's own likelihood and the mean within a cell, a truncated normal's, are
exact. At low noise, where a plain network must learn the sharp edges of the cells, nothing is left to
learn, and an untrained network already codes at most ``log2(levels)`` bits per dimension. The loss, the
samplers and the likelihood are those of any other score.

The same posterior over levels appears as the decoder ``p(x | z_0)`` of Kingma et al. (2021, "Variational
diffusion models", eq. 11), there at the last step only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.cells import expected_noise
from sde_diffusion.level_features import level_counts, level_feature_count, level_features
from sde_diffusion.parametrization import NOISE
from sde_diffusion.score import LOG_NOISE, Conditioning, ScoreModel
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand

_COUNT_WEIGHTS = 2


def inputs_per_channel(levels: int, level_features: bool) -> int:
    """Channels that the network of a :class:`QuantizedScoreModel` sees for each of the data."""
    return 1 + level_feature_count(levels) if level_features else 1


def outputs_per_channel(levels: int, level_counts: bool) -> int:
    """Channels that it gives for each of the data."""
    return levels + _COUNT_WEIGHTS if level_counts else levels


class QuantizedScoreModel(ScoreModel):
    """A :class:`~sde_diffusion.score.ScoreModel` whose network outputs logits over grey levels.

    Args:
        net: called as ``net(c_in x, c, **cond)``, maps (B, C, *S) to (B, C * levels, *S): for each channel,
            the logits of its levels. The last two arguments change what goes in and comes out.
        sde: the forward process.
        levels: the number of grey levels of data ``2 (k + u) / levels - 1``.
        level_counts: levels that the image has become more likely. Of their counts c_k, see
            :func:`~sde_diffusion.level_features.level_counts`, the network is told ``context = log(1 + c)``, (B,
            C * levels), and it gives two weights more for each channel, ``v_1`` and ``v_2``:
            ``logit_k + v_1 log(1 + c_k) + v_2 log(1 + 10 c_k)`` takes the place of ``logit_k``.
        level_features: append :func:`~sde_diffusion.level_features.level_features` of the state to the network's
            input, which then has C (1 + level_feature_count(levels)) channels.
        conditioning, sigma_data, autocast: as for ``ScoreModel``.

    Raises:
        ValueError: fewer than 2 levels, or (when called) a network output of another shape.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        levels: int,
        *,
        conditioning: Conditioning = LOG_NOISE,
        sigma_data: float = 1.0,
        autocast: torch.dtype | None = None,
        level_features: bool = False,
        level_counts: bool = False,
    ) -> None:
        super().__init__(net, sde, NOISE, conditioning=conditioning, sigma_data=sigma_data, autocast=autocast)
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
        self.levels = levels
        self.level_features = level_features
        self.level_counts = level_counts

    @property
    def inputs_per_channel(self) -> int:
        """Channels that the network sees for each of the data."""
        return inputs_per_channel(self.levels, self.level_features)

    def _input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        scaled = super()._input(x, alpha, sigma)
        if not self.level_features:
            return scaled
        y = x.double()
        return torch.cat([scaled, level_features(y / expand(alpha, y), sigma / alpha, self.levels)], dim=1)

    def _expected(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], x.shape[1] * outputs_per_channel(self.levels, self.level_counts), *x.shape[2:])

    def predict_noise(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The expected noise ``E[eps | x_t = x]``, (B, C, *S)."""
        t = batched_time(t, x).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        y = x.double()
        y, s = y / expand(alpha, y), sigma / alpha
        counts = level_counts(y, s, self.levels) if self.level_counts else None
        if counts is not None:
            if "context" in cond:
                raise ValueError("the context of a network with level_counts is the counts: give none")
            cond = cond | {"context": counts.log1p().flatten(1)}
        output = self._output(x, t, alpha, sigma, cond).unflatten(1, (x.shape[1], -1))
        logits = output if counts is None else self._with_counts(output, counts)
        return expected_noise(logits.movedim(2, -1), y, s)

    def _with_counts(self, output: Tensor, counts: Tensor) -> Tensor:
        """The logits (B, C, K, *S) from what the network gives, (B, C, K + 2, *S)."""
        logits, weights = output.split([self.levels, _COUNT_WEIGHTS], 2)
        seen = torch.stack([counts.log1p(), (10 * counts).log1p()], -1).to(logits.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            parts = (part.flatten(3).flatten(0, 1) for part in (logits, seen, weights))
            return torch.baddbmm(*parts).reshape(logits.shape)

    def predict_data(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The denoised data ``E[x_0 | x_t = x]``, (B, C, *S)."""
        t = batched_time(t, x).double()
        noise = self.predict_noise(x, t, **cond)
        return (x - expand(self.sde.sigma(t), x) * noise) / expand(self.sde.alpha(t), x)
