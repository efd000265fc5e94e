"""``cat`` in the order of training: what it prints is what a training loop got, and where it lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import Mixture, OrderOptions, StreamingDataLoader, StreamingDataset, Topology
from streamshards.cli.codes import ExitCode
from tests.cli.conftest import Ended, assert_error
from tests.datasets import write

NUM_SAMPLES = 300
BATCH = 8
RANKS = 2
SEED = 17


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a dataset of 300 samples in small shards; the id of each is its number in the order of the index."""
    path = str(tmp_path_factory.mktemp("train"))
    write(path, range(NUM_SAMPLES), shard_bytes=2_000)
    return path


def opened(url: str, rank: int = 0, **options: Any) -> StreamingDataset:
    """Return the dataset of one of two ranks that shuffle, with small blocks."""
    return StreamingDataset(
        url,
        **{
            "batch_size": BATCH,
            "shuffle": True,
            "seed": SEED,
            "with_keys": True,
            "order": OrderOptions(shuffle_block=40),
            "topology": Topology(rank=rank, world_size=RANKS),
            **options,
        },
    )


def places(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return epoch, position, shard, row and id of each sample in a batch."""
    key = batch["key"]
    columns = [key["epoch"], key["position"], key["shard"], key["row"], batch["id"]]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def trained(datasets: list[StreamingDataset], *, steps: int) -> Iterator[tuple[list[tuple[int, ...]], dict[str, Any]]]:
    """Yield each global batch that the ranks of a training loop get, and rank 0's state after it."""
    loaders = [StreamingDataLoader(dataset) for dataset in datasets]
    for batches in islice(zip(*loaders, strict=True), steps):
        yield [place for batch in batches for place in places(batch)], loaders[0].state_dict()


def printed(ended: Ended, url: str) -> list[tuple[int, ...]]:
    """Return what ``places`` does, of the lines that ``cat --json`` printed, and check the names of the shards."""
    assert (ended.code, ended.err) == (0, ""), ended
    names = json.loads((Path(url) / "index.json").read_text())["shards"]["name"]
    found = []
    for line in ended.out.splitlines():
        sample = json.loads(line)
        key = sample["key"]
        assert key["name"] == names[key["shard"]]
        found.append((key["epoch"], key["position"], key["shard"], key["row"], sample["id"]))
    return found


def save(path: Path, state: object) -> Path:
    path.write_text(json.dumps(state))
    return path


# ---- what training saw -----------------------------------------------------------------------------------------------


def test_the_batch_before_a_checkpoint_and_the_one_after_it(url: str, tmp_path: Path, call: Any) -> None:
    """At every step of an epoch: ``--last`` gives the global batch just seen, and without it comes the next one."""
    steps = list(trained([opened(url, rank) for rank in range(RANKS)], steps=6))
    for step in (0, 2, 4):
        seen, state = steps[step]
        file = save(tmp_path / "ckpt.json", state)
        size = BATCH * RANKS
        assert printed(call("cat", url, "--state", file, "--last", size, "--json"), url) == seen
        assert printed(call("cat", url, "--state", file, "--limit", size, "--json"), url) == steps[step + 1][0]
    place = ["--position", 3 * size, "--limit", size]
    assert printed(call("cat", url, "--state", file, *place, "--json"), url) == steps[3][0]
    place = ["--position", 3 * size, "--last", size]
    assert printed(call("cat", url, "--state", file, *place, "--json"), url) == steps[2][0]
    assert printed(call("cat", url, "--state", file, *place, "--limit", 3, "--json"), url) == steps[2][0][:3]


def test_with_workers(url: str, tmp_path: Path, call: Any) -> None:
    """Of a loader with two worker processes, which runs ahead: the state says what the loop received."""
    loader = StreamingDataLoader(opened(url, topology=Topology()), num_workers=2)
    batches = iter(loader)
    seen = [places(next(batches)) for _ in range(5)]
    file = save(tmp_path / "ckpt.json", loader.state_dict())
    following = places(next(batches))
    assert printed(call("cat", url, "--state", file, "--last", 2 * BATCH, "--json"), url) == seen[3] + seen[4]
    assert printed(call("cat", url, "--state", file, "--limit", BATCH, "--json"), url) == following


@pytest.mark.parametrize(("lanes", "chunk"), [(1, 1), (3, 5), (8, 2), (12, 3), (40, 7), (150, 1)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_whole_epoch_without_a_checkpoint(url: str, call: Any, lanes: int, chunk: int, shuffle: bool) -> None:
    """For any lanes and chunk, read in one window or many: each position once, the sample that training saw there."""
    order = OrderOptions(lanes=lanes, chunk=chunk, shuffle_block=40)
    dataset = opened(url, shuffle=shuffle, order=order, topology=Topology(), tail="uneven")
    dataset.set_epoch(3)
    seen = [place for batch in dataset for place in places(batch)]
    how = ["--shuffle", "--seed", SEED] if shuffle else ["--no-shuffle"]
    words = [*how, "--lanes", lanes, "--chunk", chunk, "--shuffle-block", 40, "--epoch", 3, "--json"]
    assert printed(call("cat", url, *words, "--limit", 10_000), url) == seen
    assert printed(call("cat", url, *words, "--position", 171), url) == seen[171:181]


def test_the_default_block_is_that_of_training(url: str, call: Any) -> None:
    """Without --shuffle-block the data says how large a block is, on any number of ranks."""
    ((seen, _),) = trained([opened(url, rank, order=None) for rank in range(RANKS)], steps=1)
    words = ["--shuffle", "--seed", SEED, "--lanes", RANKS, "--chunk", BATCH, "--json"]
    assert printed(call("cat", url, "--position", 0, *words, "--limit", len(seen)), url) == seen


def test_shard_and_row_lead_to_the_sample(url: str, call: Any) -> None:
    """The rows of the shards before it, plus its row, is a sample's number in the order of the index."""
    rows = json.loads((Path(url) / "index.json").read_text())["shards"]["rows"]
    words = ["--shuffle", "--lanes", 3, "--chunk", 4, "--json", "--limit", NUM_SAMPLES]
    found = printed(call("cat", url, *words), url)
    assert sorted(number for *_, number in found) == list(range(NUM_SAMPLES))
    for _, _, shard, row, number in found:
        assert sum(rows[:shard]) + row == number


def test_rows_that_were_refilled(tmp_path: Path, call: Any) -> None:
    """Where a shard is corrupt, the samples that took its rows' places are printed, with where they come from."""
    url = str(tmp_path / "data")
    write(url, range(NUM_SAMPLES), shard_bytes=2_000)
    victim = tmp_path / "data" / json.loads((tmp_path / "data" / "index.json").read_text())["shards"]["name"][2]
    victim.write_bytes(b"\0" * victim.stat().st_size)
    for seen, state in trained([opened(url, rank, max_corrupt=0.5) for rank in range(RANKS)], steps=12):
        file = save(tmp_path / "ckpt.json", state)
        if state["position"] % 48 == 0:
            assert printed(call("cat", url, "--state", file, "--last", len(seen), "--json"), url) == seen
    everything = printed(call("cat", url, "--state", file, "--position", 0, "--limit", 1_000, "--json"), url)
    assert len(everything) == NUM_SAMPLES
    assert all(shard != 2 for _, _, shard, _, _ in everything)
    assert len({number for *_, number in everything}) < NUM_SAMPLES


def test_only_the_blocks_that_are_needed_are_read(tmp_path: Path, call: Any, caplog: pytest.LogCaptureFixture) -> None:
    """However many lanes there are: the other lanes' shards may be damaged, and nobody notices."""
    url = str(tmp_path / "data")
    write(url, range(NUM_SAMPLES), shard_bytes=2_000)
    _, *others = json.loads((tmp_path / "data" / "index.json").read_text())["shards"]["name"]
    for name in others:
        (tmp_path / "data" / name).write_bytes(b"gone")
    words = ["cat", url, "--lanes", 50, "--chunk", 3, "--shuffle-block", 4, "--json"]
    assert [number for *_, number in printed(call(*words, "--limit", 3), url)] == [0, 1, 2]
    assert [record for record in caplog.records if record.name.startswith("streamshards")] == []
    call(*words, "--limit", 12)
    assert [record for record in caplog.records if record.name.startswith("streamshards")] != []


@pytest.mark.parametrize("by", ["sample", "shard"])
def test_a_part_of_a_dataset(url: str, tmp_path: Path, call: Any, by: Any) -> None:
    """take, skip and split are made again from the state's text."""
    parts = [opened(url, rank).skip(7).split(0.9, seed=1, by=by)[0].take(200) for rank in range(RANKS)]
    *_, (before, _), (seen, state) = trained(parts, steps=4)
    assert state["subset"] == f"skip(7).split(0.9, seed=1, by='{by}')[0].take(200)"
    file = save(tmp_path / "ckpt.json", state)
    assert printed(call("cat", url, "--state", file, "--last", 2 * len(seen), "--json"), url) == before + seen


def test_shards_that_were_appended_since(tmp_path: Path, call: Any) -> None:
    """The state's epoch is that of the dataset as it was."""
    url = str(tmp_path / "data")
    write(url, range(100), shard_bytes=2_000)
    *_, (seen, state) = trained([opened(url, rank) for rank in range(RANKS)], steps=3)
    file = save(tmp_path / "ckpt.json", state)
    write(url, range(100, 200), shard_bytes=2_000, mode="append")
    assert printed(call("cat", url, "--state", file, "--last", len(seen), "--json"), url) == seen
    whole = printed(call("cat", url, "--state", file, "--position", 0, "--limit", 1_000, "--json"), url)
    assert sorted(number for *_, number in whole) == list(range(100))


def test_another_epoch_of_the_same_run(url: str, tmp_path: Path, call: Any) -> None:
    """--epoch begins at the epoch's first sample, unless --position says where."""
    ((_, state),) = trained([opened(url, rank) for rank in range(RANKS)], steps=1)
    file = save(tmp_path / "ckpt.json", state)
    other = [opened(url, rank) for rank in range(RANKS)]
    for dataset in other:
        dataset.set_epoch(5)
    first, second = [seen for seen, _ in trained(other, steps=2)]
    words = ["cat", url, "--state", file, "--epoch", 5, "--json", "--limit", len(first)]
    assert printed(call(*words), url) == first
    assert printed(call(*words, "--position", len(first)), url) == second


def test_a_state_deep_in_a_checkpoint(url: str, tmp_path: Path, call: Any) -> None:
    """In JSON and in what torch saved; of several states, --state-path chooses."""
    ((seen, state),) = trained([opened(url, rank) for rank in range(RANKS)], steps=1)
    other = {**state, "position": 2 * len(seen)}
    one = {"step": 1, "loops": [None, {"data": state}], "again": {"data": state}}
    two = {**one, "valid": other}
    torch.save({**two, "model": {"w": torch.zeros(3)}}, tmp_path / "two.pt")
    words = ["--last", len(seen), "--json"]
    assert printed(call("cat", url, "--state", save(tmp_path / "one.json", one), *words), url) == seen
    assert (
        printed(call("cat", url, "--state", tmp_path / "two.pt", "--state-path", "loops.1.data", *words), url) == seen
    )
    ended = call("cat", url, "--state", tmp_path / "two.pt", *words)
    assert_error(ended, ExitCode.USAGE, "2 different states", "'loops.1.data', 'again.data', 'valid'", "--state-path")
    ended = call("cat", url, "--state", tmp_path / "two.pt", "--state-path", "valid.x", *words)
    assert_error(ended, ExitCode.USAGE, "no state at 'valid.x'")


def test_for_people(url: str, tmp_path: Path, call: Any) -> None:
    """A headline with epoch, position, shard and row, then the fields, as in the order of the index."""
    ((seen, state),) = trained([opened(url, rank) for rank in range(RANKS)], steps=1)
    file = save(tmp_path / "ckpt.json", state)
    _, position, shard, row, number = seen[-1]
    name = json.loads((Path(url) / "index.json").read_text())["shards"]["name"][shard]
    assert call("cat", url, "--state", file, "--last", 1, "--columns", "id").out == (
        f"epoch 0, position {position}: shard {shard} ({name}), row {row}\n  id  {number}\n"
    )


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_words_that_do_not_go_together(url: str, tmp_path: Path, call: Any) -> None:
    """One line each, which says what to do instead."""
    ((_, state),) = trained([opened(url, rank) for rank in range(RANKS)], steps=1)
    file = save(tmp_path / "ckpt.json", state)
    beginning = save(tmp_path / "0.json", {**state, "position": 0})
    end = save(tmp_path / "end.json", {**state, "position": NUM_SAMPLES})
    worker = save(tmp_path / "worker.json", {**state, "worker_batches": 3, "num_workers": 4})
    order = ["--lanes", 2, "--chunk", 8]
    for words, told in {
        ("--position", 3): "needs --lanes and --chunk",
        ("--shuffle", "--chunk", 8): "needs --lanes: it depends on",
        ("--seed", 3, *order): "--seed means nothing without --shuffle",
        ("--start", 3, "--position", 3, *order): "--start counts in the order of the index, --position in that of",
        ("--state", file, "--seed", 3, "--lanes", 3): "--seed, --lanes: the --state says it",
        ("--state-path", "x"): "needs --lanes and --chunk",
        ("--position", -1, *order): "position=-1",
        ("--position", NUM_SAMPLES, *order): "no sample at position 300: epoch 0 has 300",
        ("--position", NUM_SAMPLES + 1, "--last", 1, *order): "no samples before position 301",
        ("--epoch", -1, *order): "epoch=-1",
        ("--last", 0, "--position", 9, *order): "last=0",
        ("--limit", -1, "--position", 9, *order): "limit=-1",
        ("--lanes", 301, "--chunk", 1): "lanes=301 is more than the 300 samples",
        ("--position", 0, *order, "--columns", "y"): "there is no 'y'",
        ("--state", beginning, "--last", 8): "no samples before position 0 of epoch 0",
        ("--state", end): "its last ones: --last N, the next ones: --epoch 1",
        ("--state", worker): "one of 4 DataLoader workers, 3 batches after position 16",
        ("--state", tmp_path / "nothing.json"): "nothing.json: cannot be read: No such file",
    }.items():
        assert_error(call("cat", url, *words), ExitCode.USAGE, told)
    assert len(printed(call("cat", url, "--state", worker, "--position", 16, "--json"), url)) == 10
    assert call("cat", url, "--state", file, "--limit", 0) == Ended(0, "", "")


@pytest.mark.parametrize("position", [0, 16, 100])
def test_a_state_of_another_dataset(url: str, tmp_path: Path, call: Any, position: int) -> None:
    """Refused with each difference, wherever the state stands: also between two epochs, where a resume is forgiven."""
    other = str(tmp_path / "other")
    write(other, range(100), shard_bytes=2_000)
    state = {**StreamingDataLoader(opened(other)).state_dict(), "position": position}
    file = save(tmp_path / "ckpt.json", state)
    ended = call("cat", url, "--state", file, "--position", 0)
    assert_error(ended, ExitCode.MISMATCH, "num_samples is 300 here and 100 in the state", "fingerprint is")


def test_a_subset_that_cannot_be_right(url: str, tmp_path: Path, call: Any) -> None:
    """What stands in the state is read as a subset's name, and as nothing else."""
    state = StreamingDataLoader(opened(url)).state_dict()
    for subset in ("__import__('os').abort()", 3, "take(5"):
        file = save(tmp_path / "ckpt.json", {**state, "subset": subset})
        assert_error(call("cat", url, "--state", file), ExitCode.MISMATCH, "the state cannot be right", "is no subset")


def test_a_mixture(url: str, tmp_path: Path, call: Any) -> None:
    """Refused by naming its sources, and what tells the origin of its samples."""
    other = str(tmp_path / "other")
    write(other, range(100), shard_bytes=2_000)
    plain = {"shuffle": True, "topology": Topology()}
    mixture = Mixture(
        {"web": StreamingDataset(url, **plain), "books": StreamingDataset(other, **plain)},
        weights={"web": 1, "books": 1},
        batch_size=BATCH,
        topology=Topology(),
    )
    file = save(tmp_path / "ckpt.json", mixture.state_dict())
    assert_error(
        call("cat", url, "--state", file), ExitCode.MISMATCH, "a mixture of web (", "books (", "with_keys=True"
    )


def test_data_with_a_field_called_key(tmp_path: Path, call: Any) -> None:
    """The name is needed for where a sample comes from: the flag that leaves the field out is named."""
    from streamshards import ShardWriter

    with ShardWriter(tmp_path) as out:
        out.write({"key": 1, "x": 2})
    words = ["cat", tmp_path, "--lanes", 1, "--chunk", 1]
    assert_error(call(*words), ExitCode.USAGE, "the data has one; leave that one out with --columns")
    assert call(*words, "--columns", "x", "--json").json["x"] == 2
