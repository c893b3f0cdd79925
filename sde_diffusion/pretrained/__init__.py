"""Public checkpoints of others as scores: :func:`load_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sde_diffusion.errors import missing_package, unknown_name
from sde_diffusion.presets import PRESETS, Preset, preset
from sde_diffusion.pretrained import diffusers, edm, native, openai, score_sde
from sde_diffusion.pretrained.export import export_program, save_diffusers
from sde_diffusion.pretrained.native import ExportError, save_pretrained
from sde_diffusion.pretrained.state import PretrainedError, read_json
from sde_diffusion.score import ScoreModel

#: Each has ``detect(path) -> bool`` (is this file or folder of the format? a damaged one may raise
#: PretrainedError) and ``load(path, config, ema) -> ScoreModel`` with config a mapping in the format's own
#: terms, a Preset or None.
FORMATS: dict[str, ModuleType] = {
    "sde_diffusion": native,
    "score_sde": score_sde,
    "openai": openai,
    "diffusers": diffusers,
    "edm": edm,
}


def load_pretrained(
    path_or_repo: str | Path,
    *,
    format: str | None = None,
    config: Any = None,
    ema: bool = True,
) -> ScoreModel:
    """The score of a published model, with its SDE, from its file or folder; nothing in the file is run.

    Args:
        path_or_repo: a file, a folder, or (if there is no such path) the name ``owner/model`` of a model on
            the Hugging Face hub, which needs the package huggingface_hub.
        format: one of :data:`FORMATS`; None to recognise it.
        config: the architecture in the terms of the format (the options its own code would be given): a
            mapping, a JSON file with one, or the name of a preset. None to find it in the file or beside it.
        ema: the averaged weights, where a file has both these and the last ones.

    Returns:
        The score model, in evaluation mode. ``model(x, t)`` is the score, ``model.sde`` the forward process,
        ``model.data_range`` the range of the data.

    Raises:
        FileNotFoundError: neither a path nor the name of a model.
        PretrainedError: the file is truncated, of no known format, not of this architecture, or holds code.
    """
    path = locate(path_or_repo)
    chosen = choose_format(path, format)
    options = read_config(config)
    model: ScoreModel = FORMATS[chosen].load(path, options, ema)
    return model.eval()


def locate(path_or_repo: str | Path) -> Path:
    """The path itself, or the folder into which a model of the Hugging Face hub has been downloaded.

    Raises:
        FileNotFoundError: neither a path nor the name of a model.
    """
    path = Path(path_or_repo)
    if path.exists():
        return path
    name = str(path_or_repo)
    if (
        name.count("/") != 1
        or name.startswith(("/", ".", "~"))
        or path.suffix in (".pt", ".pth", ".pkl", ".json")
    ):
        raise FileNotFoundError(f"{path} does not exist (and is no name owner/model of the Hugging Face hub)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise missing_package(
            "huggingface_hub", f"loading {name!r} from the Hugging Face hub", "hub"
        ) from None
    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.rglob("*.safetensors")):  # an older repository, with torch's own files
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    return folder


def read_config(config: Any) -> Mapping[str, Any] | Preset | None:
    """What ``config`` of :func:`load_pretrained` stands for.

    Raises:
        ValueError: neither a file nor the name of a preset.
    """
    if hasattr(config, "to_dict"):  # a ConfigDict
        config = config.to_dict()
    if config is None or isinstance(config, (Mapping, Preset)):
        return config
    if str(config) in PRESETS:
        return preset(str(config))
    if Path(config).is_file():
        return read_json(Path(config))
    raise unknown_name("preset (nor is it a file)", str(config), PRESETS)


def choose_format(path: Path, format: str | None = None) -> str:
    """The name of the format: ``format`` itself, or else what a file or folder is recognised as.

    Raises:
        ValueError: a format of an unknown name.
        PretrainedError: the file is empty or of no known format.
    """
    if format is not None:
        if format not in FORMATS:
            raise unknown_name("format", format, FORMATS)
        return format
    if path.is_file() and path.stat().st_size == 0:
        raise PretrainedError(f"{path} is empty")
    for name, module in FORMATS.items():
        if module.detect(path):
            return name
    raise PretrainedError(
        f"{path} is of no known format; known: {', '.join(FORMATS)} (name one with format=)"
    )
