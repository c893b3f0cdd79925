"""Paths and bytes of data files, with errors that say which file is at fault."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def existing(path: str | Path | None, what: str) -> Path:
    """``path`` as a Path that exists.

    Raises:
        ValueError: no path was given.
        FileNotFoundError: there is nothing there; the message names the nearest folder above that exists.
    """
    if path is None or str(path) == "":
        raise ValueError(f"{what} needs a path, got {path!r}")
    found = Path(path).expanduser()
    if not found.exists():
        above = found.absolute().parent
        while not above.exists():
            above = above.parent
        raise FileNotFoundError(
            f"{what}: {str(found)!r} does not exist (the path exists up to {str(above)!r})"
        )
    return found


def existing_folder(path: str | Path | None, what: str) -> Path:
    """``path`` as a folder that exists.

    Raises:
        ValueError: no path was given.
        FileNotFoundError: there is nothing there.
        NotADirectoryError: it is a file.
    """
    found = existing(path, what)
    if not found.is_dir():
        raise NotADirectoryError(f"{what} needs a folder, got the file {str(found)!r}")
    return found


@contextmanager
def reading(path: str | Path, *damage: type[BaseException]) -> Iterator[None]:
    """Turns the errors of a damaged file, of whatever library, into a ValueError that names the file."""
    errors: tuple[type[BaseException], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *damage)
    try:
        yield
    except errors as error:
        raise ValueError(f"{str(path)!r} is truncated, damaged or of another kind: {error}") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked when it is gzip (known by its first two bytes, not by its name)."""
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    with reading(path):
        return gzip.decompress(raw)
