"""Real process groups (gloo) of 1, 2 and 4 ranks: what they read together is what one rank reads alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from streamshards import StreamingDataset, Topology
from tests.datasets import flat, ids, write
from tests.distributed import ranks, trainer
from tests.distributed.trainer import GLOBAL_BATCH, NUM_SAMPLES, make

BAD_SHARD = 2
"""Within the first lane when nothing is shuffled: then rank 0 alone needs it."""


class Exploration(NamedTuple):
    """What each rank of one group saw, by the name of the way it read."""

    world_size: int
    seen: list[dict[str, Any]]

    def together(self, way: str) -> list[list[int]]:
        """Return the ids of each step, the ranks' batches put together."""
        steps = zip_longest(*(rank[way]["batches"] for rank in self.seen), fillvalue=[])
        return [flat(step) for step in steps]

    def lengths(self, way: str) -> list[int]:
        """Return what each rank's loader said of its length before the epoch; it is what then came."""
        for rank in self.seen:
            assert rank[way]["length"] == len(rank[way]["batches"])
        return [rank[way]["length"] for rank in self.seen]

    def check(self, ways: Sequence[str], expected: list[list[int]]) -> None:
        """Check that each of some ways gives the expected steps, as many on every rank."""
        for way in ways:
            assert self.together(way) == expected, way
            assert self.lengths(way) == [len(expected)] * self.world_size, way

    def ways(self, beginning: str) -> list[str]:
        found = [way for way in self.seen[0] if way.startswith(beginning)]
        assert found
        return found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES), shard_bytes=4_000)
    return str(folder)


@pytest.fixture(scope="module")
def bad_url(url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same dataset and index, but with other bytes in the middle of one shard."""
    folder = tmp_path_factory.mktemp("dataset") / "bad"
    shutil.copytree(url, folder)
    shard = folder / StreamingDataset(url).index.names[BAD_SHARD]
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    shard.write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module", params=[1, 2, 4])
def group(
    request: pytest.FixtureRequest, url: str, bad_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Exploration:
    """One group of ranks that has read in every way: starting processes is what costs."""
    folder = tmp_path_factory.mktemp("group")
    return Exploration(request.param, ranks.run(folder, request.param, trainer.explore, url, bad_url))


def alone(url: str, **options: Any) -> list[list[int]]:
    """Return the ids of each global batch, as a single rank without workers reads them."""
    return ids(make(url, 1, topology=Topology(), **options))


@pytest.fixture(scope="module")
def expected(url: str) -> list[list[int]]:
    batches = alone(url)
    assert [len(batch) for batch in batches] == [GLOBAL_BATCH] * 15
    assert sorted(flat(batches)[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
    return batches


# -- where the rank comes from -----------------------------------------------------------------------------------------


def test_rank_and_world_size_of_the_environment_are_enough(group: Exploration, expected: list[list[int]]) -> None:
    """Without a process group RANK and WORLD_SIZE split the batches, also in workers whose environment lacks them."""
    group.check(group.ways("environment"), expected)


def test_a_dataset_made_before_the_process_group_splits_right(group: Exploration, expected: list[list[int]]) -> None:
    """The rank is asked for when an iteration begins: without workers, with forked, spawned and fork server's ones."""
    ways = group.ways("early")
    assert len(ways) == (6 if group.world_size == 2 else 5)
    group.check(ways, expected)


def test_a_function_is_asked_for_the_rank_when_an_iteration_begins(
    group: Exploration, expected: list[list[int]]
) -> None:
    """It may be passed before there is a process group; spawned workers get its answer, of a lambda too."""
    group.check(group.ways("asking"), expected)
    for rank in group.seen:
        assert "asked_rank" in rank["asked too early"]
        assert "failed" in rank["asked too early"]


def test_a_topology_function_travels_to_ranks_only_while_it_has_no_answer(
    url: str, expected: list[list[int]], tmp_path: Path
) -> None:
    """A dataset handed to processes that become ranks: each asks anew; an answer of another process is refused."""
    asking = make(url, 2, topology=trainer.asked_rank)
    answered = make(url, 2, topology=lambda: Topology(rank=0, world_size=2))
    group = Exploration(2, ranks.run(tmp_path, 2, trainer.receive, asking, answered))
    group.check(["asking"], expected)
    for rank in group.seen:
        assert "was asked in another process" in rank["answered"]


def test_a_world_without_a_rank_is_refused(group: Exploration) -> None:
    """WORLD_SIZE above 1 without RANK or a process group is an error as the iteration begins, never rank 0."""
    for rank in group.seen:
        for way in group.ways("no rank"):
            if group.world_size == 1:
                assert rank[way] == "not refused"
            else:
                assert f"WORLD_SIZE={group.world_size} but RANK is not set" in rank[way]


# -- each rank's batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_ranks_put_together_are_the_single_ranks_batches(
    url: str, group: Exploration, tail: str, num_workers: int
) -> None:
    """Step by step the same samples in the same order, as many steps on every rank, known before."""
    group.check([f"{tail}, {num_workers}"], alone(url, tail=tail))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_uneven_tails_deliver_each_sample_once(url: str, group: Exploration, num_workers: int) -> None:
    """Some ranks have a shorter last batch or none; each knows its own number before the epoch."""
    way = f"uneven, {num_workers}"
    together = group.together(way)
    assert together == alone(url, tail="uneven")
    assert sorted(flat(together)) == list(range(NUM_SAMPLES))
    assert group.lengths(way) == {1: [15], 2: [15, 14], 4: [15, 15, 14, 14]}[group.world_size]


