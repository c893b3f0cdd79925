"""The DDPM++ of the public PyTorch implementation of score SDEs (Song et al. 2021), from a checkout of yours.

Nothing of it is here; :mod:`throughput` runs it beside ours.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["reference_ddpmpp"]


def reference_ddpmpp(folder: Path, x: Tensor, steps: Tensor, noise: Tensor) -> tuple[Callable[[], Any], ...]:
    """A training step as its ``losses.py`` has it (float32, Adam with its warm-up and clipping, moving average) and
    an evaluation of the network, at its config for CIFAR-10.

    Args:
        folder: the checkout, with ``models`` and ``configs`` in it.
        x, noise: (B, 3, 32, 32); steps: (B,), 0 to 999.

    Raises:
        ValueError: there is no such checkout.
    """
    if not (folder / "models" / "ncsnpp.py").is_file():
        raise ValueError(f"{str(folder)!r} is no checkout of the implementation: it has no models/ncsnpp.py")
    # Its FIR filters are a compiled extension for GPUs, which this config does not use.
    operations: Any = types.ModuleType("op")
    operations.upfirdn2d = None
    sys.modules["op"] = operations
    sys.path.insert(0, str(folder))
    config = importlib.import_module("configs.vp.cifar10_ddpmpp_continuous").get_config()
    config.device = torch.device("cpu")
    make = importlib.import_module("models.ncsnpp").NCSNpp
    training = importlib.import_module("losses")
    net, averaged = make(config), make(config).eval()
    average = importlib.import_module("models.ema").ExponentialMovingAverage(
        net.parameters(), decay=config.model.ema_rate
    )
    optimizer = training.get_optimizer(config, net.parameters())
    optimize = training.optimization_manager(config)

    def train() -> None:
        optimizer.zero_grad()
        (net(x, steps.float()) - noise).square().mean().backward()
        optimize(optimizer, net.parameters(), step=config.optim.warmup)
        average.update(net.parameters())

    def infer() -> Any:
        with torch.no_grad():
            return averaged(x, steps.float())

    return train, infer
