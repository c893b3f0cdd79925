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
from sde_diffusion.level_features import level_feature_count, level_features
from sde_diffusion.parametrization import NOISE
from sde_diffusion.score import LOG_NOISE, Conditioning, ScoreModel
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand


class QuantizedScoreModel(ScoreModel):
    """A :class:`~sde_diffusion.score.ScoreModel` whose network outputs logits over grey levels.

    Args:
        net: called as ``net(c_in x, c, **cond)``, maps (B, C, *S) to (B, C * levels, *S): for each channel,
            the logits of its levels.
        sde: the forward process.
        levels: the number of grey levels of data ``2 (k + u) / levels - 1``.
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
    ) -> None:
        super().__init__(net, sde, NOISE, conditioning=conditioning, sigma_data=sigma_data, autocast=autocast)
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
        self.levels = levels
        self.level_features = level_features

    @property
    def inputs_per_channel(self) -> int:
        """Channels that the network sees for each of the data."""
        return 1 + level_feature_count(self.levels) if self.level_features else 1

    def _input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        scaled = super()._input(x, alpha, sigma)
        if not self.level_features:
            return scaled
        y = x.double()
        return torch.cat([scaled, level_features(y / expand(alpha, y), sigma / alpha, self.levels)], dim=1)

    def _expected(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], x.shape[1] * self.levels, *x.shape[2:])

    def predict_noise(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The expected noise ``E[eps | x_t = x]``, (B, C, *S)."""
        t = batched_time(t, x).double()
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        logits = self._output(x, t, alpha, sigma, cond)
        logits = logits.unflatten(1, (x.shape[1], self.levels)).movedim(2, -1)
        y = x.double()
        return expected_noise(logits, y / expand(alpha, y), sigma / alpha)

    def predict_data(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The denoised data ``E[x_0 | x_t = x]``, (B, C, *S)."""
        t = batched_time(t, x).double()
        noise = self.predict_noise(x, t, **cond)
        return (x - expand(self.sde.sigma(t), x) * noise) / expand(self.sde.alpha(t), x)
