from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from streamshards import ShardWriter
from streamshards.convert import reading
from streamshards.convert.reading import read_samples
from streamshards.convert.summary import summarize, summary_of
from streamshards.errors import OptionInvalid
from streamshards.plan.index import Index
from tests.datasets import assert_same, sample


def write(folder: Path, num_samples: int = 25) -> str:
    """Write a dataset of several shards and return its url."""
    with ShardWriter(folder, shard_bytes=1_000) as out:
        for number in range(num_samples):
            out.write(sample(number))
    return str(folder)


@pytest.mark.parametrize("step_bytes", [1, 1 << 24])
def test_any_start_and_limit(tmp_path: Path, step_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every small start and limit gives those very samples with their numbers, however they are cut into steps."""
    monkeypatch.setattr(reading, "_STEP_BYTES", step_bytes)
    url = write(tmp_path)
    for start, limit in itertools.product(range(0, 25, 3), (0, 1, 2, 7, 24, 25, 26, None)):
        got = list(read_samples(url, start=start, limit=limit))
        assert [number for number, _ in got] == list(range(25))[start:][:limit]
        for number, item in got:
            assert_same(item, sample(number))


def test_negative_starts_and_columns(tmp_path: Path) -> None:
    """-1 is the last sample; columns are names or whole dicts."""
    url = write(tmp_path)
    ((number, item),) = read_samples(url, start=-1, columns=["id", "meta"])
    assert number == 24
    assert_same(item, {"id": 24, "meta": sample(24)["meta"]})


def test_what_is_not_there(tmp_path: Path) -> None:
    """Samples and columns that do not exist are refused before anything is read."""
    url = write(tmp_path)
    for start in (25, -26):
        with pytest.raises(OptionInvalid, match="has 25 samples"):
            read_samples(url, start=start)
    with pytest.raises(OptionInvalid, match="there is no 'y'; the dataset has id, x"):
        read_samples(url, columns=["y"])


def test_a_dataset_without_samples(tmp_path: Path) -> None:
    """Empty is not an error: there is nothing to show."""
    url = write(tmp_path, 0)
    assert list(read_samples(url)) == []
    summary = summarize(url)
    assert (summary["num_samples"], summary["ratio"], summary["shard_rows"], summary["shard_sizes"]) == (
        0,
        None,
        None,
        [],
    )


def test_shard_sizes_are_counted_in_powers_of_two() -> None:
    """Each size falls into the one bin that holds it, borders included, and empty bins in the middle are shown."""
    sizes = [1, 1023, 1024, 1025, 2047, 8192]
    index = Index(
        schema={"fields": []},
        names=[f"{number}" for number in range(len(sizes))],
        rows=np.ones(len(sizes), np.int64),
        sizes=np.array(sizes),
        raw_sizes=np.array(sizes) * 2,
        digests=["0" * 32] * len(sizes),
    )
    summary = summary_of(index)
    bins = {(entry["from_bytes"], entry["below_bytes"]): entry["shards"] for entry in summary["shard_sizes"]}
    assert bins[1, 2] == 1
    assert bins[512, 1024] == 1
    assert bins[1024, 2048] == 3
    assert bins[2048, 4096] == 0
    assert bins[8192, 16384] == 1
    assert sum(bins.values()) == len(sizes)
    assert summary["ratio"] == 2.0
    assert summary["shard_bytes"] == {"min": 1, "median": 1024, "max": 8192}
