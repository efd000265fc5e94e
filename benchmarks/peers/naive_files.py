"""What many people begin with: one ``.pt`` file a sample, torch's Dataset and DataLoader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from peers import Batch, Reading, Sample, collate_for

FOLDER_FILES = 1_000
"""Files in one folder: a folder of a million files is slow by itself."""


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:  # noqa: ARG001 - the protocol's
    """Write a file a sample."""
    for number, sample in enumerate(samples):
        path = folder / f"{number // FOLDER_FILES:06d}" / f"{number % FOLDER_FILES:03d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(as_tensors(sample), path)


def as_tensors(sample: Sample) -> dict[str, Any]:
    """Return the sample with tensors for arrays, on storages of their own."""
    return {name: torch.tensor(value) if hasattr(value, "dtype") else value for name, value in sample.items()}


class Files(Dataset[Any]):
    """Samples by number."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        return torch.load(self._paths[number], weights_only=True)


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    files = Files([f"{reading.url}/{name}" for name in reading.names])
    return DataLoader(
        files,
        batch_size=reading.batch_size,
        shuffle=reading.shuffle,
        num_workers=reading.num_workers,
        collate_fn=collate_for(reading.workload),
    )
