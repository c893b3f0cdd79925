"""The order of the data: random words as a pure function of a key, epochs, a restorable stream of batches.

Nothing here has hidden state. The random words of a key come from SHA-256 and the Philox bit generator
(Salmon et al., 2011), whose raw streams do not change between library versions, so a split or an order is the
same everywhere and for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.data.augment import Augmentation


def random_words(count: int, purpose: str, *key: int) -> np.ndarray:
    """``count`` uniform 64-bit words that depend on ``(purpose, *key)`` and on nothing else.

    Returns:
        ``uint64`` array of shape ``(count,)``; the first ``m`` words do not depend on ``count``.
    """
    text = "/".join((purpose, *(str(int(part)) for part in key)))
    words = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype="<u8")
    return np.random.Philox(key=words[:2].astype(np.uint64)).random_raw(count)


def permutation(n: int, purpose: str, *key: int) -> Tensor:
    """A uniformly random permutation of ``0 .. n - 1``, int64 ``(n,)``: a pure function of its arguments."""
    return torch.from_numpy(np.argsort(random_words(n, purpose, *key), kind="stable").astype(np.int64))


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits ``n`` samples, int64 ``(n,)``, which depends on nothing else.

    Raises:
        ValueError: ``n`` < 1 or ``epoch`` < 0.
    """
    if n < 1:
        raise ValueError(f"n must be an integer >= 1, got {n!r}")
    if epoch < 0:
        raise ValueError(f"epoch must be an integer >= 0, got {epoch!r}")
    return permutation(n, "epoch", seed, epoch)


def held_out(n: int, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits ``n`` samples into a training and a held-out part: two sorted int64 index tensors.

    The held-out part has ``round(fraction * n)`` samples, at least one, and leaves at least one for training.

    Raises:
        ValueError: fewer than two samples, or a fraction outside (0, 1).
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"test_fraction must be > 0 and < 1, got {fraction!r}")
    if n < 2:
        raise ValueError(f"cannot hold out a test part of {n} sample{'s' * (n != 1)}: at least 2 are needed")
    held = min(max(round(fraction * n), 1), n - 1)
    order = permutation(n, "split", seed)
    return order[held:].sort().values, order[:held].sort().values


@lru_cache(maxsize=4)
def _cached_order(n: int, seed: int, epoch: int) -> Tensor:
    return epoch_order(n, seed, epoch)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of a data set.

    Attributes:
        x: samples ``(B, *D)`` in the dtype of the data set (uint8 level indices or float32 vectors),
            augmented.
        y: int64 labels ``(B,)``, or None.
        augmentation: float32 ``(B, A)``, what was done to each sample, zero where nothing was; A = 0 without
            augmentation. A network that is given this as a condition and zeros when sampling does not leak
            the augmentation into its samples (Karras et al., 2022, Appendix F.2).
        indices: int64 ``(B,)``, which samples of the data set these are.
    """

    x: Tensor
    y: Tensor | None
    augmentation: Tensor
    indices: Tensor


class Batches:
    """An endless, deterministic and restorable stream of batches.

    The stream is the epochs laid end to end; batch ``k`` is its samples ``k B .. (k + 1) B - 1``. So no
    sample is dropped, a batch may end one epoch and begin the next, a batch larger than the data set is
    several epochs, and batch ``k``, augmentation included, is a pure function of ``(seed, k)``: see
    :meth:`batch`.

    Args:
        x: samples ``(N, *D)``, on any device.
        batch_size: samples per batch.
        labels: int64 ``(N,)`` or None.
        seed: seed of the order and of the augmentation.
        augmentation: random flips and shifts; by default none.

    Raises:
        ValueError: an empty data set, a batch size below 1, labels of another length, or an augmentation of
            images asked for samples that are not images.
    """

    def __init__(
        self,
        x: Tensor,
        batch_size: int,
        *,
        labels: Tensor | None = None,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        if len(x) < 1:
            raise ValueError("the data set has no samples")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        if labels is not None and len(labels) != len(x):
            raise ValueError(f"there are {len(x)} samples but {len(labels)} labels")
        self.augmentation = augmentation if augmentation is not None else Augmentation()
        if self.augmentation.size and x.dim() != 4:
            raise ValueError(
                f"flips and shifts are for images (N, C, H, W), got samples of shape {tuple(x.shape)}"
            )
        self.x, self.labels, self.batch_size, self.seed = x, labels, batch_size, int(seed)
        self._next = 0

    def batch(self, k: int) -> Batch:
        """Batch ``k`` (from 0), a pure function of the seed and ``k``; the stream stays where it is."""
        if k < 0:
            raise ValueError(f"k must be an integer >= 0, got {k!r}")
        n = len(self.x)
        start, stop = k * self.batch_size, (k + 1) * self.batch_size
        parts = []
        while start < stop:
            epoch, offset = divmod(start, n)
            parts.append(_cached_order(n, self.seed, epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        indices = torch.cat(parts).to(self.x.device)
        words = random_words(len(indices) * self.augmentation.draws, "augmentation", self.seed, k)
        x, applied = self.augmentation(self.x[indices], words.reshape(len(indices), -1))
        y = None if self.labels is None else self.labels[indices.to(self.labels.device)]
        return Batch(x, y, applied, indices)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self._next)
        self._next += 1
        return batch

    @property
    def epoch(self) -> int:
        """The epoch of the sample that comes next."""
        return self._next * self.batch_size // len(self.x)

    @property
    def position(self) -> int:
        """How many samples of the current epoch have been given out."""
        return self._next * self.batch_size % len(self.x)

    def state_dict(self) -> dict[str, int]:
        """The position of the stream, and what it depends on, as plain integers."""
        return {"batch": self._next, "seed": self.seed, "batch_size": self.batch_size, "size": len(self.x)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where ``state`` was taken.

        Raises:
            ValueError: the state is of a stream with another seed, batch size or number of samples.
        """
        here = self.state_dict()
        if set(state) != set(here):
            raise ValueError(f"a data position has the keys {sorted(here)}, got {sorted(state)}")
        differing = [
            f"{k} {state[k]} (here {here[k]})" for k in ("seed", "batch_size", "size") if state[k] != here[k]
        ]
        if differing:
            raise ValueError(f"the data position is of another stream: {', '.join(differing)}")
        if state["batch"] < 0:
            raise ValueError(f"the batch number must be >= 0, got {state['batch']!r}")
        self._next = int(state["batch"])
