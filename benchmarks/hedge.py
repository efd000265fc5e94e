"""What a second request gains when a few reads are late: ``python benchmarks/hedge.py``.

2 % of the GETs of shards are answered 3 s late, by a proxy in front of a SeaweedFS on loopback; which first requests
are depends on the seed alone, without and with ``RetryOptions.hedge_s``. Each line is one seed: an epoch each way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch

from streamshards import RetryOptions, ShardWriter, StreamingDataset
from streamshards.testing import FaultProxy, Late, Request, at_random
from streamshards.testing.servers import seaweedfs

NUM_SHARDS = 64
ROWS = 64
LATE_S = 3.0
RATE = 0.02


def main(seeds: int, hedge_s: float) -> None:
    """Print the seconds of an epoch without and with, and how many requests each took."""
    with tempfile.TemporaryDirectory() as folder, seaweedfs(folder) as server, FaultProxy(server) as proxy:
        server.create_bucket("hedge")
        with ShardWriter(
            "s3://hedge/train", shard_bytes=ROWS * (8 + 4 * 1024), storage_options=server.storage_options
        ) as out:
            for first in range(0, NUM_SHARDS * ROWS, ROWS):
                out.write_batch({"id": torch.arange(first, first + ROWS), "x": torch.rand(ROWS, 1024)})
        num_shards = len(out.index.names)
        print(f"{num_shards} shards, {RATE:.0%} of their GETs {LATE_S:g} s late, hedge_s={hedge_s:g}")
        print("seed  late  epoch without  epoch with  second requests (of which won)")
        gains = []
        for seed in range(seeds):
            without_s, late, _, _ = epoch(proxy, seed, None)
            with_s, _, hedges, won = epoch(proxy, seed, hedge_s)
            gains.append((without_s, with_s))
            print(f"{seed:4}  {late:4}  {without_s:11.2f} s  {with_s:8.2f} s  {hedges} ({won})")
        without, hedged = zip(*gains, strict=True)
        print(f"mean        {statistics.mean(without):11.2f} s  {statistics.mean(hedged):8.2f} s")


def epoch(proxy: FaultProxy, seed: int, hedge_s: float | None) -> tuple[float, int, int, int]:
    """Return the seconds of one epoch, how many requests were late, second requests, and those that won."""
    late = at_random(RATE, [Late(LATE_S)], seed=seed)
    proxy.forget()

    def script(request: Request) -> Late | None:
        return late(request) if request.key.endswith(".pt.zst") else None  # type: ignore[return-value]  # any fault will do

    proxy.script = script
    dataset = StreamingDataset(
        "s3://hedge/train",
        batch_size=ROWS,
        storage_options=proxy.server.storage_options,
        retry=RetryOptions(hedge_s=hedge_s),
    )
    started = time.perf_counter()
    rows = sum(len(batch["id"]) for batch in dataset)
    took_s = time.perf_counter() - started
    assert rows == NUM_SHARDS * ROWS
    stats = dataset.stats()
    met = sum(request.fault is not None for request in proxy.requests)
    return took_s, met, int(stats["hedges"]), int(stats["hedges_won"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--hedge-s", type=float, default=0.5)
    args = parser.parse_args()
    main(args.seeds, args.hedge_s)
