"""Grain: ArrayRecord files, ``MapDataset``, batches of numpy arrays that become tensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import torch
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter

from peers import CHUNK_SAMPLES, Batch, Reading, Sample, grouped

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # it expects to run under absl


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write files of pickled samples, one a record: it leaves the encoding to its users."""
    for number, group in enumerate(grouped(samples, CHUNK_SAMPLES[workload])):
        out = ArrayRecordWriter(str(folder / f"{number:06d}.array_record"), "group_size:1")
        for sample in group:
            out.write(pickle.dumps(sample, protocol=5))
        out.close()


class Loader:
    """Each pass builds the pipeline anew, with the next seed."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._source = grain.sources.ArrayRecordDataSource([f"{reading.url}/{name}" for name in reading.names])
        self._epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        reading = self._reading
        dataset = grain.MapDataset.source(self._source)
        if reading.shuffle:
            dataset = dataset.shuffle(seed=17 + self._epoch)
        self._epoch += 1
        dataset = dataset.map(pickle.loads).batch(
            reading.batch_size, batch_fn=padded_arrays if reading.workload == "ragged" else None
        )
        batches = dataset.to_iter_dataset()
        if reading.num_workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=reading.num_workers))
        for batch in batches:
            yield {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in batch.items()}


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return Loader(reading)


def padded_arrays(samples: Any) -> Batch:
    """Return a batch of ragged samples, as arrays."""
    lengths = np.array([len(sample["tokens"]) for sample in samples])
    tokens = np.zeros((len(samples), lengths.max()), np.int32)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample["tokens"])] = sample["tokens"]
    return {
        "tokens": tokens,
        "lengths": lengths,
        "text": [sample["text"] for sample in samples],
        "meta": [sample["meta"] for sample in samples],
    }
