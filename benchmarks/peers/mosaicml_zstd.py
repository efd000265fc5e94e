"""MosaicML Streaming with compressed shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peers import Batch, Reading, Sample
from peers.mosaicml_raw import make, mds


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write shards."""
    mds(samples, folder, workload, "zstd")


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make(reading, keep_local=True)
