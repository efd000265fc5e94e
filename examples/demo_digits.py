"""The demo's digit classifier: scikit-learn's digits, one shard of which is corrupt for some epochs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import streamshards as ss
from streamshards.events import Event

BATCH_SIZE = 32
EPOCHS = 8
SEED = 17
SHARD_BYTES = "24KiB"
"""Small, so that these few digits fill more than a dozen shards; leave the default for a real dataset."""
CORRUPTED_SHARD = 7
CORRUPT_AFTER, REPAIR_AFTER = 1, 4
"""Epochs; the shard is corrupt in those between."""
MAX_CORRUPT = 0.1
"""Room for one of those shards; the default, 0.01, would stop the training with TooManyCorrupt."""


@dataclass(frozen=True)
class Digits:
    """1,797 images of 8 x 8 pixels, values 0 to 16, and which of them are for training."""

    images: np.ndarray[Any, np.dtype[np.float32]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    train: list[int]
    test: list[int]


@dataclass
class Course:
    """What a training did, epoch by epoch."""

    promised: int = 0
    """Batches in an epoch, as ``len`` said before the first."""
    batches: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    wrong_rows: int = 0
    """Delivered rows that were not what had been packed."""
    stats: dict[str, int | float] = field(default_factory=dict)
    seconds: float = 0.0


def read_digits() -> Digits:
    """Return the digits with a split that is the same every time."""
    bunch = load_digits()
    numbers = np.arange(len(bunch.target))
    train, test = train_test_split(numbers, test_size=0.2, random_state=SEED, stratify=bunch.target)
    return Digits(bunch.images.astype(np.float32), bunch.target.astype(np.int64), train.tolist(), test.tolist())


def pack(digits: Digits, numbers: list[int], url: str, storage_options: dict[str, Any]) -> None:
    """Write the digits of those *numbers*."""
    with ss.ShardWriter(url, shard_bytes=SHARD_BYTES, storage_options=storage_options) as out:
        for number in numbers:
            out.write({"id": number, "image": digits.images[number], "label": int(digits.labels[number])})


def train(
    digits: Digits,
    train_url: str,
    test_url: str,
    *,
    storage_options: dict[str, Any],
    observer: Callable[[Event], None],
    after_epoch: Callable[[int, ss.StreamingDataset], None],
) -> Course:
    """Train a small convolutional net and return how it went; *after_epoch* is called with 1, 2, … after each epoch."""
    torch.set_num_threads(1)  # more would only wait for each other: a step takes a millisecond
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dataset = ss.StreamingDataset(
        train_url,
        batch_size=BATCH_SIZE,
        shuffle=True,
        seed=SEED,
        max_corrupt=MAX_CORRUPT,
        storage_options=storage_options,
        observer=observer,
    )
    loader = ss.StreamingDataLoader(dataset)
    held_out = ss.StreamingDataset(test_url, batch_size=256, tail="uneven", storage_options=storage_options)
    course = Course(promised=len(loader))
    images, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.labels)
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        batches, samples, loss_sum = 0, 0, 0.0
        for batch in loader:
            ids = batch["id"]
            is_right = (batch["image"] == images[ids]).flatten(1).all(1) & (batch["label"] == labels[ids])
            course.wrong_rows += int((~is_right).sum())
            loss = nn.functional.cross_entropy(model(batch["image"][:, None] / 16), batch["label"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships it untyped
            optimizer.step()
            batches, samples, loss_sum = batches + 1, samples + len(batch["label"]), loss_sum + loss.item()
        course.batches.append(batches)
        course.samples.append(samples)
        course.losses.append(loss_sum / batches)
        course.accuracies.append(accuracy(model, held_out))
        after_epoch(epoch + 1, dataset)
    course.stats, course.seconds = dataset.stats(), time.perf_counter() - started
    return course


@torch.no_grad()
def accuracy(model: nn.Module, held_out: ss.StreamingDataset) -> float:
    """Return the part of the held-out digits that *model* names right; each is seen exactly once."""
    right = total = 0
    for batch in held_out:
        right += int((model(batch["image"][:, None] / 16).argmax(1) == batch["label"]).sum())
        total += len(batch["label"])
    return right / total
