"""The rules of the package's structure, read off its syntax trees.

Left never imports right, and the rules of style that a reviewer would otherwise look for. ``violations``
looks at the source of one file; the second half of this file proves that it sees what it should.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sde_diffusion"

# Within a chain, a module imports nothing of a later group. Groups hold the top-level modules of the package
# (a folder counts as one); a module that stands in no group yet is free.
EDGE = (
    "presets",
    "pretrained",
    "config default_config usage workdir summary",
    "builders",
    "build",
    "imported",
    "runs",
    "evaluation finetuning",
    "likelihood_report bound_report compare",
    "jobs",
    "run",
)
FORWARD = (
    "cells sdes ddpm schedules learned_schedule parametrization variances decoders noise analytic minibatch"
)
CHAINS = (
    (
        "errors tensors processor",
        f"{FORWARD} networks",
        "score quantized learned_variance",
        "losses",
        "chain_losses",
        "training_settings objective",
        "training",
        *EDGE,
    ),
    (
        "errors tensors processor",
        FORWARD,
        "ode",
        "times predictors correctors reverse_steps",
        "sampling transfer thresholding",
        "ode_sampling optimal_times",
        "guidance",
        *EDGE,
    ),
    (
        "errors tensors processor",
        FORWARD,
        "ode",
        "scipy_ode",
        "divergence coordinates",
        "likelihood dequantization ends",
        "bound importance_bound",
        *EDGE,
    ),
    (
        "errors tensors processor",
        "arrays devices",
        "data metrics pictures checkpoint ema interrupts",
        "training",
        *EDGE,
    ),
)
# Whatever the chains say: samplers and likelihood work on any score, so they know of no network, training or
# data (but for the alias ``Score``, the type of a function) ...
LEARNING = {
    "networks",
    "score",
    "quantized",
    "losses",
    "training_settings",
    "objective",
    "training",
    "monitor",
}
LEARNING |= {"checkpoint", "ema", "data", "metrics", "pictures"}
LEARNING |= {"chain_losses", "learned_variance"}
ANY_SCORE = ("sdes", "ddpm", "schedules", "learned_schedule", "variances", "decoders", "analytic", "times")
ANY_SCORE += ("minibatch",)
ANY_SCORE += (
    "predictors",
    "correctors",
    "sampling",
    "reverse_steps",
    "ode",
    "ode_sampling",
    "scipy_ode",
    "divergence",
    "coordinates",
    "dequantization",
    "ends",
    "likelihood",
    "bound",
    "importance_bound",
)
NEVER = dict.fromkeys(ANY_SCORE, LEARNING)
TYPES = {f"{PACKAGE}.score.Score"}
# ... and these know of nothing but what is named here (and themselves).
ONLY = {
    "errors": frozenset(),
    "tensors": frozenset({"errors"}),
    "processor": frozenset(),
    "networks": frozenset({"errors", "tensors", "processor"}),
    "noise": frozenset({"errors", "tensors"}),
}

MODULES = {path.stem for path in (ROOT / PACKAGE).glob("[!_]*")}
MODULES |= {name for chain in CHAINS for group in chain for name in group.split()}
# Extras: imported only where they are used.
OPTIONAL = frozenset({"pyarrow", "datasets", "huggingface_hub", "diffusers"})
FORBIDDEN = frozenset({"torchvision", "torchaudio"})
SDE_CLASSES = frozenset({"SDE", "VP", "SubVP", "VE", "CosineVP", "DDPM"})


def violations(source: str, path: str) -> list[str]:
    """What the file ``path`` (relative to the repository) of text ``source`` does that it should not."""
    tree = ast.parse(source, path)
    found = list(_calls_and_subscripts(tree))
    for line, name in _imported(tree, path):
        if name.split(".")[0] in FORBIDDEN:
            found.append((line, f"imports {name}: no {name.split('.')[0]} here"))
    if Path(path).parts[0] == PACKAGE:
        found += _wrong_direction(tree, path)
        found += _eager_optional(tree)
        found += _undocumented(tree, path)
    return [f"{path}:{line}: {what}" for line, what in sorted(set(found))]


def _module_name(path: str) -> str:
    """``sde_diffusion/networks/unet.py`` -> ``sde_diffusion.networks.unet``."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Every imported name in full, wherever the import stands; ``from a import b`` gives ``a.b``."""
    package = _module_name(path).split(".")
    if Path(path).stem != "__init__":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def _group(chain: tuple[str, ...], module: str) -> int | None:
    return next((i for i, group in enumerate(chain) if module in group.split()), None)


