"""Every command and every line of Python in the README, executed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes a job small enough for a test; everything else of a command is taken as it stands.
TINY = (
    "--config.training.steps=2",
    "--config.model.channels=8",
    "--config.model.blocks_per_level=1",
    "--config.training.batch_size=8",
    "--config.training.precision=float32",
    "--config.likelihood.rtol=0.5",
    "--config.likelihood.atol=0.5",
    "--config.likelihood.test_images=2",
    "--config.likelihood.train_images=2",
    "--config.report.baseline=False",
    "--config.report.quality=False",
    "--config.report.ode=False",
    "--config.sampling.steps=2",
    "--config.sampling.rtol=0.1",
    "--config.sampling.atol=0.1",
)
RUN = "python -m sde_diffusion.run"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """The shell commands of the README, without their comments."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


JOBS = [command for command in commands() if command.startswith(RUN)]
OTHERS = {
    "make train",
    "make test",
    "python3 -m venv .venv && . .venv/bin/activate",
    "python -m pip install -c constraints.txt -e '.[dev]'",
    "python -m pytest -n 2 --dist worksteal",
}


def run(arguments: list[str], cwd: Path, timeout: float = 300) -> str:
    done = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_is_known_to_a_test() -> None:
    assert set(commands()) == OTHERS | set(JOBS)
    assert len(JOBS) >= 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout to the commands, with a tiny trained run in its place."""
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", place / "configs")
    run([sys.executable, "-m", "sde_diffusion.run", "--mode", "train", *TINY], place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("command", JOBS)
def test_jobs_run_as_they_stand(command: str, folder: Path) -> None:
    arguments = shlex.split(command)
    tiny: tuple[str, ...] = () if "--help" in arguments else TINY
    # What the README sets itself is not overridden, but for the length of a training.
    length = {"--config.training.steps", "--config.model.channels"}
    given = {argument.split("=")[0] for argument in arguments} - length
    own = [argument for argument in tiny if argument.split("=")[0] not in given]
    # The default folder belongs to the default run.
    elsewhere = ["--workdir", f"runs/{abs(hash(command))}"] if "--config " in command else []
    out = run([sys.executable, *arguments[1:], *own, *elsewhere], folder)
    assert "--mode MODE" in out if "--help" in arguments else "metrics.json" in out


@pytest.mark.slow
def test_python_runs_as_it_stands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert tuple(names["images"].shape) == (64, 1, 8, 8)  # type: ignore[attr-defined]
    assert tuple(names["bits"].shape) == (10,)  # type: ignore[attr-defined]


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_what_make_runs_is_what_stands_beside_it() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target, line in (
        ("train", f"{RUN} --mode train"),
        ("test", "python -m pytest -n 2 --dist worksteal"),
    ):
        recipe = run(["make", "-n", target], ROOT)
        assert line in recipe.replace(".venv/bin/", "")
        assert line in commands()
