"""Train a tiny linear model from a stream of shards; kill it whenever you like and start it again.

    python examples/pack_sample.py                      # once: makes the dataset
    python examples/train_minimal.py                    # from $DATA_URL, or s3://streamshards/train

The checkpoint is one JSON file with the model and the loader's state in it, replaced atomically: the two never
disagree, and a run that was killed goes on with the very next batch. (A real model does the same with torch.save.)
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import streamshards as ss

NUM_CLASSES = 9
POOLED = 8
"""Pixels a side that the model sees: enough for it, and it keeps the JSON small."""


class TinyModel(nn.Module):
    """Average-pooled pixels to classes, one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(POOLED)
        self.linear = nn.Linear(3 * POOLED * POOLED, NUM_CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits ``(N, 9)`` of uint8 images ``(N, 3, H, W)``."""
        scaled = image.float().div(127.5).sub(1.0)
        logits: torch.Tensor = self.linear(self.pool(scaled).flatten(1))
        return logits


def save(path: Path, checkpoint: dict[str, Any]) -> None:
    """Replace *path* by *checkpoint*; a kill at any moment leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")  # one trainer writes it; what a kill leaves is written over
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    """Train, or go on training, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=os.environ.get("DATA_URL", "s3://streamshards/train"))
    parser.add_argument("--checkpoint", type=Path, default=Path(os.environ.get("CHECKPOINT", "train-minimal.json")))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=25, metavar="STEPS")
    options = parser.parse_args()

    torch.manual_seed(17)
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    dataset = ss.StreamingDataset(options.url, batch_size=options.batch_size, shuffle=True, seed=17)
    loader = ss.StreamingDataLoader(dataset, num_workers=options.workers)

    step, loss_value = 0, float("nan")
    last_step = options.epochs * len(loader)
    if options.checkpoint.exists():
        checkpoint = json.loads(options.checkpoint.read_text(encoding="utf-8"))
        model.load_state_dict({name: torch.tensor(value) for name, value in checkpoint["model"].items()})
        loader.load_state_dict(checkpoint["loader"])
        step, loss_value = checkpoint["step"], checkpoint["loss"]
        print(f"resumed from {options.checkpoint} after step {step} of {last_step}")

    samples, started = 0, time.perf_counter()
    while step < last_step:
        for batch in loader:  # one pass is one epoch, or the rest of one
            loss = nn.functional.cross_entropy(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
            optimizer.step()
            step, loss_value = step + 1, loss.item()
            samples += len(batch["label"])
            if step % options.save_every == 0 or step == last_step:
                state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
                position = loader.state_dict()
                save(options.checkpoint, {"step": step, "loss": loss_value, "model": state, "loader": position})
            if step == last_step:
                break
    seconds = time.perf_counter() - started
    print(f"step {step} of {last_step}: final loss {loss_value:.4f}, {samples / max(seconds, 1e-9):,.0f} samples/s")


if __name__ == "__main__":
    main()