def _wrong_direction(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Imports of later modules of a chain, of forbidden modules, and of names from the package's front."""
    module = _module_name(path).split(".")[1:2]
    if not module:  # the front, __init__.py, offers everything
        return
    me = module[0]
    for line, name in _imported(tree, path):
        if name.split(".")[0] != PACKAGE:
            continue
        other = name.split(".")[1] if "." in name else ""
        if other == "__version__" or (me in ANY_SCORE and name in TYPES):
            continue
        if other not in MODULES:
            yield (
                line,
                f"imports {name} from the front of the package: import it from the module that defines it",
            )
            continue
        here_and_there = [(_group(chain, me), _group(chain, other)) for chain in CHAINS]
        too_late = any(None not in pair and pair[0] < pair[1] for pair in here_and_there)  # type: ignore[operator]
        not_listed = me in ONLY and other != me and other not in ONLY[me]
        if too_late or not_listed or other in NEVER.get(me, ()):
            yield line, f"{me} must not import {other}"


def _eager_optional(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Packages of the extras, imported when the module is (not inside the function that needs them)."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _type_checking(node):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if name.split(".")[0] in OPTIONAL:
                    yield (
                        node.lineno,
                        f"imports {name} at the top: it is an extra, import it where it is used",
                    )
        pending += ast.iter_child_nodes(node)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _undocumented(tree: ast.Module, path: str) -> Iterator[tuple[int, str]]:
    """The module, and every public function and class at its top level, has a docstring."""
    if tree.body and not ast.get_docstring(tree):
        yield 1, f"the module {_module_name(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            overload = any(ast.unparse(d).endswith("overload") for d in node.decorator_list)
            if not (node.name.startswith("_") or overload or ast.get_docstring(node)):
                yield node.lineno, f"{node.name} has no docstring"


def _calls_and_subscripts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Unsafe or loose loading, type ladders over SDEs, broadcasting for one number of dimensions only."""
    torch_load = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "load"
    } | {"torch.load"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            index = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
            if sum(isinstance(e, ast.Constant) and e.value is None for e in index) >= 3:
                yield (
                    node.lineno,
                    f"[{ast.unparse(node.slice)}] fixes the number of dimensions: use tensors.expand",
                )
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if function in torch_load and options.get("weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True runs whatever code the file holds"
            if options.get("strict") is False and function != "zip":
                yield node.lineno, f"{function}(strict=False) hides what does not fit"
            if function == "isinstance" and len(node.args) == 2 and _about_an_sde(*node.args):
                yield node.lineno, f"{ast.unparse(node)}: ask the SDE for what differs, not for its type"


def _about_an_sde(value: ast.expr, classes: ast.expr) -> bool:
    asked = ast.unparse(value).split(".")[-1].lower()
    names = {n.id for n in ast.walk(classes) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(classes) if isinstance(n, ast.Attribute)}
    return asked == "sde" or bool(names & SDE_CLASSES)


# The rules hold in this tree.

FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in (PACKAGE, "experiments", "configs")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


@pytest.mark.parametrize("path", FILES)
def test_file_follows_the_rules(path):
    assert violations((ROOT / path).read_text(encoding="utf-8"), path) == []


def test_there_are_files_to_look_at():
    assert f"{PACKAGE}/errors.py" in FILES


def test_no_import_cycles():
    """Imports when a module is loaded (not those inside functions) form no cycle."""
    graph: dict[str, set[str]] = {}
    paths = [path for path in FILES if path.startswith(PACKAGE + "/") and path != f"{PACKAGE}/__init__.py"]
    names = {_module_name(path) for path in paths}
    for path in paths:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for node in [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.If))]:
            if isinstance(node, ast.FunctionDef) or _type_checking(node):
                node.body = []
        found = {name if name in names else name.rpartition(".")[0] for _, name in _imported(tree, path)}
        graph[_module_name(path)] = (found & names) - {_module_name(path)}
    assert _cycle(graph) is None


def _cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """The nodes on cycles or leading to one, or None: removes those without successors as long as it can."""
    left = {name: set(others) for name, others in graph.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    return sorted(left) or None


# The rules see what they should.

GOOD_FUNCTION = '"""Doc."""\n\ndef f(x):\n    """Doc."""\n'


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("sdes.py", "from sde_diffusion.score import ScoreModel", "sdes must not import score"),
        ("sdes.py", "from sde_diffusion import training", "sdes must not import training"),
        ("sdes.py", "import sde_diffusion.sampling", "sdes must not import sampling"),
        ("sdes.py", "from .sampling import sample", "sdes must not import sampling"),
        ("sdes.py", "from . import likelihood", "sdes must not import likelihood"),
        ("sdes.py", "from sde_diffusion import sample", "from the front of the package"),
        (
            "score.py",
            "def g():\n    'doc'\n    from sde_diffusion.losses import f",
            "score must not import losses",
        ),
        ("sampling.py", "from sde_diffusion.networks.unet import UNet", "sampling must not import networks"),
        ("predictors.py", "from sde_diffusion.sampling import sample", "predictors must not import sampling"),
        ("sampling.py", "from sde_diffusion.score import ScoreModel", "sampling must not import score"),
        ("likelihood.py", "from sde_diffusion.data import load_dataset", "likelihood must not import data"),
        ("ode.py", "from sde_diffusion.likelihood import f", "ode must not import likelihood"),
        ("networks/unet.py", "from sde_diffusion.sdes import VP", "networks must not import sdes"),
        ("networks/unet.py", "from ..sdes import VP", "networks must not import sdes"),
        ("tensors.py", "from sde_diffusion.sdes import VP", "tensors must not import sdes"),
        ("losses.py", "from sde_diffusion.build import build", "losses must not import build"),
        ("training.py", "from sde_diffusion.jobs import train", "training must not import jobs"),
        ("jobs.py", "from sde_diffusion.run import entry", "jobs must not import run"),
        ("new.py", "import torchvision.transforms", "no torchvision here"),
        ("new.py", "from torchvision import transforms", "no torchvision here"),
        ("new.py", "import pyarrow.parquet as pq", "pyarrow.parquet at the top"),
        (
            "new.py",
            "try:\n    from datasets import load\nexcept ImportError:\n    pass",
            "datasets at the top",
        ),
        ("new.py", "y = x[:, None, None, None]", "fixes the number of dimensions"),
        ("new.py", "y = x[..., None, None, None]", "fixes the number of dimensions"),
        ("new.py", "torch.load(path)", "torch.load without weights_only=True"),
        ("new.py", "torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("new.py", "from torch import load as get\nget(path)", "torch.load without weights_only=True"),
        ("new.py", "model.load_state_dict(state, strict=False)", "hides what does not fit"),
        ("new.py", "isinstance(self.sde, kinds)", "not for its type"),
        ("new.py", "isinstance(process, (sd.VP, VE))", "not for its type"),
        ("new.py", "def g(x):\n    return x", "g has no docstring"),
        ("new.py", "class G:\n    pass", "G has no docstring"),
    ],
)
def test_a_violation_is_seen(path, line, message):
    found = violations(f"{GOOD_FUNCTION}\n{line}\n", f"{PACKAGE}/{path}")
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith(f"{PACKAGE}/{path}:")


def test_a_module_without_a_docstring_is_seen():
    assert violations("x = 1\n", f"{PACKAGE}/new.py") == [
        f"{PACKAGE}/new.py:1: the module {PACKAGE}.new has no docstring"
    ]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            f"{PACKAGE}/score.py",
            "from sde_diffusion.sdes import SDE\nfrom sde_diffusion.networks import UNet",
        ),
        (f"{PACKAGE}/sampling.py", "from sde_diffusion.predictors import Predictor"),
        (f"{PACKAGE}/ode.py", "from sde_diffusion.score import Score"),
        (f"{PACKAGE}/training.py", "from sde_diffusion import __version__, losses"),
        (
            f"{PACKAGE}/networks/unet.py",
            "from sde_diffusion.networks.blocks import ResBlock\nfrom . import mlp",
        ),
        (f"{PACKAGE}/__init__.py", "from sde_diffusion.training import train\nfrom .sampling import sample"),
        (f"{PACKAGE}/new.py", "def _g(x):\n    import pyarrow\n    return x[:, :, None, None]"),
        (f"{PACKAGE}/new.py", "torch.load(path, weights_only=True)\nzip(a, b, strict=False)"),
        (f"{PACKAGE}/new.py", "isinstance(x, torch.Tensor)\nmodel.load_state_dict(state)"),
        ("experiments/solvers.py", "import sde_diffusion as sd\ndef main():\n    pass"),
    ],
)
def test_what_is_allowed_passes(path, line):
    assert violations(f"{GOOD_FUNCTION}\n{line}\n", path) == []


def test_cycles_are_seen():
    assert _cycle({"a": {"b"}, "b": set()}) is None
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
