"""A pool of processes: what it is given first, its threads, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sde_diffusion.processes import processes

PROGRAM = """
import os, signal, sys, time
from sde_diffusion.processes import processes

def work(file):
    with open(file, "w") as out:
        out.write(str(os.getpid()))
        out.flush()
    os.rename(file, file + ".ready")
    time.sleep(120)

if __name__ == "__main__":
    # A shell starts what it runs in the background with Ctrl-C ignored, and this inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes(1) as pool:
        pool.submit(work, sys.argv[1]).result()
"""


def _threads() -> tuple[int, str | None]:
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def _double(x: int) -> int:
    return 2 * x


@pytest.mark.slow
def test_results_come_in_their_order_from_single_threads() -> None:
    before = dict(os.environ)
    with processes(2) as pool:
        assert list(pool.map(_double, range(5))) == [0, 2, 4, 6, 8]
        assert pool.submit(_threads).result() == (1, "1")
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_survives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    script, file = tmp_path / "program.py", tmp_path / "pid"
    script.write_text(PROGRAM)
    parent = subprocess.Popen([sys.executable, str(script), str(file)], stderr=subprocess.DEVNULL)
    ready = tmp_path / "pid.ready"
    deadline = time.monotonic() + 90
    while not ready.exists():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.1)
    worker = int(ready.read_text())
    parent.send_signal(number)
    try:
        parent.wait(30)
    except subprocess.TimeoutExpired:
        parent.kill()
        parent.wait()
        raise
    deadline = time.monotonic() + 30
    while _alive(worker):
        assert time.monotonic() < deadline, "the worker goes on"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
