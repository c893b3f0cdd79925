"""The comparison of correctors: its targets, accounts, measures, cache, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
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
from sde_diffusion.compare.page import command
from sde_diffusion.compare.ranking import entries
from sde_diffusion.compare.stationarity import autocorrelation, effective_share, stationarity
from sde_diffusion.compare.study import tasks
from sde_diffusion.compare.verdicts import paper, places, statements
from sde_diffusion.config import UsageError
from sde_diffusion.correctors import Chain
from sde_diffusion.metrics import energy_distance
from tiny import NO_REPORT, POINTS, STEPS, keywords
from tiny import command as tiny_command

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


def test_the_minibatch_score_is_of_half_of_the_components() -> None:
    """A component that is not among them is as if it were not there: samples in its mode are drawn elsewhere."""
    chosen, t = target("ring"), torch.tensor(1e-3, dtype=torch.float64)
    x = chosen.mixture.means.repeat(500, 1)
    pulled = chosen.minibatch(len(x), 0)(x, t).norm(dim=1) > 10 * chosen.score(x, t).norm(dim=1).max() + 10
    assert float(pulled.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


def test_the_answer_comes_before_what_refines_it() -> None:
    """All numbers of evaluations, targets and families with the exact score come first, then step sizes, the biased
    score and the rest: a budget that ends early has an answer."""
    settings = Settings()
    arms = plan(settings.targets, settings.evaluations)
    assert len(set(arms)) == len(arms)
    middle = [a for a in arms if a.score == "exact" and a.ratio in (0.0, 0.1) and a.steps == 1]
    needed = {
        (name, nfe, kind)
        for name in settings.targets
        for nfe in settings.evaluations
        for kind in ("P", "PC", "C")
    }
    first = arms[: len(arms) // 4]
    assert {
        (a.target, a.nfe, a.kind) for a in first if a in middle and a.nfe in settings.evaluations
    } == needed
    assert {a.corrector for a in first} == {"none", *settings.correctors}
    kinds = [task[0] if task[0] == "chain" else task[1]["score"] for task in tasks(settings)]
    assert kinds.index("chain") < kinds.index("biased") < kinds.index("minibatch")
    assert {a.target for a in arms if a.score == "minibatch"} == {"ring", "grid"}


def test_reports_may_be_of_some_steps_only() -> None:
    ring, t = target("ring"), torch.tensor(0.3, dtype=torch.float64)
    record: list[sd.Report] = []
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(5, 2, dtype=torch.float64, generator=generator)

    chain = Chain(sd.SGLD(sd.SigmaScaled(0.1)), draw, record.append, every=3)
    x = draw()
    for _ in range(7):
        x = chain.step(ring.sde, ring.score, x, t, draw())
    assert len(record) == 3


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


def _arm(predictor: str, corrector: str, nfe: int, value: float, error: float = 0.01) -> dict:
    one = {"value": value, "error": error}
    kind = "P" if corrector == "none" else "C" if predictor == "none" else "PC"
    arm = {"target": "ring", "score": "exact", "nfe": nfe, "predictor": predictor, "corrector": corrector}
    measured = {"energy": one, "energy_a": one, "energy_b": one}
    return arm | {"steps": 1, "ratio": 0.1, "kind": kind, "measures": measured}


def test_verdicts_say_what_the_numbers_say() -> None:
    """Made-up distances: PC beats P at equal steps but not at equal evaluations, correctors alone are worst, and at
    50 evaluations all have arrived."""
    arms = [
        _arm("ddim", "none", 10, 0.5),
        _arm("ddim", "none", 20, 0.2),
        _arm("ddim", "langevin", 20, 0.3),
        _arm("ddim", "mala", 20, 0.6),
        _arm("none", "langevin", 20, 0.9),
    ]
    arms += [_arm("ddim", c, 50, v) for c, v in (("none", 0.001), ("langevin", 0.002), ("mala", 0.0))]
    settings = {"targets": ["ring"], "evaluations": [20, 50], "correctors": ["langevin", "mala"]}
    results = {"arms": arms, "settings": settings}
    text = "\n".join(statements(results))
    assert "20 evaluations, exact score: better spent on predictor steps, where there is a difference" in text
    assert "50 evaluations, exact score: no clear difference" in text
    assert (
        "ddim with Langevin: reproduced (better in 1, worse in 0, no clear difference in 0 of 1). "
        "Against P with the same evaluations: better in 0, worse in 1, no clear difference in 1 of 2" in text
    )
    assert "reverse_diffusion with Langevin: not tested" in text
    assert "with as many evaluations, ddim: reproduced (better in 0, worse in 1" in text
    ranked = places(results, "exact")
    assert [row["corrector"] for row in ranked] == ["langevin", "mala"] or ranked[0]["place"] == 1.5
    assert ranked[0]["place"] == pytest.approx(1.5) and ranked[0]["error"] > 0.1
    arms[2] = _arm("ddim", "langevin", 20, 0.7)
    text = "\n".join(statements(results))
    assert "ddim with Langevin: contradicted (better in 0, worse in 1" in text
    arms[3] = _arm("ddim", "mala", 20, 0.05)
    assert "20 evaluations, exact score: better spent on corrector steps" in "\n".join(statements(results))


# Trained runs -------------------------------------------------------------------------------------------------------


def trained(folder: Path, settings: dict) -> int:
    return tiny_command("train", folder, **keywords(NO_REPORT | settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on digits with classes, and one on points in the plane; of four steps each."""
    found = {}
    for name, settings in (("digits", {"model.class_conditional": True}), ("points", POINTS)):
        found[name] = tmp_path_factory.mktemp("runs") / name
        assert trained(found[name], settings) == 0
    return found


