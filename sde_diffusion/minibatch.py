"""The score of a finite mixture from a random subset of its components: the stochastic gradient of SGLD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.noise import NoiseSource
from sde_diffusion.sdes import SDE


@dataclass(frozen=True)
class MinibatchScore:
    """``sum_{k in S} w_k p_t(x | k) grad log p_t(x | k) / sum_{k in S} w_k p_t(x | k)`` with a new random
    subset ``S`` of ``size`` components in every evaluation, for each sample its own.

    This is what a minibatch makes of a mixture (with a data point for each component: of the empirical
    distribution). A score of a mixture is a quotient of sums, not a sum: unlike the gradient of a
    log-posterior over independent observations (Welling and Teh 2011), the estimate has beside its noise a
    bias, of order ``1 / size`` where the components overlap; far apart, a sample whose component is not in
    ``S`` is drawn to another one. With all components it is exact.

    Args:
        mixture: the target.
        sde: the forward process.
        size: components in a subset, 1 to K.
        source: gives (B, K) independent numbers of any one continuous law, those of each sample its own, such as
            ``SampleNoise(seed, range(B), (K,)).normal``.
    """

    mixture: GaussianMixture
    sde: SDE
    size: int
    source: NoiseSource

    def __post_init__(self) -> None:
        count = len(self.mixture.weights)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= count:
            raise ValueError(f"a subset of {count} components has 1 to {count}, got {self.size!r}")

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate, of the shape and type of ``x``."""
        joint, scores = self.mixture.component_scores(self.sde, x, t)
        keys = self.source().to(joint.device)
        if keys.shape != joint.shape:
            raise ValueError(
                f"the source must give numbers of shape {tuple(joint.shape)}, got {tuple(keys.shape)}"
            )
        chosen = torch.zeros_like(joint, dtype=torch.bool)
        chosen.scatter_(1, keys.topk(self.size, dim=1).indices, True)
        weights = joint.masked_fill(~chosen, -torch.inf).softmax(1)
        return torch.einsum("nk,nkd->nd", weights, scores).reshape(x.shape).to(x.dtype)
