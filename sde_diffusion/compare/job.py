"""The mode ``compare`` of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sde_diffusion.compare.page import write_page
from sde_diffusion.compare.study import Settings, run_study
from sde_diffusion.compare.verdicts import answers, statements
from sde_diffusion.config import UsageError

FOLDER = "runs/correctors"


def settings_of(config: ConfigDict) -> Settings:
    """The settings of the block ``compare``.

    Raises:
        UsageError: what is wrong with them.
    """
    block = {key: value for key, value in config.compare.to_dict().items() if value is not None}
    for key in {"targets", "correctors"} & set(block):  # a,b on a command line is one string
        block[key] = tuple(name.strip() for text in block[key] for name in text.split(",") if name.strip())
    try:
        return Settings(**block, seed=config.seed)
    except (TypeError, ValueError) as error:
        raise UsageError(f"config.compare: {error}") from error


def compare_job(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Compares predictors and correctors; ``report.html``, pictures and ``results.json`` in the folder.

    Raises:
        UsageError: settings that make no sense; nothing has been done.
    """
    settings = settings_of(config)
    results = run_study(settings, workdir, say=print)
    page = write_page(results, workdir)
    for a in answers(results):
        if a["score"] == "exact":
            best = " | ".join(
                f"{kind} {a[kind].value:.4f} ± {a[kind].error:.4f} {a[kind].method}"
                for kind in ("P", "PC", "C")
                if a[kind]
            )
            print(f"{a['target']:10} {a['nfe']:5} evaluations: {a['verdict']:9} | {best}")
    for sentence in statements(results):
        print(sentence)
    print(f"{len(results['arms'])} arms in {results['seconds']:.0f} s, {results['missing']} left out; {page}")
    return results
