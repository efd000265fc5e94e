"""A cluster of real trainers, killed and resized at random for minutes; what they received is checked sample by sample.

``make soak`` runs it. It is no test of its own: pytest does not collect it, ``tests/test_soak.py`` keeps it alive.

Theory
------
* A *chain* is one training run of three epochs. It consists of *lives*: each is a cluster of 1 to 8 ranks, each rank a
  process with a StreamingDataset and a StreamingDataLoader of 0 to 2 workers. A life ends by SIGKILL, of all ranks or
  of one, at any instant, also while they start; the next life has another shape and knows nothing but the checkpoint.
* Ranks stay in step as a gradient exchange would keep them: each tells the supervisor which step it has done, and goes
  on when all have. A rank that is killed therefore holds up the others, and the supervisor ends them.
* A rank appends each batch to a log of its own, in one write, before it says that it has done the step. So a checkpoint
  that rank 0 writes after that step holds for what stands in every rank's log, and SIGKILL cuts at most the last line.
* The *surviving timeline* of a chain is what each life received before the checkpoint from which a later life went on.
  It must be what one rank receives that is never killed: nothing lost, repeated or out of order, but for what the tail
  declares at the end of an epoch. Batches that were received after the last checkpoint count for nothing; they too
  must be those of the order, at their place.

Not elegant yet: which instants are hit depends on the machine's timing. The seed fixes shapes and kills, not that.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import torch

from streamshards import OrderOptions, ShardWriter, StreamingDataLoader, StreamingDataset, Topology

NUM_EPOCHS: Final = 3
SEED: Final = 23
SHUFFLE_BLOCK: Final = 200
SHARD_BYTES: Final = 1024
"""About 60 samples: shards are many, and lane borders cut some."""
BATCH_SIZES: Final = (4, 7, 16)
WORKERS: Final = (0, 0, 1, 1, 2)
PATIENCE_S: Final = 90.0
"""No life needs that long for one step, however busy the machine: who does hangs."""
START_KILL: Final = 0.2
"""Part of the lives that are killed while they start."""
START_S: Final = 1.0
"""Processes, datasets and workers take about that long to begin."""

_forkserver = multiprocessing.get_context("forkserver")
# What is imported here, no trainer waits for; numpy imports parts of itself only when they are used.
_forkserver.set_forkserver_preload(
    ["tests.soak.cluster", "tests.soak.faults", "streamshards.loader", "s3fs", "numpy.ma", "numpy.random"]
)


class Resume(NamedTuple):
    """A checkpoint: what a life goes on from."""

    life: int
    batches: int
    """Batches that each rank of *life* had received."""
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Life:
    """One cluster, and all that its ranks are told."""

    url: str
    folder: Path
    number: int
    world_size: int
    num_workers: int
    batch_size: int
    tail: str
    lanes: int | None
    save_every: int
    saves_at_end: bool
    by_environment: bool
    """Whether ranks learn their place from RANK and WORLD_SIZE, or are told by ``topology=``."""
    sets_epoch: bool
    resume: Resume | None

    @property
    def global_batch(self) -> int:
        return self.world_size * self.batch_size

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.world_size, self.num_workers, self.batch_size

    def log(self, rank: int) -> Path:
        return self.folder / f"life-{self.number:03}-rank-{rank:02}.log"

    def errors(self, rank: int) -> Path:
        return self.log(rank).with_suffix(".err")

    # What another soak changes.

    @property
    def num_epochs(self) -> int:
        """After how many epochs a run ends."""
        return NUM_EPOCHS

    def prepare(self, rank: int) -> None:
        """Make this process the one of rank *rank*; the first thing it does."""

    def open_dataset(self, topology: Topology | None) -> StreamingDataset:
        """Return what this life's ranks read."""
        return StreamingDataset(
            self.url,
            batch_size=self.batch_size,
            shuffle=True,
            seed=SEED,
            tail=self.tail,  # type: ignore[arg-type]  # "pad" or "drop"
            order=OrderOptions(lanes=self.lanes, shuffle_block=SHUFFLE_BLOCK),
            topology=topology,
        )

    def describe(self, batch: dict[str, Any], loader: StreamingDataLoader) -> dict[str, Any]:
        """Return what stands in the log of *batch*: its "ids", and what else is to be checked."""
        if not torch.equal(batch["x"], content(batch["id"])):
            raise AssertionError(f"life {self.number}: wrong content in {batch}")
        return {"ids": batch["id"].tolist()}

    def reference(self, state: dict[str, Any]) -> list[int]:
        """Return the ids of the epoch of *state*, in order, as one rank that is never killed receives them."""
        return _reference(self.url, state["lanes"], state["chunk"], state["shuffle_block"])[state["epoch"]]


