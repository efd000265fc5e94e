"""Fakes for your own tests: stores that fail on a script, time that you move, and real S3 servers on loopback.

::

    store = FaultyStore(MemoryStore({"a": b"123"}), [UNAVAILABLE, Truncate(1)])   # the third get succeeds
    clock = FakeClock()

    from streamshards.testing.servers import seaweedfs
    with seaweedfs(folder) as server:
        server.create_bucket("train")
        StreamingDataset("s3://train", storage_options=server.storage_options)
"""

from streamshards.testing.clock import FakeClock
from streamshards.testing.stores import (
    DENIED,
    MISSING,
    UNAVAILABLE,
    Block,
    Fail,
    Fault,
    FaultyStore,
    FlipBit,
    MemoryStore,
    Script,
    Swap,
    Truncate,
)

__all__ = [
    "DENIED",
    "MISSING",
    "UNAVAILABLE",
    "Block",
    "Fail",
    "FakeClock",
    "Fault",
    "FaultyStore",
    "FlipBit",
    "MemoryStore",
    "Script",
    "Swap",
    "Truncate",
]
