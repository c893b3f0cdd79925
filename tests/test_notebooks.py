"""Every notebook runs from top to bottom, draws its pictures, and what it says about its numbers holds."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sde_diffusion

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PACKAGE = Path(sde_diffusion.__file__).resolve().parent
CELL_SECONDS = 1200  # for one cell on a machine with much else to do

NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
# The fewest pictures, and printed numbers with the range that what the text says allows. The notebooks assert
# some of this themselves; here it is seen that the lines are there.
PICTURES = {"quickstart": 7, "ddpm_is_an_sde": 6, "correctors": 5, "likelihood": 8}
CLAIMS: dict[str, dict[str, tuple[float, float]]] = {
    "quickstart": {
        rf"KL\(data \|\| samples\) is at most {NUMBER} nats": (0.0, 0.15),
        rf"reverse SDE: 101 network evaluations, energy distance to held-out data {NUMBER}": (-0.01, 0.015),
        rf"probability flow: 101 network evaluations, energy distance to held-out data {NUMBER}": (
            -0.01,
            0.02,
        ),
        rf"KL\(p \|\| q\) = {NUMBER} nats": (-0.01, 0.15),
        rf"integral of q = {NUMBER}": (0.98, 1.02),
        rf"where p > 0.001: {NUMBER} nats": (0.0, 1e-3),
        rf"P, 10 steps +11 evaluations, energy distance +{NUMBER}": (0.015, 0.1),
        rf"PC, 10 × \(1 \+ 4\) steps +51 evaluations, energy distance +{NUMBER}": (-0.01, 0.015),
        rf"P, 50 steps +51 evaluations, energy distance +{NUMBER}": (-0.01, 0.01),
        rf"V[PE] +energy distance +{NUMBER}": (-0.01, 0.01),
        rf"mean \|log q - log p\| = {NUMBER} nats": (0.0, 0.02),
    },
    "correctors": {
        rf"SGLD with eta = 0.8: variance {NUMBER}": (1.6, 1.73),
        rf"MALA with eta = 0.8: variance {NUMBER}": (0.96, 1.04),
        rf"BAOAB with eta = 0.8: variance {NUMBER}": (0.96, 1.04),
        rf"change their mode in the last 100 steps: {NUMBER}": (0.0, 0.003),
        rf"wrong weights of the modes after 200 steps: {NUMBER}": (0.15, 0.3),
        rf"8 of 8 components: further than 1 from every mode {NUMBER}": (0.0, 0.03),
        rf"2 of 8 components: further than 1 from every mode {NUMBER}": (0.2, 0.6),
        rf"steps: {NUMBER} at the data": (0.0, 0.003),
        rf"at the data, {NUMBER} in the noise": (0.7, 0.95),
        rf"(?:alone|both)[^:]*evaluations: wrong weights {NUMBER}": (0.0, 0.1),
    },
    "likelihood": {
        rf"the density integrates to {NUMBER}": (0.999, 1.001),
        rf"tolerance 1e-02: \d+ evaluations, largest error {NUMBER} nats": (0.0, 0.1),
        rf"tolerance 1e-05: \d+ evaluations, largest error {NUMBER} nats": (0.0, 1e-4),
        rf"variance of one probe over its theory {NUMBER}": (0.85, 1.15),
        rf"a whole basis: variance {NUMBER}": (0.0, 1e-20),
        rf"V[PE], ours in the angle: error \S+ nats with {NUMBER} evaluations": (20, 80),
        rf"largest difference of gradient and score {NUMBER}": (0.0, 0.1),
        rf"tolerance 1e-07: round trip error at most {NUMBER}": (0.0, 1e-5),
        rf"averages of digits: .* AUC by likelihood {NUMBER}, ": (0.0, 0.3),
        rf"averages of digits: .* by typicality {NUMBER}": (0.5, 1.0),
        rf"pixels shuffled: .* by likelihood {NUMBER}, ": (0.9, 1.0),
    },
    "ddpm_is_an_sde": {
        rf"largest relative change of a beta: {NUMBER}": (0.0, 1e-11),
        rf"ancestral sampling differ by {NUMBER}": (0.0, 1e-12),
        rf"cosine: L_T {NUMBER}": (0.0, 1e-4),
        rf"nearer: {NUMBER}": (1.8, 2.8),
        rf"the continuous bound: +{NUMBER} ± ": (-0.3, 0.3),
        rf"the ODE: +{NUMBER} ± ": (-0.2, 0.2),
        rf"best: {NUMBER} ± ": (-0.2, 0.15),
    },
}
PROBE = "import sys, sde_diffusion\nprint(sys.prefix, sde_diffusion.__file__, sep='\\n')"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a kernel that is this very interpreter, whatever others the machine knows by that name."""
    reason = "running notebooks needs nbclient and ipykernel: pip install 'sde_diffusion[test]'"
    pytest.importorskip("nbclient", reason=reason)
    kernelspec = pytest.importorskip("ipykernel.kernelspec", reason=reason)
    kernelspec.install(prefix=str(tmp_path / "prefix"), kernel_name="python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "prefix" / "share" / "jupyter"))
    # No settings or start-up files of whoever runs the tests.
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    )
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the tests' own choice; a notebook draws inline
    return "python3"


