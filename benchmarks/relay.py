"""A TCP relay that is as far away and as narrow as asked, and counts: a network between two ports of one machine.

    python benchmarks/relay.py '{"host": "127.0.0.1", "port": 8333, "rtt_ms": 30, "mbit": 1000}'

It prints the port it listens on. Each line it then reads is answered with its counters as JSON; at the end of its input
it stops. It is a process of its own, so that its time is nobody else's.

Theory: a direction is one *link* that all connections share, as a network card is. A piece of data leaves when the link
has sent all earlier ones, and arrives half a round trip later. A connection waits one round trip before its first byte,
for the handshake that loopback did at once. What is on its way is bounded for each connection, like a TCP window.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

PIECE_BYTES = 64 * 1024
WINDOW_PIECES = 64
"""4 MiB on their way for a connection: 30 ms at 1 Gbit/s hold 3.75 MB, so that one connection can fill the link."""
MAX_QUEUE_S = 0.02
"""A sender waits while the link has this much work ahead: a router's buffer."""
METHODS = (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")


@dataclass
class Counters:
    """What went through since the start."""

    connections: int = 0
    requests: int = 0
    up_bytes: int = 0
    down_bytes: int = 0


class Link:
    """One direction: when a piece of data that is sent now arrives."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self._free_at = 0.0

    async def send(self, num_bytes: int) -> float:
        """Wait until the link takes so many bytes; return when they arrive."""
        clock = asyncio.get_running_loop().time
        if not self._bytes_per_s:
            return clock() + self._delay_s
        while (ahead_s := self._free_at - clock()) > MAX_QUEUE_S:
            await asyncio.sleep(ahead_s - MAX_QUEUE_S / 2)
        self._free_at = max(self._free_at, clock()) + num_bytes / self._bytes_per_s
        return self._free_at + self._delay_s


class Relay:
    """Listens, connects on, and counts."""

    def __init__(self, *, host: str, port: int, rtt_ms: float = 0, mbit: float = 0) -> None:
        self._host, self._port = host, port
        self._rtt_s = rtt_ms / 1e3
        self._up, self._down = (Link(mbit * 1e6 / 8, self._rtt_s / 2) for _ in range(2))
        self.counters = Counters()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client until both sides have said all they had to say."""
        self.counters.connections += 1
        with contextlib.suppress(OSError):  # a client may hang up at any time
            if self._rtt_s:
                await asyncio.sleep(self._rtt_s)
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port, limit=2 * PIECE_BYTES)
            try:
                await asyncio.gather(
                    self._pump(reader, far_writer, self._up, "up_bytes"),
                    self._pump(far_reader, writer, self._down, "down_bytes"),
                )
            finally:
                far_writer.close()
        writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link, counter: str) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(WINDOW_PIECES)
        delivering = asyncio.ensure_future(self._deliver(on_the_way, writer))
        try:
            while data := await reader.read(PIECE_BYTES):
                setattr(self.counters, counter, getattr(self.counters, counter) + len(data))
                # Clients of S3 wait for an answer before they ask again, so a request begins a piece.
                self.counters.requests += counter == "up_bytes" and data.startswith(METHODS)
                await on_the_way.put((await link.send(len(data)), data))
            await on_the_way.put((0.0, b""))
            await delivering
        finally:
            delivering.cancel()
            # Either end has closed: the other must learn it, or it waits for ever.
            writer.close()

    async def _deliver(self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        while (arrival := await on_the_way.get())[1]:
            arrives_at, data = arrival
            if (wait_s := arrives_at - clock()) > 0:
                await asyncio.sleep(wait_s)
            with contextlib.suppress(OSError):  # hung up: go on taking pieces, or the sender would wait for room
                writer.write(data)
                await writer.drain()


async def serve(options: dict[str, Any]) -> None:
    """Relay until stdin ends."""
    relay = Relay(**options)
    server = await asyncio.start_server(relay.connected, "127.0.0.1", 0, limit=2 * PIECE_BYTES)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(asdict(relay.counters)), flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
