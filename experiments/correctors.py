"""Predictor or corrector, and which: predictors and correctors at equal numbers of evaluations.

    python experiments/correctors.py                          # the exact targets
    python experiments/correctors.py --budget 3               # what three minutes are enough for, the answer first
    python experiments/correctors.py --targets runs/digits --evaluations 20 50 --samples 512    # a trained run

Everything is kept in ``runs/correctors``: run it again to go on, or to write the report anew. Opens as
``runs/correctors/report.html`` in any browser; ``python -m sde_diffusion.run --mode compare`` does the same
from a config.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sde_diffusion.compare.page import write_page
from sde_diffusion.compare.study import Settings, run_study
from sde_diffusion.compare.verdicts import statements


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Settings()
    parser.add_argument("--workdir", type=Path, default=Path("runs/correctors"))
    parser.add_argument("--targets", nargs="+", default=default.targets, help="names, or folders of runs")
    parser.add_argument("--evaluations", nargs="+", type=int, default=default.evaluations)
    parser.add_argument("--correctors", nargs="+", default=default.correctors)
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=default.ratios, help="step sizes / sigma^2"
    )
    parser.add_argument("--samples", type=int, default=default.samples)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--budget", type=float, default=default.budget, help="minutes")
    parser.add_argument("--jobs", type=int, default=default.jobs, help="processes")
    given = vars(parser.parse_args())
    folder = given.pop("workdir")
    try:
        settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        results = run_study(settings, folder, say=print)
    except ValueError as error:
        parser.error(str(error))
    page = write_page(results, folder)
    for sentence in statements(results):
        print(sentence)
    print(f"{results['cpu_seconds']:.0f} s of processor time in all")
    print(f"{len(results['arms'])} arms in {results['seconds']:.0f} s, {results['missing']} left out; {page}")


if __name__ == "__main__":
    main()
