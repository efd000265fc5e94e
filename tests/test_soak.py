"""The soaks in small: killed and resized trainers, faults of store and disk, and checks that find what is wrong."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamshards import CacheOptions, StreamingDataLoader, StreamingDataset, Topology
from streamshards.engine.cachefolder import CacheFolder
from streamshards.testing import Request
from tests.datasets import write
from tests.soak import cluster, disk, faults


def test_killed_and_resized_trainers_receive_each_sample_once(tmp_path: Path) -> None:
    """Two runs of three epochs, killed at random and resized: nothing lost, repeated or out of order, nothing left."""
    lines: list[str] = []
    figures = cluster.soak(
        tmp_path, chains=2, seconds=math.inf, seed=1, max_ranks=2, num_samples=301, report=lines.append
    )
    assert figures.faults == 0, lines
    assert figures.chains == len(lines) == 2
    assert figures.lives > figures.chains
    assert figures.killed_all_ranks + figures.killed_one_rank >= figures.lives - figures.chains
    tail = figures.kept - 2 * cluster.NUM_EPOCHS * 301
    assert abs(tail) < 2 * cluster.NUM_EPOCHS * 2 * max(cluster.BATCH_SIZES)


def drop_a_batch(lines: list[str]) -> None:
    del lines[-1]


def repeat_a_batch(lines: list[str]) -> None:
    lines[-1] = lines[-2]


def swap_two_samples(lines: list[str]) -> None:
    ids = json.loads(lines[-1])["ids"]
    ids[0], ids[1] = ids[1], ids[0]
    lines[-1] = json.dumps({"ids": ids})


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[cluster.Life]:
    """The two lives of one run, with their logs: one is killed in its fifth step, the other goes on to the end."""
    folder = tmp_path_factory.mktemp("chain")
    url = cluster.write_dataset(folder, 301)
    rng = random.Random(4)
    figures = cluster.Figures()
    lives: list[cluster.Life] = []
    for kill in (cluster.Kill(5, 0, 0.0, is_single=False), None):
        life = cluster.next_life(url, folder, len(lives), lives[-1] if lives else None, rng, 2)
        is_over, processes = cluster.live(life, kill, rng, figures)
        assert is_over is (kill is None), cluster.complaints(folder)
        assert processes.end() == 0
        lives.append(life)
    assert figures.faults == 0
    return lives


def test_the_check_is_content_with_the_truth(chain: list[cluster.Life]) -> None:
    """The logs of a run that went well have no faults."""
    figures = cluster.Figures()
    cluster.check_chain(chain, cluster.read_logs(chain), figures)
    assert figures.faults == 0


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (drop_a_batch, ("lost",)),
        (repeat_a_batch, ("lost", "repeated", "out_of_order")),
        (swap_two_samples, ("out_of_order",)),
    ],
)
def test_the_check_finds_what_is_wrong(
    chain: list[cluster.Life], damage: Callable[[list[str]], None], found: tuple[str, ...]
) -> None:
    """A batch that is missing, one that came twice, and two samples in each other's places are all noticed."""
    log = chain[-1].log(0)
    truth = log.read_text()
    lines = truth.splitlines()
    damage(lines)
    log.write_text("\n".join([*lines, ""]))
    try:
        figures = cluster.Figures()
        cluster.check_chain(chain, cluster.read_logs(chain), figures)
    finally:
        log.write_text(truth)
    assert all(getattr(figures, name) > 0 for name in found), figures.table()


# -- faults of the store and the disk ----------------------------------------------------------------------------------


def test_jobs_that_share_a_cache_survive_faults_and_kills() -> None:
    """Fifteen seconds of the long soak: the store fails, the disk is full, jobs are killed; all is right, none left."""
    command = [sys.executable, "-m", "tests.soak", "faults", "--seconds=15", "--seed=1", "--samples=961"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1]
    match = re.fullmatch(r"make soak: (\d+) epochs .* (\d+) faults of the store, (\d+) kills, .*; 0 faults", said)
    assert match is not None, said
    assert all(int(count) > 0 for count in match.groups()), said


def test_a_tenth_of_the_requests_fails_in_every_way() -> None:
    """Shards meet each kind of fault; what is no shard only those that pass by themselves."""
    chaos = faults.Chaos({f"soak/{number}": 1000 for number in range(20)}, seed=1)
    spoiled = [chaos(Request("GET", f"soak/{number}", attempt, "")) for number in range(20) for attempt in range(500)]
    assert set(chaos.faults) == {*faults.TRANSIENT, *faults.CORRUPTING}
    assert 0.08 < sum(fault is not None for fault in spoiled) / chaos.requests < 0.12
    chaos = faults.Chaos({"soak/0": 1000}, seed=1)
    for attempt in range(1000):
        chaos(Request("GET", "soak/index.json", attempt, ""))
    assert set(chaos.faults) == set(faults.TRANSIENT)


def rank_of_a_job(folder: Path) -> tuple[faults.Life, list[str], list[dict[str, Any]]]:
    """Return a life of one rank, the digest of each sample, and what the rank logs of its first epoch."""
    place = folder / "dataset"
    digests = faults.write_locally(place, 40)
    life = faults.Life(
        url=str(place),
        folder=folder,
        number=0,
        world_size=1,
        num_workers=0,
        batch_size=8,
        tail="pad",
        lanes=2,
        save_every=1,
        saves_at_end=False,
        by_environment=False,
        sets_epoch=False,
        resume=None,
        seed=3,
        storage_options={},
        cache=CacheOptions(directory=folder / "cache", keep_free_bytes=0),
        rows=tuple(StreamingDataset(str(place)).index.rows.tolist()),
    )
    loader = StreamingDataLoader(life.open_dataset(Topology()))
    iterator = iter(loader)
    lines = [{"state": loader.state_dict(), "batches": len(loader)}]
    lines += [life.describe(batch, loader) for batch in iterator]
    return life, digests, lines


