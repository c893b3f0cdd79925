"""The comparison of correctors: its targets, accounts, measures, cache, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import sde_diffusion as sd
from sde_diffusion import run
from sde_diffusion.compare import (
    TARGETS,
    Arm,
    Settings,
    answers,
    plan,
    run_arm,
    run_study,
    target,
    write_page,
)
from sde_diffusion.compare.arms import PREDICTORS
from sde_diffusion.compare.measures import energy, measure, modes, spread
from sde_diffusion.compare.page import paper
from sde_diffusion.compare.ranking import entries
from sde_diffusion.compare.stationarity import autocorrelation, effective_share, stationarity
from sde_diffusion.metrics import energy_distance

SMALL = Settings(
    targets=("ring",),
    evaluations=(50,),
    correctors=("langevin", "mala"),
    ratios=(0.02, 0.1),
    samples=256,
    jobs=1,
)


@pytest.mark.parametrize("name", TARGETS)
def test_fast_scores_are_those_of_the_mixture(name: str) -> None:
    chosen = target(name)
    exact = chosen.mixture.score(chosen.sde)
    for t in (1e-3, 0.2, 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        x = chosen.sde.perturb(chosen.sample(40, 0), time, torch.randn(40, *chosen.shape).double())
        torch.testing.assert_close(chosen.score(x, time), exact(x, time), rtol=1e-7, atol=1e-6)
        torch.testing.assert_close(
            chosen.score.log_prob(x, time), exact.log_prob(x, time), rtol=1e-8, atol=1e-8
        )


def test_targets_are_what_they_say() -> None:
    ring = target("ring")
    weights = sorted((ring.mixture.weights * 36).tolist())
    assert weights == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8])
    values = torch.linalg.eigvalsh(target("gaussian").mixture.covariance)
    assert float(values[-1] / values[0]) == pytest.approx(1e4)
    x = target("funnel").sample(40_000, 0)
    assert float(x[:, 0].std()) == pytest.approx(
        1.2, abs=0.02
    )  # and x | v has the variance exp(v), here by halves
    high = x[:, 0] > 0
    assert float(x[high, 1].var() / x[~high, 1].var()) > 4


def test_the_biased_score_is_off_by_its_error() -> None:
    chosen, t = target("ring"), torch.tensor(0.3, dtype=torch.float64)
    x = torch.randn(500, 2, dtype=torch.float64)
    off = chosen.biased(0.5)(x, t) - chosen.score(x, t)
    radius = (chosen.sde.alpha(t) ** 2 * chosen.scale**2 + chosen.sde.variance(t)).sqrt()
    torch.testing.assert_close(off * radius, 0.5 * torch.sin(3 * x.flip(1) / radius))


@pytest.mark.slow
@pytest.mark.parametrize("nfe", [20, 51])
def test_no_arm_spends_more_than_it_may(nfe: int) -> None:
    """Counted where evaluations happen. What is left over is less than another level would cost."""
    for arm in plan(["ring"], [nfe]):
        used = run_arm(arm, target("ring"), 4).nfe
        spare = (arm.nfe - 1) // arm.levels + 2
        assert arm.nfe - spare <= used <= arm.nfe, (arm, used)


def test_arms_share_their_noise() -> None:
    """The first draw is the initial state, the same for all; an arm is the same every time."""
    chosen, arm = target("ring"), Arm("ring", "exact", 20, "ddim", "sgld", 1, 0.1)
    torch.testing.assert_close(run_arm(arm, chosen, 8, 3).x, run_arm(arm, chosen, 8, 3).x, rtol=0, atol=0)
    assert not torch.equal(run_arm(arm, chosen, 8, 3).x, run_arm(arm, chosen, 8, 4).x)
    assert not torch.equal(
        run_arm(arm, chosen, 8, 3).x, run_arm(Arm("ring", "exact", 20, "ddim"), chosen, 8, 3).x
    )


# Measures -----------------------------------------------------------------------------------------------------------


def test_the_energy_distance_and_its_error() -> None:
    """The value is that of the metrics; the error is the spread over fresh samples."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(400, 2))
    own = spread(y)
    draws = [rng.normal(size=(400, 2)) * 1.5 for _ in range(40)]
    assert energy(draws[0], y, own)["value"] == pytest.approx(energy_distance(draws[0], y).value)
    found = [energy(x, y, own) for x in draws]
    spread_of_values = np.std([f["value"] for f in found])
    assert np.mean([f["error"] for f in found]) == pytest.approx(spread_of_values, rel=0.35)


