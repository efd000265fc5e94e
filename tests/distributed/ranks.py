"""How tests start ranks: as children of the fork server, which costs no import of torch, or for real with torchrun."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

ROOT: Final = Path(__file__).resolve().parents[2]
COLLECTIVE_S: Final = 120
"""A collective that waits longer than this has lost a rank: it fails, so that no test hangs."""
GROUP_S: Final = 200
"""A group that takes longer than this hangs."""


def join_group(folder: Path, rank: int, world_size: int) -> None:
    """Initialise a gloo process group that meets at a file in *folder*; the environment is not asked."""
    store = dist.FileStore(str(folder / "group"), world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=COLLECTIVE_S)
    )


def _be(rank: int, world_size: int, folder: Path, job: Callable[..., None], args: Sequence[Any]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        job(folder, rank, world_size, *args)
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise


def start(folder: Path, world_size: int, job: Callable[..., None], *args: Any) -> list[BaseProcess]:
    """Start *world_size* processes of ``job(folder, rank, world_size, *args)``, with ``RANK`` and ``WORLD_SIZE``."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    processes: list[BaseProcess] = [
        context.Process(target=_be, args=(rank, world_size, folder, job, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def kill(processes: Sequence[BaseProcess]) -> None:
    """End all of them at once with SIGKILL."""
    for process in processes:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def finish(folder: Path, processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait until all have ended; return their exit codes.

    Raises:
        AssertionError: They hang; they are ended.
    """
    for process in processes:
        if not wait([process.sentinel], timeout=GROUP_S):
            kill(processes)
            raise AssertionError(f"a rank hangs; what others said: {errors(folder)}")
        process.join()
    return [process.exitcode for process in processes]


def errors(folder: Path) -> dict[int, str]:
    """Return the traceback of each rank that failed."""
    return {int(path.stem): path.read_text() for path in sorted(folder.glob("*.error"))}


def run(folder: Path, world_size: int, job: Callable[..., None], *args: Any) -> list[Any]:
    """Return what each rank's *job* wrote to ``{rank}.json``."""
    codes = finish(folder, start(folder, world_size, job, *args))
    assert codes == [0] * world_size, errors(folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


@contextlib.contextmanager
def torchrun(world_size: int, *args: object) -> Iterator[subprocess.Popen[str]]:
    """Start ``torchrun -m tests.distributed.trainer *args`` on *world_size* ranks, output and errors in one pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={world_size}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--max-restarts=0"]
    command += ["-m", "tests.distributed.trainer", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # it ends its ranks; they are in sessions of their own


def torchrun_to_the_end(world_size: int, *args: object) -> tuple[int, str]:
    """Return the exit code and the output of a whole torchrun job."""
    with torchrun(world_size, *args) as process:
        output, _ = process.communicate(timeout=GROUP_S)
        return process.returncode, output
