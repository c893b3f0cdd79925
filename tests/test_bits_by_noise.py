"""``experiments/bits_by_noise.py``: all bits are found, and those of levels that are not alike are fewer."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sde_diffusion as sd
import tiny


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "experiments"))
    return importlib.import_module("bits_by_noise")


class Prior(nn.Module):
    """Knows how often each level occurs: exact for pixels that know nothing of each other."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.logits[None, :, None, None].expand(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("share", [None, (8, 4, 2, 1, 1)])
def test_an_exact_model_has_the_entropy_of_its_levels(
    script: ModuleType, share: tuple[int, ...] | None
) -> None:
    """Of 5 levels alike, or of which the first makes half: by the area under the excess error over all noise."""
    weights = torch.ones(5) if share is None else torch.tensor(share).float()
    p = weights / weights.sum()
    levels = torch.multinomial(p, 2400 * 64, replacement=True, generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(test=levels.to(torch.uint8).reshape(2400, 1, 8, 8), levels=5)
    model = sd.QuantizedScoreModel(Prior(p.log()), sd.VP(), 5)
    log_snr, excess = script.excess(
        SimpleNamespace(data=data, model=model, sde=model.sde), 2400, "float32", 1
    )
    ends = model.sde.log_snr(torch.tensor([model.sde.t_max, model.sde.t_min], dtype=torch.float64))
    area = float(ends.diff()) / (2 * math.log(2)) * excess
    ordered = area[log_snr.argsort()]
    error = float(ordered.diff().square().mean() / 2 / len(ordered)) ** 0.5
    entropy = -float((p * p.log2()).sum())
    assert error < 0.02 * entropy
    assert abs(float(ordered.mean()) - entropy) < 4 * error


def test_the_table_of_two_runs(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        changes = tiny.keywords(tiny.NO_REPORT | {"model.parametrization": "levels", "seed": seed})
        assert tiny.command("train", Path(folder), **changes) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bits_by_noise.py", "--images", "40", "--workdirs", *folders])
    script.main()
    printed = capsys.readouterr().out
    bands = re.findall(r"^\| \S+ to \S+ \| (\S+) \| (\S+) \|$", printed, re.M)
    totals = re.search(r"^\| all \| (\S+) \| (\S+) \|$", printed, re.M).groups()
    for i in range(2):
        assert sum(float(row[i]) for row in bands) == pytest.approx(float(totals[i]), abs=1e-3)
    difference = float(re.search(r"second: (\S+) ± \S+ from first", printed).group(1))
    assert difference == pytest.approx(float(totals[1]) - float(totals[0]), abs=2e-4)
