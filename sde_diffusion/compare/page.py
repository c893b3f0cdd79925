"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from sde_diffusion.compare.figures import all_figures
from sde_diffusion.compare.ranking import Entry, best, entries, method, of_kind, of_method
from sde_diffusion.compare.targets import target
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
    names = ("energy", "w2", "mode_error", "coverage", "outside", "mean_error", "std_error", "frechet")
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
                cells.append(_cell(float("inf"), "diverged" if measured["diverged"] else ""))
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


def answers(results: dict[str, Any]) -> list[dict[str, Any]]:
    """For each target, score and number of evaluations the best of each family, and which family is first.

    ``verdict``: ``predictor`` or ``corrector`` where the best of P and of PC differ by two standard errors,
    else ``tie``.
    """
    settings = results["settings"]
    found = []
    for score in ("exact", "biased"):
        for name in settings["targets"]:
            for nfe in settings["evaluations"]:
                ranked = entries(results["arms"], name, score, nfe)
                kinds = {kind: best(ranked, of_kind(kind)) for kind in ("P", "PC", "C")}
                p, pc = kinds["P"], kinds["PC"]
                if p is None or pc is None:
                    continue
                error = (p.error**2 + pc.error**2) ** 0.5
                z = (p.value - pc.value) / error if error else float("nan")
                verdict = "corrector" if z > 2 else "predictor" if z < -2 else "tie"
                found.append(
                    {"target": name, "score": score, "nfe": nfe, "z": z, "verdict": verdict, **kinds}
                )
    return found


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
    heads = ("target", "score", "NFE", "better spent on", "z", "best P", "", "best PC", "", "best C", "")
    return _table(heads, rows, "answers")


def paper(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Song et al.'s comparison (2021, table 1) on the exact targets: ``P`` with N/2 and with N predictor steps,
    ``PC`` with N/2 of each, ``C`` with N, all with Langevin by their rule, each at its best step size."""
    settings = results["settings"]
    found = []
    for name in settings["targets"]:
        for nfe in settings["evaluations"]:
            row: dict[str, Any] = {"target": name, "nfe": nfe}
            for predictor in ("reverse_diffusion", "ddim"):
                ranked = entries(results["arms"], name, "exact", nfe)
                half = entries(results["arms"], name, "exact", nfe // 2)
                row[f"{predictor} P N/2"] = best(half, of_method(predictor))
                row[f"{predictor} P N"] = best(ranked, of_method(predictor))
                row[f"{predictor} PC"] = best(ranked, of_method(f"{predictor} + langevin"))
            row["C"] = best(entries(results["arms"], name, "exact", nfe), of_method("langevin alone"))
            found.append(row)
    return found


def _paper(results: dict[str, Any]) -> str:
    rows, heads = [], ["target", "N"]
    for row in paper(results):
        columns = [key for key in row if key not in ("target", "nfe")]
        heads = ["target", "N", *columns]
        cells = [_cell(row["target"]), _cell(float(row["nfe"]), str(row["nfe"]))]
        cells += [_cell(None) if row[c] is None else _cell(row[c].value, _shown(row[c])) for c in columns]
        rows.append(cells)
    return _table(heads, rows, "paper")


def write_page(results: dict[str, Any], folder: str | Path) -> Path:
    """Writes the pictures and ``report.html`` into the folder; the path of the page."""
    place = Path(folder)
    figures = all_figures(results, place)
    settings = results["settings"]
    names = "; ".join(target(n).title for n in settings["targets"])
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Correctors compared</title>',
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>Correctors compared</h1>',
        f"<p>Predictors and correctors at equal numbers of score evaluations on: {html.escape(names)}. "
        f"{settings['samples']} samples an arm, all arms from the same initial noise; errors are bootstrap "
        "standard errors. Quality is the energy distance 2 E|x-y| - E|x-x'| - E|y-y'| in the coordinates (x / "
        "scale, place within the most probable component), unbiased, so that it may be negative. The step size "
        "of each method is chosen by the even samples and judged by the odd ones. "
        f"{len(results['arms'])} arms and {len(results['chains'])} chains; {results['missing']} left out for "
        "want of time.</p>",
        "<h2>Predictor or corrector?</h2><p>z: by how many standard errors the best with a corrector beats the "
        "best without. The best of many methods is lucky, and PC has more of them than P.</p>",
        _answers(results),
        "<h2>The paper's comparison</h2><p>Langevin steps by Song's rule (per sample); N/2 predictor steps, N, "
        "N/2 of each, N corrector steps.</p>",
        _paper(results),
    ]
    for caption, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        )
    parts += [
        "<h2>Ranking, exact score</h2>",
        _ranking(results, "exact"),
        "<h2>Ranking, biased score</h2>",
        _ranking(results, "biased"),
        "<h2>Chains started in p_t</h2>",
        _chains(results),
        "<h2>Every arm</h2>",
        _arms(results),
        "<h2>To reproduce</h2><pre>python experiments/correctors.py\n",
        html.escape(
            json.dumps({"settings": settings, **environment(torch.device("cpu"))}, indent=1, default=str)
        ),
        f"</pre><script>{_SCRIPT}</script></body></html>",
    ]
    page = place / "report.html"
    page.write_text("".join(parts), encoding="utf-8")
    return page
