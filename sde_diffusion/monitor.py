"""What a training run reports: running averages between two reports, TensorBoard, one progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

__all__ = ["Monitor", "NoiseLevels", "Window"]


class NoiseLevels:
    """Bins of equal width in log-SNR over the range of an SDE.

    Args:
        sde: has ``t_min``, ``t_max``, ``log_snr`` and ``time_of_log_snr``.
        bins: how many, >= 1.
        device: of the times that will be sorted into them.
    """

    @torch.no_grad()
    def __init__(self, sde: Any, bins: int = 5, device: torch.device | str = "cpu") -> None:
        ends = sde.log_snr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64))
        # Descending in log-SNR, so that the times ascend, as bucketize needs them.
        edges = torch.linspace(float(ends[0]), float(ends[1]), bins + 1, dtype=torch.float64)
        self._inner_times = sde.time_of_log_snr(edges[1:-1]).to(device)
        self.names = [f"log_snr_{low:.1f}_to_{high:.1f}" for high, low in pairwise(edges.tolist())]

    def __len__(self) -> int:
        return len(self.names)

    def index(self, t: Tensor) -> Tensor:
        """The bin of each time, int64 like ``t``; bin 0 has the least noise."""
        return torch.bucketize(t.double(), self._inner_times)


class Window:
    """Sums since the last report, kept on the device so that a step never waits for them.

    Args:
        levels: the noise levels over which errors are split.
        device: where the sums live.
    """

    def __init__(self, levels: NoiseLevels, device: torch.device | str = "cpu") -> None:
        self.levels = levels
        self._device = torch.device(device)
        self.seconds = 0.0  # not part of the state: a wall clock is not reproducible
        self.clear()

    def clear(self) -> None:
        """Starts over."""
        self._totals = torch.zeros(2, dtype=torch.float64, device=self._device)  # loss, gradient norm
        self._errors = torch.zeros(
            2, len(self.levels), dtype=torch.float64, device=self._device
        )  # sum, count
        self.steps = 0
        self.samples = 0
        self.seconds = 0.0

    def add(self, loss: Tensor, gradient_norm: Tensor, t: Tensor, error: Tensor, seconds: float) -> None:
        """One step: its loss and gradient norm, and the times and unweighted errors of its samples."""
        self._totals += torch.stack((loss.detach(), gradient_norm.detach())).double()
        self.add_errors(t, error)
        self.steps += 1
        self.samples += len(t)
        self.seconds += seconds

    def add_errors(self, t: Tensor, error: Tensor) -> None:
        """Times and unweighted errors of samples, (B,) each."""
        error = error.detach().double()
        self._errors.index_add_(1, self.levels.index(t), torch.stack((error, torch.ones_like(error))))

    def averages(self) -> dict[str, float]:
        """TensorBoard tags and values; empty without steps."""
        if not self.steps:
            return {}
        loss, norm = (self._totals / self.steps).tolist()
        by_level = {f"train_error/{name}": value for name, value in self.level_averages().items()}
        return {"train/loss": loss, "train/gradient_norm": norm, **by_level}

    def level_averages(self) -> dict[str, float]:
        """The average error of each noise level that occurred, by the level's name."""
        sums, counts = self._errors.tolist()
        return {
            name: total / count
            for name, total, count in zip(self.levels.names, sums, counts, strict=True)
            if count
        }

    @property
    def samples_per_second(self) -> float:
        """Training speed over the window; 0 without steps."""
        return self.samples / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "totals": self._totals.clone(),
            "errors": self._errors.clone(),
            "steps": self.steps,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self._totals.copy_(state["totals"])
        self._errors.copy_(state["errors"])
        self.steps, self.samples = int(state["steps"]), int(state["samples"])


class Monitor:
    """TensorBoard events in a folder, and a progress bar on a terminal.

    Args:
        folder: of the event files.
        step: the step from which the run (re)starts; events of an earlier attempt from there on are
            discarded.
        steps: at which it ends.
        progress: show the bar (only on a terminal) and the lines of :meth:`say`.
    """

    def __init__(self, folder: Path, step: int, steps: int, progress: bool = True) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it

        self._writer = SummaryWriter(str(folder), purge_step=step)
        self._progress = progress
        disable = None if progress else True  # None: only on a terminal
        self._bar = tqdm(
            total=steps, initial=step, disable=disable, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._writer.close()

    def advance(self) -> None:
        """One step done."""
        self._bar.update(1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values under their tags."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def images(self, step: int, pictures: Any) -> None:
        """Writes a picture, or several by name; (C, H, W), (H, W, C) or (H, W), uint8 or floats in [0, 1].
        None is nothing."""
        named = pictures if isinstance(pictures, Mapping) else {"samples": pictures}
        for name, picture in named.items():
            if picture is not None:
                channels_first = picture.ndim == 3 and picture.shape[0] in (1, 3)
                formats = "HW" if picture.ndim == 2 else ("CHW" if channels_first else "HWC")
                self._writer.add_image(name, picture, step, dataformats=formats)

    def flush(self) -> None:
        """Puts everything on the disk."""
        self._writer.flush()

    def postfix(self, **values: str) -> None:
        """The numbers at the end of the bar."""
        self._bar.set_postfix(values, refresh=False)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self._progress:
            tqdm.write(line)
