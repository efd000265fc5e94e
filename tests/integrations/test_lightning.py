"""Lightning: examples/lightning_module.py resumes from every checkpoint that Lightning can write, exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from examples.lightning_module import EpochLoader, StreamingDataModule
from streamshards import StreamingDataLoader
from tests.datasets import flat, ids, write
from tests.integrations.launch import torchrun
from tests.integrations.lightning_ranks import GLOBAL_BATCH, SAVE_EVERY, Model, make, make_trainer

NUM_SAMPLES = 100
EPOCH_STEPS = 5
KILLED_AFTER = 7

pytestmark = [
    # Lightning uses what torch has renamed.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    # On purpose: what resumes does not save again.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used to create:UserWarning"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset") / "train"
    write(str(folder), range(NUM_SAMPLES))
    return str(folder)


class Validated(Model):
    """Has something to validate, which is when Lightning writes checkpoints by default."""

    validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1


# Lightning keeps the state of one callback of each class.
class AfterEachStep(ModelCheckpoint): ...


class AfterEachEpoch(ModelCheckpoint): ...


class AfterValidation(ModelCheckpoint): ...


def savers(folder: Path) -> Iterator[ModelCheckpoint]:
    """Yield callbacks that keep a checkpoint of every occasion."""
    options: dict[str, Any] = {"dirpath": folder, "save_top_k": -1}
    yield AfterEachStep(filename="step-{step}", every_n_train_steps=1, **options)
    yield AfterEachEpoch(filename="epoch-{step}", save_on_train_epoch_end=True, **options)
    yield AfterValidation(filename="validation-{step}", **options)


def trained_before(checkpoint: Path) -> int:
    """Return how many batches Lightning had trained when it wrote *checkpoint*."""
    loops = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]
    count: int = loops["epoch_loop.batch_progress"]["total"]["processed"]
    return count


def data_for(url: str, model: Model) -> StreamingDataModule:
    """Return data for training, and for validation where *model* has any."""
    data = make(url, 1)
    if isinstance(model, Validated):
        data.val_dataloader = lambda: torch.utils.data.DataLoader(range(2))  # type: ignore[method-assign, arg-type]
    return data


CASES: dict[str, tuple[type[Model], dict[str, Any]]] = {
    "plain": (Model, {}),
    "validation": (Validated, {}),
    "validation inside the epoch": (Validated, {"val_check_interval": 2}),
    "accumulated gradients": (Model, {"accumulate_grad_batches": 2}),
    "limited epochs": (Model, {"limit_train_batches": 3}),
    "reloaded": (Model, {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_every_checkpoint(url: str, tmp_path: Path, case: str) -> None:
    """Whenever it was written, a checkpoint goes on with the very next batch, and epochs and steps count on."""
    kind, options = CASES[case]
    whole = kind()
    trainer = make_trainer(*savers(tmp_path), **options)
    trainer.fit(whole, data_for(url, whole))
    if isinstance(whole, Validated):
        assert whole.validated
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= trainer.global_step
    until_step = {"max_steps": trainer.global_step, "max_epochs": -1}
    for checkpoint in checkpoints:
        done = trained_before(checkpoint)
        for ends in ({}, until_step) if case != "reloaded" else ({},):
            resumed = kind()
            make_trainer(**{**options, **ends}).fit(resumed, data_for(url, resumed), ckpt_path=str(checkpoint))
            assert resumed.seen == whole.seen[done:], (checkpoint.name, ends)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_sample_once_over_two_lives(url: str, tmp_path: Path, num_workers: int) -> None:
    """Saved in the middle of the second epoch, resumed with other workers: each epoch has each sample once."""

    class Leave(lightning.Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == KILLED_AFTER:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")
                raise ArithmeticError

    first, second = Model(), Model()
    with pytest.raises(ArithmeticError):
        make_trainer(Leave()).fit(first, make(url, 1, num_workers))
    make_trainer().fit(second, make(url, 1, 2 - num_workers), ckpt_path=str(tmp_path / "saved.ckpt"))
    assert len(first.seen) == KILLED_AFTER
    seen = first.seen + second.seen
    assert [step[:2] for step in seen] == [(epoch, step) for epoch in range(2) for step in range(EPOCH_STEPS)]
    for epoch in range(2):  # the last batch is padded with the epoch's first samples
        samples = flat(batch for number, _, batch in seen if number == epoch)
        assert sorted(samples[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
        assert samples[NUM_SAMPLES:] == samples[: EPOCH_STEPS * GLOBAL_BATCH - NUM_SAMPLES]


class Fails(Model):
    """Raises before a step is done."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.at:
            raise ArithmeticError("in the middle of a step")
        return super().training_step(batch, batch_idx)


