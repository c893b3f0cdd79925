"""C functions, compiled on the computer they run on and kept in the user's cache; nothing needs them.

``SDE_DIFFUSION_NATIVE=0`` in the environment turns them off.
"""

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
_TYPES = {"P": ctypes.c_void_p, "N": ctypes.c_int64, "I": ctypes.c_int, "D": ctypes.c_double}


@lru_cache
def load_native(source: Path, **arguments: str) -> ctypes.CDLL | None:
    """The functions of a C file; None where they are turned off, and, with a warning, where there is no compiler
    (``$CC``, cc, gcc or clang; on Linux and macOS) or it fails. Compiled once for each source with the headers
    beside it, compiler and processor.

    Args:
        source: the file.
        arguments: of functions by name, a letter each: P for a pointer, N for int64_t, I for int, D for double.
    """
    library = _load(source)
    if library is not None:
        for name, letters in arguments.items():
            getattr(library, name).argtypes = [_TYPES[letter] for letter in letters]
    return library


def _load(source: Path) -> ctypes.CDLL | None:
    if os.environ.get("SDE_DIFFUSION_NATIVE") == "0":
        return None
    compiler = _compiler()
    if compiler is None:
        _warn(source, "there is no C compiler")
        return None
    command = [*compiler, *_FLAGS.split()]
    try:
        version = _run([*compiler, "--version"])
        texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
        key = texts, command, version, platform.platform(), _processor()
        name = f"{source.stem}-{hashlib.sha256(repr(key).encode()).hexdigest()[:20]}.so"
        path = cache_folder() / name
        if path.exists():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # damaged: made anew
                path.unlink()
        _compile([*command, str(source), "-lm"], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        printed = (getattr(error, "stderr", None) or str(error)).strip()
        _warn(source, printed.splitlines()[0] if printed else type(error).__name__)
        return None


def cache_folder() -> Path:
    """Where compiled functions are kept: ``$XDG_CACHE_HOME/sde_diffusion`` or ``~/.cache/sde_diffusion``; a temporary
    folder where that cannot be written, or where others could write into it."""
    try:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "sde_diffusion"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
        if state.st_uid == os.getuid() and not state.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the latter without a home
        pass
    return Path(_temporary().name)


@lru_cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Of this process, and gone with it."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _compile(command: list[str], path: Path) -> None:
    """Into ``path``, which is never there in part."""
    handle, part = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run([*command, "-o", part])
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
    return done.stdout


def _compiler() -> list[str] | None:
    if os.name != "posix":
        return None
    wanted = shlex.split(os.environ.get("CC", ""))
    names = [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]
    return next((name for name in names if shutil.which(name[0])), None)


def _processor() -> str:
    """What this processor can do: a home may serve several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _warn(source: Path, reason: str) -> None:
    warnings.warn(f"{source.name} is not used, computing is slower without: {reason}", stacklevel=4)
