"""The discrete chain of DDPM as a continuous-time SDE, and what only a chain has.

Step ``i`` of a chain of n, from 1 to n, goes from ``x_{i-1}`` (``x_0`` is the data) to ``x_i``; it ends at
the time ``t_i = i / n``. Tables hold step i at index ``i - 1``, as in the published code, whose "t" is that
index. ``alphas_bar`` is the product of ``alphas = 1 - betas`` (Ho et al. 2020; ``alphas_cumprod`` of their
code); the ``alpha(t)`` of an SDE is its square root.

Respacing a chain (``SpacedDiffusion`` of Nichol & Dhariwal 2021) takes no new chain here: the kernels between
any two grid points are exact, so a sampler just goes along fewer of them (:meth:`DDPM.times`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from sde_diffusion.parametrization import NOISE, Parametrization
from sde_diffusion.sdes import VariancePreserving, in_float64
from sde_diffusion.tensors import expand


@dataclass(frozen=True)
class DDPM(VariancePreserving):
    """A chain of betas seen as an SDE: ``log_alpha(i / n) = sum_{j <= i} log(1 - beta_j) / 2``, a smooth
    falling curve in between.

    At the grid points ``t_i = i / n`` the marginals and transition kernels are exactly the chain's,
    ``q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i I)`` (Ho et al. 2020, eq. 2). Between them any
    falling curve would do; this one is a cubic spline, because an ODE solver meets the drift ``f`` there. Were
    ``log_alpha`` linear, ``f`` would jump n times: an adaptive solver then needs 10 to 30 times the
    evaluations, and its error estimate is blind to part of the jumps.

    Args:
        betas: (n,) numbers in (0, 1), from the data end to the noise end; a tensor, an array or a sequence.

    Raises:
        ValueError: fewer than 2 betas, or one outside (0, 1).
    """

    betas: Sequence[float] | Tensor = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        betas = torch.as_tensor(self.betas, dtype=torch.float64).detach().cpu()
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"a chain needs a vector of at least 2 betas, got shape {tuple(betas.shape)}")
        wrong = ~((betas > 0) & (betas < 1))
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(f"betas must lie in (0, 1), got {betas[first]:.6g} at index {first}")
        # A tuple, so that the dataclass stays comparable and hashable.
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        values = torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0) / 2])
        table = torch.stack([values, _falling_slopes(values)])
        object.__setattr__(self, "_tables", {torch.device("cpu"): table})

    @classmethod
    def of_alphas_bar(cls, alphas_bar: Sequence[float] | Tensor, **times: float) -> DDPM:
        """The chain with given products ``alpha_bar_i = prod_{j <= i} (1 - beta_j)``, (n,).

        Raises:
            ValueError: they do not fall strictly from below 1 to above 0, or are fewer than 2.
        """
        table = torch.as_tensor(alphas_bar, dtype=torch.float64).detach().cpu()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                f"a chain needs a vector of at least 2 alphas_bar, got shape {tuple(table.shape)}"
            )
        outside = ~((table > 0) & (table < 1))
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(f"alphas_bar must lie in (0, 1), got {table[i]:.6g} at index {i}")
        rising = table.diff() >= 0
        if rising.any():
            i = int(rising.nonzero()[0])
            raise ValueError(
                f"alphas_bar must fall strictly, got {table[i]:.10g} and then {table[i + 1]:.10g} at index {i + 1}"
            )
        log_products = torch.cat([table.new_zeros(1), table.log()])
        return cls(-torch.expm1(log_products.diff()), **times)

    def __repr__(self) -> str:
        betas = f"{self.num_steps} betas from {self.betas[0]:.4g} to {self.betas[-1]:.4g}"
        return f"DDPM({betas}, t_min={self.t_min:g}, t_max={self.t_max:g})"

    @property
    def num_steps(self) -> int:
        """The length n of the chain."""
        return len(self.betas)

    # ------------------------------------------------------------ the tables of the papers, (n,) float64

    def _log_products(self) -> Tensor:
        """``log alpha_bar`` of 0 .. n, beginning with 0 for the data."""
        return 2 * self._table(torch.device("cpu"))[0]

    @property
    def alphas_bar(self) -> Tensor:
        """``alpha_bar_i = prod_{j <= i} (1 - beta_j)``, so that ``x_i = sqrt(alpha_bar_i) x_0 + sqrt(1 -
        alpha_bar_i) eps`` (Ho et al. 2020, eq. 4)."""
        return self._log_products()[1:].exp()

    @property
    def posterior_variance(self) -> Tensor:
        """``beta-tilde_i = beta_i (1 - alpha_bar_{i-1}) / (1 - alpha_bar_i)``, the variance of ``q(x_{i-1} |
        x_i, x_0)`` (Ho et al. 2020, eq. 7); 0 at the first step."""
        noise = -torch.expm1(self._log_products())
        return torch.tensor(self.betas, dtype=torch.float64) * noise[:-1] / noise[1:]

    @property
    def posterior_log_variance(self) -> Tensor:
        """``log beta-tilde``; the first step has that of the second, for its own is minus infinity (as in the
        code of Ho et al. 2020)."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2], variance[1:]]).log()

    @property
    def posterior_coefficients(self) -> tuple[Tensor, Tensor]:
        """The factors on ``x_0`` and on ``x_i`` in the mean of ``q(x_{i-1} | x_i, x_0)``:
        ``sqrt(alpha_bar_{i-1}) beta_i / (1 - alpha_bar_i)`` and ``sqrt(1 - beta_i) (1 - alpha_bar_{i-1}) / (1
        - alpha_bar_i)`` (Ho et al. 2020, eq. 7)."""
        products, betas = self._log_products(), torch.tensor(self.betas, dtype=torch.float64)
        noise = -torch.expm1(products)
        on_data = (products[:-1] / 2).exp() * betas / noise[1:]
        return on_data, (1 - betas).sqrt() * noise[:-1] / noise[1:]

    # ------------------------------------------------------------ steps

    def step_times(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """``(s, t)`` = the times of ``x_{i-1}`` and ``x_i`` for steps i in 1 .. n, (B,) integers -> float64.

        Raises:
            ValueError: they are no integers, or outside 1 .. n.
        """
        steps = torch.as_tensor(steps)
        if steps.is_floating_point() or (
            len(steps.flatten()) and not 1 <= int(steps.min()) <= int(steps.max()) <= self.num_steps
        ):
            raise ValueError(f"steps must be integers from 1 to {self.num_steps}, got {steps.tolist()!r}")
        scale = self.t_max / self.num_steps
        return (steps - 1).double() * scale, steps.double() * scale

    def times(self, steps: Tensor | None = None, *, data: bool = False) -> Tensor:
        """The grid of a sampler that visits the chain's own times: float64, falling from ``x_n`` to ``x_1``.

        Args:
            steps: visit these only (1 .. n in any order, such as :func:`respaced_steps` gives).
            data: end with the time 0 of the data. A sampler needs it not: its final denoising is the last
                step.
        """
        chosen = torch.arange(1, self.num_steps + 1) if steps is None else torch.as_tensor(steps).unique()
        times = self.step_times(chosen)[1].flip(0)
        return torch.cat([times, times.new_zeros(1)]) if data else times

    def respaced(self, steps: Tensor) -> DDPM:
        """The shorter chain over some of the steps (1 .. n), with the same marginals there.

        Its times are its own: step j of m is at ``j / m``. To run a network on it, go along ``times(steps)``
        of this chain instead.
        """
        chosen = torch.as_tensor(steps).unique()
        self.step_times(chosen)
        products = self._log_products()[torch.cat([chosen.new_zeros(1), chosen])]
        return DDPM(-torch.expm1(products.diff()), t_min=self.t_min, t_max=self.t_max)

    def mean(
        self,
        output: Tensor,
        x: Tensor,
        steps: Tensor,
        parametrization: Parametrization = NOISE,
        *,
        clip: bool = False,
    ) -> Tensor:
        """``mu_theta(x_i, i)``, the mean of ``p(x_{i-1} | x_i)``, from a network's prediction.

        The posterior mean of :attr:`posterior_coefficients` with the predicted data for ``x_0``; for a
        prediction of the noise it is ``(x_i - beta_i / sqrt(1 - alpha_bar_i) eps) / sqrt(1 - beta_i)`` (Ho et
        al. 2020, eq. 11).

        Args:
            output: of the network, (B, *D).
            x: ``x_i``, (B, *D).
            steps: ``i``, (B,) or () integers from 1 to n.
            parametrization: what the network predicts.
            clip: clip the predicted data to [-1, 1].
        """
        s, t = (time.to(x.device) for time in self.step_times(steps))
        data = parametrization.to_data(output, x, self.alpha(t), self.sigma(t))
        on_data, on_state, _ = self.posterior(s, t)
        return expand(on_data, x) * (data.clamp(-1, 1) if clip else data) + expand(on_state, x) * x

    # ------------------------------------------------------------ as an SDE

    def _table(self, device: torch.device) -> Tensor:
        tables: dict[torch.device, Tensor] = self.__dict__["_tables"]
        if device not in tables:
            with torch.inference_mode(False):  # what is kept may be differentiated later
                tables[device] = tables[torch.device("cpu")].to(device)
        return tables[device]

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """Half the cumulative sum of ``log(1 - beta)`` at the grid points ``i / n``, cubic in between."""
        position = t / self.t_max * self.num_steps
        left = position.detach().floor().long().clamp(0, self.num_steps - 1)
        value, *rest = self._cubic(left)
        u = position - left
        return value + u * (rest[0] + u * (rest[1] + u * rest[2]))

    def _cubic(self, left: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hermite's cubic between two grid points: its coefficients in the part of a step beyond the left one."""
        values, slopes = self._table(left.device)
        start, end = slopes[left], slopes[left + 1]
        rise = values[left + 1] - values[left]
        return values[left], start, 3 * rise - 2 * start - end, start + end - 2 * rise

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """By Newton's method within the right step of the table, kept between bounds that close in."""
        wanted = -0.5 * torch.nn.functional.softplus(-log_snr)
        falling = self._table(wanted.device)[0]
        left = torch.searchsorted(-falling, -wanted.contiguous(), right=True) - 1
        left = left.clamp(0, self.num_steps - 1)
        value, a, b, c = self._cubic(left)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        u = low + 0.5
        for i in range(16):
            above = value + u * (a + u * (b + u * c)) - wanted
            low, high = torch.where(above > 0, u, low), torch.where(above > 0, high, u)
            newton = u - above / (a + u * (2 * b + u * (3 * c)))
            # Far from the root halving the interval is safe; in the end only rounding can lead out of it.
            inside = (
                (newton >= low) & (newton <= high) if i < 10 else torch.ones_like(newton, dtype=torch.bool)
            )
            u = torch.where(inside, newton.clamp(0, 1), (low + high) / 2)
        return (left + u) / self.num_steps * self.t_max


def _falling_slopes(values: Tensor) -> Tensor:
    """Slopes for a cubic interpolation of falling ``values`` at 0 .. n that itself falls everywhere, (n + 1,).

    Those of the cubic spline, with two continuous derivatives. Where the values turn too sharply for it to
    fall (a slope above three times a neighbouring difference, or rising: Fritsch and Carlson 1980), the
    harmonic mean of the two differences takes its place (Fritsch and Butland 1984).
    """
    spline = CubicSpline(np.arange(len(values)), values.numpy())(np.arange(len(values)), 1)
    slopes, differences = torch.from_numpy(spline), values.diff()
    left = torch.cat([differences[:1], differences])
    right = torch.cat([differences, differences[-1:]])
    smaller, larger = torch.maximum(left, right), torch.minimum(left, right)  # all are negative
    falls = (slopes >= 2.5 * smaller) & (slopes <= 0.1 * larger)
    return torch.where(falls, slopes, 2 / (1 / left + 1 / right))


def respaced_steps(n: int, counts: int | Sequence[int]) -> Tensor:
    """Which of n steps a shorter chain keeps: (m,) integers from 1 to n, rising.

    The chain is cut into as many equal parts as there are counts, and from each so many steps are taken at
    equal distances, the first and last of the part among them (``space_timesteps`` of Nichol & Dhariwal 2021,
    whose "timestep map" is these less one).

    Args:
        n: steps of the whole chain.
        counts: one number, or one for each part, the data end first.

    Raises:
        ValueError: a count below 1 or beyond the length of its part.
    """
    counts = [counts] if isinstance(counts, int) else list(counts)
    if not counts:
        raise ValueError("respacing needs at least one number of steps, got none")
    lengths = [n // len(counts) + (i < n % len(counts)) for i in range(len(counts))]
    kept, start = [], 0
    for length, count in zip(lengths, counts, strict=True):
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= length:
            raise ValueError(
                f"a part of {length} steps can be respaced to 1 to {length} steps, got {count!r}"
            )
        stride = (length - 1) / max(count - 1, 1)
        # Python rounds halves to even, as the published code does.
        kept += [1 + start + round(stride * j) for j in range(count)]
        start += length
    return torch.tensor(kept)


def strided_steps(n: int, count: int) -> Tensor:
    """Every ``n / m``-th step from the first on: (m,) integers from 1 to n (the "ddim" respacing of Nichol &
    Dhariwal 2021, after Song et al. 2020).

    Raises:
        ValueError: no whole stride gives exactly so many steps.
    """
    for stride in range(1, n):
        steps = torch.arange(1, n + 1, stride)
        if len(steps) == count:
            return steps
    raise ValueError(f"no whole stride gives {count!r} of {n} steps")
