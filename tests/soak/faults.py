"""Two jobs that share a small cache, a store that fails, kills at any instant; judged by someone outside.

``python -m tests.soak faults`` runs it, ``make soak`` for ten minutes. ``tests/test_soak.py`` runs it for some seconds.

Theory
------
* *The store* is a real S3 server behind a proxy that spoils a tenth of the requests, each with one of the faults that
  the policy says must be survived. A shard may by chance be bad so often that it counts as corrupt: with eight attempts
  that is one in 10^12. ``on_corrupt="raise"`` lets a skip end the life, and so be seen.
* *The disk* is a tmpfs of 200 MB. The cache on it may take half of the dataset's size. At times the disk is filled to
  the last byte or the last file, and at times an entry is replaced by a copy with a wrong bit.
* *A job* is a chain as in ``cluster.py``: lives of one or two ranks, each with up to two workers, that know nothing but
  the last checkpoint. Both jobs read the same dataset, in orders of their own. A life ends by SIGKILL: of the whole job
  with its workers, of its trainers only, of one trainer or of one worker.
* *The judge* is this process. It knows the digest of each sample from when it wrote them, computes the order without
  reading anything, and believes the logs that ranks write, as in ``cluster.py``.

Not elegant yet: which instants are hit depends on the machine's timing. The seed fixes faults by request, shapes and
delays, not that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
import torch
import xxhash

from streamshards import (
    CacheOptions,
    OrderOptions,
    RetryOptions,
    ShardWriter,
    StreamingDataLoader,
    StreamingDataset,
    Topology,
)
from streamshards.engine.cache import check_entries
from streamshards.engine.cachefolder import CacheFolder
from streamshards.events import CacheDamaged, CacheOff, Event, FetchRetried, ShardSkipped
from streamshards.plan.order import EpochOrder
from streamshards.plan.state import State
from streamshards.testing import (
    BAD_GATEWAY,
    INTERNAL_ERROR,
    SLOW_DOWN,
    TOO_MANY_REQUESTS,
    Answer,
    Cut,
    Drip,
    FaultProxy,
    FlipBit,
    Request,
    Reset,
    Stall,
    Swap,
    Truncate,
)
from streamshards.testing.proxy import Fault
from streamshards.testing.servers import S3Server, client_of, seaweedfs
from tests.soak import cluster, disk

BUCKET: Final = "soak"
PREFIX: Final = "train"
URL: Final = f"s3://{BUCKET}/{PREFIX}"
RATE: Final = 0.1
"""Part of the requests that fail."""
NUM_SAMPLES: Final = 4801
"""About 160 MB, decoded."""
SHARD_BYTES: Final = 512_000
"""About 15 samples: an epoch is some 300 requests."""
SHUFFLE_BLOCK: Final = 64
BATCH_SIZES: Final = (8, 15, 32)
SHAPES: Final = ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
"""Ranks and workers of each."""
KEEP_FREE: Final = (0, 64 * 1024, 1 << 20)
RETRY: Final = RetryOptions(
    deadline_s=300, first_contact_s=60, attempt_timeout_s=30, stall_s=1, base_s=0.02, max_wait_s=0.5, corrupt_attempts=8
)
LIFE_S: Final = 10.0
"""A life is killed within this."""
FULL_EVERY_S: Final = (10.0, 30.0)
FULL_S: Final = (2.0, 8.0)
DAMAGE_EVERY_S: Final = (0.5, 2.0)
DAMAGED_AT_ONCE: Final = 4
MAY_BE_DAMAGED: Final = frozenset("0123")
"""First digits of the names of entries that the judge damages: no other may ever be found damaged."""
STEPS_AFTER_WORKER: Final = 20
"""A life that goes on for so long did not need the worker that was killed: it had done its part."""
WORKER_GONE: Final = ("was killed by SIGKILL", "RuntimeError: DataLoader worker")
"""What a trainer ends with whose worker was killed: our error, or torch's own, if that came outside of ``next``."""
LATE: Final = 4
"""Lives that may still be ending while the next ones run."""
LEFT_S: Final = 10.0

