"""A store, and how we ask it: every request with the engine's retries, a dataset's shards through its fetcher."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch

from streamshards.clock import Clock, SystemClock
from streamshards.engine.catalog import INDEX_KEY, Catalog, load_index, save_index
from streamshards.engine.fetch import Fetcher
from streamshards.engine.retry import circuit_of, with_retries
from streamshards.events import COUNTERS, Counters, Event, emit
from streamshards.options import RetryOptions
from streamshards.plan.index import Index
from streamshards.shard.schema import Schema
from streamshards.storage import Blob, Store, open_store

T = TypeVar("T")

Progress: TypeAlias = Callable[[int, int, str], None]
"""Told after each file or shard: how many are done, how many there are, the name of the last. Must be quick."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One url, open for whatever a command does there. It knows nobody who could cancel it but Ctrl-C."""

    store: Store
    retry: RetryOptions
    clock: Clock = field(default_factory=SystemClock)
    cancelled: threading.Event = field(default_factory=threading.Event)
    counters: Counters = field(default_factory=lambda: Counters(torch.zeros(len(COUNTERS), dtype=torch.int64)))

    @classmethod
    def at(
        cls,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        retry: RetryOptions | None = None,
    ) -> Place:
        """Return the place at *url*; nothing is connected yet.

        Raises:
            OptionInvalid: Not a url, or not storage options.
        """
        return cls(store=open_store(url, storage_options), retry=retry or RetryOptions())

    @property
    def url(self) -> str:
        """Where it is, without credentials."""
        return self.store.url

    @property
    def emit(self) -> Callable[[Event], None]:
        """What takes events: they are logged."""
        return partial(emit, observer=None, counters=self.counters)

    def list(self) -> list[tuple[str, int]]:
        """Return key and size of every object, sorted by key, within ``retry.first_contact_s``.

        Raises:
            StoreError: The store did not answer, or refused.
        """
        return self._call(lambda timeout_s: self.store.list(timeout_s=timeout_s), "list", self.retry.first_contact_s)

    def get(self, key: str, *, max_bytes: int) -> Blob:
        """Return one whole object.

        Raises:
            ObjectMissing: There is none.
            StoreError: Longer than *max_bytes*, or the store did not give it within ``retry.deadline_s``.
        """

        def attempt(timeout_s: float) -> Blob:
            return self.store.get(key, timeout_s=timeout_s, max_bytes=max_bytes)

        return self._call(attempt, key, self.retry.deadline_s)

    def load_index(self) -> Index:
        """Return the index of the dataset here.

        Raises:
            IndexInvalid: There is none, or it does not hold.
            StoreError: The store did not give it.
        """
        return load_index(self.store, **self._how())

    def index_keys(self) -> set[str]:
        """Return the keys that the current index lies under: ``index.json``, and its part if it is large."""
        retry = self.retry
        catalog = Catalog(self.store, retry, retry.first_contact_s, self.clock, self.cancelled, self.emit)
        found = catalog.find()
        if found is None:
            return set()
        return {INDEX_KEY} if found.part is None else {INDEX_KEY, found.part}

    def save_index(self, index: Index, *, replace: bool) -> None:
        """Make *index* the current one, in one atomic step; with *replace* whatever stands there now.

        Raises:
            ObjectExists: There is one, and *replace* is not set.
            IndexInvalid: There is a damaged one, and *replace* is not set.
            StoreError: The store did not take it.
        """
        save_index(self.store, index, base=None, checked=not replace, **self._how())

    def fetcher(self, index: Index, *, trust_pickle: bool = False) -> Fetcher:
        """Return what fetches and verifies the shards of *index*."""
        return Fetcher(
            self.store,
            index,
            Schema.from_json(index.schema),
            retry=self.retry,
            clock=self.clock,
            cancelled=self.cancelled,
            counters=self.counters,
            emit=self.emit,
            trust_pickle=trust_pickle,
        )

    def _how(self) -> dict[str, Any]:
        return {"retry": self.retry, "clock": self.clock, "cancelled": self.cancelled, "on_retry": self.emit}

    def _call(self, action: Callable[[float], T], key: str, deadline_s: float) -> T:
        return with_retries(
            action,
            what=f"{self.url}/{key}",
            options=self.retry,
            deadline_s=deadline_s,
            clock=self.clock,
            cancelled=self.cancelled,
            on_retry=self.emit,
            circuit=circuit_of(self.store, self.clock),
        )
