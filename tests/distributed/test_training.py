"""Training with real ranks: the same weights, bit for bit, on any number of ranks, and after kills.

The sum of a global batch's gradients would depend on how ranks split it, because sums of floating-point numbers are
rounded. So each sample's gradient is first rounded to a multiple of 2**-30 and bounded by 2**10: then float64 holds
every partial sum exactly, and any split and any order give the same bits. What can still differ is which samples a
step sees.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.datasets import flat, write
from tests.distributed import ranks, trainer
from tests.distributed.trainer import CHECKPOINT_STEPS, NUM_SAMPLES

NUM_STEPS = 30
"""Two epochs of 15 global batches, the last of each padded."""


class Life(NamedTuple):
    """A part of a training run, until all its ranks are killed."""

    world_size: int
    num_workers: int
    killed_at: int
    """Step; 0: it lives to the end."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES), shard_bytes=4_000)
    return str(folder)


@pytest.fixture(scope="module")
def dead() -> Iterator[list[BaseProcess]]:
    """Killed ranks; one counts as over only when its orphaned workers have noticed, seconds later."""
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.join()


def weights(folder: Path, world_size: int) -> dict[str, Any]:
    """Return the weights that all ranks ended with: the same."""
    ends = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert [end["steps"] for end in ends] == [NUM_STEPS] * world_size
    assert all(end["weights"] == ends[0]["weights"] for end in ends)
    found: dict[str, Any] = ends[0]["weights"]
    return found


@pytest.fixture(scope="module")
def expected(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The weights after one rank's training, straight through."""
    folder = tmp_path_factory.mktemp("straight")
    code, output = ranks.torchrun_to_the_end(1, "train", url, folder, 0, 0)
    assert code == 0, output
    trained = weights(folder, 1)
    untrained = {name: tensor.tolist() for name, tensor in trainer._model().state_dict().items()}
    assert trained.keys() == untrained.keys()
    assert all(trained[name] != untrained[name] for name in trained)
    assert all(math.isfinite(weight) for weight in [*flat(trained["0.weight"]), *trained["0.bias"]])
    return trained


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 2), (4, 0)])
def test_weights_do_not_depend_on_the_number_of_ranks(
    url: str, expected: dict[str, Any], tmp_path: Path, world_size: int, num_workers: int
) -> None:
    """torchrun with 2 and 4 ranks ends with the weights of one rank, bit for bit."""
    code, output = ranks.torchrun_to_the_end(world_size, "train", url, tmp_path, num_workers, 0)
    assert code == 0, output
    assert weights(tmp_path, world_size) == expected


@pytest.mark.parametrize(
    "lives",
    [
        [Life(1, 0, 6), Life(4, 1, 0)],
        [Life(4, 1, 14), Life(2, 0, 0)],
        [Life(2, 2, 15), Life(1, 1, 0)],
        [Life(1, 2, 2), Life(2, 0, 11), Life(4, 0, 17), Life(1, 0, 22), Life(2, 1, 29), Life(4, 0, 0)],
    ],
    ids=lambda lives: " then ".join(str(life.world_size) for life in lives),
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    url: str, expected: dict[str, Any], tmp_path: Path, dead: list[BaseProcess], lives: list[Life]
) -> None:
    """SIGKILL for all ranks between two checkpoints; the rest on other numbers of ranks and workers; the same bits."""
    context = multiprocessing.get_context("forkserver")
    for life in lives:
        (tmp_path / f"life-{life.killed_at}").mkdir()
        ours, theirs = context.Pipe(duplex=False)
        processes = ranks.start(tmp_path, life.world_size, trainer.live, url, life.num_workers, life.killed_at, theirs)
        theirs.close()
        if not life.killed_at:
            assert ranks.finish(tmp_path, processes) == [0] * life.world_size, ranks.errors(tmp_path)
        else:
            assert ours.poll(ranks.GROUP_S), ranks.errors(tmp_path)
            assert ours.recv() == life.killed_at
            ranks.kill(processes)
            dead += processes
            assert list(tmp_path.glob("[0-9].json")) == []
            assert _checkpoint_step(tmp_path) == life.killed_at // CHECKPOINT_STEPS * CHECKPOINT_STEPS
        ours.close()
    assert weights(tmp_path, lives[-1].world_size) == expected


def _checkpoint_step(folder: Path) -> int:
    checkpoint = folder / "checkpoint.json"
    return int(json.loads(checkpoint.read_text())["step"]) if checkpoint.exists() else 0


def test_torchrun_killed_and_started_anew(url: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """torchrun and its two ranks end by SIGKILL in the second epoch; torchrun with one rank goes on; the same bits."""
    with ranks.torchrun(2, "train", url, tmp_path, 0, 18) as job:
        assert job.stdout is not None
        said = []
        for line in job.stdout:
            said.append(line)
            if line.startswith("kill "):
                break
        assert said, "torchrun ended without a word"
        assert said[-1].startswith("kill "), "".join(said)
        job.kill()
        for pid in json.loads(said[-1].removeprefix("kill ")):
            os.kill(pid, signal.SIGKILL)
        job.stdout.read()  # ends when the last process that could write has ended
    assert _checkpoint_step(tmp_path) == 16
    code, output = ranks.torchrun_to_the_end(1, "train", url, tmp_path, 1, 0)
    assert code == 0, output
    assert weights(tmp_path, 1) == expected
