"""The exact Wasserstein distance between two sets of samples, by optimal assignment."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from sde_diffusion.arrays import as_matrix, same_length, same_width


def wasserstein2(x: Any, y: Any) -> float:
    """``W_2 = (min over permutations p of mean_i |x_i - y_p(i)|^2)^(1/2)``, in data units.

    The distance between the two sets, exactly; between the distributions behind them it is too large, by
    what two sets of one distribution are apart (of the order of ``n^(-1/D)``): report that beside it. Time is
    O(n^3), a second for n = 2000.

    Args:
        x, y: (n, *D), of equal length.
    """
    a, b = as_matrix(x, "x"), as_matrix(y, "y")
    same_width(x=a, y=b)
    same_length(x=a, y=b)
    cost = cdist(a, b, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))
