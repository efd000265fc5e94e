"""A trainer in a session of its own: what is sent to its process group reaches it and its workers, and nobody else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

from streamshards import OrderOptions, StreamingDataLoader, StreamingDataset

BATCH: Final = 32
NUM_BATCHES: Final = 74
NUM_SAMPLES: Final = 2345
HANGS_AFTER_S: Final = 90
"""What takes longer than this hangs."""
START_METHODS: Final = ("fork", "spawn", "forkserver")


def make_dataset(url: str, **options: Any) -> StreamingDataset:
    """Return the dataset whose order all these tests compare with."""
    options = {"columns": ["id", "tokens", "text"]} | options
    order = OrderOptions(lanes=4, shuffle_block=300)
    return StreamingDataset(url, batch_size=BATCH, shuffle=True, seed=9, order=order, **options)


def make(url: str, num_workers: int, context: str | None = None, **options: Any) -> StreamingDataLoader:
    """Return a loader of it, with workers that *context* starts."""
    dataset = make_dataset(url, **options.pop("dataset", {}))
    options["multiprocessing_context"] = (context or "fork") if num_workers else None
    return StreamingDataLoader(dataset, num_workers=num_workers, **options)


class Session(NamedTuple):
    """A trainer that runs."""

    pid: int
    """Of the trainer, its group and its session."""
    channel: Connection
    handle: int
    """Readable once the trainer has ended."""
    process: Any

    def receive(self) -> Any:
        """Return what the trainer says next; fail if it says nothing."""
        assert self.channel.poll(HANGS_AFTER_S), f"the trainer hangs; its session: {members(self.pid)}"
        return self.channel.recv()

    def signal_group(self, number: int) -> None:
        """Send a signal to the trainer and all its workers, as a scheduler does."""
        os.killpg(self.pid, number)

    def end(self) -> int | None:
        """Return the trainer's exit code, once it and all others of its session have ended."""
        wait_for_end([self.handle], f"the trainer hangs; its session: {members(self.pid)}")
        handles = []
        for pid in members(self.pid):
            with contextlib.suppress(ProcessLookupError):
                handles.append(os.pidfd_open(pid))
        wait_for_end(handles, "processes outlived their trainer")
        for handle in handles:
            os.close(handle)
        self.process.join()
        code: int | None = self.process.exitcode
        return code


def wait_for_end(handles: list[int], what: str) -> None:
    """Wait until all processes of these pidfds have ended."""
    waiting = list(handles)
    while waiting:
        ended = select.select(waiting, [], [], HANGS_AFTER_S)[0]
        assert ended, what
        waiting = [handle for handle in waiting if handle not in ended]


def members(session: int) -> list[int]:
    """Return the processes of a session that run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state not in "ZX":
                    found.append(int(folder.name))
    return sorted(found)


@contextlib.contextmanager
def session(job: Callable[..., None], *args: Any) -> Iterator[Session]:
    """Run ``job(channel, *args)`` in a process that leads a session; end all of it afterwards."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_lead, args=(job, theirs, args))
    process.start()
    theirs.close()
    assert process.pid is not None
    handle = os.pidfd_open(process.pid)
    try:
        yield Session(process.pid, ours, handle, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        for pid in members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()
        ours.close()
        os.close(handle)


def _lead(job: Callable[..., None], channel: Connection, args: tuple[Any, ...]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    job(channel, *args)
