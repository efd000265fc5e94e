"""streamshards, with its defaults."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import streamshards as ss
from peers import Batch, Reading, Sample


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:  # noqa: ARG001 - the protocol's
    """Write shards."""
    with ss.ShardWriter(str(folder), mode="replace") as out:
        for sample in samples:
            out.write(sample)


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return make(reading)


def make(reading: Reading, **options: Any) -> Iterable[Batch]:
    """Return the loader, with more options for the dataset."""
    dataset = ss.StreamingDataset(
        reading.url,
        batch_size=reading.batch_size,
        shuffle=reading.shuffle,
        seed=17,
        tail="uneven",
        batch_transform=pad if reading.workload == "ragged" else None,
        storage_options=dict(reading.s3) if reading.s3 else None,
        **options,
    )
    return ss.StreamingDataLoader(dataset, num_workers=reading.num_workers)


def pad(batch: Batch) -> Batch:
    """Pad the ragged field, as docs/usage.md shows it."""
    rows = batch["tokens"]
    return batch | {
        "tokens": pad_sequence(rows, batch_first=True),
        "lengths": torch.tensor([len(row) for row in rows]),
    }
