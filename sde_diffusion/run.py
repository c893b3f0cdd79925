"""The command line: ``python -m sde_diffusion.run --mode train|sample|likelihood|dequantize|bound|compare|import
...``; ``--help`` says the rest.

Thin: it reads flags into a config and calls one of :mod:`sde_diffusion.jobs`. Exit status: 0, or 1 when
training diverged or an evaluation failed, 2 when what was asked for makes no sense (nothing has been done),
130 and 143 after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from sde_diffusion.allocator import keep_freed_memory
from sde_diffusion.checkpoint import CheckpointError
from sde_diffusion.compare.job import FOLDER as COMPARISON
from sde_diffusion.config import UsageError, config_keys, default_config, load_config, set_key, unknown_key
from sde_diffusion.errors import unknown_name
from sde_diffusion.imported import import_config
from sde_diffusion.interrupts import TrainingInterrupted
from sde_diffusion.jobs import JOBS, EvaluationError
from sde_diffusion.training import TrainingDiverged
from sde_diffusion.usage import help_text
from sde_diffusion.workdir import Workdir

__all__ = ["entry", "main"]

_HELP = ("help", "h", "helpshort", "helpfull")
_IMPORT = ("source", "format", "model-config", "raw")


class _Terminated(BaseException):
    """SIGTERM."""


def entry() -> NoReturn:
    """The console script."""
    keep_freed_memory()
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's), given without the program's name; the exit status."""
    try:
        with _termination():
            return _run(sys.argv[1:] if arguments is None else list(arguments))
    except (UsageError, CheckpointError) as error:
        return _fail(2, error)
    except (TrainingDiverged, EvaluationError) as error:
        return _fail(1, error)
    except TrainingInterrupted as error:
        return _fail(143 if "SIGTERM" in str(error) else 130, error)
    except KeyboardInterrupt:
        return _fail(
            130,
            "stopped by Ctrl-C; run the same command again to go on from the last checkpoint, if there is "
            "one",
        )
    except _Terminated:
        return _fail(
            143,
            "stopped by SIGTERM; run the same command again to go on from the last checkpoint, if there is "
            "one",
        )


def _fail(status: int, message: object) -> int:
    print(
        f"\nsde_diffusion: {message}" if status >= 128 else f"sde_diffusion: {message}",
        file=sys.stderr,
        flush=True,
    )
    return status


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C, with the messages and files of an orderly end."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    values = flags.FlagValues()
    for name in ("mode", "config", "workdir", "tolerance", "source", "format", "model-config"):
        flags.DEFINE_string(name, None, name, flag_values=values)
    for name in (*_HELP, "raw"):
        flags.DEFINE_boolean(name, False, name, flag_values=values)
    values.set_gnu_getopt(True)
    try:
        rest = values(["sde_diffusion", *arguments], known_only=True)[1:]
    except flags.Error as error:
        raise UsageError(str(error)) from None
    if any(values[name].value for name in _HELP):
        print(help_text())
        return 0
    overrides = _overrides(rest)
    mode = values["mode"].value
    if mode is None:
        raise UsageError(f"say what to do: --mode {', '.join(JOBS)} (--help tells more)")
    if mode not in JOBS:
        raise UsageError(str(unknown_name("mode", mode, JOBS)))
    if values["tolerance"].value is not None:
        if mode != "likelihood":
            raise UsageError("--tolerance is for --mode likelihood")
        overrides["likelihood.tolerance"] = values["tolerance"].value
    source, folder = values["config"].value, values["workdir"].value
    importing = {
        name.replace("-", "_"): v for name in _IMPORT if (v := values[name].value) not in (None, False)
    }
    _check_import(mode, importing, source, folder)
    if mode == "import":
        config = import_config()
    elif source is not None:
        config = load_config(source)
    elif mode == "train":
        config = default_config()
    elif mode == "compare":  # of a run or of none: its folder is that of the report
        config, folder = default_config(), folder or COMPARISON
    else:
        folder = folder or f"runs/{_file_name(overrides.get('data.name') or default_config().data.name)}"
        Workdir(folder).require_run()
        config = Workdir(folder).read_config() or default_config()
    _apply(config, overrides)
    JOBS[mode](config, folder or _default_folder(source, config), **importing)
    return 0


def _check_import(mode: str, importing: dict[str, Any], config: str | None, folder: str | None) -> None:
    """Refuses flags of the mode import in others, and that mode without what it needs."""
    if mode != "import":
        if importing:
            raise UsageError(f"--{next(iter(importing)).replace('_', '-')} is for --mode import")
        return
    if config is not None:
        raise UsageError("--mode import takes no --config: the architecture goes with --model-config")
    if "source" not in importing or folder is None:
        raise UsageError("--mode import needs --source PATH_OR_REPO and --workdir DIR")


def _overrides(arguments: list[str]) -> dict[str, str]:
    """``--config.KEY=VALUE``, ``--config.KEY VALUE``, ``--[no]config.SWITCH`` as {key: text}, checked."""
    keys = config_keys()
    found: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not match:
            if argument.startswith("-"):
                name = argument.lstrip("-").partition("=")[0]
                allowed = ("mode", "config", "workdir", "tolerance", *_IMPORT, "help", "config.KEY")
                raise UsageError(str(unknown_name("flag", name, allowed)))
            raise UsageError(
                f"unexpected argument {argument!r}; flags look like --mode train or "
                "--config.training.steps=100"
            )
        negated, key, text = match.groups()
        if key not in keys:
            raise unknown_key(key)
        switch = isinstance(keys[key].default, bool)
        if negated and (not switch or text is not None):
            raise UsageError(f"{argument}: only switches can be negated, and they take no value then")
        if text is None:
            text = str(not negated) if switch else next(left, None)
        if text is None:
            raise UsageError(f"{argument} needs a value")
        found[key] = text
    return found


def _apply(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Sets the overrides, read as the types that the config has."""
    keys = config_keys()
    for key in [key for key, text in overrides.items() if text.lower() == "none" and keys[key].optional]:
        set_key(config, key, None)
        del overrides[key]
    argv = ["sde_diffusion"]
    argv += [f"--config.{key}={_names(text, keys[key].default)}" for key, text in overrides.items()]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        match = re.search(r"--config\.([\w.]+)=", str(error))
        if match is None or match[1] not in keys:
            raise UsageError(" ".join(str(error).split())) from None
        kind = keys[match[1]].optional or type(keys[match[1]].default)
        raise UsageError(
            f"config key {match[1]!r} must be of type {kind.__name__}, got {overrides[match[1]]!r}"
        ) from None


def _names(text: str, default: Any) -> str:
    """``ring,runs/digits`` as a tuple of strings, where one is expected: a path is no Python word."""
    if not (isinstance(default, tuple) and all(isinstance(v, str) for v in default) and default):
        return text
    quoted = text.lstrip().startswith(("(", "[", "'", '"'))
    return text if quoted else repr(tuple(name.strip() for name in text.split(",") if name.strip()))


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def _default_folder(source: str | None, config: ConfigDict) -> str:
    """``runs/`` and the name of the config file with its variant, or else of the data set.

    A stored config means the folder it is in.
    """
    if source is None:
        return f"runs/{_file_name(config.data.name)}"
    if source.endswith(".json"):
        return str(Path(source).parent)
    file, _, variant = source.partition(".py")
    name = Path(file).name if Path(file).name != "default_config" else config.data.name
    return f"runs/{_file_name(name + variant.replace(':', '_', 1))}"


if __name__ == "__main__":
    entry()
