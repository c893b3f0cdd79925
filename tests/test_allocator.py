"""Memory freed by a process stays with it: seen by the page faults of taking it again."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from sde_diffusion.allocator import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from sde_diffusion.allocator import keep_freed_memory, return_freed_memory
if sys.argv[1] != "leave":
    assert keep_freed_memory()
if sys.argv[1] == "return":
    assert return_freed_memory()
for _ in range(12):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24)  # 64 MB, 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=120
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_are_taken_again_without_page_faults() -> None:
    assert _faults("keep") < 1000 < 10 * _faults("leave")
    assert 10 * _faults("return") > 1000


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
