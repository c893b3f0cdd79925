"""Error messages that name what was received and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, got: object, allowed: Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``allowed``, with the nearest valid name suggested.

    Args:
        kind: what the name stands for, such as ``"sde"``.
        got: the value received.
        allowed: the valid names.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(str(got), names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return ValueError(f"unknown {kind} {got!r}{hint} allowed: {', '.join(names)}")


def missing_package(package: str, purpose: str, extra: str) -> ImportError:
    """The error for an optional package that is not installed: says what for, and how to install it."""
    return ImportError(
        f"{purpose} needs the package {package!r}; install it with: pip install 'sde_diffusion[{extra}]'"
    )