def test_modes_are_counted() -> None:
    ring = target("ring")
    exact = modes(ring.sample(4000, 1), ring)
    assert exact["coverage"]["value"] == 1 and exact["outside"]["value"] < 1e-3
    assert exact["mode_error"]["value"] < 0.04
    means = ring.mixture.means
    half = modes(means[:4].repeat(100, 1), ring)
    assert half["coverage"]["value"] == 0.5
    lost = ring.mixture.weights[4:].sum()
    shifted = (0.25 - ring.mixture.weights[:4]).clamp_min(0).sum()
    assert half["mode_error"]["value"] == pytest.approx(
        0.5 * float(lost + (0.25 - ring.mixture.weights[:4]).abs().sum())
    )
    assert float(shifted) > 0
    assert modes(torch.zeros(50, 2).double(), ring)["outside"]["value"] == 1


@pytest.mark.parametrize("name", TARGETS)
def test_exact_samples_measure_as_exact_and_others_do_not(name: str) -> None:
    chosen = target(name)
    x = chosen.sample(768, 77)
    good = measure(x, chosen)
    assert abs(good["energy"]["value"]) < 4 * good["energy"]["error"]
    wide = measure(x + 0.1 * torch.randn(x.shape, dtype=x.dtype), chosen)
    if name != "funnel":  # whose narrow end is the only part that feels it
        assert wide["energy"]["value"] > 5 * wide["energy"]["error"]
    x[3, 0] = math.nan
    broken = measure(x, chosen)
    assert broken == {"diverged": pytest.approx(1 / 768)}


# Chains -------------------------------------------------------------------------------------------------------------


def test_autocorrelation_and_effective_samples_of_a_known_chain() -> None:
    """AR(1): ``rho_l = a^l``, and ``(1 - a) / (1 + a)`` effective samples a step."""
    rng, a = np.random.default_rng(0), 0.7
    values = np.empty((80, 3000))
    values[0] = rng.normal(size=3000)
    for i in range(1, 80):
        values[i] = a * values[i - 1] + math.sqrt(1 - a**2) * rng.normal(size=3000)
    assert autocorrelation(values)[:5] == pytest.approx(a ** np.arange(5), abs=0.02)
    assert effective_share(values) == pytest.approx((1 - a) / (1 + a), rel=0.1)


def test_only_biased_chains_drift() -> None:
    ring = target("ring")
    exact = stationarity(ring, "mala", 0.4, n=600, steps=30)
    assert abs(exact["z"]) < 4 and 0.5 < exact["acceptance"] < 1
    biased = stationarity(ring, "sgld", 0.9, n=600, steps=30)
    assert biased["drift"] < -5 * biased["error"]


