"""Fakes for your own tests: stores that fail on a script, time that you move, real S3 servers on loopback, and a proxy
that makes those fail on a script.

::

    store = FaultyStore(MemoryStore({"a": b"123"}), [UNAVAILABLE, Truncate(1)])   # the third get succeeds
    clock = FakeClock()

    from streamshards.testing.servers import seaweedfs
    with seaweedfs(folder) as server:
        server.create_bucket("train")
        StreamingDataset("s3://train", storage_options=server.storage_options)
        with FaultProxy(server, by_key("*.pt.zst", [SLOW_DOWN, Reset(100)])) as proxy:
            StreamingDataset("s3://train", storage_options=proxy.server.storage_options)
"""

from streamshards.testing.clock import FakeClock
from streamshards.testing.proxy import (
    ACCESS_DENIED,
    BAD_GATEWAY,
    EXPIRED_TOKEN,
    INTERNAL_ERROR,
    NO_SUCH_KEY,
    SLOW_DOWN,
    TIME_SKEWED,
    TOO_MANY_REQUESTS,
    Answer,
    Cut,
    Drip,
    FaultProxy,
    Late,
    Request,
    Reset,
    Stall,
    at_random,
    by_key,
)
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
    "ACCESS_DENIED",
    "BAD_GATEWAY",
    "DENIED",
    "EXPIRED_TOKEN",
    "INTERNAL_ERROR",
    "MISSING",
    "NO_SUCH_KEY",
    "SLOW_DOWN",
    "TIME_SKEWED",
    "TOO_MANY_REQUESTS",
    "UNAVAILABLE",
    "Answer",
    "Block",
    "Cut",
    "Drip",
    "Fail",
    "FakeClock",
    "Fault",
    "FaultProxy",
    "FaultyStore",
    "FlipBit",
    "Late",
    "MemoryStore",
    "Request",
    "Reset",
    "Script",
    "Stall",
    "Swap",
    "Truncate",
    "at_random",
    "by_key",
]
