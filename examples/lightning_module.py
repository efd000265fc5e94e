"""Train with Lightning from a stream of shards; kill it whenever you like and start it again.

    pip install lightning
    python examples/pack_sample.py --url data/sample              # once: makes the dataset
    python examples/lightning_module.py --url data/sample         # again after a kill: goes on where it was

Copy the two upper classes. No sample is lost or repeated, wherever in an epoch a checkpoint was written, also by
``OnExceptionCheckpoint`` in the middle of a step, and with accumulated gradients. What Lightning 2.6 does to loaders:

- It counts the batches of a resumed epoch from the epoch's beginning, so a loader's length must count them, too.
- It restores a loader's own state only inside an epoch, not at its end. The DataModule's state is always restored.
- A batch has been fetched before its step is done: the state that fits the weights may be one batch back.
- It may call ``iter`` twice for one epoch; for a streamshards loader the second call would be the next epoch.
- Resumed from the end of an epoch it goes on with the next one; but with ``max_steps`` it ends the old one again.

To resume on another number of ranks or with another batch size, which changes the epoch's number of steps, use
``Trainer(reload_dataloaders_every_n_epochs=1)``: Lightning asks for a length only when it loads the loader.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import streamshards as ss


class EpochLoader:
    """A loader as Lightning wants it: its length is the whole epoch's, *before* batches of an earlier life included."""

    def __init__(
        self, loader: ss.StreamingDataLoader, *, before: int = 0, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        self.loader = loader
        self.before = before
        self.is_over = is_over
        """Whether Lightning still asks for an epoch that has no more batches."""
        self.is_fresh = True
        """Whether no batch has been asked for since the epoch, or its rest, began."""
        self.places = {before: loader.state_dict()}
        """Batches of the epoch → the loader's state after them; of the last two."""

    def __len__(self) -> int:
        return self.before + len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self.is_fresh:
            self.loader.load_state_dict(self.loader.state_dict())  # begin at the same place, however often
        else:
            self.before = 0
        self.is_fresh = True
        batches = iter(self.loader)
        self.places = {self.before: self.loader.state_dict()}
        return self._counted(batches)

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        if self.is_over():
            return
        self.is_fresh = False
        for number, batch in enumerate(batches, self.before + 1):
            self.places = {number - 1: self.places[number - 1], number: self.loader.state_dict()}
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the DataModule saves the place. Lightning warns about loaders without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the DataModule has loaded the place."""


class StreamingDataModule(lightning.LightningDataModule):
    """Streams a dataset for training; each rank takes its part, and the checkpoint holds the exact place.

    Args:
        url: Where the shards are.
        num_workers: DataLoader workers of each rank; 0 reads on threads, which is often the fastest.
        **options: As for :class:`streamshards.StreamingDataset`: ``batch_size`` (of one rank), ``seed``, …
    """

    def __init__(self, url: str, *, num_workers: int = 0, **options: Any) -> None:
        super().__init__()
        self.url = url
        self.num_workers = num_workers
        self.options = options
        self.train: EpochLoader | None = None
        self._loaded: dict[str, Any] | None = None

    def train_dataloader(self) -> EpochLoader:
        """Return a loader that begins at the loaded place, or else with the current epoch."""
        dataset = ss.StreamingDataset(self.url, shuffle=True, **self.options)
        loader = ss.StreamingDataLoader(dataset, num_workers=self.num_workers)
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            loader.set_epoch(self.trainer.current_epoch)
            self.train = EpochLoader(loader)
        elif loaded["is_over"]:
            loader.set_epoch(loaded["loader"]["epoch"] + 1)
            epochs = self.trainer.fit_loop.epoch_progress.current
            over = epochs.processed if epochs.processed == epochs.ready and self.trainer.max_steps != -1 else None
            self.train = EpochLoader(loader, is_over=lambda: epochs.processed == over)
            # Lightning asks whether it has counted as many batches as an epoch has now.
            counted = self.trainer.fit_loop.epoch_loop.batch_progress.current
            counted.completed = max(counted.completed, len(loader))
        else:
            loader.load_state_dict(loaded["loader"])
            self.train = EpochLoader(loader, before=loaded["batches"])
        return self.train

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch whose step is done."""
        if self.train is None:
            return {}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = progress.current.processed
        is_over = progress.is_last_batch and batches == progress.current.ready
        if batches not in self.train.places:  # resumed between two epochs, and Lightning still counts the old one
            batches, is_over = max(self.train.places), False
        return {"batches": batches, "is_over": is_over, "loader": self.train.places[batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let training go on from there; Lightning calls this before it asks for the loader."""
        self._loaded = state or None


class TinyModel(lightning.LightningModule):
    """Pixels to 9 classes, one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(3 * 8 * 8, 9))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:  # noqa: ARG002 -- Lightning's names
        """Return the loss of *batch*."""
        loss = nn.functional.cross_entropy(self.model(batch["image"].float().div(127.5).sub(1.0)), batch["label"])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.5)


def main() -> None:
    """Train, or go on training from the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="data/sample")
    parser.add_argument("--checkpoints", type=Path, default=Path("lightning-checkpoints"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()

    keep_last = ModelCheckpoint(options.checkpoints, every_n_train_steps=10, save_last=True)
    trainer = lightning.Trainer(max_epochs=options.epochs, callbacks=[keep_last], logger=False)
    data = StreamingDataModule(options.url, batch_size=64, seed=17, num_workers=options.workers)
    last = options.checkpoints / "last.ckpt"
    trainer.fit(TinyModel(), data, ckpt_path=str(last) if last.exists() else None)
    print(f"{trainer.global_step} steps")


if __name__ == "__main__":
    main()
