"""The package as a stranger gets it: what it needs, the make targets, the wheel outside the checkout."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CORE = (
    "torch torchsde torchdiffeq numpy scipy scikit-learn ml-collections absl-py tensorboard tqdm pillow"
    " matplotlib safetensors"
)
MODULES = {
    "scikit-learn": "sklearn",
    "absl-py": "absl",
    "pillow": "PIL",
}  # where a package is imported by another name
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

# The whole job of the train mode in seconds: a tiny network, two steps, few samples.
TINY = (
    "--config.training.steps=2",
    "--config.training.batch_size=8",
    "--config.model.channels=16",
    "--config.model.blocks_per_level=1",
    "--config.sampling.steps=2",
    "--config.report.ode=False",
    "--config.report.likelihood=False",
    "--config.report.baseline=False",
    "--config.report.quality=False",
)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def declared() -> dict[str, list[Requirement]]:
    """The requirements by extra; ``""`` holds those of the package itself. Without extras of extras."""
    config = setup_cfg()
    groups = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    found = {extra: requirements(text) for extra, text in groups.items()}
    return {extra: [r for r in group if r.name != "sde_diffusion"] for extra, group in found.items()}


def pins(python: str) -> dict[str, str]:
    """Name -> version of the constraints that hold for a version of Python."""
    found: dict[str, str] = {}
    for pin in requirements((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            name, version = canonicalize_name(pin.name), re.fullmatch(r"==([^*]+)", str(pin.specifier))
            assert version, f"{pin} is not an exact version"
            assert name not in found, f"{name} has two versions for Python {python}"
            found[name] = version[1]
    return found


# What it needs


def test_core_requirements_stay_few():
    assert [r.name for r in declared()[""]] == CORE.split()


def test_no_upper_bounds():
    """Exact versions are the business of the constraints; the package itself does not pin its neighbours."""
    bounds = [s.operator for group in declared().values() for r in group for s in r.specifier]
    assert bounds
    assert set(bounds) == {">="}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_exact_version_within_its_bounds(python):
    exact = pins(python)
    for requirement in [r for group in declared().values() for r in group]:
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        name = canonicalize_name(requirement.name)
        assert name in exact, f"{requirement.name} is not in constraints.txt for Python {python}"
        assert requirement.specifier.contains(exact[name]), (
            f"{requirement} but constraints.txt has {exact[name]}"
        )


def test_dev_is_every_extra():
    dev = setup_cfg()["options.extras_require"]["dev"].strip()
    assert dev == "sde_diffusion[{}]".format(
        ",".join(extra for extra in declared() if extra not in ("", "dev"))
    )


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of everything imported absolutely, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def test_the_package_imports_only_what_it_declares():
    allowed = {"sde_diffusion", *sys.stdlib_module_names}
    for extra in ("", "data", "hub"):
        allowed |= {MODULES.get(r.name, r.name.replace("-", "_")) for r in declared()[extra]}
    for path in (ROOT / "sde_diffusion").rglob("*.py"):
        undeclared = set(imports(ast.parse(path.read_text(encoding="utf-8")))) - allowed
        assert not undeclared, (
            f"{path.relative_to(ROOT)} imports {sorted(undeclared)}, which setup.cfg does not name"
        )


def test_the_licence_is_the_one_named():
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


# The make targets

needs_make = pytest.mark.skipif(
    sys.platform == "win32" or shutil.which("make") is None, reason="needs make and a POSIX shell"
)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a fresh shell: nothing of a make that may have started the tests."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


@needs_make
def test_make_alone_says_what_there_is():
    shown = make()
    assert shown.returncode == 0
    for target in ("train", "test", "lint", "wheel", "clean"):
        assert f"make {target} " in shown.stdout


@needs_make
def test_make_train_installs_then_runs_the_main_job(tmp_path):
    steps = make("--dry-run", "train", f"VENV={tmp_path}/venv", "ARGS=--config.training.steps=10").stdout
    install, run = steps.index("-c constraints.txt -e ."), steps.index("-m sde_diffusion.run --mode train")
    assert steps.index("-m venv") < install < run
    assert "--mode train --config.training.steps=10" in steps


@needs_make
def test_a_second_make_does_not_install_again(tmp_path):
    """The stamps are newer than the requirements: only the job is left to do."""
    for stamp in (".made", ".core", ".dev"):
        (tmp_path / stamp).touch()
    for target in ("train", "test"):
        steps = make("--dry-run", target, f"VENV={tmp_path}").stdout
        assert "pip install" not in steps
        assert len(steps.splitlines()) == 1
    os.utime(tmp_path / ".core", (0, 0))  # as if the requirements had changed since
    steps = make("--dry-run", "train", f"VENV={tmp_path}").stdout
    assert "-e ." in steps
    assert "-m venv" not in steps


@needs_make
@pytest.mark.parametrize(
    ("python", "message"),
    [
        (None, "Install Python 3.10 or newer, or name one: make PYTHON="),
        (
            'case "$*" in *version_info*) exit 1;; *--version*) echo Python 3.8.20;; esac',
            "but .* is Python 3.8.20",
        ),
        ('case "$*" in *ensurepip*) exit 1;; esac', "apt install python3-venv"),
    ],
    ids=["no Python", "too old", "no venv"],
)
def test_make_says_what_is_wrong_with_the_python(tmp_path, python, message):
    program = tmp_path / "python-of-a-stranger"
    if python is not None:
        program.write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
        program.chmod(0o755)
    result = make("train", f"VENV={tmp_path}/venv", f"PYTHON={program}")
    assert result.returncode != 0
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "venv").exists()


# The wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package installed from a wheel that was built from the source archive of a copy."""
    place = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, place / "tree", ignore=ignored)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", place / "tree"], place)
    [wheel] = (place / "dist").glob("*.whl")
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--target", place / "site", wheel], place)
    return place / "site"


