"""What is sampled: mixtures with exact scores and exact samples, the score with a known error, and trained runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.data.toy import grid
from sde_diffusion.errors import unknown_name
from sde_diffusion.minibatch import MinibatchScore
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE, VP


@dataclass(frozen=True, eq=False)
class DiagonalScore:
    """The score, and log-density, of a diffused mixture whose covariances are diagonal in one common basis: the same
    numbers as those of :class:`~sde_diffusion.analytic.MixtureScore`, by two products of matrices.

    Args:
        weights, means, variances: (K,), (K, D), (K, D), along the rows of ``basis`` (D, D), or the axes.
        sde: the forward process.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    sde: SDE
    basis: Tensor | None = None

    def matrices(self, t: float) -> tuple[Tensor, Tensor]:
        """What a time makes of the mixture: ``A`` (K, 2 D + 1) with joint log-densities ``A [u, u^2, 1]``, and ``C``
        (2 D, K) with ``C share = [sum share mean / v, sum share / v]``, in the coordinates ``u``."""
        alpha, variance = float(self.sde.alpha(t)), float(self.sde.variance(t))
        v = alpha**2 * self.variances + variance
        precision, means = 1 / v, alpha * self.means
        shifted = means * precision
        constant = self.weights.log() - 0.5 * (means * shifted + (2 * math.pi * v).log()).sum(1)
        return torch.cat([shifted, -0.5 * precision, constant[:, None]], 1), torch.cat(
            [shifted, precision], 1
        ).T.contiguous()

    def _joint(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Joint log-densities (K, B), the matrix ``C``, and the coordinates (D, B)."""
        to_joint, back = _matrices(self, float(t))
        u = (x.double() if self.basis is None else x.double() @ self.basis.T).T
        return to_joint @ torch.cat([u, u.square(), u.new_ones(1, u.shape[1])]), back, u

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """``grad_x log p_t(x)``, for one time ()."""
        joint, back, u = self._joint(x, t)
        # Components in rows, samples in columns, and no softmax: four times as fast for a thousand samples.
        share = joint.sub_(joint.amax(0)).exp_()
        mixed = back @ share / share.sum(0)
        gradient = (mixed[: len(u)] - u * mixed[len(u) :]).T
        return (gradient if self.basis is None else gradient @ self.basis).to(x.dtype).contiguous()

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p_t(x)`` in nats, (B,)."""
        return self._joint(x, t)[0].logsumexp(0).to(x.dtype)


@functools.lru_cache(maxsize=4)
def _matrices(score: DiagonalScore, t: float) -> tuple[Tensor, Tensor]:
    """A corrector and a predictor ask at the same time, one after the other."""
    with torch.inference_mode(False):
        return score.matrices(t)


@dataclass(frozen=True, eq=False)
class BiasedScore:
    """``score + error sin(3 x_rolled / r) / r`` with ``r^2 = alpha^2 scale^2 + sigma^2``, where ``x_rolled`` has each
    coordinate in the place of its neighbour: an error of known size that is the gradient of nothing, as a network's.
    """

    score: Score
    sde: SDE
    error: float
    scale: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The biased score."""
        radius = float((self.sde.alpha(t) ** 2 * self.scale**2 + self.sde.variance(t)).sqrt())
        return self.score(x, t) + self.error / radius * torch.sin(3 * x.roll(1, -1) / radius)


@dataclass(frozen=True, eq=False)
class Target:
    """A distribution and its score.

    Attributes:
        name, title: short, and for people.
        sde: the forward process.
        shape: of one sample.
        score: exact, or trained.
        sample: exact samples, or test data (at most ``n``), ``(n, seed) -> (n, *shape)``: what is compared with.
        mixture: the distribution itself, where it is one.
        modes: whether the components of the mixture are modes to be counted.
        features: of samples, for the Frechet distance; None where there are none.
        scale: the root mean square of a coordinate.
        observe: of samples, what is compared: images at their grey levels.
        fresh: real samples other than ``sample``, whose distance to it is the least there can be; default ``sample``
            itself, with another seed.
        version: of a trained score, whose folder may be trained on.
    """

    name: str
    title: str
    sde: SDE
    shape: tuple[int, ...]
    score: Score
    sample: Callable[[int, int], Tensor]
    mixture: GaussianMixture | None = None
    modes: bool = False
    features: Callable[[Tensor], object] | None = field(default=None, repr=False)
    scale: float = 1.0
    observe: Callable[[Tensor], Tensor] = field(default=lambda x: x, repr=False)
    fresh: Callable[[int, int], Tensor] | None = field(default=None, repr=False)
    version: str = ""

    def floor(self, n: int, seed: int) -> Tensor:
        """Real samples that a perfect sampler would do no better than."""
        return (self.fresh or self.sample)(n, 20_000 + seed)

    def biased(self, error: float = 0.5) -> BiasedScore:
        """The score with a known error."""
        return BiasedScore(self.score, self.sde, error, self.scale)

    def minibatch(self, n: int, seed: int) -> MinibatchScore:
        """For ``n`` samples the score of a random half of the components, another half in every evaluation."""
        assert self.mixture is not None
        count = len(self.mixture.weights)
        generator = torch.Generator().manual_seed(seed)
        return MinibatchScore(
            self.mixture,
            self.sde,
            count // 2,
            lambda: torch.randn(n, count, dtype=torch.float64, generator=generator),
        )


def _of_diagonal(
    name: str,
    title: str,
    weights: Tensor,
    means: Tensor,
    variances: Tensor,
    *,
    modes: bool = False,
    basis: Tensor | None = None,
) -> Target:
    weights, sde = weights.double() / weights.double().sum(), VP()
    means, variances = means.double(), variances.double()
    turn = torch.eye(means.shape[1], dtype=torch.float64) if basis is None else basis
    mixture = GaussianMixture(weights, means @ turn, turn.T @ torch.diag_embed(variances) @ turn)
    scale = math.sqrt(float((mixture.covariance.diagonal() + mixture.mean.square()).mean()))

    def draw(n: int, seed: int) -> Tensor:
        return mixture.sample(n, torch.Generator().manual_seed(seed))

    score = DiagonalScore(weights, means, variances, sde, basis)
    return Target(name, title, sde, (means.shape[1],), score, draw, mixture, modes, scale=scale)


def ring() -> Target:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius 2, with weights 1 : 2 : .. : 8."""
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    means = 2 * torch.stack((angles.cos(), angles.sin()), 1)
    weights = torch.tensor([1.0, 6, 3, 8, 2, 5, 4, 7])
    return _of_diagonal(
        "ring",
        "ring of 8 Gaussians, unequal weights",
        weights,
        means,
        torch.full((8, 2), 0.01, dtype=torch.float64),
        modes=True,
    )


def grid25() -> Target:
    """Twenty-five equal Gaussians of standard deviation 0.1 on a square grid of spacing 1."""
    mixture = grid()
    return _of_diagonal(
        "grid",
        "grid of 25 Gaussians",
        mixture.weights,
        mixture.means,
        torch.full((25, 2), 0.01, dtype=torch.float64),
        modes=True,
    )


def gaussian16() -> Target:
    """A Gaussian in 16 dimensions, its standard deviations from 0.01 to 1 in random directions."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator))
    variances = torch.logspace(-4, 0, 16, dtype=torch.float64)[None]
    return _of_diagonal(
        "gaussian",
        "16-D Gaussian, condition 10,000",
        torch.ones(1),
        torch.zeros(1, 16),
        variances,
        basis=basis,
    )


def funnel() -> Target:
    """Neal's funnel in the plane, ``v ~ N(0, 1.2^2)``, ``x | v ~ N(0, exp(v))``, as a mixture of 49 Gaussians.

    The components lie 0.2 apart in v and are 0.2 wide, with the weights of ``N(0, 1.2^2 - 0.2^2)``: that
    mixture itself is the target, and its score is exact.
    """
    v = torch.linspace(-4.8, 4.8, 49, dtype=torch.float64)
    weights = (-0.5 * v.square() / (1.2**2 - 0.2**2)).exp()
    means = torch.stack((v, torch.zeros_like(v)), 1)
    variances = torch.stack((torch.full_like(v, 0.04), v.exp()), 1)
    return _of_diagonal("funnel", "funnel (a mixture of 49)", weights, means, variances)


TARGETS: dict[str, Callable[[], Target]] = {
    "ring": ring,
    "grid": grid25,
    "gaussian": gaussian16,
    "funnel": funnel,
}


@functools.lru_cache(maxsize=8)
def target(name: str) -> Target:
    """The target of a name; a name with a slash is the folder of a trained run."""
    if "/" in name:
        from sde_diffusion.compare.trained import trained_target

        return trained_target(name)
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    return TARGETS[name]()