_forkserver = multiprocessing.get_context("forkserver")


# -- the dataset -------------------------------------------------------------------------------------------------------


def sample(number: int) -> dict[str, Any]:
    """Return sample *number*: mostly noise, so that its shard is large in the store, too."""
    noise = np.random.Generator(np.random.Philox(key=number))
    return {
        "id": number,
        "x": torch.from_numpy(noise.integers(0, 256, 24_000, dtype=np.uint8)),
        "tokens": torch.arange(number % 4000, dtype=torch.int32) + number,
        "text": f"sample {number} - ümläut",
    }


def digest_of(number: int, x: torch.Tensor, tokens: torch.Tensor, text: str) -> str:
    """Return a digest of one sample's fields."""
    hasher = xxhash.xxh3_64(f"{number} {x.dtype} {tuple(x.shape)} {tokens.dtype} {tuple(tokens.shape)} {text}".encode())
    hasher.update(x.contiguous().numpy())
    hasher.update(tokens.contiguous().numpy())
    return hasher.hexdigest()


def write_locally(folder: Path, num_samples: int) -> list[str]:
    """Write the dataset into *folder*, and return the digest of each sample."""
    digests: list[str] = []
    with ShardWriter(str(folder), shard_bytes=SHARD_BYTES) as out:
        for number in range(num_samples):
            made = sample(number)
            digests.append(digest_of(number, made["x"], made["tokens"], made["text"]))
            out.write(made)
    return digests


def upload(folder: Path, server: S3Server) -> None:
    """Copy the dataset to where jobs read it."""
    server.create_bucket(BUCKET)
    with client_of(server) as client:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{path.relative_to(folder)}", Body=path.read_bytes())


# -- faults ------------------------------------------------------------------------------------------------------------

TRANSIENT: Final = ("503", "500", "502", "429", "reset before", "reset within", "cut", "stall", "no answer", "drip")
CORRUPTING: Final = ("shorter", "wrong bit", "another object")


class Chaos:
    """A script: which requests fail, and how; from the seed, the key, and how often that was asked for.

    Args:
        sizes: Of each object, by ``bucket/key``. Those of shards may be spoiled in any way; what is no shard fails in
            passing ways only: a wrong index is refused at once.
        seed: Of the choice.

    Attributes:
        requests: How many came.
        faults: How many failed, by kind.
    """

    def __init__(self, sizes: Mapping[str, int], seed: int) -> None:
        self.requests = 0
        self.faults: Counter[str] = Counter()
        self._sizes = sizes
        self._others = sorted(sizes)[:8]  # the proxy keeps their bytes
        self._seed = seed

    def __call__(self, request: Request) -> Fault | None:
        self.requests += 1
        rng = random.Random(f"{self._seed} {request.method} {request.key} {request.attempt}")
        if rng.random() >= RATE:
            return None
        nbytes = self._sizes.get(request.key)
        kind = rng.choice(TRANSIENT if nbytes is None else TRANSIENT + CORRUPTING)
        self.faults[kind] += 1
        return self._fault(kind, nbytes or 1000, rng)

    def _fault(self, kind: str, nbytes: int, rng: random.Random) -> Fault:
        at = rng.randrange(nbytes)
        faults: dict[str, Fault] = {
            "503": rng.choice((SLOW_DOWN, Answer(503, "SlowDown", retry_after_s=1))),
            "500": INTERNAL_ERROR,
            "502": BAD_GATEWAY,
            "429": TOO_MANY_REQUESTS,
            "reset before": Reset(),
            "reset within": Reset(at),
            "cut": Cut(at),
            "stall": Stall(at),
            "no answer": Stall(),
            "drip": Drip(1000),
            "shorter": Truncate(at),
            "wrong bit": FlipBit(8 * at + rng.randrange(8)),
            "another object": Swap(rng.choice(self._others)),
        }
        return faults[kind]


