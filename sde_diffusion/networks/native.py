"""C functions, compiled on the computer they run on and kept in the user's cache; nothing needs them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

__all__ = ["cache_folder", "load_native"]

_FLAGS = "-O3 -march=native -fno-math-errno -ffp-contract=fast -fopenmp -shared -fPIC"
_PATIENCE = 120.0  # seconds


def cache_folder() -> Path:
    """Where compiled functions are kept: ``$XDG_CACHE_HOME/sde_diffusion``, or that in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sde_diffusion"


@lru_cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The functions of a C file; None, with a warning, where there is no compiler (``$CC``, cc, gcc or clang) or it
    fails. Compiled once for each source, compiler and processor."""
    compiler = _compiler()
    if compiler is None or os.name != "posix":
        _warn(source, "there is no C compiler")
        return None
    command = [*compiler, *_FLAGS.split()]
    key = [source.read_text(), shlex.join(command), platform.platform(), _processor()]
    name = f"{source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}.so"
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp())
    path = folder / name
    try:
        if not path.exists():
            _compile([*command, str(source), "-lm"], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        printed = getattr(error, "stderr", None)
        _warn(source, (printed or str(error)).strip().splitlines()[0])
        return None


def _compile(command: list[str], path: Path) -> None:
    """Into ``path``, which is never there in part."""
    handle, part = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        run = [*command, "-o", part]
        subprocess.run(run, check=True, capture_output=True, text=True, timeout=_PATIENCE)
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _compiler() -> list[str] | None:
    wanted = shlex.split(os.environ.get("CC", ""))
    names = [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]
    return next((name for name in names if shutil.which(name[0])), None)


def _processor() -> str:
    """What this processor can do: a folder of homes may serve several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _warn(source: Path, reason: str) -> None:
    warnings.warn(f"{source.name} is not used, computing is slower without: {reason}", stacklevel=3)