# The study ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("compare")
    results = run_study(SMALL, folder)
    return results, write_page(results, folder)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(study: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = study
    assert results["missing"] == 0
    files = sorted((page.parent / "arms").glob("*.json"))
    assert len(files) == len(results["arms"]) + len(results["chains"])
    files[-1].unlink()
    done: list = []
    original = sd.compare.study.run_task
    monkeypatch.setattr(sd.compare.study, "run_task", lambda *a: done.append(a[0]) or original(*a))
    again = run_study(SMALL, page.parent)
    assert len(done) == 1
    keep = ("seconds",)
    plain = [{k: v for k, v in arm.items() if k not in keep} for arm in results["arms"]]
    assert [{k: v for k, v in arm.items() if k not in keep} for arm in again["arms"]] == plain


def test_a_budget_ends_a_study(tmp_path: Path) -> None:
    few = Settings(
        targets=("ring",), evaluations=(20,), correctors=("sgld",), samples=256, jobs=1, budget=1e-9
    )
    results = run_study(few, tmp_path)
    assert results["arms"] == [] and results["missing"] > 10
    write_page(results, tmp_path)  # says so, and does not fail


@pytest.mark.slow
def test_the_ranking_is_chosen_and_judged_on_different_samples(study: tuple[dict, Path]) -> None:
    results, _ = study
    ranked = entries(results["arms"], "ring", "exact", 50)
    assert sum(e.first for e in ranked) == pytest.approx(1)
    assert [e.value for e in ranked] == sorted(e.value for e in ranked)
    for e in ranked:
        rivals = [
            a["measures"]["energy_a"]["value"]
            for a in results["arms"]
            if all(a[k] == e.result[k] for k in ("target", "score", "nfe", "predictor", "corrector", "steps"))
        ]
        assert e.result["measures"]["energy_a"]["value"] == min(rivals)
        assert e.value == e.result["measures"]["energy_b"]["value"]
    assert {a["verdict"] for a in answers(results)} <= {"predictor", "corrector", "tie"}
    row = paper(results)[0]
    assert row["ddim P N/2"].result["levels"] == row["ddim PC"].result["levels"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [v for k, v in values.items() if k in ("src", "href") and v]


@pytest.mark.slow
def test_the_page_needs_nothing_else(study: tuple[dict, Path]) -> None:
    _, page = study
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    assert len(parser.images) >= 8
    assert all(link.startswith("data:") for link in parser.links)
    for image in parser.images:
        assert base64.b64decode(image.split(",", 1)[1])[:8] == b"\x89PNG\r\n\x1a\n"


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)

PROBE = """
<script>
window.addEventListener("load", () => {
  const images = [...document.images], head = document.querySelector("#arms th:nth-child(4)");
  const column = () => [...document.querySelectorAll("#arms tbody tr")].map(r => Number(r.cells[3].dataset.value));
  const sorted = (v, up) => v.every((x, i) => i === 0 || (up ? v[i - 1] <= x : v[i - 1] >= x));
  head.click();
  const up = sorted(column(), true);
  head.click();
  const down = sorted(column(), false);
  const complete = images.filter(i => i.complete && i.naturalWidth > 0).length;
  document.title = JSON.stringify({images: images.length, complete, up, down, errors: window.caught});
});
</script>
"""
CATCH = (
    "<script>window.caught=[];window.onerror=m=>{window.caught.push(m)};"
    "console.error=m=>window.caught.push(m)</script>"
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_in_a_browser_images_are_there_and_tables_sort(study: tuple[dict, Path], tmp_path: Path) -> None:
    _, page = study
    text = (
        page.read_text(encoding="utf-8")
        .replace("<head>", f"<head>{CATCH}")
        .replace("</body>", f"{PROBE}</body>")
    )
    probed = tmp_path / "probed.html"
    probed.write_text(text, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--virtual-time-budget=10000", "--dump-dom"]
    dom = subprocess.run(
        [BROWSER, *options, probed.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None, dom[:500]
    seen = json.loads(title[1])
    assert seen == {
        "images": seen["images"],
        "complete": seen["images"],
        "up": True,
        "down": True,
        "errors": [],
    }
    assert seen["images"] >= 8


# What is refused, and the command line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": ("rnig",)}, "unknown target 'rnig'; did you mean 'ring'"),
        ({"correctors": ("mela",)}, "unknown corrector 'mela'; did you mean 'mala'"),
        ({"ratios": (-0.1,)}, r"step sizes must be positive, got \(-0.1,\)"),
        ({"ratios": (math.nan,)}, "step sizes must be positive"),
        ({"ratios": ()}, "ratios must not be empty"),
        ({"evaluations": (5,)}, "evaluations must be integers >= 12"),
        ({"samples": 10}, "at least 256 samples, got 10"),
        ({"budget": 0.0}, "budget must be positive, in minutes, got 0.0"),
        ({"jobs": 0}, "processes must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_arms_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a predictor or a corrector"):
        Arm("ring", "exact", 20, "none")
    with pytest.raises(ValueError, match="unknown predictor"):
        Arm("ring", "exact", 20, "dimm")
    with pytest.raises(ValueError, match="too few for a single step"):
        Arm("ring", "exact", 5, "ddim", "sgld", 10, 0.1)
    assert "ddim" in PREDICTORS


@pytest.mark.slow
def test_the_mode_compare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--mode", "compare", "--workdir", str(tmp_path), "--config.compare.targets=ring,"]
    words += [
        "--config.compare.evaluations=20,",
        "--config.compare.correctors=sgld,",
        "--config.compare.jobs=1",
    ]
    assert run.main([*words, "--config.compare.ratios=0.1,", "--config.compare.samples=256"]) == 0
    out = capsys.readouterr().out
    assert "ring" in out and "20 evaluations: " in out and (tmp_path / "report.html").is_file()
    assert run.main([*words, "--config.compare.samples=3"]) == 2
    assert "config.compare: an arm needs at least 256 samples, got 3" in capsys.readouterr().err
