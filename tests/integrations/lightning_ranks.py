"""A rank that trains under Lightning's DDP, and kills itself after a step if it is told to; it logs each batch.

lightning_ranks.py URL FOLDER KILL_AFTER_STEP|0
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from examples.lightning_module import StreamingDataModule
from streamshards import OrderOptions

GLOBAL_BATCH = 24
SAVE_EVERY = 4
EPOCHS = 2


class Model(lightning.LightningModule):
    """Keeps the ids it is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, int, list[int]]] = []
        """Epoch, batch of the epoch, ids."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["id"].tolist()))
        loss: torch.Tensor = self.weights(torch.ones(1, 1)).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(url: str, num_ranks: int, num_workers: int = 0) -> StreamingDataModule:
    """Return a module whose global batch is the same on 1 and 2 ranks."""
    order = OrderOptions(lanes=4, shuffle_block=60)
    return StreamingDataModule(
        url, batch_size=GLOBAL_BATCH // num_ranks, seed=5, columns=["id"], order=order, num_workers=num_workers
    )


def make_trainer(*callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    """Return a quiet trainer on the CPU."""
    return lightning.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, **options},
    )


class Kill(lightning.Callback):
    """Ends the process at once after a step, and tells the batches first."""

    def __init__(self, after_step: int, tell: Path) -> None:
        self.after_step = after_step
        self.tell = tell

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.after_step:
            self.tell.write_text(json.dumps(module.seen))
            trainer.strategy.barrier()  # both have written
            os.kill(os.getpid(), signal.SIGKILL)


def main(url: str, folder: str, kill_after: str) -> None:
    rank = os.environ["RANK"]
    checkpoint = Path(folder, "saved.ckpt")
    tell = Path(folder, f"{'resumed' if checkpoint.exists() else 'killed'}-{rank}.json")
    keep = ModelCheckpoint(folder, filename="saved", every_n_train_steps=SAVE_EVERY, enable_version_counter=False)
    killers = [Kill(int(kill_after), tell)] if int(kill_after) else []
    trainer = make_trainer(keep, *killers, strategy="ddp", devices=2, num_nodes=1)
    model, data = Model(), make(url, 2)
    trainer.fit(model, data, ckpt_path=str(checkpoint) if checkpoint.exists() else None)
    assert trainer.train_dataloader is data.train
    tell.write_text(json.dumps(model.seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
