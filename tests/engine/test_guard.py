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
def test_orphaned_workers_leave_nothing_behind(tmp_path: Path, descriptors: int) -> None:
    """A trainer is killed; its workers end, and neither their sockets nor shared memory of theirs stay.

    Also if it has more descriptors open than ``select`` can wait for.
    """
    assert descriptors + 100 < resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    write(str(tmp_path / "train"), range(200))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
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
