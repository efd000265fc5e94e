"""An outage of minutes, with the default options: ``python -m tests.soak.outage [SECONDS]`` (default 120).

The endpoint goes in the middle of an epoch and comes back; the epoch must end soon after, with every sample
in its place.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time

from streamshards import StreamingDataset
from streamshards.events import ShardSkipped
from streamshards.testing import FaultProxy, Request
from streamshards.testing.servers import seaweedfs
from tests.datasets import write

NUM_SAMPLES = 200


def main(outage_s: float) -> None:
    """Print how long the epoch took beyond the outage."""
    outages: list[threading.Thread] = []
    skipped: list[ShardSkipped] = []
    with tempfile.TemporaryDirectory() as folder, seaweedfs(folder) as server, FaultProxy(server) as proxy:
        server.create_bucket("outage")
        write("s3://outage/train", range(NUM_SAMPLES), shard_bytes=2_000, storage_options=server.storage_options)
        dataset = StreamingDataset(
            "s3://outage/train",
            storage_options=proxy.server.storage_options,
            observer=lambda event: skipped.append(event) if isinstance(event, ShardSkipped) else None,
        )
        middle = dataset.index.names[len(dataset.index.names) // 2]

        def script(request: Request) -> None:
            if request.key.endswith(middle) and not outages:
                outages.append(proxy.down_for(outage_s))

        proxy.script = script
        started = time.monotonic()
        got = [s["id"] for s in dataset]
        took_s = time.monotonic() - started
        retries = dataset.stats()["retries"]
    assert got == list(range(NUM_SAMPLES))
    assert skipped == []
    print(f"outage {outage_s:g} s: epoch took {took_s:.1f} s, {retries} retries, 0 of {NUM_SAMPLES} samples lost")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
