"""The pictures of the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sde_diffusion.compare.ranking import Entry, after_a_predictor, best, entries, of_kind, ratio_of
from sde_diffusion.compare.study import pictured
from sde_diffusion.compare.targets import Target, target
from sde_diffusion.pictures.style import TEXT, new_figure, write

_COLOURS = (
    "#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#d69e2e", "#319795", "#b83280", "#718096", "#1a202c",
)  # fmt: skip
_FAMILIES = {
    "P": ("predictor only", "#2b6cb0"),
    "PC": ("predictor + corrector", "#2f855a"),
    "C": ("corrector only", "#c53030"),
}
_LEAST = 1e-4


def _panels(count: int, width: float = 3.3, height: float = 3.1) -> tuple[Figure, list[Axes]]:
    figure = new_figure(max(width * count, 4.8), height)  # one panel must not be narrower than its title
    axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def _plain(axes: Axes, title: str, x_label: str = "", y_label: str = "") -> None:
    axes.set_title(title, color=TEXT, fontsize=9)
    axes.set_xlabel(x_label, color=TEXT, fontsize=8)
    axes.set_ylabel(y_label, color=TEXT, fontsize=8)
    axes.tick_params(labelsize=7, colors=TEXT)
    axes.grid(color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(
    axes: Axes,
    results: dict[str, Any],
    name: str,
    score: str,
    series: dict[str, tuple[Callable[[Entry], bool], str]],
    measure: str = "energy_b",
) -> None:
    evaluations = results["settings"]["evaluations"]
    for i, (label, (chosen, colour)) in enumerate(series.items()):
        found = [(n, best(entries(results["arms"], name, score, n), chosen)) for n in evaluations]
        points = [(n, *e.of(measure)) for n, e in found if e is not None and np.isfinite(e.value)]
        if not points:
            continue
        n, value, error = (np.array(v) for v in zip(*points, strict=True))
        shift = 1.03 ** (i - len(series) / 2)
        low = np.maximum(value - error, _LEAST / 2)
        value_shown = np.maximum(value, _LEAST)
        axes.errorbar(
            n * shift,
            value_shown,
            yerr=(np.maximum(value_shown - low, 0), error),
            color=colour,
            label=label,
            marker="o",
            markersize=3,
            linewidth=1.3,
            capsize=2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=_LEAST / 2)
    axes.set_xticks(evaluations, [str(n) for n in evaluations])
    axes.minorticks_off()
    noise = results["floor"].get(name, {}).get(measure.removesuffix("_b"))
    if noise is not None:
        axes.axhspan(
            _LEAST / 2, max(noise["value"], 0) + 2 * noise["error"] + _LEAST, color="#edf2f7", zorder=0
        )


def families(results: dict[str, Any], path: Path, score: str = "exact") -> Path:
    """The best of each family against evaluations: where evaluations are best spent."""
    names = results["settings"]["targets"]
    figure, panels = _panels(len(names))
    series = {label: (of_kind(kind), colour) for kind, (label, colour) in _FAMILIES.items()}
    for axes, name in zip(panels, names, strict=True):
        _lines(axes, results, name, score, series)
        _plain(
            axes,
            target(name).title,
            "evaluations per sample",
            "energy distance to the target" if axes is panels[0] else "",
        )
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=7, framealpha=0.8)
    return write(figure, path, f"best of each family, {score} score")


def frechet(results: dict[str, Any], path: Path) -> Path | None:
    """The Frechet distance of those arms of each family whose energy distance is the least."""
    with_it = {arm["target"] for arm in results["arms"] if "frechet" in arm["measures"]}
    names = [name for name in results["settings"]["targets"] if name in with_it]
    if not names:
        return None
    figure, panels = _panels(len(names), width=4.2)
    series = {label: (of_kind(kind), colour) for kind, (label, colour) in _FAMILIES.items()}
    for axes, name in zip(panels, names, strict=True):
        _lines(axes, results, name, "exact", series, "frechet")
        axes.set_ylim(bottom=results["floor"][name]["frechet"]["value"] / 2)
        _plain(axes, target(name).title, "evaluations per sample", "Frechet distance, classifier's features")
    panels[0].legend(fontsize=7, framealpha=0.8)
    return write(figure, path, "Frechet distance (grey: what real samples have)")


def quality(results: dict[str, Any], path: Path, score: str = "exact") -> Path:
    """Every corrector after its best predictor against evaluations, and no corrector."""
    names = results["settings"]["targets"]
    figure, panels = _panels(len(names), height=3.8)
    series: dict[str, tuple[Callable[[Entry], bool], str]] = {
        "no corrector": (lambda e: e.kind == "P", "#000000")
    }
    for corrector, colour in zip(results["settings"]["correctors"], _COLOURS * 2, strict=False):
        series[corrector] = (after_a_predictor(corrector), colour)
    for axes, name in zip(panels, names, strict=True):
        _lines(axes, results, name, score, series)
        _plain(
            axes, target(name).title, "evaluations per sample", "energy distance" if axes is panels[0] else ""
        )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return write(figure, path, f"each corrector, {score} score")


def heat_map(results: dict[str, Any], path: Path, nfe: int) -> Path:
    """Energy distance over correctors and step sizes, after DDIM."""
    settings = results["settings"]
    names, ratios, correctors = settings["targets"], settings["ratios"], settings["correctors"]
    figure, panels = _panels(len(names), width=3.3, height=3.6)
    for axes, name in zip(panels, names, strict=True):
        values = np.array(
            [[ratio_of(results["arms"], c, nfe).get((name, r), np.nan) for r in ratios] for c in correctors]
        )
        logs = np.log10(np.maximum(values, _LEAST))
        shown = axes.imshow(
            np.where(np.isfinite(logs), logs, np.nan), aspect="auto", cmap="viridis_r", vmin=-4, vmax=0
        )
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                colour = "#ffffff" if logs[i, j] > -2 else "#1a202c"  # dark cells are far from the target
                text = "diverged" if np.isinf(value) else "" if np.isnan(value) else f"{value:.2g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
        _plain(axes, target(name).title, "step size / sigma²")
        axes.grid(False)
        axes.set_xticks(range(len(ratios)), [f"{r:g}" for r in ratios])
        axes.set_yticks(range(len(correctors)), correctors if axes is panels[0] else [""] * len(correctors))
    bar = figure.colorbar(shown, ax=panels, shrink=0.8)
    bar.set_label("log10 energy distance", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return write(figure, path, f"step sizes, {nfe} evaluations, DDIM + one corrector step a time")


def _contours(axes: Axes, chosen: Target, limits: float) -> None:
    if chosen.mixture is None:  # a run on points in the plane
        x, y = chosen.sample(500, 0).T.numpy()
        axes.scatter(x, y, s=1.2, color="#b87a33", linewidths=0, alpha=0.5)
        return
    line = np.linspace(-limits, limits, 160)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    density = chosen.mixture.log_prob(torch.from_numpy(points)).exp().reshape(160, 160).numpy()
    axes.contour(
        line,
        line,
        density,
        levels=density.max() * np.array([0.01, 0.1, 0.5]),
        colors="#b87a33",
        linewidths=0.6,
    )


def _picked(results: dict[str, Any], name: str, nfe: int, key: str) -> list[Entry]:
    """The best two of P and PC, the best of C, and the worst, of those whose samples were kept."""
    found = [e for e in entries(results["arms"], name, "exact", nfe) if key in e.result]
    picks: list[Entry] = []
    for kind, count in (("P", 2), ("PC", 2), ("C", 1)):
        picks += [e for e in found if e.kind == kind][:count]
    finite = [e for e in found if np.isfinite(e.value)]
    worst = max(finite, key=lambda e: e.value, default=None)
    return picks if worst is None or worst in picks else [*picks, worst]


def clouds(results: dict[str, Any], path: Path, name: str, nfe: int = 50) -> Path | None:
    """Samples of some arms over the contours of the density."""
    chosen = target(name)
    picks = _picked(results, name, nfe, "cloud")
    if not picks:
        return None
    figure, panels = _panels(len(picks), width=2.4, height=3.1)
    limits = 5.5 if name == "funnel" else 3.6 if chosen.mixture is not None else 3 * chosen.scale
    for axes, entry in zip(panels, picks, strict=True):
        _contours(axes, chosen, limits)
        x = np.array(entry.result["cloud"])
        axes.scatter(x[:, 0], x[:, 1], s=1.2, color="#2b6cb0", linewidths=0)
        axes.set_xlim(-limits, limits)
        axes.set_ylim(-limits, limits)
        axes.set_aspect("equal")
        _plain(axes, f"{entry.method}\n{entry.value:.4f} ± {entry.error:.4f}")
        axes.grid(False)
    return write(figure, path, f"{chosen.title}, {nfe} evaluations: best of P, PC, C, and the worst")


def images(results: dict[str, Any], path: Path, name: str, nfe: int = 50) -> Path | None:
    """Images drawn by some arms, from the same initial noise."""
    picks = _picked(results, name, nfe, "pictures")
    if not picks:
        return None
    figure, panels = _panels(len(picks), width=2.2, height=2.7)
    for axes, entry in zip(panels, picks, strict=True):
        drawn = np.array(entry.result["pictures"])  # (n, C, H, W)
        side = math.isqrt(len(drawn))
        rows = [np.concatenate(list(drawn[i * side : (i + 1) * side]), -1) for i in range(side)]
        whole = np.concatenate(rows, -2).transpose(1, 2, 0)
        axes.imshow(whole.squeeze(-1) if whole.shape[-1] == 1 else whole, cmap="gray", vmin=0, vmax=255)
        _plain(axes, f"{entry.method}\n{entry.value:.3f} ± {entry.error:.3f}")
        axes.grid(False)
        axes.set_xticks([])
        axes.set_yticks([])
    return write(figure, path, f"{target(name).title}, {nfe} evaluations: best of P, PC, C, and the worst")


def stationarity(results: dict[str, Any], path: Path) -> Path | None:
    """The drift of chains that begin in p_t, in nats of the mean log-density, by corrector and step size."""
    chains, settings = results["chains"], results["settings"]
    names = [n for n in settings["targets"] if any(c["target"] == n for c in chains)]
    if not names:
        return None
    figure, panels = _panels(len(names), width=3.2, height=3.6)
    for axes, name in zip(panels, names, strict=True):
        for k, ratio in enumerate(settings["ratios"]):
            rows = [c for c in chains if c["target"] == name and c["ratio"] == ratio]
            y = np.array([settings["correctors"].index(c["corrector"]) for c in rows]) + 0.22 * (k - 1)
            drift = np.nan_to_num([c["drift"] for c in rows], nan=-1e3, neginf=-1e3)
            error = np.nan_to_num([2 * c["error"] for c in rows], nan=0.0, posinf=0.0)
            axes.errorbar(
                drift,
                y,
                xerr=error,
                fmt="o",
                markersize=3,
                color=_COLOURS[k],
                label=f"{ratio:g} sigma²",
                linewidth=1,
            )
        axes.axvline(0, color="#1a202c", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=0.1)
        _plain(axes, target(name).title, "drift of E log p_t (nats), ± 2 errors")
        axes.set_yticks(
            range(len(settings["correctors"])),
            settings["correctors"] if axes is panels[0] else [""] * len(settings["correctors"]),
        )
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=6)
    if names and chains:
        panels[0].legend(fontsize=6)
    return write(figure, path, "chains started in p_t (t = 0.2): zero for a chain without bias")


def autocorrelation(results: dict[str, Any], path: Path, ratio: float) -> Path | None:
    """How fast chains forget, by lag."""
    chains, settings = results["chains"], results["settings"]
    names = [n for n in settings["targets"] if any(c["target"] == n for c in chains)]
    if not names:
        return None
    figure, panels = _panels(len(names), height=2.9)
    for axes, name in zip(panels, names, strict=True):
        for c in chains:
            if c["target"] == name and c["ratio"] == ratio:
                colour = (_COLOURS * 2)[settings["correctors"].index(c["corrector"])]
                axes.plot(
                    np.clip(c["autocorrelation"], -1, 1), color=colour, linewidth=1.1, label=c["corrector"]
                )
        _plain(
            axes, target(name).title, "lag, steps", "autocorrelation of log p_t" if axes is panels[0] else ""
        )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return write(figure, path, f"memory of chains, step size {ratio:g} sigma²")


def all_figures(results: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Every picture that the results allow, by caption."""
    settings = results["settings"]
    middle = settings["ratios"][len(settings["ratios"]) // 2]
    some = pictured(settings["evaluations"])
    scores = {arm["score"] for arm in results["arms"]}
    made: dict[str, Path | None] = {
        "Where to spend evaluations: the best of each family": families(results, folder / "families.png"),
        "The same with a biased score": families(results, folder / "families_biased.png", "biased")
        if "biased" in scores
        else None,
        "Frechet distance": frechet(results, folder / "frechet.png"),
        "Quality against evaluations, each corrector": quality(results, folder / "quality.png"),
        "The same with a biased score, each corrector": quality(
            results, folder / "quality_biased.png", "biased"
        )
        if "biased" in scores
        else None,
        "Step sizes": heat_map(results, folder / "step_sizes.png", some),
        "Stationarity": stationarity(results, folder / "stationarity.png"),
        "Autocorrelation": autocorrelation(results, folder / "autocorrelation.png", middle),
    }
    for name in settings["targets"]:
        draw = clouds if target(name).shape == (2,) else images
        file = folder / f"samples_{name.strip('/').replace('/', '_')}.png"
        made[f"Samples: {target(name).title}"] = draw(results, file, name, some)
    return {caption: path for caption, path in made.items() if path is not None}
