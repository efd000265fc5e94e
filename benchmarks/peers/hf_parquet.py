"""Hugging Face datasets: parquet files, ``streaming=True``, torch's DataLoader.

Arrays are stored as bytes: its list types came out several times slower, and as int64. Its pause of 5 s at the end of
every epoch (a guard against crashes when Python exits) is turned off, in its favour.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Value
from torch.utils.data import DataLoader

from peers import CHUNK_SAMPLES, Batch, Reading, Sample, grouped, padded

ARRAYS = {
    "image": ("uint8", (3, 96, 96)),
    "tokens": ("int32", (-1,)),
    "x": ("float32", (64,)),
}
KINDS = {"image": "binary", "tokens": "binary", "x": "binary", "label": "int64", "y": "int64"}
SHUFFLE_BUFFER = 1_000
"""Its default."""
datasets.disable_progress_bars()
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write parquet files."""
    for number, group in enumerate(grouped(samples, CHUNK_SAMPLES[workload])):
        columns = {name: [_stored(name, sample[name]) for sample in group] for name in group[0]}
        features = Features({name: Value(KINDS.get(name, "string")) for name in columns})
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{number:06d}.parquet"))


def _stored(name: str, value: Any) -> Any:
    if name in ARRAYS:
        return value.tobytes()
    return json.dumps(value) if name == "meta" else value


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    options: dict[str, Any] = {"storage_options": dict(reading.s3)} if reading.s3 else {}
    dataset = datasets.load_dataset(
        "parquet",
        data_files=[f"{reading.url}/{name}" for name in reading.names],
        split="train",
        streaming=True,
        cache_dir=str(reading.scratch),
        **options,
    )
    if reading.shuffle:
        dataset = dataset.shuffle(seed=17, buffer_size=SHUFFLE_BUFFER)
    return DataLoader(
        dataset,
        batch_size=reading.batch_size,
        num_workers=reading.num_workers,
        collate_fn=ragged if reading.workload == "ragged" else stacked,
    )


def stacked(samples: list[Sample]) -> Batch:
    """Return a batch of samples whose arrays have one shape."""
    return {name: _column(name, [sample[name] for sample in samples]) for name in samples[0]}


def _column(name: str, values: list[Any]) -> torch.Tensor:
    if name not in ARRAYS:
        return torch.tensor(values)
    dtype, shape = ARRAYS[name]
    joined = np.frombuffer(bytearray().join(values), dtype)
    return torch.from_numpy(joined.reshape(len(values), *shape))


def ragged(samples: list[Sample]) -> Batch:
    """Return a batch of ragged samples."""
    return padded(
        [
            sample | {"tokens": np.frombuffer(bytearray(sample["tokens"]), "int32"), "meta": json.loads(sample["meta"])}
            for sample in samples
        ]
    )
