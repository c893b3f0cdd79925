"""Work in several processes of one thread each, which on CPUs do more than one process of as many threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from sde_diffusion.allocator import keep_freed_memory

__all__ = ["processes"]

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def processes(
    number: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of so many processes, new ones rather than copies of this, each of which first calls ``begin``."""
    context = multiprocessing.get_context("spawn")
    # What a process may use it reads when it starts.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        with ProcessPoolExecutor(
            number, mp_context=context, initializer=_begin, initargs=(begin, arguments)
        ) as pool:
            others = set(multiprocessing.active_children())
            try:
                yield pool
            except BaseException:
                # Nobody waits for what is being computed.
                pool.shutdown(wait=False, cancel_futures=True)
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()
                raise
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _begin(begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    if begin is not None:
        begin(*arguments)


def _end_with(parent: Any) -> None:
    """A parent that is killed ends nothing by itself."""
    parent.join()
    os._exit(1)