def run(command: list[object], folder: Path, site: Path | None = None) -> str:
    """What a command prints, run in ``folder`` with the package of ``site``. It must not fail."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, (
        f"{command} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    )
    return result.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(installed):
    for pattern in ("*.py", "*.c", "*.h"):
        files = {path.relative_to(ROOT) for path in (ROOT / "sde_diffusion").rglob(pattern)}
        assert files
        assert {path.relative_to(installed) for path in (installed / "sde_diffusion").rglob(pattern)} == files
    others = {path.name for path in installed.iterdir()} - {"sde_diffusion", "bin", "__pycache__"}
    assert others == {"sde_diffusion-0.1.0.dist-info"}
    assert list(installed.glob("*.dist-info/**/LICENSE"))


@pytest.mark.slow
def test_the_wheel_is_what_runs_outside_the_checkout(installed, tmp_path):
    """The default config is found, and it is that of the wheel."""
    script = (
        "import sde_diffusion; from sde_diffusion.default_config import get_config;"
        "print(sde_diffusion.__file__); print(get_config().data.name)"
    )
    file, data = run([sys.executable, "-c", script], tmp_path, installed).splitlines()
    assert Path(file).is_relative_to(installed)
    assert data == "digits"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["module", "script"])
def test_help_of_the_wheel(installed, tmp_path, program):
    script = installed / "bin" / "sde-diffusion"
    command = [script] if program == "script" else [sys.executable, "-m", "sde_diffusion.run"]
    shown = run([*command, "--help"], tmp_path, installed)
    for word in ("--mode", "--config", "--workdir", "train", "sample", "likelihood"):
        assert word in shown


@pytest.mark.slow
def test_two_steps_of_training_with_the_wheel(installed, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["-m", "sde_diffusion.run", "--mode", "train", "--workdir", workdir, *TINY]
    run([sys.executable, *arguments], tmp_path, installed)
    metrics = json.loads((workdir / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["training"]["steps"] == 2
    assert metrics["run"]["data"]["train"] == 1437
    assert list(workdir.rglob("*.png"))
    assert list(workdir.rglob("*.pt"))
