"""Real data and reference numbers that may lie beside the checkout; tests skip where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest


def shared_path(*parts: str) -> Path:
    """The path of a file or folder of ``shared/`` beside the checkout; skips the test where it is absent."""
    path = Path(__file__).resolve().parents[2].joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(('shared', *parts))} is not beside this checkout")
    return path
