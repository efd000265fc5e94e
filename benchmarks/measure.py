"""One measurement in a process of its own, so that memory and CPU time are its own; prints one JSON line.

python benchmarks/measure.py decode|epoch|get '{"url": …, "threads": 2, …}'
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import fsspec
import numpy as np
import zstandard

import streamshards as ss


class Stopwatch:
    """Wall and CPU seconds (all threads of this process) since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return both."""
        return {"wall_s": time.perf_counter() - self._wall, "cpu_s": time.process_time() - self._cpu}


def decode(*, url: str, passes: int, threads: int, **_: Any) -> dict[str, Any]:
    """Decode every shard of a local dataset with zstandard alone: no index, no digest, no tensors, no batches.

    The stored bytes are in memory already, and each thread decodes into one buffer that it has used before.
    """
    index = ss.StreamingDataset(url).index
    raw_sizes = index.raw_sizes.tolist()
    shards = [Path(url, name).read_bytes() for name in index.names]
    buffers: SimpleQueue[np.ndarray[Any, np.dtype[np.uint8]]] = SimpleQueue()
    for _number in range(threads):
        buffers.put(np.zeros(max(raw_sizes), np.uint8))

    def decode_one(data: bytes, raw_size: int) -> None:
        buffer = buffers.get()
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as stream:
            if stream.readinto(memoryview(buffer)[:raw_size]) != raw_size:  # type: ignore[arg-type] # a memoryview does
                raise SystemExit("a shard gave fewer bytes than the index promises")
        buffers.put(buffer)

    with ThreadPoolExecutor(threads) as pool:

        def decode_all() -> None:
            for _ in pool.map(decode_one, shards, raw_sizes):
                pass

        decode_all()  # warms the buffers
        return {"passes": _timed(passes, decode_all)}


def epoch(
    *, url: str, passes: int, batch_size: int, storage_options: dict[str, Any] | None = None, **_: Any
) -> dict[str, Any]:
    """Take whole shuffled epochs from a dataset, the first one from opening it on."""
    started = time.perf_counter()
    dataset = ss.StreamingDataset(
        url, batch_size=batch_size, shuffle=True, seed=17, tail="uneven", storage_options=storage_options
    )
    batches = iter(dataset)
    samples = _count(next(batches))
    first_batch_s = time.perf_counter() - started
    samples += sum(map(_count, batches))
    first_epoch_s = time.perf_counter() - started
    if samples != dataset.num_samples:
        raise SystemExit(f"{samples:,} samples came of {dataset.num_samples:,}")
    return {
        "first_batch_s": first_batch_s,
        "first_epoch_s": first_epoch_s,
        "passes": _timed(passes, lambda: sum(map(_count, dataset))),
        "stats": dataset.stats(),
    }


def get(*, url: str, passes: int, connections: int, storage_options: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Get every shard with s3fs alone, over as many connections as the library uses, and drop the bytes."""
    names = ss.StreamingDataset(url, storage_options=storage_options).index.names
    fs = fsspec.filesystem("s3", **storage_options)
    bucket = url.removeprefix("s3://")

    def get_one(name: str) -> int:
        return len(fs.cat_file(f"{bucket}/{name}"))

    with ThreadPoolExecutor(connections) as pool:
        return {"passes": _timed(passes, lambda: sum(pool.map(get_one, names)))}


def _timed(passes: int, work: Callable[[], Any]) -> list[dict[str, float]]:
    """Return the times of *passes* runs."""
    times = []
    for _ in range(passes):
        watch = Stopwatch()
        work()
        times.append(watch.read())
    return times


def _count(batch: dict[str, Any]) -> int:
    return len(next(iter(batch.values())))


def peak_rss_bytes() -> int:
    """Return the most memory this process has had.

    Not from ``getrusage`` where there is /proc: Linux carries its maximum over ``exec``, from the parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(what: str, arguments: str) -> None:
    """Measure *what* on so many cores."""
    options = json.loads(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options["threads"]])
    ss.StreamingDataset  # noqa: B018 - imports torch, which every user pays for
    base = peak_rss_bytes()
    result = {"decode": decode, "epoch": epoch, "get": get}[what](**options)
    print(json.dumps(result | {"base_rss_bytes": base, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
