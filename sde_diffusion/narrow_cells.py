"""Many grey levels on CPUs: the series of :mod:`sde_diffusion.cells` in C, ``networks/narrow_cells.c``.

By torch's operations each of its steps is a pass over (pixels, levels).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).parent / "networks" / "narrow_cells.c"
_LEAST = 64  # levels from which it is worth a compiler


@lru_cache
def _library() -> ctypes.CDLL | None:
    from sde_diffusion.networks.native import load_native  # importing the package imports no networks

    return load_native(_SOURCE, narrow_cells="PPPPPPPPNNNNI")


def narrow_cells(
    logits: Tensor,
    y: Tensor,
    s: Tensor,
    cumulants: tuple[Tensor, Tensor, Tensor],
    rows: Tensor,
    noise: Tensor,
    slopes: Tensor | None,
    in_y: Tensor | None,
) -> bool:
    """Fills in the expected noise and its derivatives for the samples ``rows``.

    Args:
        logits, y, s: of all samples, as for :func:`~sde_diffusion.cells.expected_noise`.
        cumulants: the coefficients of the series, each (B,).
        rows: which samples, int64.
        noise, in_y: (B, *D), contiguous.
        slopes: (B, *D, K); without it no derivatives are computed.

    Returns:
        False, with nothing done, where this is not for it: another device or type, few levels, pixels that are not
        next to each other in memory, no compiler.
    """
    fitting = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.shape[-1] >= _LEAST
    if not fitting or not len(rows) or _library() is None:
        return False
    layouts = [_layout(tensor) for tensor in (logits, logits if slopes is None else slopes)]
    if None in layouts:
        return False
    table = torch.stack([*cumulants, 2 / logits.shape[-1] / s, 1 / s], 1)[rows].contiguous()
    strides = torch.tensor(layouts).flatten()
    levels = logits.shape[-1]
    channels = logits.shape[1] if logits.ndim > 3 else 1
    rows, y = rows.contiguous(), y.contiguous()
    tensors = (logits, y, rows, table, noise, slopes, in_y, strides)
    failed = _library().narrow_cells(  # type: ignore[union-attr]
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        len(rows), channels, levels, y[0].numel() // channels, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the posterior of grey levels")
    return True


def _layout(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of image, channel and level for (B, C, *S, K) or (B, S, K), whose pixels S are in order."""
    expected = 1
    first = 2 if x.ndim > 3 else 1
    for size, stride in zip(reversed(x.shape[first:-1]), reversed(x.stride()[first:-1]), strict=True):
        if size != 1 and stride != expected:
            return None
        expected *= size
    return x.stride(0), x.stride(1) if x.ndim > 3 else 0, x.stride(-1)
