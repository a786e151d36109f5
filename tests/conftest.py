"""Offline, one thread, one seed."""

from __future__ import annotations

import os

# Read when the libraries are imported, hence before any import of them. Child processes inherit it.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
)
# Two OpenMP threads on two busy cores spin against each other: milliseconds instead of microseconds per operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Timings on a shared machine say nothing about the code; the same examples every time make a failure reproducible.
settings.register_profile("nabla_rl", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("nabla_rl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """No test depends on which test ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """The generator that stochastic functions are handed."""
    return torch.Generator().manual_seed(0)
