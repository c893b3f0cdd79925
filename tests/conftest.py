"""What holds for every test: one thread, fixed seeds, no display; tests of a GPU skip where there is none."""

from __future__ import annotations

import os

# Set before torch and matplotlib are imported. One thread: pytest-xdist runs a process per core, and sums
# over several threads would make the last digits depend on the machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The global generators start every test from the same state, whichever tests ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_defaults():
    """A test that changes torch's global settings does not change those of the next."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports much of torch
        torch.use_deterministic_algorithms(deterministic)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip, and say so, where torch finds no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by how many: gzip writes the time into them, and pytest-xdist needs names that stay."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) else None
