"""Memory that a process on a CPU has freed stays with it, instead of going back to the system at once.

glibc gives every freed block of more than 32 MB back to the system, and what is free at the heap's end beyond 64 MB.
The next one costs a page fault each 4 kB, where the system clears the page. Activations of large images and batches
are such blocks: without that, operations that only read and write memory are two to four times faster.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory", "return_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1
_LARGE, _USUAL_MMAPS = 32 * 2**20, 65536


def keep_freed_memory() -> bool:
    """From now on, blocks come from the process's own heap, which does not shrink; whether that could be said.

    For programs, as it changes the whole process: the largest amount that was in use at a time stays taken until the
    end. Does nothing (False) where the C library is not glibc.
    """
    return _set(mmaps=0, trim=_NEVER)


def return_freed_memory() -> bool:
    """For comparisons, what glibc does by itself; what is free is returned now.

    Its thresholds follow the blocks that are freed, up to 32 MB, and twice that; here they are there at once.
    """
    done = _set(mmaps=_USUAL_MMAPS, trim=2 * _LARGE)
    if done:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
        ctypes.CDLL(None).malloc_trim(0)
    return done


def _set(mmaps: int, trim: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_MAX, mmaps)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, trim))
