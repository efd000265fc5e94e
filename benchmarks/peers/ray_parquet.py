"""Ray Data: parquet files, ``iter_torch_batches``; it brings its own processes, started before the clock runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.extensions import ArrowTensorArray

from peers import CHUNK_SAMPLES, Batch, Reading, Sample, columns_of, grouped, padded

SHUFFLE_BUFFER = 1_000


def write(samples: Iterable[Sample], folder: Path, workload: str) -> None:
    """Write parquet files, with its tensor type."""
    for number, group in enumerate(grouped(samples, CHUNK_SAMPLES[workload])):
        columns = {name: _stored(values) for name, values in columns_of(group).items()}
        pq.write_table(pa.table(columns), folder / f"{number:06d}.parquet")


def _stored(values: Any) -> Any:
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return ArrowTensorArray.from_numpy(values)
    if isinstance(values[0], list):
        return pa.array([json.dumps(value) for value in values])
    return pa.array(values)


def prepare() -> None:
    """Start its processes."""
    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False


class Loader:
    """Batches of a dataset that is read anew in each pass."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._ragged = reading.workload == "ragged"
        self._shuffle: dict[str, Any] = {"local_shuffle_buffer_size": SHUFFLE_BUFFER} if reading.shuffle else {}
        self._data = ray.data.read_parquet(
            paths_of(reading), filesystem=filesystem_of(reading), shuffle="files" if reading.shuffle else None
        )

    def __iter__(self) -> Iterator[Batch]:
        size = self._reading.batch_size
        if not self._ragged:
            yield from self._data.iter_torch_batches(batch_size=size, **self._shuffle)
            return
        for columns in self._data.iter_batches(batch_size=size, batch_format="numpy", **self._shuffle):
            names = list(columns)
            samples = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield padded([sample | {"meta": json.loads(sample["meta"])} for sample in samples])


def paths_of(reading: Reading) -> list[str]:
    """Return the files, without a scheme where a file system is given."""
    return [f"{reading.url.removeprefix('s3://')}/{name}" for name in reading.names]


def filesystem_of(reading: Reading) -> Any:
    """Return pyarrow's client for S3, or nothing."""
    if reading.s3 is None:
        return None
    from pyarrow.fs import S3FileSystem

    return S3FileSystem(
        access_key=reading.s3["key"],
        secret_key=reading.s3["secret"],
        endpoint_override=reading.s3["endpoint_url"],
        region="us-east-1",
    )


def loader(reading: Reading) -> Iterable[Batch]:
    """Return the loader."""
    return Loader(reading)