# -- tensor-parallel replicas ------------------------------------------------------------------------------------------


four_ranks = pytest.mark.parametrize("group", [4], indirect=True)


@four_ranks
def test_a_dimension_of_a_mesh_is_the_rank(group: Exploration, expected: list[list[int]]) -> None:
    """On a 2 x 2 mesh, ranks of one tp group read identical batches, the two dp ranks together the global batch."""
    ways = group.ways("mesh")
    assert len(ways) == 4
    for way in ways:
        by_place = {tuple(rank["coordinate"]): rank for rank in group.seen}
        for dp in (0, 1):
            assert by_place[dp, 0][way] == by_place[dp, 1][way]
        assert by_place[0, 0][way] != by_place[1, 0][way]
        for tp in (0, 1):
            Exploration(2, [by_place[0, tp], by_place[1, tp]]).check([way], expected)


@four_ranks
def test_flattened_dimensions_of_a_mesh_are_the_rank(group: Exploration, expected: list[list[int]]) -> None:
    """Hybrid sharding: dp_replicate and dp_shard, flattened, split the batches four ways."""
    group.check(["flat mesh"], expected)


@four_ranks
def test_a_mesh_that_names_no_rank_is_refused(group: Exploration) -> None:
    """Several dimensions: the error says what to pass. A mesh of other ranks: it says so."""
    for number, rank in enumerate(group.seen):
        assert 'mesh["dp"]' in rank["two dimensions"]
        assert 'mesh["dp_replicate", "dp_shard"]._flatten()' in rank["two dimensions"]
        assert ("does not hold this process" in rank["not in the mesh"]) == (number > 1)


# -- a corrupt shard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_rank_that_meets_a_corrupt_shard_stays_in_step(
    url: str, bad_url: str, group: Exploration, num_workers: int
) -> None:
    """With an all_reduce in each step: as many steps on all ranks, and the refills a single rank would deliver."""
    reference = alone(bad_url)
    rows = StreamingDataset(url).index.rows.tolist()
    lost = set(range(sum(rows[:BAD_SHARD]), sum(rows[: BAD_SHARD + 1])))
    assert lost
    assert set(flat(reference)) == set(range(NUM_SAMPLES)) - lost
    way = f"bad shard, {num_workers}"
    group.check([way], reference)
    for rank in group.seen:
        assert rank[way]["sums"] == [sum(batch) for batch in reference]


def test_torchrun_ends_when_a_rank_raises_on_a_corrupt_shard(bad_url: str, tmp_path: Path) -> None:
    """on_corrupt="raise": the rank that needs the shard raises ShardCorrupt, and the job fails, with nobody waiting."""
    code, output = ranks.torchrun_to_the_end(2, "read", bad_url, tmp_path, 0, 0)
    assert code != 0, output
    assert "ShardCorrupt" in output
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_the_rank_that_needs_a_corrupt_shard_raises(bad_url: str, tmp_path: Path, num_workers: int) -> None:
    """ShardCorrupt stays ShardCorrupt when it comes from a worker; the other rank loses its peer, and ends too."""
    codes = ranks.finish(tmp_path, ranks.start(tmp_path, 2, trainer.read_to_the_bad_shard, bad_url, num_workers))
    said = ranks.errors(tmp_path)
    assert codes == [1, 1], said
    assert "streamshards.errors.ShardCorrupt: " in said[0]
    assert "ShardCorrupt" not in said[1]