def job_of(life: faults.Life) -> faults.Job:
    """Return a job that had this one life."""
    return faults.Job(
        number=life.seed,
        folder=life.folder,
        storage_options={},
        cache=life.cache,
        rows=life.rows,
        rng=random.Random(0),
        pace=1.0,
        stopping=threading.Event(),
        lives=[life],
        is_over=True,
    )


def test_the_judge_finds_wrong_contents_and_a_sample_that_came_twice(tmp_path: Path) -> None:
    """The truth has no faults; a wrong digest and a repeated batch have theirs."""
    life, digests, truth = rank_of_a_job(tmp_path)

    def judged(lines: list[dict[str, Any]]) -> faults.Figures:
        life.log(0).write_text("".join(json.dumps(line) + "\n" for line in lines))
        job = job_of(life)
        faults.check_job(job, digests, set())
        return job.figures

    figures = judged(truth)
    assert (figures.faults, figures.kept, figures.epochs) == (0, 40, 1)
    wrong = json.loads(json.dumps(truth))
    wrong[2]["digests"][0] = "0" * 16
    assert judged(wrong).wrong == judged(wrong).faults == 1
    twice = [*truth[:-1], truth[-2]]
    assert judged(twice).repeated == judged(twice).lost == 8
    life.events(0).write_text(
        json.dumps({"kind": "ShardSkipped", "text": ""})
        + "\n"
        + json.dumps({"kind": "CacheDamaged", "text": "", "entry": "aa.raw"})
        + "\n"
    )
    figures = judged(truth)
    assert (figures.skipped, figures.damage_unexplained, figures.faults) == (1, 1, 2)


def test_the_judge_tells_whose_leftovers_they_are(tmp_path: Path) -> None:
    """What Python and torch leave when a signal ends a worker is counted apart; the same of anybody else is a fault."""
    life, _, _ = rank_of_a_job(tmp_path)
    life.scratch.mkdir(parents=True)
    (life.scratch / "pymp-one").mkdir()
    job = job_of(life)
    figures = faults.Figures()
    folder = CacheFolder(str(life.cache.directory), budget_bytes=1 << 30, keep_free_bytes=0)
    left = faults.check_leftovers([job], folder, figures, shm=["torch_17_1_0"], damaged=set())
    assert len(left) == figures.left_in_shm + figures.left_in_tmp == figures.faults == 2
    job.killed.add(17)
    job.killed_workers[life.number] = 1
    (life.scratch / "other").touch()
    figures = faults.Figures()
    left = faults.check_leftovers([job], folder, figures, shm=["torch_17_1_0"], damaged=set())
    assert left == [f"{life.scratch / 'other'}, of a life ended by: itself"]
    assert (figures.named_by_killed, figures.sockets_of_killed, figures.faults) == (1, 1, 1)


def test_the_judge_finds_what_was_left(tmp_path: Path) -> None:
    """A file of a dead process, and an entry with a wrong bit that nobody put there; not one that the judge damaged."""
    write(str(tmp_path / "train"), range(300))
    options = CacheOptions(directory=tmp_path / "cache", keep_free_bytes=0)
    assert len(list(StreamingDataset(str(tmp_path / "train"), cache=options))) == 300
    folder = CacheFolder(str(options.directory), budget_bytes=int(options.budget_bytes), keep_free_bytes=0)
    assert faults.left_in_cache(folder, set()) == []
    entries = sorted(entry.path for entry in folder.entries())
    name = disk.damage(entries, tmp_path / "spare", random.Random(1))
    assert name is not None
    assert not (tmp_path / "spare").exists()
    assert len(faults.left_in_cache(folder, set())) == 1, "and removed"
    name = disk.damage(sorted(entry.path for entry in folder.entries()), tmp_path / "spare", random.Random(2))
    assert name is not None
    assert faults.left_in_cache(folder, {name}) == []
    entries[0].unlink(missing_ok=True)
    assert disk.damage(entries[:1], tmp_path / "spare", random.Random(1)) is None
    assert not entries[0].exists(), "what is gone does not come back"
    stale = folder.home / "v1" / "new" / f"{os.getpid()}-00-4096.tmp"
    stale.write_bytes(b"")
    assert faults.left_in_cache(folder, set()) == [str(stale)]


def test_only_what_was_there_at_once_counts(tmp_path: Path) -> None:
    """A look that sees a file before it goes, and the one that takes its place, does not count both."""
    (tmp_path / "one").write_bytes(bytes(8192))
    before = disk.blocks_of(tmp_path)
    (tmp_path / "two").write_bytes(bytes(4096))
    after = disk.blocks_of(tmp_path)
    assert disk.taken_at_once(before, after) == 8192
    assert disk.taken_at_once(after, after) == 12288


@pytest.mark.parametrize(("with_files", "full"), [(False, "f_bavail"), (True, "f_favail")])
def test_a_disk_of_our_own_can_be_full(tmp_path: Path, with_files: bool, full: str) -> None:
    """Inside the ``with`` there is no room, outside there is; nobody else sees the disk, and it is gone afterwards."""
    begin = disk.mounted(tmp_path, 1 << 20)
    if isinstance(begin, str):
        pytest.skip(begin)
    script = f"""
import os, pathlib, sys
from tests.soak import disk
place = pathlib.Path(sys.argv[1])
with disk.filled(place, with_files={with_files}):
    while os.statvfs(place).{full}:
        pass
print(os.statvfs(place).{full} > 100)
"""
    command = [*begin, sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"True\n"
    assert list(tmp_path.iterdir()) == []
