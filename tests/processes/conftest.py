"""The dataset of these tests, and the order that it must come in."""

from __future__ import annotations

import os
import sys

import pytest

from tests.datasets import ids, write
from tests.processes.sessions import NUM_SAMPLES, make_dataset

if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
    collect_ignore_glob = ["test_*.py"]  # what they promise needs Linux 5.3; see docs/guarantees.md


@pytest.fixture(autouse=True)
def _quiet_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the dataset is."""
    folder = tmp_path_factory.mktemp("processes") / "train"
    write(str(folder), range(NUM_SAMPLES))
    return str(folder)


@pytest.fixture(scope="session")
def epochs(url: str) -> list[list[list[int]]]:
    """The ids of each batch of the first three epochs, read without any loader."""
    dataset = make_dataset(url)
    return [ids(dataset) for _ in range(3)]