@pytest.mark.slow
def test_a_trained_run_is_a_target(runs: dict[str, Path], tmp_path: Path) -> None:
    names = {key: str(path) for key, path in runs.items()}
    small = Settings(
        targets=tuple(names.values()),
        evaluations=(12,),
        correctors=("langevin",),
        ratios=(0.1,),
        samples=256,
        jobs=1,
    )
    results = run_study(small, tmp_path)
    assert results["missing"] == 0 and results["chains"] == []
    assert {a["score"] for a in results["arms"]} == {"exact"}  # its own: no bias is added to it
    real = results["floor"][names["digits"]]
    assert abs(real["energy"]["value"]) < 4 * real["energy"]["error"]
    digits = [a for a in results["arms"] if a["target"] == names["digits"]]
    assert {a["kind"] for a in digits} == {"P", "PC", "C"}
    held = [a for a in digits if not a["measures"]["diverged"]]
    assert {a["kind"] for a in held} >= {"P", "PC"}
    for arm in held:  # of a network that has learned nothing yet
        frechet = arm["measures"]["frechet"]
        assert frechet["error"] > 0
        assert frechet["value"] > real["frechet"]["value"] + 4 * (frechet["error"] + real["frechet"]["error"])
        assert np.array(arm.get("pictures", np.zeros((16, 1, 8, 8)))).shape == (16, 1, 8, 8)
    page = write_page(results, tmp_path)
    parser = _Page()
    parser.feed(page.read_text(encoding="utf-8"))
    assert {p.name for p in tmp_path.glob("*.png")} >= {"families.png", "frechet.png", "quality.png"}
    assert len(list(tmp_path.glob("samples_*.png"))) == 2
    assert "trained score: " in page.read_text(encoding="utf-8")
    # Other weights in the same folder are another target: nothing of the old results is taken for theirs.
    before = target(names["points"]).version
    assert trained(runs["points"], POINTS | {"training.steps": STEPS + 2}) == 0
    target.cache_clear()
    assert target(names["points"]).version != before


@pytest.mark.slow
def test_what_a_trained_target_is_compared_with(runs: dict[str, Path]) -> None:
    chosen = target(str(runs["digits"]))
    test = chosen.sample(10_000, 0)
    assert test.shape == (360, 1, 8, 8) and len(torch.unique(test.flatten(1), dim=0)) == 360
    assert len(chosen.sample(100, 1)) == 100
    real = chosen.floor(256, 0)
    assert not (real.flatten(1)[:, None] == test.flatten(1)).all(-1).any()  # training data
    off = test + 0.05 * torch.rand_like(test)  # within a grey level's bin of width 2 / 17
    torch.testing.assert_close(chosen.observe(off), test)
    # The state goes through the network in parts, and classes in turn, whatever the number of states.
    x, t = torch.randn(300, 1, 8, 8), torch.tensor(0.3, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(chosen.score(x, t)[:20], chosen.score(x[:20], t), rtol=1e-4, atol=1e-4)


def test_a_folder_that_is_no_run_is_refused_before_any_work(tmp_path: Path) -> None:
    empty = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match="nothing"):
        run_study(Settings(targets=("ring", empty)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = [
        "--mode",
        "compare",
        "--workdir",
        str(tmp_path / "out"),
        f"--config.compare.targets=ring,{empty}",
    ]
    assert run.main(words) == 2


def test_the_command_that_reproduces() -> None:
    assert command(json.loads(json.dumps(asdict(Settings())))) == "python experiments/correctors.py"
    given = asdict(Settings(targets=("runs/digits",), evaluations=(20, 50), samples=512))
    assert command(given) == (
        "python experiments/correctors.py --targets runs/digits --evaluations 20 50 --samples 512"
    )


# The page -----------------------------------------------------------------------------------------------------------


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

WATCH = """
<script>
window.addEventListener("load", () => {
  const complete = [...document.images].filter(i => i.complete && i.naturalWidth > 0).length;
  document.title = JSON.stringify({complete, errors: window.caught});
});
</script>
"""
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


def opened(page: str, folder: Path) -> tuple[str, list[str]]:
    """The document after its scripts, and what the browser wrote to its console (also on what did not load)."""
    folder.mkdir(exist_ok=True)
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-extensions", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=10000", "--dump-dom", file.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_in_a_browser_images_are_there_and_tables_sort(study: tuple[dict, Path], tmp_path: Path) -> None:
    _, page = study
    text = (
        page.read_text(encoding="utf-8")
        .replace("<head>", f"<head>{CATCH}")
        .replace("</body>", f"{PROBE}</body>")
    )
    dom, console = opened(text, tmp_path / "report")
    assert console == []
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


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_the_browser_would_tell_of_errors(tmp_path: Path) -> None:
    """A page with an error, a message and a missing image: all three are seen."""
    broken = (
        '<html><head></head><body><img src="missing.png">'
        '<script>console.error("told"); nowhere()</script></body></html>'
    )
    console = "\n".join(opened(broken, tmp_path)[1])
    assert "told" in console and "nowhere is not defined" in console
    caught = opened(
        broken.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{WATCH}</body>"), tmp_path
    )[0]
    title = re.search(r"<title>(.*?)</title>", caught, re.DOTALL)
    assert title is not None
    seen = json.loads(title[1])
    assert seen["complete"] == 0 and seen["errors"][0] == "told" and len(seen["errors"]) == 2


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
