"""LitData with compressed chunks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peers import Batch, Reading, Sample
from peers.litdata_raw import make_loader, optimized


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write chunks."""
    optimized(samples, folder, workload, compression="zstd")


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make_loader(reading, tokens=False)
