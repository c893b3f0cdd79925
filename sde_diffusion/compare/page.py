"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sde_diffusion.compare.figures import all_figures
from sde_diffusion.compare.ranking import Entry, entries, method
from sde_diffusion.compare.study import Settings
from sde_diffusion.compare.targets import target
from sde_diffusion.compare.verdicts import answers, paper, places, scores_of, statements
from sde_diffusion.workdir import environment

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a202c;max-width:1150px;margin:2em auto;padding:0 1em}
h1,h2{line-height:1.2}h2{margin-top:2em;border-bottom:1px solid #e2e8f0}
img{max-width:100%;display:block;margin:.5em 0}
table{border-collapse:collapse;font-size:13px;margin:1em 0}
th,td{padding:.25em .6em;text-align:right;border-bottom:1px solid #edf2f7}
th{cursor:pointer;background:#f7fafc;position:sticky;top:0;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th[aria-sort=ascending]::after{content:" \\25B2"}th[aria-sort=descending]::after{content:" \\25BC"}
.scroll{max-height:32em;overflow:auto}code,pre{background:#f7fafc;font-size:12px}pre{padding:.8em;overflow:auto}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b), numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      const order = numbers ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    body.append(...rows);
  }));
}
"""


def _cell(value: Any, shown: str | None = None) -> str:
    if isinstance(value, float):
        key = "1e99" if value != value or value == float("inf") else repr(value)
        return f'<td data-value="{key}">{html.escape(shown if shown is not None else f"{value:.4g}")}</td>'
    return f"<td>{html.escape('' if value is None else str(value))}</td>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable" id="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _shown(entry: Entry) -> str:
    return f"{entry.value:.4f} ± {entry.error:.4f}" if entry.value < float("inf") else "diverged"


def _ranking(results: dict[str, Any], score: str) -> str:
    settings = results["settings"]
    rows = []
    for name in settings["targets"]:
        for nfe in settings["evaluations"]:
            for place, e in enumerate(entries(results["arms"], name, score, nfe), 1):
                rows.append(
                    [
                        _cell(e.method),
                        _cell(e.kind),
                        _cell(name),
                        _cell(float(nfe), str(nfe)),
                        _cell(float(place), str(place)),
                        _cell(e.value, _shown(e)),
                        _cell(e.first, f"{e.first:.2f}"),
                        _cell(e.result["ratio"] or None),
                    ]
                )
    heads = ("method", "kind", "target", "NFE", "place", "energy distance", "P(best)", "step / sigma²")
    return _table(heads, rows, f"ranking-{score}")


def _arms(results: dict[str, Any]) -> str:
    everything = ("energy", "w2", "mode_error", "coverage", "outside", "mean_error", "std_error", "frechet")
    names = tuple(name for name in everything if any(name in arm["measures"] for arm in results["arms"]))
    rows = []
    for arm in results["arms"]:
        measured = arm["measures"]
        cells = [
            _cell(method(arm)),
            _cell(arm["target"]),
            _cell(arm["score"]),
            _cell(float(arm["used"]), str(arm["used"])),
        ]
        cells += [_cell(arm["ratio"]), _cell(float(arm["seconds"]), f"{arm['seconds']:.2f}")]
        for key in ("acceptance", "snr"):
            cells.append(_cell(arm[key]))
        for name in names:
            value = measured.get(name)
            if value is None:
                cells.append(_cell(float("inf"), "diverged" if measured["diverged"] else "–"))
            else:
                cells.append(_cell(value["value"], f"{value['value']:.4f} ± {value['error']:.4f}"))
        rows.append(cells)
    heads = ("method", "target", "score", "NFE", "step", "seconds", "acceptance", "snr", *names)
    return _table(heads, rows, "arms")


def _chains(results: dict[str, Any]) -> str:
    rows = [
        [
            _cell(c["corrector"]),
            _cell(c["target"]),
            _cell(c["ratio"]),
            _cell(c["drift"], f"{c['drift']:.4f} ± {c['error']:.4f}"),
            _cell(c["z"]),
            _cell(c["effective"]),
            _cell(c["acceptance"]),
        ]
        for c in results["chains"]
    ]
    heads = (
        "corrector",
        "target",
        "step / sigma²",
        "drift, nats",
        "z",
        "effective samples / evaluation",
        "acceptance",
    )
    return _table(heads, rows, "chains")


def _answers(results: dict[str, Any]) -> str:
    rows = []
    for a in answers(results):
        cells = [
            _cell(a["target"]),
            _cell(a["score"]),
            _cell(float(a["nfe"]), str(a["nfe"])),
            _cell(a["verdict"]),
            _cell(float(a["z"]), f"{a['z']:.1f}"),
        ]
        for kind in ("P", "PC", "C"):
            e = a[kind]
            cells += [_cell(None), _cell(None)] if e is None else [_cell(e.method), _cell(e.value, _shown(e))]
        rows.append(cells)
    heads = ("target", "score", "NFE", "better spent on", "z", "best P", "P", "best PC", "PC", "best C", "C")
    return _table(heads, rows, "answers")


def _paper(results: dict[str, Any]) -> str:
    rows, heads = [], ["target", "N"]
    for row in paper(results):
        columns = [key for key in row if key not in ("target", "nfe")]
        heads = ["target", "N", *columns]
        cells = [_cell(row["target"]), _cell(float(row["nfe"]), str(row["nfe"]))]
        cells += [_cell(None) if row[c] is None else _cell(row[c].value, _shown(row[c])) for c in columns]
        rows.append(cells)
    return _table(heads, rows, "paper")


def _places(results: dict[str, Any]) -> str:
    rows = [
        [
            _cell(row["corrector"]),
            _cell(score),
            _cell(row["place"], f"{row['place']:.2f} ± {row['error']:.2f}"),
            _cell(row["first"], f"{row['first']:.2f}"),
        ]
        for score in scores_of(results)
        for row in places(results, score)
    ]
    return _table(("corrector", "score", "mean place", "P(best)"), rows, "places")


def _floor(results: dict[str, Any]) -> str:
    names = list(dict.fromkeys(key for found in results["floor"].values() for key in found))
    names = [name for name in names if name not in ("diverged", "energy_a", "energy_b")]
    rows = []
    for name, found in results["floor"].items():
        cells = [_cell(name)]
        for key in names:
            v = found.get(key)
            cells.append(
                _cell(None) if v is None else _cell(v["value"], f"{v['value']:.4f} ± {v['error']:.4f}")
            )
        rows.append(cells)
    return _table(("target", *names), rows, "floor")


def _minibatch(results: dict[str, Any]) -> str:
    """Arms with the score of random components beside those with the exact one."""
    same = ("target", "nfe", "predictor", "corrector", "steps", "ratio")
    exact = {tuple(a[k] for k in same): a for a in results["arms"] if a["score"] == "exact"}
    rows = []
    for arm in results["arms"]:
        if arm["score"] != "minibatch":
            continue
        beside = exact.get(tuple(arm[k] for k in same))
        cells = [_cell(method(arm)), _cell(arm["target"]), _cell(float(arm["nfe"]), str(arm["nfe"]))]
        for one in (arm, beside):
            for key in ("energy", "mode_error"):
                v = None if one is None else one["measures"].get(key)
                cells.append(
                    _cell(None) if v is None else _cell(v["value"], f"{v['value']:.4f} ± {v['error']:.4f}")
                )
        rows.append(cells)
    heads = (
        "method",
        "target",
        "NFE",
        "energy",
        "mode error",
        "energy, exact score",
        "mode error, exact score",
    )
    return _table(heads, rows, "minibatch")


_INTRODUCTION = (
    "Quality is the energy distance 2 E|x-y| - E|x-x'| - E|y-y'|, unbiased, so that it may be negative: for mixtures "
    "in the coordinates (x / scale, place within the most probable component), for runs in those of their data, "
    "images at their grey levels. The step size of each method is chosen by the even samples and judged by the odd. "
    "Errors are bootstrap standard errors. NFE: score evaluations per sample. MALA and Barker accept by the path "
    "integral of the score."
)


def command(settings: dict[str, Any]) -> str:
    """The command line of the same study."""
    words = ["python experiments/correctors.py"]
    for key, value in asdict(Settings()).items():
        given = settings[key]
        if list(given) != list(value) if isinstance(value, tuple) else given != value:
            shown = " ".join(map(str, given)) if isinstance(value, tuple) else str(given)
            words.append(f"--{key} {shown}")
    return " ".join(words)


def write_page(results: dict[str, Any], folder: str | Path) -> Path:
    """Writes the pictures and ``report.html`` into the folder; the path of the page."""
    place = Path(folder)
    figures = all_figures(results, place)
    settings = results["settings"]
    names = "; ".join(target(n).title for n in settings["targets"])
    said = "".join(f"<li>{html.escape(text)}</li>" for text in statements(results))
    scores = scores_of(results)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Correctors compared</title>',
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>Correctors compared</h1>',
        f"<p>Predictors and correctors at equal numbers of score evaluations on: {html.escape(names)}. "
        f"{settings['samples']} samples an arm, all arms from the same initial noise. {html.escape(_INTRODUCTION)} "
        f"{len(results['arms'])} arms and {len(results['chains'])} chains in {results['cpu_seconds'] / 60:.1f} "
        f"minutes of processor time; {results['missing']} left out for want of time.</p>",
        f"<h2>In short</h2><ul>{said}</ul>",
        "<p>A clear difference is one of two standard errors: of twenty comparisons of equals one shows it by "
        "chance.</p>",
        "<h2>Predictor or corrector?</h2><p>z: by how many standard errors the best with a corrector beats the "
        "best without. The best of many methods is lucky, and PC has more of them than P.</p>",
        _answers(results),
        "<h2>Which corrector?</h2><p>Each after its best predictor: the mean place over all targets and numbers of "
        "evaluations, ± and probability of the best mean place by drawing the distances anew with their errors.</p>",
        _places(results),
        "<h2>The paper's comparison</h2><p>Song et al. (2021), table 1. Langevin steps by their rule (per sample); "
        "N/2 predictor steps, N, N/2 of each, N corrector steps.</p>",
        _paper(results),
        "<h2>What real samples measure</h2><p>As many as an arm has, against the same reference: nothing can be "
        "expected to do better.</p>",
        _floor(results),
    ]
    for caption, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        )
    for score in scores:
        if score != "minibatch":
            parts += [f"<h2>Ranking, {score} score</h2>", _ranking(results, score)]
    if "minibatch" in scores:
        parts += [
            "<h2>SGLD with the score of random components</h2><p>Half of the components, others in every evaluation, "
            "for the predictor too; beside it the same with the exact score.</p>",
            _minibatch(results),
        ]
    if results["chains"]:
        parts += ["<h2>Chains started in p_t</h2>", _chains(results)]
    parts += [
        "<h2>Every arm</h2>",
        _arms(results),
        f"<h2>To reproduce</h2><pre>{html.escape(command(settings))}\n",
        html.escape(
            json.dumps({"settings": settings, **environment(torch.device("cpu"))}, indent=1, default=str)
        ),
        f"</pre><script>{_SCRIPT}</script></body></html>",
    ]
    page = place / "report.html"
    page.write_text("".join(parts), encoding="utf-8")
    return page