class Kill(NamedTuple):
    """When a life ends."""

    step: int
    """After so many steps of the cluster; with 0, from its very start."""
    told: int
    """And when so many ranks have done the next step."""
    delay_s: float
    """And this much later."""
    is_single: bool
    """Only one rank is killed; the supervisor ends the others when it notices."""


# -- one rank ----------------------------------------------------------------------------------------------------------


def train(life: Life, rank: int, barrier: Connection, alive: Connection) -> None:
    """Be one rank until the last epoch is over.

    Args:
        life: What the cluster is.
        rank: Which rank of it.
        barrier: To say that a step is done, and to hear that all have done it, or that this is the last epoch.
        alive: Held open by this process and its workers: closed means that all of them are gone.
    """
    # Workers whose trainer is killed say so at length; it is shown if the life was to go on.
    os.dup2(os.open(life.errors(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT), sys.stderr.fileno())
    warnings.simplefilter("ignore")  # torch warns of more workers than cores
    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=barrier.close)  # it must close when the rank dies, not with its last worker
    life.prepare(rank)
    topology = None
    if life.by_environment:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(life.world_size))
    else:
        topology = Topology(rank=rank, world_size=life.world_size)
    dataset = life.open_dataset(topology)
    loader = StreamingDataLoader(
        dataset, num_workers=life.num_workers, multiprocessing_context="fork" if life.num_workers else None
    )
    if life.resume is not None:
        loader.load_state_dict(life.resume.state)
    log = os.open(life.log(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    batches = 0
    is_last = False
    for epoch in range(loader.state_dict()["epoch"], life.num_epochs):
        if life.sets_epoch:
            dataset.set_epoch(epoch)
        iterator = iter(loader)
        write_line(log, {"state": loader.state_dict(), "batches": len(loader)})
        for batch in iterator:
            write_line(log, life.describe(batch, loader))
            batches += 1
            barrier.send_bytes(f"{epoch}:{batches}".encode())
            is_last = barrier.recv_bytes() == b"last"
            if rank == 0 and batches % life.save_every == 0:
                save(life, batches, loader.state_dict())
        if rank == 0 and life.saves_at_end:
            save(life, batches, loader.state_dict())
        if is_last:
            break
    barrier.send_bytes(b"over")
    barrier.recv_bytes()
    alive.close()


def content(numbers: torch.Tensor) -> torch.Tensor:
    """Return the field "x" of samples *numbers*."""
    return torch.stack([numbers, -3 * numbers], dim=1).to(torch.float32)


def write_line(log: int, value: dict[str, Any]) -> None:
    line = json.dumps(value).encode() + b"\n"
    written = os.write(log, line)
    assert written == len(line), "the disk is full"


def save(life: Life, batches: int, state: dict[str, Any]) -> None:
    """Write the checkpoint: either the whole of it or none."""
    new = life.folder / "checkpoint.new"
    new.write_text(json.dumps({"life": life.number, "batches": batches, "state": state}))
    new.replace(life.folder / "checkpoint.json")


def last_checkpoint(folder: Path) -> Resume | None:
    path = folder / "checkpoint.json"
    return Resume(**json.loads(path.read_text())) if path.exists() else None


# -- the supervisor ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """What happened, in all."""

    chains: int = 0
    lives: int = 0
    trainers: int = 0
    resized: int = 0
    killed_starting: int = 0
    """Of the kills that follow: before all ranks had done their first step."""
    killed_all_ranks: int = 0
    killed_one_rank: int = 0
    kept: int = 0
    """Samples of surviving timelines."""
    again: int = 0
    """Samples that were received after the last checkpoint, and so received again later."""
    lost: int = 0
    repeated: int = 0
    out_of_order: int = 0
    out_of_step: int = 0
    """Lives whose ranks did different steps, or not as many as said before."""
    failed: int = 0
    """Lives that ended without being killed."""
    hung: int = 0
    left_running: int = 0
    """Ranks that left a process behind."""

    FAULTS: ClassVar = ("lost", "repeated", "out_of_order", "out_of_step", "failed", "hung", "left_running")

    @property
    def faults(self) -> int:
        return sum(getattr(self, name) for name in self.FAULTS)

    def table(self) -> str:
        """Return one line for each figure."""
        return "\n".join(f"{spec.name.replace('_', ' '):<18}{getattr(self, spec.name):>12,}" for spec in fields(self))


@dataclass
class Processes:
    """The ranks of one life. Every process that was started is ended."""

    life: Life
    ranks: list[BaseProcess] = field(default_factory=list)
    barriers: list[Connection] = field(default_factory=list)
    alive: list[Connection] = field(default_factory=list)

    def start(self) -> None:
        for rank in range(self.life.world_size):
            barrier, their_barrier = _forkserver.Pipe(duplex=True)
            alive, their_alive = _forkserver.Pipe(duplex=False)
            process = _forkserver.Process(target=train, args=(self.life, rank, their_barrier, their_alive))
            process.start()
            their_barrier.close()
            their_alive.close()
            self.ranks.append(process)
            self.barriers.append(barrier)
            self.alive.append(alive)

    def kill(self, rank: int) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None  # it was started
        if self.ranks[rank].exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # dead; the fork server has not told us yet
                os.kill(pid, signal.SIGKILL)

    def end(self) -> int:
        """Return how many ranks left a process behind, once all had the time to go."""
        for process in self.ranks:
            process.join(PATIENCE_S)
        waiting = set(self.alive)
        until = time.monotonic() + PATIENCE_S
        while waiting and (gone := connection.wait(list(waiting), max(0.0, until - time.monotonic()))):
            waiting.difference_update(gone)  # type: ignore[arg-type]  # they are the connections we passed
        for end in (*self.barriers, *self.alive):
            end.close()
        for process in self.ranks:
            if process.exitcode is not None:
                process.close()
        return len(waiting)


def live(life: Life, kill: Kill | None, rng: random.Random, figures: Figures) -> tuple[bool, Processes]:
    """Let one cluster live until it is killed or its last epoch is over; return whether it is over."""
    processes = Processes(life)
    processes.start()
    try:
        is_over = _serve(processes, kill, rng, figures)
    finally:
        for rank in rng.sample(range(life.world_size), life.world_size):
            processes.kill(rank)
    return is_over, processes


def _serve(processes: Processes, kill: Kill | None, rng: random.Random, figures: Figures) -> bool:
    """Be the barrier of a life's ranks; return whether they are over, not killed."""
    said: dict[int, bytes] = {}
    steps = 0
    kill_at: float | None = None
    while True:
        now = time.monotonic()
        if kill is not None and kill_at is None and (steps, len(said)) >= (kill.step, kill.told):
            kill_at = now + kill.delay_s
        if kill is not None and kill_at is not None and now >= kill_at:
            _kill(processes, kill, rng)
            figures.killed_starting += steps == 0
            figures.killed_one_rank += kill.is_single
            figures.killed_all_ranks += not kill.is_single
            return False
        silent = [barrier for rank, barrier in enumerate(processes.barriers) if rank not in said]
        ready = connection.wait(silent, PATIENCE_S if kill_at is None else kill_at - now)
        if not ready and kill_at is None:
            figures.hung += 1
            return False
        for barrier in ready:
            assert isinstance(barrier, Connection)
            try:
                said[processes.barriers.index(barrier)] = barrier.recv_bytes()
            except (EOFError, ConnectionError):
                figures.failed += 1
                return False
        if len(said) == len(processes.barriers):
            if len(set(said.values())) > 1:
                figures.out_of_step += 1
                return False
            steps += 1
            is_over = said[0] == b"over"
            said.clear()
            for barrier in processes.barriers:
                with contextlib.suppress(ConnectionError):  # it died by itself: the next look at it says so
                    barrier.send_bytes(b"go")
            if is_over:
                return finish(processes, figures)


def _kill(processes: Processes, kill: Kill, rng: random.Random) -> None:
    order = rng.sample(range(processes.life.world_size), processes.life.world_size)
    if not kill.is_single:
        for rank in order:
            processes.kill(rank)
        return
    processes.kill(order[0])
    wait_for_end(processes.barriers[order[0]])


def wait_for_end(barrier: Connection) -> None:
    """Return when the rank at *barrier* is gone. The others run on, up to the barrier, until the supervisor notices."""
    try:
        while barrier.poll(PATIENCE_S):
            barrier.recv_bytes()
    except (EOFError, ConnectionError):
        return


def finish(processes: Processes, figures: Figures) -> bool:
    """Let ranks end by themselves; return whether they did so well."""
    for process in processes.ranks:
        process.join(PATIENCE_S)
    is_well = all(process.exitcode == 0 for process in processes.ranks)
    figures.failed += not is_well
    return is_well


def next_life(url: str, folder: Path, number: int, before: Life | None, rng: random.Random, max_ranks: int) -> Life:
    """Return a cluster of another shape, that goes on from the last checkpoint."""
    while True:
        life = Life(
            url=url,
            folder=folder,
            number=number,
            world_size=rng.randint(1, max_ranks),
            num_workers=rng.choice(WORKERS),
            batch_size=rng.choice(BATCH_SIZES),
            tail=rng.choice(("pad", "drop")) if before is None else before.tail,
            lanes=rng.choice((None, 12)) if before is None else before.lanes,
            save_every=rng.randint(1, 15),
            saves_at_end=rng.random() < 0.5,
            by_environment=rng.random() < 0.5,
            sets_epoch=rng.random() < 0.5,
            resume=last_checkpoint(folder),
        )
        if before is None or life.shape != before.shape or max_ranks == 1:
            return life


def next_kill(life: Life, num_samples: int, rng: random.Random) -> Kill:
    """Return when *life* is to be killed, unless its last epoch is over before."""
    is_single = rng.random() < 0.5
    if rng.random() < START_KILL:
        return Kill(0, 0, rng.uniform(0, START_S), is_single)
    steps_per_epoch = num_samples // life.global_batch
    told = rng.randrange(life.world_size)
    return Kill(rng.randint(1, max(1, 4 * steps_per_epoch // 3)), told, rng.uniform(0, 0.004), is_single)


def run_chain(
    url: str, folder: Path, num_samples: int, rng: random.Random, max_ranks: int, until: float, figures: Figures
) -> list[Life] | None:
    """Return the lives of one run that came to its end; None when it had to be given up, or there was no time."""
    lives: list[Life] = []
    gone: list[Processes] = []
    is_over = False
    while not is_over and not figures.faults and time.monotonic() < until:
        life = next_life(url, folder, len(lives), lives[-1] if lives else None, rng, max_ranks)
        kill = next_kill(life, num_samples, rng)
        lives.append(life)
        is_over, processes = live(life, kill, rng, figures)
        gone.append(processes)
        figures.lives += 1
        figures.trainers += life.world_size
        figures.resized += life.resume is not None
    # Only now: orphaned workers take up to some seconds to notice, and the next life need not wait for them.
    figures.left_running += sum(processes.end() for processes in gone)
    return lives if is_over else None


# -- checking ----------------------------------------------------------------------------------------------------------


class Pass(NamedTuple):
    """What one rank logged of one epoch, in one life."""

    state: dict[str, Any]
    num_batches: int
    """How many batches there were to come."""
    batches: list[list[int]]
    lines: list[dict[str, Any]]
    """What was described of each batch."""


def read_log(path: Path) -> list[Pass]:
    """Return what a rank logged, without the line that a kill cut off."""
    passes: list[Pass] = []
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        value = json.loads(line)
        if "state" in value:
            passes.append(Pass(value["state"], value["batches"], [], []))
        else:
            passes[-1].batches.append(value["ids"])
            passes[-1].lines.append(value)
    return passes


@functools.lru_cache(maxsize=2)
def _reference(url: str, lanes: int, chunk: int, shuffle_block: int) -> list[list[int]]:
    """Return the ids of each epoch, as one rank without workers that is never killed receives them."""
    dataset = StreamingDataset(
        url,
        batch_size=512,
        shuffle=True,
        seed=SEED,
        tail="uneven",
        order=OrderOptions(lanes=lanes, chunk=chunk, shuffle_block=shuffle_block),
        topology=Topology(),
    )
    return [[number for batch in dataset for number in batch["id"].tolist()] for _ in range(NUM_EPOCHS)]


def check_life(life: Life, logs: list[list[Pass]], figures: Figures) -> None:
    """Check that all that this life's ranks received, for good or not, was theirs, and that they were in step."""
    num_passes = max(len(log) for log in logs)
    for number in range(num_passes):
        parts = {rank: log[number] for rank, log in enumerate(logs) if number < len(log)}  # some died before it
        first = next(iter(parts.values()))
        state, num_batches = first.state, first.num_batches
        in_step = all((part.state, part.num_batches) == (state, num_batches) for part in parts.values())
        if number + 1 < num_passes:  # this epoch is over
            in_step &= all(len(part.batches) == num_batches for part in parts.values())
        figures.out_of_step += not in_step
        ids = life.reference(state)
        for rank, part in parts.items():
            for step, batch in enumerate(part.batches):
                at = state["position"] + step * life.global_batch + rank * life.batch_size
                expected = [ids[(at + i) % len(ids)] for i in range(life.batch_size)]
                if batch != expected:
                    figures.out_of_order += 1
                    print(
                        f"life {life.number}, rank {rank}, workers {life.num_workers}, {state}: batch {step} of "
                        f"{len(part.batches)} is {batch}, not {expected}",
                        file=sys.stderr,
                    )


def surviving(lives: Sequence[Life]) -> Iterator[tuple[Life, int | None]]:
    """Yield each life of whose batches some count, and how many; None for all of the last one's."""
    chosen: list[tuple[Life, int | None]] = [(lives[-1], None)]
    while (resume := chosen[-1][0].resume) is not None:
        chosen.append((lives[resume.life], resume.batches))
    yield from reversed(chosen)


@dataclass
class EpochRead:
    """What the surviving timeline holds of one epoch."""

    ids: list[int] = field(default_factory=list)
    left_out: int = 0
    padding: int = 0


def timeline(lives: Sequence[Life], logs: list[list[list[Pass]]], num_epochs: int) -> list[EpochRead]:
    """Return what counts of a chain, epoch by epoch."""
    epochs = [EpochRead() for _ in range(num_epochs)]
    for life, count in surviving(lives):
        left = sys.maxsize if count is None else count
        for parts in itertools.zip_longest(*logs[life.number]):
            part = next(part for part in parts if part is not None)
            if part.state["epoch"] >= num_epochs:  # begun after the last checkpoint, and not again
                break
            read = epochs[part.state["epoch"]]
            for step in range(min(left, part.num_batches)):
                for mine in parts:
                    read.ids += mine.batches[step] if mine is not None and step < len(mine.batches) else []
            if part.state["position"] < part.state["num_samples"] and left >= part.num_batches:
                rest = (part.state["num_samples"] - part.state["position"]) % life.global_batch
                read.left_out = rest if life.tail == "drop" else 0
                read.padding = -rest % life.global_batch if life.tail == "pad" else 0
            left -= min(left, part.num_batches)
    return epochs


def read_logs(lives: Sequence[Life]) -> list[list[list[Pass]]]:
    """Return what each rank of each life logged."""
    return [[read_log(life.log(rank)) for rank in range(life.world_size)] for life in lives]


def check_chain(
    lives: Sequence[Life], logs: list[list[list[Pass]]], figures: Figures, *, num_epochs: int = NUM_EPOCHS
) -> None:
    """Compare all that the ranks of a chain logged with the order of the *num_epochs* that it had."""
    for life, mine in zip(lives, logs, strict=True):
        check_life(life, mine, figures)
    received = sum(len(ids) for life in logs for rank in life for part in rank for ids in part.batches)
    state = logs[-1][0][0].state
    kept = 0
    for epoch, read in enumerate(timeline(lives, logs, num_epochs)):
        ids = lives[-1].reference({**state, "epoch": epoch})
        expected = ids[: len(ids) - read.left_out] + [ids[i % len(ids)] for i in range(read.padding)]
        figures.lost += (Counter(expected) - Counter(read.ids)).total()
        figures.repeated += (Counter(read.ids) - Counter(expected)).total()
        figures.out_of_order += sum(a != b for a, b in zip(read.ids, expected, strict=False))
        kept += len(read.ids)
    figures.kept += kept
    figures.again += received - kept


# -- all of it ---------------------------------------------------------------------------------------------------------


def soak(
    folder: Path,
    *,
    chains: int,
    seconds: float,
    seed: int,
    max_ranks: int = 8,
    num_samples: int = 2501,
    report: Callable[[str], object],
) -> Figures:
    """Return what *chains* runs came to; fewer when the time is over before. The first fault ends it.

    Args:
        folder: Where to write the dataset, the logs and the checkpoints; fresh.
        chains: Runs to play.
        seconds: A run that is not over by then does not count.
        seed: Of shapes and kills.
        max_ranks: Trainers of one cluster at most.
        num_samples: Of the dataset.
        report: Is told a line for each chain.
    """
    until = time.monotonic() + seconds
    url = write_dataset(folder, num_samples)
    figures = Figures()
    for number in range(chains):
        rng = random.Random(f"{seed}/{number}")
        place = folder / f"chain-{number:03}"
        place.mkdir()
        lives = run_chain(url, place, num_samples, rng, max_ranks, until, figures)
        if lives is not None:
            check_chain(lives, read_logs(lives), figures)
            figures.chains += 1
            shapes = " ".join(f"{life.world_size}x{life.num_workers}" for life in lives)
            report(f"chain {number}: {len(lives)} lives, ranks x workers: {shapes}; {figures.faults} faults")
        if figures.faults:
            report(complaints(place))
        if figures.faults or time.monotonic() >= until:
            break
    return figures


def write_dataset(folder: Path, num_samples: int) -> str:
    """Write the dataset into *folder*, and return its url."""
    url = str(folder / "dataset")
    numbers = torch.arange(num_samples)
    with ShardWriter(url, shard_bytes=SHARD_BYTES) as out:
        out.write_batch({"id": numbers, "x": content(numbers)})
    return url


def complaints(folder: Path) -> str:
    """Return what the ranks of a chain's last life wrote to stderr."""
    last = max(folder.glob("life-*.err"), default=None)
    said = [] if last is None else sorted(folder.glob(f"{last.name.partition('-rank')[0]}-*.err"))
    return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in said)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resize a cluster of real trainers; check every sample.")
    parser.add_argument("--chains", type=int, default=30, help="runs of three epochs (default 30)")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes and kills (default 0)")
    parser.add_argument("--ranks", type=int, default=8, help="trainers of one cluster at most (default 8)")
    parser.add_argument("--keep", type=Path, help="a fresh folder for dataset, logs and checkpoints, to keep them")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streamshards-soak-") as folder:
        if arguments.keep is not None:
            arguments.keep.mkdir(parents=True)
        figures = soak(
            arguments.keep or Path(folder),
            chains=arguments.chains,
            seconds=arguments.seconds,
            seed=arguments.seed,
            max_ranks=arguments.ranks,
            report=functools.partial(print, flush=True),
        )
    print(f"\n{figures.table()}\n")
    took_s = time.monotonic() - began
    print(f"make soak: {figures.chains} of {arguments.chains} chains in {took_s:,.0f} s, {figures.faults} faults")
    return 1 if figures.faults or not figures.chains else 0