# -- one rank ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Life(cluster.Life):
    """One life of a job."""

    seed: int
    storage_options: dict[str, Any] = field(repr=False)
    cache: CacheOptions
    rows: tuple[int, ...] = field(repr=False)
    """Of each shard."""

    @property
    def num_epochs(self) -> int:
        return sys.maxsize  # until told

    @property
    def scratch(self) -> Path:
        """TMPDIR."""
        return self.folder / "tmp" / f"{self.number:03}"

    def events(self, rank: int) -> Path:
        return self.log(rank).with_suffix(".events")

    def prepare(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(0, 0)
        os.environ["TMPDIR"] = str(self.scratch)
        tempfile.tempdir = None
        # The fork server's children are told to use the judge's folder; a trainer of a user's has one of its own.
        multiprocessing.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]  # private
        descriptor = os.open(self.events(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        global _events
        _events = descriptor

    def open_dataset(self, topology: Topology | None) -> StreamingDataset:
        return StreamingDataset(
            self.url,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            on_corrupt="raise",
            order=OrderOptions(lanes=self.lanes, shuffle_block=SHUFFLE_BLOCK),
            topology=topology,
            retry=RETRY,
            cache=self.cache,
            storage_options=self.storage_options,
            observer=note,
        )

    def describe(self, batch: dict[str, Any], loader: StreamingDataLoader) -> dict[str, Any]:
        ids = batch["id"].tolist()
        samples = zip(ids, batch["x"], batch["tokens"], batch["text"], strict=True)
        stats = loader.stats()
        counted = {name: stats[name] for name in ("cache_hits", "cache_misses", "cache_evicted")}
        return {"ids": ids, "digests": [digest_of(*each) for each in samples], "counted": counted}

    def reference(self, state: dict[str, Any]) -> list[int]:
        place = State.from_dict(state)
        return _order(self.rows, place.order, place.epoch)


_events: int = -1


def note(event: Event) -> None:
    """Write *event* to the rank's list of events; in the rank, or in a worker of it."""
    line: dict[str, Any] = {"kind": type(event).__name__, "text": str(event)}
    if isinstance(event, CacheDamaged):
        line["entry"] = os.path.basename(event.path)
    cluster.write_line(_events, line)


@functools.lru_cache(maxsize=8)
def _order(rows: tuple[int, ...], settings: Any, epoch: int) -> list[int]:
    """Return the ids of an epoch; samples were written in the order of their ids."""
    counts = np.array(rows, dtype=np.int64)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    shards, within = EpochOrder(counts, settings, epoch).rows_at(np.arange(counts.sum(), dtype=np.int64))
    ids: list[int] = (first[shards] + within).tolist()
    return ids


# -- a job -------------------------------------------------------------------------------------------------------------


@dataclass
class Figures(cluster.Figures):
    """What happened, in all; a chain is a job."""

    killed_jobs: int = 0
    """All trainers and all their workers."""
    killed_workers: int = 0
    epochs: int = 0
    retries: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    cache_off: int = 0
    """Events: the disk was full."""
    damaged: int = 0
    """Entries that the judge damaged, some more than once."""
    damage_found: int = 0
    """Events; several processes may meet the same one."""
    wrong: int = 0
    """Samples with other contents than were written."""
    skipped: int = 0
    damage_unexplained: int = 0
    """Entries found damaged that the judge had not touched."""
    over_budget: int = 0
    sockets_of_killed: int = 0
    """In TMPDIR, Python's own, of workers that a signal ended."""
    named_by_killed: int = 0
    """In /dev/shm, torch's own, of processes that a signal ended."""
    left_in_shm: int = 0
    left_in_tmp: int = 0
    left_in_cache: int = 0
    """Files of the dead after the next eviction, and entries that are not right."""
    left_open: int = 0
    """Descriptors of the judge."""

    def plus(self, other: Figures) -> Figures:
        """Return the sums."""
        return Figures(**{spec.name: getattr(self, spec.name) + getattr(other, spec.name) for spec in fields(self)})

    FAULTS: ClassVar = (
        *cluster.Figures.FAULTS,
        *("wrong", "skipped", "damage_unexplained", "over_budget"),
        *("left_in_shm", "left_in_tmp", "left_in_cache", "left_open"),
    )


class Ending(NamedTuple):
    """How a life is killed, and when."""

    kind: str
    """``"job"``: trainers and workers. ``"trainers"``: workers must notice. ``"trainer"``, ``"worker"``: one."""
    after_s: float


@dataclass
class Job:
    """A chain of lives, until it is told to end after an epoch."""

    number: int
    folder: Path
    storage_options: dict[str, Any]
    cache: CacheOptions
    rows: tuple[int, ...]
    rng: random.Random
    pace: float
    """Of kills: 1 for a long soak, less for a short one."""
    stopping: threading.Event
    """Set when no more is to be killed, and the next epoch's end is the job's."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when the job is to be killed, and not to come back."""
    figures: Figures = field(default_factory=Figures)
    lives: list[Life] = field(default_factory=list)
    groups: set[int] = field(default_factory=set)
    """Process groups that there were."""
    is_over: bool = False
    killed: set[int] = field(default_factory=set)
    """Processes that were ended by a signal; others ended by themselves, because these were gone."""
    endings: dict[int, str] = field(default_factory=dict)
    """What was killed last, by life."""
    killed_workers: Counter[int] = field(default_factory=Counter)
    """How many of them were workers, by life."""

    def run(self) -> None:
        """Live until the job is over, or something is wrong."""
        gone: deque[cluster.Processes] = deque()
        while not self.is_over and not self.figures.faults and not self.abandoned.is_set():
            life = self._next_life()
            self.lives.append(life)
            life.scratch.mkdir(parents=True)
            processes = cluster.Processes(life)
            try:
                processes.start()
                self.is_over = self._serve(processes, self._next_ending(life))
            except BaseException:
                self.figures.failed += 1
                raise
            finally:
                self._kill(processes, range(life.world_size), with_workers=False)
                self.groups.update(process.pid for process in processes.ranks if process.pid is not None)
                gone.append(processes)
            self.figures.lives += 1
            self.figures.trainers += life.world_size
            self.figures.resized += life.resume is not None
            # Orphaned workers take some seconds to notice; the next life need not wait for them.
            if len(gone) > LATE:
                self.figures.left_running += gone.popleft().end()
        self.figures.left_running += sum(processes.end() for processes in gone)
        self.figures.chains += self.is_over

    def _next_life(self) -> Life:
        rng = self.rng
        world_size, num_workers = rng.choice(SHAPES)
        return Life(
            url=URL,
            folder=self.folder,
            number=len(self.lives),
            world_size=world_size,
            num_workers=num_workers,
            batch_size=rng.choice(BATCH_SIZES),
            tail="pad",
            lanes=self.lives[0].lanes if self.lives else rng.choice((None, 4)),
            save_every=rng.randint(1, 10),
            saves_at_end=rng.random() < 0.5,
            by_environment=rng.random() < 0.5,
            sets_epoch=rng.random() < 0.5,
            resume=cluster.last_checkpoint(self.folder),
            seed=self.number,
            storage_options=self.storage_options,
            cache=CacheOptions(
                directory=self.cache.directory,
                budget_bytes=self.cache.budget_bytes,
                keep_free_bytes=rng.choice(KEEP_FREE),
                mode=rng.choice(("raw", "compressed")),
            ),
            rows=self.rows,
        )

    def _next_ending(self, life: Life) -> Ending | None:
        rng = self.rng
        kinds = ["job", "trainers", "trainer"] + ["worker"] * (2 if life.num_workers else 0)
        is_start = rng.random() < cluster.START_KILL
        return Ending(rng.choice(kinds), rng.uniform(0, cluster.START_S if is_start else LIFE_S * self.pace))

    def _serve(self, processes: cluster.Processes, ending: Ending | None) -> bool:
        """Be the barrier of a life's ranks; return whether the job is over, not killed."""
        began = heard = time.monotonic()
        said: dict[int, bytes] = {}
        steps = 0
        worker_killed_at: int | None = None
        while True:
            now = time.monotonic()
            if self.abandoned.is_set():
                return False
            if self.stopping.is_set():
                ending = None
            if ending is not None and now >= began + ending.after_s:
                self.figures.killed_starting += steps == 0
                if self._end(processes, ending):
                    return False
                worker_killed_at, ending = steps, None
            silent = [barrier for rank, barrier in enumerate(processes.barriers) if rank not in said]
            limit_s = 0.5 if ending is None else min(0.5, began + ending.after_s - now)
            ready = connection.wait(silent, max(0.0, limit_s))
            if ready:
                heard = time.monotonic()
            elif time.monotonic() > heard + cluster.PATIENCE_S:
                self.figures.hung += 1
                return False
            for barrier in ready:
                assert isinstance(barrier, Connection)
                try:
                    said[processes.barriers.index(barrier)] = barrier.recv_bytes()
                except (EOFError, ConnectionError):
                    why = processes.life.errors(processes.barriers.index(barrier)).read_text()
                    is_told = any(text in why for text in WORKER_GONE)
                    self.figures.failed += worker_killed_at is None or not is_told
                    return False
            if len(said) == len(processes.barriers):
                if len(set(said.values())) > 1:
                    self.figures.out_of_step += 1
                    return False
                steps += 1
                is_over = said[0] == b"over"
                said.clear()
                for barrier in processes.barriers:
                    with contextlib.suppress(ConnectionError):  # it died by itself: the next look at it says so
                        barrier.send_bytes(b"last" if self.stopping.is_set() else b"go")
                if is_over:
                    return cluster.finish(processes, self.figures)
                if worker_killed_at is not None and steps > worker_killed_at + STEPS_AFTER_WORKER:
                    worker_killed_at, ending = None, Ending("job", 0.0)

    def _end(self, processes: cluster.Processes, ending: Ending) -> bool:
        """Kill what *ending* says; return whether that was the end, and not a worker's only."""
        size = processes.life.world_size
        self.endings[processes.life.number] = ending.kind
        order = self.rng.sample(range(size), size)
        match ending.kind:
            case "worker" if pids := children_of(processes.ranks[order[0]].pid):
                self._note_workers(processes, pids)  # all: multiprocessing ends the others with SIGTERM
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(pids), signal.SIGKILL)
                self.figures.killed_workers += 1
                return False
            case "trainer" | "worker":
                self._kill(processes, order[:1], with_workers=False)
                cluster.wait_for_end(processes.barriers[order[0]])
                self.figures.killed_one_rank += 1
            case "trainers":
                self._kill(processes, order, with_workers=False)
                self.figures.killed_all_ranks += 1
            case _:
                self._kill(processes, order, with_workers=True)
                self.figures.killed_jobs += 1
        return True

    def _kill(self, processes: cluster.Processes, ranks: Sequence[int], *, with_workers: bool) -> None:
        for rank in ranks:
            if rank < len(processes.ranks):
                pid = processes.ranks[rank].pid
                if pid is not None and processes.ranks[rank].exitcode is None:
                    self.killed.add(pid)
                    if with_workers:
                        self._note_workers(processes, children_of(pid))
                        with contextlib.suppress(ProcessLookupError):  # it has no group yet, or is dead
                            os.killpg(pid, signal.SIGKILL)
                processes.kill(rank)

    def _note_workers(self, processes: cluster.Processes, pids: Sequence[int]) -> None:
        self.killed.update(pids)
        self.killed_workers[processes.life.number] += len(pids)


class Running(NamedTuple):
    """A process of this machine."""

    pid: int
    parent: int
    group: int
    state: str


def running() -> Iterator[Running]:
    """Yield all processes."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                text = Path(entry.path, "stat").read_text(errors="replace")
                state, parent, group = text.rpartition(")")[2].split()[:3]
                yield Running(int(entry.name), int(parent), int(group), state)


def children_of(pid: int | None) -> list[int]:
    return [process.pid for process in running() if process.parent == pid]


# -- the judge ---------------------------------------------------------------------------------------------------------


def check_job(job: Job, digests: Sequence[str], damaged: set[str]) -> None:
    """Compare all that a job's ranks logged with what it should have been."""
    logs = cluster.read_logs(job.lives)
    figures = job.figures
    passes = [part for life in logs for rank in life for part in rank]
    if job.is_over:
        figures.epochs = 1 + logs[-1][0][-1].state["epoch"]
        cluster.check_chain(job.lives, logs, figures, num_epochs=figures.epochs)
    for part in passes:
        for line in part.lines:
            figures.wrong += sum(
                digests[number] != found for number, found in zip(line["ids"], line["digests"], strict=True)
            )
    for life in logs:
        for rank in life:
            last = next((part.lines[-1]["counted"] for part in reversed(rank) if part.lines), Counter())
            figures.hits += last["cache_hits"]
            figures.misses += last["cache_misses"]
            figures.evicted += last["cache_evicted"]
    check_events(job, damaged)


def check_events(job: Job, damaged: set[str]) -> None:
    """Count what the ranks and workers of a job told, and look for what should not have happened."""
    seen: Counter[str] = Counter()
    for path in sorted(job.folder.glob("*.events")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                event = json.loads(line)
                seen[event["kind"]] += 1
                job.figures.damage_unexplained += "entry" in event and event["entry"] not in damaged
    job.figures.retries += seen[FetchRetried.__name__]
    job.figures.cache_off += seen[CacheOff.__name__]
    job.figures.damage_found += seen[CacheDamaged.__name__]
    job.figures.skipped += seen[ShardSkipped.__name__]


def check_leftovers(
    jobs: Sequence[Job], folder: CacheFolder, figures: Figures, *, shm: Sequence[str], damaged: set[str]
) -> list[str]:
    """Look for what the dead left behind; return what there is.

    Two things are not ours to remove, and counted apart: multiprocessing removes a worker's socket when the worker
    ends, and torch gives shared memory a name for an instant. A process that a signal ends cannot see to either.
    """
    groups = {group for job in jobs for group in job.groups}
    processes = [f"process {each.pid}" for each in running() if each.group in groups and each.state != "Z"]
    figures.left_running += len(processes)
    killed = {pid for job in jobs for pid in job.killed}
    named = [name for name in shm if name.startswith("torch_") and int(name.split("_")[1]) in killed]
    figures.named_by_killed += len(named)
    shared = [f"/dev/shm/{name}" for name in sorted(shm) if name not in named]
    figures.left_in_shm += len(shared)
    scratch: list[str] = []
    for job in jobs:
        for life in job.lives:
            found = sorted(life.scratch.iterdir())
            sockets = [path for path in found if path.name.startswith("pymp-")][: job.killed_workers[life.number]]
            figures.sockets_of_killed += len(sockets)
            ending = job.endings.get(life.number, "itself")
            if ending == "worker":  # torch then tries out how many files it may open; its signal handler interrupts it
                sockets += [path for path in found if path.name.startswith(("tmp", "torchinductor_"))]
            scratch += [f"{path}, of a life ended by: {ending}" for path in found if path not in sockets]
    figures.left_in_tmp += len(scratch)
    cached = left_in_cache(folder, damaged)
    figures.left_in_cache += len(cached)
    return [*processes, *shared, *scratch, *cached]


def left_in_cache(folder: CacheFolder, damaged: set[str]) -> list[str]:
    """Evict as the next writer would; return files of the dead, and entries that are not right and should be."""
    if not folder.home.exists():
        return []
    folder.evict()
    stale = [str(path) for path in folder.home.rglob("*.tmp")]
    bad = [check for check in check_entries(folder) if check.error is not None and check.path.name not in damaged]
    return stale + [f"{check.path}: {check.error}" for check in bad]


# -- all of it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a soak came to."""

    figures: Figures
    faults: Counter[str]
    """Requests that failed, by kind."""
    requests: int
    looks: int
    """At the cache."""
    max_bytes: int
    budget_bytes: int
    seconds: float
    left: list[str]

    def text(self) -> str:
        """Return all figures, a line for each."""
        spoiled = self.faults.total()
        share = 100 * spoiled / max(1, self.requests)
        lines = [
            f"requests          {self.requests:>12,}, of which {spoiled:,} failed ({share:.1f} %):",
            *(f"  {kind:<16}{self.faults[kind]:>12,}" for kind in TRANSIENT + CORRUPTING),
            self.figures.table(),
            f"cache, at most    {self.max_bytes:>12,} bytes of {self.budget_bytes:,}, in {self.looks:,} looks",
            *(f"left: {each}" for each in self.left[:20]),
        ]
        return "\n".join(lines)

    def line(self) -> str:
        """Return the result in a line."""
        figures = self.figures
        kills = figures.killed_jobs + figures.killed_all_ranks + figures.killed_one_rank + figures.killed_workers
        return (
            f"make soak: {figures.epochs} epochs of 2 jobs in {self.seconds:,.0f} s, {figures.kept:,} samples, "
            f"{self.faults.total():,} faults of the store, {kills:,} kills, cache at most "
            f"{100 * self.max_bytes / self.budget_bytes:.1f} % of its budget; {figures.faults} faults"
        )


def soak(
    folder: Path, *, seconds: float, seed: int, own_disk: Path | None, num_samples: int, report: Callable[[str], object]
) -> Verdict:
    """Return what two jobs came to that are killed for *seconds*, and then may end their epoch.

    Args:
        folder: Where the server's data, the logs and the checkpoints lie; fresh.
        seconds: How long.
        seed: Of faults, shapes and kills.
        own_disk: A small disk of our own, for the cache, that may be filled, and /dev/shm is ours, too; None: the cache
            lies in *folder*, and /dev/shm is others'.
        num_samples: Of the dataset.
        report: Is told what is going on.
    """
    began = time.monotonic()
    _warm_up()
    descriptors, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    with seaweedfs(folder / "server") as server:
        digests = write_locally(folder / "dataset", num_samples)
        upload(folder / "dataset", server)
        index = StreamingDataset(str(folder / "dataset")).index
        chaos = Chaos({f"{BUCKET}/{PREFIX}/{n}": int(s) for n, s in zip(index.names, index.sizes, strict=True)}, seed)
        budget = int(index.raw_sizes.sum()) // 2
        place = (own_disk or folder) / "cache"
        place.mkdir()
        cache = CacheFolder(str(place), budget_bytes=budget, keep_free_bytes=0)
        report(f"seed {seed}; {index.num_shards:,} shards; budget {budget:,} bytes; ready in {_since(began)}")
        with FaultProxy(server, chaos) as proxy, disk.Watch(place, budget) as watch:
            options = {**proxy.server.storage_options, "client_kwargs": {"verify": False}}
            stopping, pace = threading.Event(), min(1.0, seconds / 60)
            jobs = [
                Job(
                    number=number,
                    folder=folder / f"job-{number}",
                    storage_options=options,
                    cache=CacheOptions(directory=place, budget_bytes=budget),
                    rows=tuple(index.rows.tolist()),
                    rng=random.Random(f"{seed}/{number}"),
                    pace=pace,
                    stopping=stopping,
                )
                for number in range(2)
            ]
            damaged = trouble(jobs, cache, own_disk, began + seconds, random.Random(seed), pace)
            report(f"the last epochs are over after {_since(began)}")
    figures = Figures(damaged=len(damaged), over_budget=watch.num_over)
    for job in jobs:
        check_job(job, digests, damaged)
        figures = figures.plus(job.figures)
        if not job.is_over:
            report(cluster.complaints(job.folder))
    shm = [] if own_disk is None else os.listdir("/dev/shm")
    left = check_leftovers(jobs, cache, figures, shm=shm, damaged=damaged)
    for thread in set(threading.enumerate()) - threads:
        thread.join(LEFT_S)
    gc.collect()
    figures.left_open = max(0, len(os.listdir("/proc/self/fd")) - descriptors)
    took_s = time.monotonic() - began
    return Verdict(figures, chaos.faults, chaos.requests, watch.looks, watch.max_bytes, budget, took_s, left)


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def _warm_up() -> None:
    """Start the fork server, that its descriptors are there before they are counted."""
    process = _forkserver.Process(target=os.getpid)
    process.start()
    process.join()
    process.close()


def trouble(
    jobs: Sequence[Job], cache: CacheFolder, own_disk: Path | None, until: float, rng: random.Random, pace: float
) -> set[str]:
    """Let *jobs* run and be killed *until* then, and to the end of their epoch; return what was damaged."""
    threads = [threading.Thread(target=job.run, name=f"soak-job-{job.number}", daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        damaged = _trouble(threads, cache, own_disk, until, rng, pace)
        jobs[0].stopping.set()
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C
        for job in jobs:
            job.abandoned.set()
        for thread in threads:
            thread.join()
    return damaged


def _trouble(
    threads: Sequence[threading.Thread],
    cache: CacheFolder,
    own_disk: Path | None,
    until: float,
    rng: random.Random,
    pace: float,
) -> set[str]:
    damaged: set[str] = set()
    now = time.monotonic()
    next_full, next_damage = (now + pace * rng.uniform(*every) for every in (FULL_EVERY_S, DAMAGE_EVERY_S))
    while (now := time.monotonic()) < until and all(thread.is_alive() for thread in threads):
        if own_disk is not None and now >= next_full:
            with disk.filled(own_disk, with_files=rng.random() < 0.5):
                threads[0].join(min(until - now, pace * rng.uniform(*FULL_S)))
            next_full = time.monotonic() + pace * rng.uniform(*FULL_EVERY_S)
        if now >= next_damage:
            entries = sorted(entry.path for entry in cache.entries() if entry.path.name[0] in MAY_BE_DAMAGED)
            for _ in range(DAMAGED_AT_ONCE):
                name = disk.damage(entries, Path(cache.directory).with_name("spare"), rng)
                damaged.update(() if name is None else (name,))
            next_damage = now + pace * rng.uniform(*DAMAGE_EVERY_S)
        threads[0].join(0.1)
    return damaged


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long jobs are killed (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of faults, shapes and kills (default 0)")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES, help=f"of the dataset (default {NUM_SAMPLES})")
    parser.add_argument("--keep", type=Path, help="a fresh folder for data, logs and checkpoints, to keep them")
    parser.add_argument("--own-disk", type=Path, help=argparse.SUPPRESS)  # how we call ourselves
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(sys.argv[2:])
    if arguments.folder is None:
        return _in_a_world_of_its_own(arguments.keep)
    verdict = soak(
        arguments.folder,
        seconds=arguments.seconds,
        seed=arguments.seed,
        own_disk=arguments.own_disk,
        num_samples=arguments.samples,
        report=functools.partial(print, flush=True),
    )
    print(f"\n{verdict.text()}\n")
    print(verdict.line())
    return 1 if verdict.figures.faults else 0


def _in_a_world_of_its_own(keep: Path | None) -> int:
    """Run this program again, with a small disk and a /dev/shm that nobody else sees; return its exit status."""
    with tempfile.TemporaryDirectory(prefix="streamshards-soak-") as scratch:
        folder = keep or Path(scratch, "soak")
        folder.mkdir(parents=True)
        own_disk = Path(scratch, "disk")
        own_disk.mkdir()
        begin = disk.mounted(own_disk)
        command = [sys.executable, "-m", "tests.soak", *sys.argv[1:], f"--folder={folder}"]
        if isinstance(begin, str):
            print(f"no small disk and no /dev/shm of our own: neither is full nor looked at: {begin}", flush=True)
        else:
            command = [*begin, *command, f"--own-disk={own_disk}"]
        return subprocess.run(command, check=False).returncode
