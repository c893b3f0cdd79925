"""Training steps of the default job by several versions of the package, in turns.

    git worktree add /tmp/before 95d3c71
    python experiments/versions.py --folders /tmp/before . --repeats 60

Each version runs in a process of its own that stays, on one thread; a turn is one step that does not count and two
that do, in seconds of the processor. The figures are the median, and median and quartiles of each turn's ratio to
that of the first version, so that what comes and goes on the machine meets both sides alike. ``FOLDER:KEY=VALUE``
changes a key of the config, the value as in JSON, such as ``.:model.blocks_per_level=2``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Silent:
    """What a training step reports to, which does nothing."""

    def advance(self) -> None: ...

    def say(self, text: str) -> None: ...


def work(folder: str, changes: list[str]) -> None:
    """A version's process: a turn for each line that comes in, its seconds go out."""
    sys.path.insert(0, folder)
    import torch

    import sde_diffusion
    from sde_diffusion import build
    from sde_diffusion.config import default_config, set_key
    from sde_diffusion.training import Trainer

    if not Path(sde_diffusion.__file__).is_relative_to(folder):
        raise SystemExit(f"{folder} has no package sde_diffusion")
    try:
        from sde_diffusion.allocator import keep_freed_memory

        keep_freed_memory()
    except ImportError:  # a version from before
        pass
    torch.set_num_threads(1)
    config = default_config()
    for name in ("log_every", "eval_every", "checkpoint_every"):
        set_key(config, f"training.{name}", 0)
    for change in changes:
        key, value = change.split("=", 1)
        set_key(config, key, json.loads(value))
    data = build.dataset(config)
    model = build.score_model(config, build.DataInfo.of(data))
    with tempfile.TemporaryDirectory() as place:
        settings = build.training_settings(config)
        trainer = Trainer(model, data, settings, place, config.to_dict(), progress=False)
        trainer.model.train()
        step = trainer._train_step
        for _ in range(4):
            step(Silent())  # type: ignore[arg-type]
        print("ready", flush=True)
        for _ in sys.stdin:
            step(Silent())  # type: ignore[arg-type]
            started = time.process_time()
            for _ in range(2):
                step(Silent())  # type: ignore[arg-type]
            print((time.process_time() - started) / 2 / settings.batch_size, flush=True)


def start(version: str) -> subprocess.Popen[str]:
    """The process of ``FOLDER[:KEY=VALUE..]``."""
    folder, *changes = version.split(":")
    command = [sys.executable, __file__, "--work", str(Path(folder).resolve()), *changes]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def turn(process: subprocess.Popen[str]) -> float:
    """Seconds of the processor for an image."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folders", nargs="+", help="of versions, the first of which is what others are held to"
    )
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], options.work[1:])
        return
    if not options.folders or options.repeats < 2:
        parser.error("give at least one of --folders, and --repeats of 2 or more")
    processes = [start(version) for version in options.folders]
    for version, process in zip(options.folders, processes, strict=True):
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{version} did not start; what it said is above")
    turns = [[turn(process) for process in processes] for _ in range(options.repeats)]
    seconds = [list(taken) for taken in zip(*turns, strict=True)]
    print("| version | images/s | times the first | quartiles |\n|---|---|---|---|")
    for version, taken in zip(options.folders, seconds, strict=True):
        low, middle, high = statistics.quantiles(
            [first / own for first, own in zip(seconds[0], taken, strict=True)], n=4
        )
        print(f"| {version} | {1 / statistics.median(taken):.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
