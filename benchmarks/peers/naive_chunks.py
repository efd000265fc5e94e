"""What they do next: lists of samples in larger ``.pt`` files, an IterableDataset, files dealt out to workers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from peers import CHUNK_SAMPLES, Batch, Reading, Sample, collate_for, grouped
from peers.naive_files import as_tensors


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write lists of samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(grouped(samples, CHUNK_SAMPLES[workload])):
        torch.save([as_tensors(sample) for sample in group], folder / f"chunk-{number:06d}.pt")


class Chunks(IterableDataset[Any]):
    """Samples of one file after the other."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __iter__(self) -> Iterator[Any]:
        names = list(self._reading.names)
        if self._reading.shuffle:
            random.Random(17).shuffle(names)
        worker = get_worker_info()
        if worker is not None:
            names = names[worker.id :: worker.num_workers]
        for name in names:
            samples = self._load(f"{self._reading.url}/{name}")
            if self._reading.shuffle:
                random.shuffle(samples)
            yield from samples

    def _load(self, url: str) -> list[Any]:
        if self._reading.s3 is None:
            return list(torch.load(url, weights_only=True))
        import fsspec

        with fsspec.open(url, **self._reading.s3) as file:
            return list(torch.load(file, weights_only=True))


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return DataLoader(
        Chunks(reading),
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
        collate_fn=collate_for(reading.workload),
    )
