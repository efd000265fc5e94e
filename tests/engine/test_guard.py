"""Workers end with their trainer, and leave nothing behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.datasets import write

TRAINER: Final = """
import os, resource, sys
import streamshards as ss
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[2]))]
loader = ss.StreamingDataLoader(
    ss.StreamingDataset(sys.argv[1], batch_size=2), num_workers=2, multiprocessing_context="fork"
)
for batch in loader:
    print(batch["id"].tolist(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("descriptors", [0, 1100])
def test_orphaned_workers_leave_nothing_behind(tmp_path: Path, scratch: Path, descriptors: int) -> None:
    """A trainer is killed; its workers end, and neither their sockets nor shared memory of theirs stay.

    Also if it has more descriptors open than ``select`` can wait for.
    """
    assert descriptors + 100 < resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    write(str(tmp_path / "train"), range(200))
    shm = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-W", "ignore", "-c", TRAINER, str(tmp_path / "train"), str(descriptors)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(scratch)}, text=True
    ) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "[0, 1]\n"
        assert list(scratch.glob("pymp-*/listener-*")), "the workers have sent something"
        children = Path(f"/proc/{trainer.pid}/task/{trainer.pid}/children").read_text().split()
        trainer.kill()
        assert trainer.stdout.read() == "", "read to its end: all that held it open are gone"
    assert len(children) == 2
    assert list(scratch.iterdir()) == []
    left = set(os.listdir("/dev/shm")) - shm
    assert not {name for name in left for pid in children if name.startswith(f"torch_{pid}_")}


KILLER: Final = """
import multiprocessing, os, signal, sys
import streamshards as ss
loader = ss.StreamingDataLoader(
    ss.StreamingDataset(sys.argv[1], batch_size=2), num_workers=2, multiprocessing_context="fork"
)
try:
    for batch in loader:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
except (ss.StreamShardsError, RuntimeError) as error:  # torch's own, if it comes outside of next
    print("DataLoader worker" in str(error))
"""


def run(program: str, folder: Path, scratch: Path) -> str:
    """Return what *program* printed, read to its end: all that held it open are gone."""
    write(str(folder / "train"), range(200))
    command = [sys.executable, "-W", "ignore", "-c", program, str(folder / "train")]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(scratch)}, text=True, check=True
    )
    return ended.stdout


def test_the_trainer_cleans_up_after_workers_that_are_killed(tmp_path: Path, scratch: Path) -> None:
    """They cannot themselves; what they shared goes when the trainer ends."""
    write(str(tmp_path / "train"), range(200))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "train")]
    ended = subprocess.run(
        command, capture_output=True, env={**os.environ, "TMPDIR": str(scratch)}, text=True, check=True
    )
    assert ended.stdout == "True\n"
    assert list(scratch.iterdir()) == []


LAUNCHER: Final = """
import multiprocessing, multiprocessing.util, os, sys
import streamshards as ss

def train(barrier, url):
    dataset = ss.StreamingDataset(url, batch_size=2)
    batches = iter(ss.StreamingDataLoader(dataset, num_workers=1, multiprocessing_context="fork"))
    next(batches)
    barrier.wait()
    os.kill(os.getpid(), 9)

context = multiprocessing.get_context("fork")
folder = multiprocessing.util.get_temp_dir()
barrier = context.Barrier(2)
trainers = [context.Process(target=train, args=(barrier, sys.argv[1])) for _ in range(2)]
for trainer in trainers:
    trainer.start()
for trainer in trainers:
    trainer.join()
print(folder, [trainer.exitcode for trainer in trainers], flush=True)
os._exit(0)  # its folder stays
"""


def test_a_launchers_folder_is_left_alone(tmp_path: Path, scratch: Path) -> None:
    """Trainers that multiprocessing started share a folder with their launcher, and with each other: it is not ours."""
    ended = run(LAUNCHER, tmp_path, scratch)
    assert [f"{folder} [-9, -9]\n" for folder in scratch.iterdir()] == [ended]


def test_a_long_tmpdir_is_no_obstacle(tmp_path: Path) -> None:
    """Sockets lie elsewhere then; what cannot be made would not be told, and the trainer wait for ever."""
    scratch = tmp_path / ("x" * 80)
    scratch.mkdir()
    program = TRAINER.replace("sys.stdin.read()", "sys.exit()")
    assert run(program, tmp_path, scratch) == "[0, 1]\n"


UNSENDABLE: Final = """
import sys, threading
import streamshards as ss
dataset = ss.StreamingDataset(sys.argv[1], batch_size=2, batch_transform=lambda batch: {"lock": threading.Lock()})
try:
    next(iter(ss.StreamingDataLoader(dataset, num_workers=1, multiprocessing_context="fork")))
except (ss.StreamShardsError, RuntimeError) as error:
    print("ended with exit code 1" in str(error) or "exited unexpectedly" in str(error))
"""


def test_a_batch_that_cannot_be_sent_is_an_error(tmp_path: Path, scratch: Path) -> None:
    """And not one that the trainer waits for for ever."""
    assert run(UNSENDABLE, tmp_path, scratch) == "True\n"
