"""Hugging Face Accelerate: prepare leaves a loader as it is; save_state and load_state keep its exact place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState

from streamshards import StreamingDataLoader, StreamingDataset, StreamShardsError
from tests.datasets import flat, ids, write
from tests.integrations.accelerate_ranks import STEPS_BEFORE, make, prepared
from tests.integrations.launch import torchrun

NUM_SAMPLES = 230


@pytest.fixture
def url(tmp_path: Path) -> str:
    write(str(tmp_path / "data"), range(NUM_SAMPLES))
    return str(tmp_path / "data")


@pytest.fixture(autouse=True)
def _no_accelerator_outlives_a_test() -> Iterator[None]:
    """Accelerate keeps its state in the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_two_ranks_get_their_own_batches_and_resume_on_two_or_one(url: str, tmp_path: Path) -> None:
    """prepare re-shards nothing, gather_for_metrics drops nothing, and a checkpoint of 2 ranks goes on on 1."""
    done = torchrun("accelerate_ranks.py", 2, url, str(tmp_path / "checkpoint"), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    reference = make(url, 1)
    epochs = [ids(reference), ids(reference)]
    steps = len(epochs[0])
    assert all(rank["is_ours"] for rank in ranks)
    assert ranks[0]["saved"] == ranks[1]["saved"]
    for name, expected in (("before", epochs[0][:STEPS_BEFORE]), ("rest", epochs[0][STEPS_BEFORE:])):
        assert [flat(parts) for parts in zip(ranks[0][name], ranks[1][name], strict=True)] == expected
    assert ranks[0]["gathered"] == ranks[1]["gathered"] == epochs[1]
    assert [rank["evaluated"] for rank in ranks] == [NUM_SAMPLES, NUM_SAMPLES]

    accelerator = Accelerator(cpu=True)
    loader = prepared(accelerator, make(url, 1))
    accelerator.load_state(str(tmp_path / "checkpoint"))
    assert loader.state_dict() == ranks[0]["saved"]
    assert ids(loader) == epochs[0][STEPS_BEFORE:]
    assert len(loader) == steps


@pytest.mark.parametrize("dispatch_batches", [None, True, False])
@pytest.mark.parametrize("split_batches", [False, True])
def test_no_setting_of_the_data_loader_wraps_ours(url: str, dispatch_batches: bool | None, split_batches: bool) -> None:
    """Whatever Accelerate is told to do with data loaders, prepare returns the very loader it was given."""
    from accelerate import DataLoaderConfiguration

    configuration = DataLoaderConfiguration(
        dispatch_batches=dispatch_batches, split_batches=split_batches, even_batches=True
    )
    accelerator = Accelerator(cpu=True, dataloader_config=configuration)
    loader = make(url, 1)
    assert accelerator.prepare(loader) is loader
    assert accelerator.prepare(loader) is loader
    assert ids(loader) == ids(make(url, 1))


def test_accumulated_gradients_carry_over_the_end_of_an_epoch(url: str) -> None:
    """accumulate() steps every n batches, counted on over the epochs: it is not told where ours ends."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    loader = prepared(accelerator, make(url, 1))
    model = accelerator._models[0]
    steps = []
    for _ in range(2):
        for _batch in loader:
            with accelerator.accumulate(model):
                steps.append(accelerator.sync_gradients)
    assert steps == [number % 4 == 0 for number in range(1, len(steps) + 1)]


def test_skip_first_batches_is_refused(url: str) -> None:
    """It makes another loader over what ours reads, which would not know the place."""
    loader = StreamingDataLoader(StreamingDataset(url, batch_size=4, shuffle=True))
    with pytest.raises(StreamShardsError, match="only that loader can iterate it"):
        next(iter(skip_first_batches(loader, 2)))
