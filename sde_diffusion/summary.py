"""A few lines for people from the numbers of ``metrics.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["duration", "summarize"]

Section = Mapping[str, Any]


def duration(seconds: float) -> str:
    """``8.1 s`` or ``5 min 12 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def summarize(metrics: Section, sections: tuple[str, ...]) -> str:
    """The given sections, those that there are, in a line or a few each."""
    lines = []
    for name in sections:
        section = metrics.get(name)
        if not section:
            continue
        label = name.replace("_", " ")
        if "error" in section:
            text = [f"FAILED: {section['error']}"]
        elif "skipped" in section:
            text = [f"skipped: {section['skipped']}"]
        else:
            text = _WRITERS[name](section)
        lines += [f"  {label if i == 0 else '':<12} {line}" for i, line in enumerate(text)]
    return "\n".join(lines)


def _error_bar(value: Section) -> str:
    return (
        f"{value['mean']:.3f} ± {value['standard_error']:.3f}" if value["n"] > 1 else f"{value['mean']:.3f}"
    )


def _training(section: Section) -> list[str]:
    skipped = f", {section['skipped_steps']} steps skipped" if section["skipped_steps"] else ""
    return [
        f"{section['steps']} steps in {duration(section['seconds'])}, {section['parameters']:,} "
        f"parameters{skipped}",
        f"loss of the averaged weights: training {section['train_loss']:.4f}, held-out "
        f"{section['heldout_loss']:.4f}",
    ]


def _initial_weights(section: Section) -> list[str]:
    return [f"of {section['folder']} after {section['step']} steps"]


def _dequantization(section: Section) -> list[str]:
    return [
        f"a flow of {section['parameters']:,} parameters, {section['steps']} steps in "
        f"{duration(section['seconds'])}",
        f"bound by denoising, held-out: {section['heldout_loss']:.4f} bits/dim (uniform "
        f"{section['uniform_heldout_loss']:.4f}); training: {section['train_loss']:.4f} (uniform "
        f"{section['uniform_train_loss']:.4f})",
        "used by --mode likelihood --config.likelihood.dequantization=variational",
    ]


def _samples(section: Section) -> list[str]:
    picture = f" -> {section['picture']}" if "picture" in section else ""
    return [
        f"{section['n']} in {duration(section['seconds'])}, {section['nfe']} network evaluations "
        f"each{picture}"
    ]


def _likelihood(section: Section) -> list[str]:
    lines = []
    for part in ("images", "test", "train"):
        if part in section:
            values = section[part]
            exact = f"; the true density has {_error_bar(values['exact'])}" if "exact" in values else ""
            lines.append(f"{part}: {_error_bar(values)} {section['unit']} ({values['n']} samples){exact}")
            if "failed" in values:
                wrong = values.get("off_the_grid", [])
                why = f" (no grey levels: {', '.join(map(str, wrong))})" if wrong else ""
                lines.append(f"{part}: failed, and left out: {', '.join(map(str, values['failed']))}{why}")
    if "error_of_the_mean" in section:
        parts = ("between_images", "dequantization", "probes", "solver")
        lines.append(
            "error of the test mean: "
            + ", ".join(
                f"{name.replace('_', ' ')} {section['error_of_the_mean'][name]:.1g}" for name in parts
            )
        )
    if "plan" in section:
        plan = section["plan"]
        lines.append(
            f"for an error of {plan['wanted']:g} (expected {plan['expected_error']:.2g}): "
            + ", ".join(f"{name} {value:g}" for name, value in plan["chosen"].items())
        )
    return lines


def _baseline(section: Section) -> list[str]:
    return [
        f"test: {section['test_bits_per_dim']:.3f} ± {section['test_standard_error']:.3f} bits/dim by a "
        "mixture of "
        f"{section['components']} Gaussians ({section['covariance_type']})"
    ]


def _quality(section: Section) -> list[str]:
    lines = []
    if "classifier" in section:
        real, samples = (section["classifier"][name] for name in ("real", "samples"))
        lines.append(
            f"an independent classifier's confidence: samples {_confidence(samples)}, real "
            f"{_confidence(real)}; its classes: "
            f"chi-square distance {samples['chi_square']['distance']:.3f}, real "
            f"{real['chi_square']['distance']:.3f}"
        )
        if "accuracy" in samples:
            lines.append(
                f"samples are of the class asked for: {samples['accuracy']:.1%} (real {real['accuracy']:.1%})"
            )
    values = section["two_sample"]["rbf"]
    lines.append(
        "kernel distance (MMD²) to test data: "
        + ", ".join(
            f"{name} {values[key]['value']:.5f} ± {values[key]['standard_error']:.5f} (p = "
            f"{values[key]['p_value']:.2g})"
            for name, key in (("samples", "samples_vs_test"), ("training data", "train_vs_test"))
        )
    )
    if "sliced_wasserstein" in section:
        values = section["sliced_wasserstein"]
        lines.append(
            f"sliced Wasserstein distance: samples to exact {_error_bar(values['samples_vs_exact'])}, "
            f"exact to exact {_error_bar(values['exact_vs_exact'])}"
        )
    if "memorisation" in section:
        values = section["memorisation"]
        lines.append(
            f"copies: {values['suspected_copies']:.1%} of the samples lie nearer to a training image than "
            "99% of the test "
            f"images do; a sample is nearer with probability {values['closer_than_test']:.2f} (1/2 is "
            "perfect)"
        )
    return lines


def _confidence(section: Section) -> str:
    values = section["confidence"]
    return f"{values['mean']:.3f} ± {values['standard_error']:.3f}"


def _bound(section: Section) -> list[str]:
    lines = []
    names = {"chain": f"{section['steps']} steps", "continuous": "continuous time", "ode": "by the ODE"}
    for kind, name in names.items():
        if kind in section:
            parts = section[kind]
            inner = "" if kind == "ode" else f", L_T {_error_bar(parts['prior'])}"
            lines.append(
                f"{name}: {_error_bar(parts['total'])} {section['unit']} ({parts['total']['n']} samples){inner}, "
                f"decoder {_error_bar(parts['decoder'])}"
            )
    if "importance" in section:
        parts = section["importance"]
        lines.insert(
            -1 if "ode" in section else len(lines),
            f"importance-weighted, {parts['paths']} paths of {parts['steps']} steps: {_error_bar(parts['total'])}"
            f" {section['unit']}; one path {_error_bar(parts['one_path'])}",
        )
    return lines


def _import(section: Section) -> list[str]:
    weights = "averaged" if section["ema"] else "raw"
    shape = "x".join(map(str, section["data"]["shape"]))
    return [
        f"{section['source']} ({section['format']}): {section['network']}, {section['parameters']:,} parameters, "
        f"{weights} weights where there are both",
        f"{section['sde']}, predicts {section['parametrization']}, samples of {shape}",
    ]


_WRITERS: dict[str, Callable[[Section], list[str]]] = {
    "initial_weights": _initial_weights,
    "training": _training,
    "dequantization": _dequantization,
    "samples": _samples,
    "samples_pc": _samples,
    "samples_ode": _samples,
    "likelihood": _likelihood,
    "bound": _bound,
    "import": _import,
    "baseline": _baseline,
    "quality": _quality,
}