# With OnExceptionCheckpoint, Lightning looks for the last checkpoint by itself; a first life has none.
@pytest.mark.filterwarnings("ignore:.*was called without a model:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
def test_a_step_that_failed_is_done_again(url: str, tmp_path: Path) -> None:
    """A batch that was fetched when its step failed was not trained: OnExceptionCheckpoint resumes with it."""
    whole = Model()
    make_trainer().fit(whole, make(url, 1))
    for at in range(len(whole.seen)):
        first, second = Fails(at), Model()
        with pytest.raises(ArithmeticError):
            make_trainer(OnExceptionCheckpoint(tmp_path, str(at))).fit(first, make(url, 1))
        make_trainer().fit(second, make(url, 1), ckpt_path=str(tmp_path / f"{at}.ckpt"))
        assert first.seen + second.seen == whole.seen


def test_ddp_killed_and_resumed_on_two_ranks_and_on_one(url: str, tmp_path: Path) -> None:
    """Two ranks, SIGKILL, resumed on two ranks and on one: one order, nothing lost, no sampler in between."""
    killed = torchrun("lightning_ranks.py", 2, url, str(tmp_path), str(KILLED_AFTER))
    assert "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-3000:]
    shutil.copy(tmp_path / "saved.ckpt", tmp_path / "first.ckpt")
    assert trained_before(tmp_path / "first.ckpt") == SAVE_EVERY
    resumed = torchrun("lightning_ranks.py", 2, url, str(tmp_path), "0")
    assert resumed.returncode == 0, resumed.stderr[-3000:]

    whole = Model()
    make_trainer().fit(whole, make(url, 1))
    expected = [list(step) for step in whole.seen]
    for life, steps in (("killed", slice(KILLED_AFTER)), ("resumed", slice(SAVE_EVERY, None))):
        ranks = [json.loads((tmp_path / f"{life}-{rank}.json").read_text()) for rank in range(2)]
        both = [[*one[:2], one[2] + two[2]] for one, two in zip(*ranks, strict=True)]
        assert both == expected[steps]

    alone = Model()
    make_trainer().fit(alone, make(url, 1), ckpt_path=str(tmp_path / "first.ckpt"))
    assert alone.seen == whole.seen[SAVE_EVERY:]


@pytest.mark.parametrize("factor", [2, 0.5])
def test_resumed_with_another_global_batch(url: str, tmp_path: Path, factor: float) -> None:
    """With more or fewer steps an epoch than before, each epoch still has each sample exactly once."""
    whole = Model()
    make_trainer(*savers(tmp_path)).fit(whole, make(url, 1))
    for checkpoint in sorted(tmp_path.glob("*.ckpt")):
        resumed = Model()
        data = make(url, 1)
        data.options["batch_size"] = int(GLOBAL_BATCH * factor)
        make_trainer(reload_dataloaders_every_n_epochs=1).fit(resumed, data, ckpt_path=str(checkpoint))
        seen = whole.seen[: trained_before(checkpoint)] + resumed.seen
        for epoch in range(2):
            samples = flat(batch for number, _, batch in seen if number == epoch)
            assert sorted(samples[:NUM_SAMPLES]) == list(range(NUM_SAMPLES)), (checkpoint.name, epoch)


@pytest.mark.filterwarnings("ignore:Your .IterableDataset. has .__len__. defined:UserWarning")  # ours is exact
def test_a_loader_of_ours_is_left_as_it_is(url: str) -> None:
    """Handed to Lightning without a DataModule, the loader is used itself: no sampler, no other loader around it."""
    data = make(url, 1)
    trainer = make_trainer(max_epochs=1)
    model = Model()
    data.trainer = trainer
    loader = data.train_dataloader().loader
    assert isinstance(loader, StreamingDataLoader)
    trainer.fit(model, loader)
    assert trainer.train_dataloader is loader
    loader.set_epoch(0)
    assert [step[2] for step in model.seen] == ids(loader)


def test_iterating_twice_before_a_batch_is_one_epoch(url: str) -> None:
    """Lightning calls iter() to see whether it can: an iteration that nobody read does not count."""
    data = make(url, 1)
    data.trainer = make_trainer()
    loader: EpochLoader = data.train_dataloader()
    iter(loader)
    first = ids(loader)
    iter(loader)
    second = ids(loader)
    plain = loader.loader
    plain.set_epoch(0)
    assert [first, second] == [ids(plain), ids(plain)]
