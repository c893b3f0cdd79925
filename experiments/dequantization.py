"""What each dequantization makes of the same model and test images, in bits/dim.

    python -m sde_diffusion.run --mode train --workdir runs/digits_v --config.model.parametrization=v
    python -m sde_diffusion.run --mode dequantize --workdir runs/digits_v
    python experiments/dequantization.py --workdir runs/digits_v

Two tables. The averages of single draws, with random probes for the divergence, which leave them unbiased; then
importance weights of K draws on fewer images with the exact divergence, because an estimate's noise in an exponent
would be taken for probability. Images, uniform numbers and probes are the same for all kinds, so the differences
from uniform noise are paired.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

import sde_diffusion as sd
from sde_diffusion.dequantization import combine


def row(value: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean and paired difference, each with its standard error over images."""
    difference, n = value - reference, len(value)
    return {
        "bits_per_dim": float(value.mean()),
        "standard_error": float(value.std()) / math.sqrt(n),
        "difference": float(difference.mean()),
        "difference_error": float(difference.std()) / math.sqrt(n),
    }


def draws(
    run: Any, images: Tensor, labels: Tensor | None, kind: str, count: int, **likelihood: Any
) -> Tensor:
    """``log [p(v_j) w^D / q(u_j)]`` in nats of every draw and image, (count, B), each draw with other probes."""
    found = []
    for draw in range(count):
        out = run.evaluate(images, draw, y=labels, dequantization=kind, dequantizations=1, **likelihood)
        found.append(out.log_prob)
    return torch.stack(found)


def measure(run: Any, kinds: list[str], images: int, counts: list[int], **likelihood: Any) -> dict[str, Any]:
    """Rows by kind and number of draws: averages for 1, importance weights for more."""
    x, y = run.data.test[:images], None
    if run.config.model.class_conditional:
        y = run.data.test_labels[:images]
    rows: dict[str, Any] = {}
    reference = None
    for kind in kinds:
        started = time.perf_counter()
        ratios = draws(run, x, y, kind, max(counts), **likelihood)
        for k in counts:
            groups = ratios[: len(ratios) // k * k].unflatten(0, (-1, k))
            bits = run.in_bits(torch.stack([combine(group, importance=True) for group in groups]).mean(0))
            reference = bits if reference is None else reference
            rows[f"{kind}, K = {k}"] = row(bits, reference)
        print(f"{kind}: {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def table(title: str, rows: dict[str, Any]) -> None:
    """As Markdown."""
    print(f"\n| {title} | bits/dim | less than uniform by |\n|---|---|---|")
    for name, r in rows.items():
        print(
            f"| {name} | {r['bits_per_dim']:.4f} ± {r['standard_error']:.4f} | "
            f"{-r['difference']:.4f} ± {r['difference_error']:.4f} |"
        )
    print(flush=True)


def main() -> None:
    """Prints both tables as Markdown, and everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs/digits_v")
    parser.add_argument("--kinds", nargs="+", default=["uniform", "truncated_normal", "variational"])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--exact-images", type=int, default=32)
    parser.add_argument("--exact-draws", type=int, default=8, help="a power of 2")
    arguments = parser.parse_args()
    run, result = sd.load(arguments.workdir), {}
    if arguments.images:
        x = run.data.test[: arguments.images]
        y = run.data.test_labels[: arguments.images] if run.config.model.class_conditional else None
        rows, reference = {}, None
        for kind in arguments.kinds:
            bits = run.in_bits(draws(run, x, y, kind, arguments.draws).mean(0))
            reference = bits if reference is None else reference
            rows[kind] = row(bits, reference)
        table(f"single draws, {arguments.images} images", rows)
        result["single"] = rows
    if arguments.exact_images:
        counts = [2**i for i in range(0, arguments.exact_draws.bit_length())]
        counts = [k for k in counts if k in (1, arguments.exact_draws)]
        rows = measure(run, arguments.kinds, arguments.exact_images, counts, divergence="exact")
        table(f"exact divergence, {arguments.exact_images} images", rows)
        result["importance"] = rows
    print(json.dumps(result))


if __name__ == "__main__":
    main()
