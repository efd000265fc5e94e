"""An exception on any thread arrives once for what it spoils, with the frames where it happened, and stays told."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamshards import PrefetchOptions, StreamingDataLoader, StreamingDataset
from streamshards.errors import ShardCorrupt, ShardMissing
from streamshards.events import Event
from tests.datasets import flat, ids, write

BATCH = 8
NUM_SAMPLES = 400

workers = pytest.mark.parametrize("num_workers", [0, 2])


@pytest.fixture
def own_url(tmp_path: Path) -> str:
    """A dataset that the test may damage."""
    write(str(tmp_path / "train"), range(NUM_SAMPLES), shard_bytes=4_000)
    return str(tmp_path / "train")


def damage(url: str, number: int) -> str:
    """Flip a bit in the middle of shard *number*; return its name."""
    name = StreamingDataset(url).index.names[number]
    data = bytearray((Path(url) / name).read_bytes())
    data[len(data) // 2] ^= 1
    (Path(url) / name).write_bytes(data)
    return name


def make(url: str, num_workers: int, **options: Any) -> StreamingDataLoader:
    dataset = StreamingDataset(url, **{"batch_size": BATCH, "columns": ["id"], "on_corrupt": "raise"} | options)
    return StreamingDataLoader(
        dataset, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None
    )


def errors_of(loader: StreamingDataLoader, kind: type[Exception], *, at_most: int) -> tuple[list[int], list[Exception]]:
    """Return the ids that came, and the errors, of a loop that goes on after each; at most so many of them."""
    seen: list[int] = []
    errors: list[Exception] = []
    iterator = iter(loader)
    while len(errors) < at_most:
        try:
            seen += next(iterator)["id"].tolist()
        except StopIteration:  # noqa: PERF203 -- the loop goes on after errors
            break
        except kind as error:
            errors.append(error)
    return seen, errors


def text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _corrupt(url: str) -> str:
    return damage(url, 3)


def _missing(url: str) -> str:
    name = StreamingDataset(url).index.names[3]
    (Path(url) / name).unlink()
    return name


@workers
@pytest.mark.parametrize(
    ("spoil", "kind", "frame"), [(_corrupt, ShardCorrupt, "in fetch"), (_missing, ShardMissing, "in fetch")]
)
def test_what_a_fetching_thread_raises(
    own_url: str, num_workers: int, spoil: Callable[[str], str], kind: type[Exception], frame: str
) -> None:
    """A bad shard with on_corrupt="raise": url and cause, its own frames, and again at each later next."""
    name = spoil(own_url)
    _, errors = errors_of(make(own_url, num_workers), kind, at_most=4)
    assert len(errors) == 4
    for error in errors:
        assert f"{own_url}/{name}" in str(error)
        assert frame in text_of(error)
        assert "loading.py" in text_of(error)
    if not num_workers:
        assert len({text_of(error) for error in errors}) == 1  # none grows with each next


class Spoiled(LookupError):
    """What the tests' own functions raise; made from one string, as torch wants it."""


def transform_that_fails(sample: dict[str, Any]) -> dict[str, Any]:
    if sample["id"] == 41:
        raise Spoiled(f"sample {sample['id']}")
    return sample


def batch_transform_that_fails(batch: dict[str, Any]) -> dict[str, Any]:
    if 41 in batch["id"].tolist():
        raise Spoiled("the batch with 41")
    return batch


@workers
@pytest.mark.parametrize("name", ["transform", "batch_transform"])
def test_what_a_transform_raises(own_url: str, num_workers: int, name: str) -> None:
    """It arrives once, with its frames; the batch is not handed out, and a loop that goes on gets all others."""
    function: Any = transform_that_fails if name == "transform" else batch_transform_that_fails
    loader = make(own_url, num_workers, **{name: function})
    seen, errors = errors_of(loader, Spoiled, at_most=4)
    assert len(errors) == 1
    assert f"in {function.__name__}" in text_of(errors[0])
    spoiled = next(batch for batch in ids(StreamingDataset(own_url, batch_size=BATCH)) if 41 in batch)
    assert sorted([*seen, *spoiled]) == list(range(NUM_SAMPLES))


def observer_that_fails(event: Event) -> None:
    raise Spoiled(f"cannot take {type(event).__name__}")


@workers
def test_what_an_observer_raises(own_url: str, num_workers: int) -> None:
    """It ends the pass like any error, from whatever thread: nobody believes that the epoch was whole."""
    damage(own_url, 3)
    loader = make(own_url, num_workers, observer=observer_that_fails, on_corrupt="skip", max_corrupt=1.0)
    _, errors = errors_of(loader, Spoiled, at_most=4)
    assert len(errors) == 4
    for error in errors:
        assert "cannot take" in str(error)
        assert "in observer_that_fails" in text_of(error)


@workers
def test_what_an_observer_raises_about_a_slow_read(own_url: str, num_workers: int) -> None:
    """There the thread that iterates tells it: the error comes out of that next, and no row is lost by it."""
    loader = make(own_url, num_workers, observer=observer_that_fails, prefetch=PrefetchOptions(slow_s=1e-6))
    iterator = iter(loader)
    seen: list[list[int]] = []
    failures = 0
    while True:
        try:
            seen.append(next(iterator)["id"].tolist())
        except StopIteration:  # noqa: PERF203 -- the loop goes on after errors
            break
        except Spoiled:
            failures += 1
    assert failures > 0
    assert sorted(flat(seen)) == list(range(NUM_SAMPLES))
