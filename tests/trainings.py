"""Small training runs, and what is compared of them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sde_diffusion.checkpoint import read_checkpoint
from sde_diffusion.data import DataSet
from sde_diffusion.networks import MLP
from sde_diffusion.score import ScoreModel
from sde_diffusion.sdes import VP
from sde_diffusion.training import Trainer, TrainingSettings

CPU = torch.device("cpu")


def vectors(n=50, labels=False):
    """Correlated Gaussian vectors, 50 to train on and 20 held out."""
    generator = seeded(1)
    x = torch.randn(n + 20, 2, generator=generator) @ torch.tensor([[0.8, 0.3], [0.0, 0.2]])
    y = (x[:, 0] > 0).long() if labels else None
    parts = (None, None) if y is None else (y[:n], y[n:])
    return DataSet("vectors", x[:n], x[n:], *parts)


def images():
    generator = seeded(2)
    x = torch.randint(0, 5, (30, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return DataSet("images", x[:20], x[20:], levels=5)


def mlp(dropout=0.2, seed=0, sde=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ScoreModel(MLP(2, width=16, depth=1, dropout=dropout, **options), sde or VP())


class StandIn(nn.Module):
    """A model without a network; the trainer wants something to train."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))


def settings(**changes):
    """Small and awkward: 50 samples, batches of 16 in 3 pieces, nothing a multiple of anything."""
    numbers = {"steps": 11, "batch_size": 16, "accumulate": 3, "warmup_steps": 3, "learning_rate": 3e-3}
    reports = {"log_every": 4, "eval_every": 5, "eval_size": 30, "checkpoint_every": 3}
    exact = {"device": "cpu", "precision": "float32"}
    return TrainingSettings(**{**numbers, **reports, "ema_decay": 0.9, **exact, **changes})


def trainer(workdir, model=None, data=None, config=None, augmentation=None, **changes):
    return Trainer(
        mlp() if model is None else model,
        vectors() if data is None else data,
        settings(**changes),
        workdir,
        {"name": "test"} if config is None else config,
        augmentation=augmentation,
        progress=False,
    )


def assert_equal(a, b, where="state", skip=()):
    """Bit for bit, whatever the nesting."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in skip:
                assert_equal(a[key], b[key], f"{where}.{key}", skip)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_equal(*pair, f"{where}[{i}]", skip)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def final_state(workdir):
    return read_checkpoint(Path(workdir) / "checkpoints" / "latest.pt")


def assert_same_run(a, b, skip=("seconds",)):
    assert_equal(final_state(a), final_state(b), skip=skip)


def scalars(workdir):
    """All values by tag, as TensorBoard shows them after any number of restarts."""
    events = EventAccumulator(str(Path(workdir) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def at_call(module, number, action):
    """Runs ``action`` at the given forward call of a module."""
    calls = 0

    def hook(*_):
        nonlocal calls
        calls += 1
        if calls == number:
            action()

    return module.register_forward_pre_hook(hook)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def next_second():
    """TensorBoard orders event files by the second in which they begin: here two runs could share one."""
    time.sleep(1.0 - time.time() % 1.0 + 1e-3)