def execute(path: Path, kernel: str, folder: Path) -> Any:
    """The notebook with the outputs of a fresh run in ``folder``; its first cell is ``PROBE``."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PROBE))
    folder.mkdir()
    nbclient.NotebookClient(
        notebook,
        kernel_name=kernel,
        timeout=CELL_SECONDS,
        startup_timeout=300,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook


def printed(outputs: list[Any], stream: str) -> str:
    return "".join(o["text"] for o in outputs if o["output_type"] == "stream" and o["name"] == stream)


def pictures(outputs: list[Any]) -> list[Image.Image]:
    encoded = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in encoded]


def test_there_are_notebooks():
    assert "quickstart" in [path.stem for path in NOTEBOOKS]
    assert {*PICTURES, *CLAIMS} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, kernel: str, tmp_path: Path):
    notebook = execute(path, kernel, tmp_path / "here")
    probe, *outputs = (cell["outputs"] for cell in code_cells(notebook))
    prefix, package = printed(probe, "stdout").split("\n")[:2]
    assert Path(prefix).resolve() == Path(sys.prefix).resolve(), "another interpreter ran the notebook"
    assert Path(package).resolve().parent == PACKAGE, "another sde_diffusion was imported"

    everything = [output for cell in outputs for output in cell]
    assert printed(everything, "stderr") == "", "a notebook shows no warnings"
    drawn = pictures(everything)
    assert len(drawn) >= PICTURES.get(path.stem, 1)
    for picture in drawn:
        assert picture.width >= 300
        assert picture.height >= 100
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(64 * 64) or ()) > 20, "an empty picture"

    text = printed(everything, "stdout")
    for claim, (low, high) in CLAIMS.get(path.stem, {}).items():
        numbers = [float(number) for number in re.findall(claim, text)]
        assert numbers, f"nothing printed matches {claim!r}; the notebook printed\n{text}"
        assert all(low <= number <= high for number in numbers), (
            f"{claim!r}: {numbers} not in {low} .. {high}"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path: Path):
    """Outputs go stale and bloat the history; the notebook is stored as it is before its first run."""
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]["language_info"]) == {"name"}
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert all(cell["metadata"] == {} for cell in notebook["cells"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_a_title_and_uses_public_names_only(path: Path):
    notebook = read(path)
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")
    for cell in code_cells(notebook):
        lines = "".join(cell["source"]).splitlines()
        source = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            private = [name for name in names if name.startswith("_") and not name.endswith("__")]
            assert not private, f"{path.name} uses {private}, which is not public"
