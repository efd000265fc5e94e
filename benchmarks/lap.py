"""One measurement of one peer, in a process of its own in the peer's environment; prints one JSON line.

python benchmarks/lap.py write '{"peer": …, "workload": …, "raw_bytes": …, "folder": …}'
python benchmarks/lap.py read '{"peer": …, "workload": …, "url": …, …}'

A reading goes through these spans, one after the other:

1. *first*: a new loader, its first batch, and the rest of the epoch, or as much of it as ``max_s`` allow.
2. *more* (only if ``min_s``): further epochs of the same loader for at least so long, a started one ended or cut.
3. *steps*: a new loader, and so many training steps of 20 ms. A step is a wait, as for a GPU: the loader has the cores.
4. *check* (only if asked for): a new loader's whole epoch, whose contents are summed. It is not timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peers
from contents import Contents
from peers import Batch, Reading, Sample
from processes import Used, adopt_orphans, memory, used
from workloads import chunks

STEP_S = 0.02


def samples_of(workload: str, raw_bytes: int) -> Iterator[Sample]:
    """Yield the samples of a workload."""
    for columns in chunks(workload, raw_bytes):
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def write(*, peer: str, workload: str, raw_bytes: int, folder: str) -> dict[str, Any]:
    """Store a workload in a peer's format."""
    started = time.perf_counter()
    Path(folder).mkdir(parents=True)
    peers.module_of(peer).write(samples_of(workload, raw_bytes), Path(folder), workload)
    return {"write_s": time.perf_counter() - started}


class Span:
    """What was delivered and used since it was made."""

    def __init__(self) -> None:
        self.samples = 0
        self._used = used(os.getpid())  # first: looking through /proc takes some ms, many on a busy machine
        self._since = time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._since

    def result(self) -> dict[str, Any]:
        """Return it all."""
        wall_s = self.wall_s
        spent: Used = used(os.getpid()) - self._used
        return {"samples": self.samples, "wall_s": wall_s, **dataclasses.asdict(spent)}


def read(
    *,
    peer: str,
    min_s: float,
    max_s: float,
    steps: int,
    check: bool,
    check_s3: dict[str, str] | None = None,
    threads: int,
    **options: Any,
) -> dict[str, Any]:
    """Measure a peer's loader."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    reading = Reading(**options | {"scratch": Path(options["scratch"]), "names": tuple(options["names"])})
    module = peers.module_of(peer)  # what everybody pays for once: torch and the library are imported
    getattr(module, "prepare", lambda: None)()
    base = memory(os.getpid())
    since = time.monotonic()
    loader, first = _first(lambda: module.loader(_fresh(reading, "first")), max_s)
    result: dict[str, Any] = {"first": first}
    if min_s:
        result["more"] = _more(loader, min_s, max_s)
    result["stall"] = _steps(module.loader(_fresh(reading, "steps")), steps)
    until = time.monotonic()
    if check:
        again = reading if check_s3 is None else dataclasses.replace(reading, s3=check_s3)
        if check_s3 is not None:
            os.environ.update(
                {"AWS_ENDPOINT_URL": check_s3["endpoint_url"], "S3_ENDPOINT_URL": check_s3["endpoint_url"]}
            )
        result["check"] = _check(module.loader(_fresh(again, "check")))
    return result | {
        "window": [since, until],
        "base_pss_bytes": base.pss_bytes,
        "versions": {name: _version(name) for name in ("torch", "numpy", *peers.PEERS[peer].packages)},
    }


def _fresh(reading: Reading, name: str) -> Reading:
    scratch = reading.scratch / name
    scratch.mkdir(parents=True)
    return dataclasses.replace(reading, scratch=scratch)


def _first(open_loader: Any, max_s: float) -> tuple[Iterable[Batch], dict[str, Any]]:
    span = Span()
    loader = open_loader()
    batches = iter(loader)
    span.samples += _count(next(batches))
    first_batch_s = span.wall_s
    whole = _take(batches, span, max_s)
    return loader, {"first_batch_s": first_batch_s, "whole": whole, **span.result()}


def _more(loader: Iterable[Batch], min_s: float, max_s: float) -> dict[str, Any]:
    span = Span()
    _take(iter(loader), span, max_s)
    while span.wall_s < min_s:
        _take(iter(loader), span, max_s)
    return span.result()


def _take(batches: Iterator[Batch], span: Span, max_s: float) -> bool:
    """Take batches until the end, and return True, or until the span is that old."""
    for batch in batches:
        span.samples += _count(batch)
        if span.wall_s > max_s:
            return False
    return True


def _steps(loader: Iterable[Batch], count: int) -> dict[str, Any]:
    """Train for some steps; epochs follow each other."""
    waits: list[float] = []
    batches = iter(loader)
    next(batches)  # its time is in first_batch_s
    while len(waits) < count:
        time.sleep(STEP_S)
        asked = time.perf_counter()
        try:
            next(batches)
        except StopIteration:
            batches = iter(loader)
            next(batches)
        waits.append(time.perf_counter() - asked)
    waited_s = sum(waits)
    return {
        "steps": count,
        "waited_s": waited_s,
        "longest_s": max(waits),
        "part": waited_s / (waited_s + count * STEP_S),
    }


def _check(loader: Iterable[Batch]) -> dict[str, Any]:
    found = Contents()
    for batch in loader:
        found.add({name: _plain(values) for name, values in batch.items()})
    return dataclasses.asdict(found)


def _plain(values: Any) -> Any:
    return values.numpy() if hasattr(values, "numpy") else values


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def main(what: str, arguments: str) -> None:
    """Write or read."""
    adopt_orphans()
    options = json.loads(arguments)
    result = {"write": write, "read": read}[what](**options)
    # Peers may print: the result is the last line, and on a line of its own.
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
