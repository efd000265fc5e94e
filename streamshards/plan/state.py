"""What the training loop has received, as one small flat dict; the same on every rank, on any number of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from streamshards.errors import OptionInvalid, ResumeMismatch
from streamshards.plan.assignment import Assignment
from streamshards.plan.order import OrderSettings

STATE_VERSION: Final = 1
MAX_EPOCH: Final = 1 << 40
"""So that positions counted over all epochs stay far inside 64 bits."""

_MAX_INTEGER: Final = 2**63 - 1
_INTEGERS: Final = ("version", "epoch", "position", "num_samples", "seed", "lanes", "chunk", "shuffle_block")
_IDENTITY: Final = ("kind", "fingerprint", "num_shards", "subset", "stop", "weights", "sources")
"""Keys that name what is read; others, which a checkpointer may have added, are left alone."""
_MAX_IDENTITY_BYTES: Final = 1 << 24
"""About 100,000 sources of a mixture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A place in the global order. Everything that shapes the order stands in it, so a resume needs nothing else."""

    epoch: int
    position: int
    """Samples of the epoch's global order that have been received, over all ranks."""
    num_samples: int
    """Of the epoch."""
    identity: Mapping[str, Any] = field(hash=False)
    """Names what is read, as JSON values: the dataset's ``"fingerprint"``, and what else a resume must find again."""
    order: OrderSettings
    worker_batches: int = 0
    """Only in the state of a single DataLoader worker: batches it delivered from *position* on."""
    num_workers: int = 1
    """Only in the state of a single DataLoader worker: how many there were."""
    global_batch: int = 0
    """Only in the state of a single DataLoader worker: samples of a step over all ranks."""

    def to_dict(self) -> dict[str, Any]:
        """Return a fresh dict of JSON values: flat and under 1 KiB, but for a mixture, which has a dict per source."""
        return {
            "version": STATE_VERSION,
            "epoch": self.epoch,
            "position": self.position,
            "num_samples": self.num_samples,
            **json.loads(json.dumps(self.identity)),  # a fresh one: nobody's changes to it reach us
            **asdict(self.order),
            **(
                {name: getattr(self, name) for name in ("worker_batches", "num_workers", "global_batch")}
                if self.worker_batches
                else {}
            ),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> State:
        """Return the state that :meth:`to_dict` gave.

        Raises:
            ResumeMismatch: Not such a dict, or one of a newer version.
        """
        if not isinstance(state, Mapping):
            raise ResumeMismatch(f"the state is a {type(state).__name__}, not the dict that state_dict() returns")
        version = state.get("version")
        if isinstance(version, int) and version > STATE_VERSION:
            raise ResumeMismatch(
                f"the state has version {version}, this streamshards reads up to {STATE_VERSION}; upgrade it"
            )
        missing = [name for name in (*_INTEGERS, "fingerprint", "shuffle") if name not in state]
        if missing:
            raise ResumeMismatch(f"the state lacks {', '.join(missing)}; {_hint(state)}")
        numbers = {name: state[name] for name in _INTEGERS}
        numbers["worker_batches"] = state.get("worker_batches", 0)
        numbers["num_workers"] = state.get("num_workers", 1)
        numbers["global_batch"] = state.get("global_batch", 0)
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_INTEGER:
                raise ResumeMismatch(f"the state's {name} is {value!r}, not a whole number from 0 to {_MAX_INTEGER:,}")
        if numbers["epoch"] > MAX_EPOCH:
            raise ResumeMismatch(f"the state's epoch is {numbers['epoch']:,}; the last one is {MAX_EPOCH:,}")
        for name, kind in (("fingerprint", str), ("shuffle", bool)):
            if not isinstance(state[name], kind):
                raise ResumeMismatch(f"the state's {name} is {state[name]!r}, not a {kind.__name__}")
        identity = {name: state[name] for name in _IDENTITY if name in state}
        try:
            size = len(json.dumps(identity))
        except (TypeError, ValueError, RecursionError) as error:
            raise ResumeMismatch(f"the state holds what JSON cannot: {error}") from error
        if size > _MAX_IDENTITY_BYTES:
            raise ResumeMismatch(f"the state has {size:,} bytes besides its place; that is none of ours")
        if version != STATE_VERSION:
            raise ResumeMismatch(f"the state has version {version!r}; only version {STATE_VERSION} exists")
        if state["position"] > state["num_samples"]:
            raise ResumeMismatch(f"the state's position {state['position']:,} is beyond its {state['num_samples']:,}")
        if numbers["lanes"] > max(1, numbers["num_samples"]):
            raise ResumeMismatch(f"the state's lanes {numbers['lanes']:,} are more than its samples")
        try:
            order = OrderSettings(
                shuffle=state["shuffle"],
                seed=state["seed"],
                lanes=state["lanes"],
                chunk=state["chunk"],
                shuffle_block=state["shuffle_block"],
            )
        except OptionInvalid as error:
            raise ResumeMismatch(f"the state cannot be right: {error}") from error
        return cls(
            epoch=state["epoch"],
            position=state["position"],
            num_samples=state["num_samples"],
            identity=identity,
            order=order,
            worker_batches=numbers["worker_batches"],
            num_workers=numbers["num_workers"],
            global_batch=numbers["global_batch"],
        )

    def after(self, assignment: Assignment, batches: int, *, is_over: bool = False) -> State:
        """Return the state once the reader of *assignment*, which began here, has handed out *batches* batches.

        Args:
            assignment: The rest of the epoch, from here.
            batches: How many of its batches were handed out.
            is_over: Whether the training loop has seen that there are no more.
        """
        if assignment.topology.num_workers == 1:
            return replace(self, position=self.num_samples if is_over else assignment.position_after(batches))
        return replace(
            self,
            worker_batches=self.worker_batches + batches,
            num_workers=assignment.topology.num_workers,
            global_batch=assignment.global_batch,
        )

    def require_workers(self, num_workers: int, global_batch: int) -> None:
        """Check that one of *num_workers* workers, in steps of *global_batch* samples, can go on from a worker's state.

        Raises:
            ResumeMismatch: It is the state of one worker of another number of them.
        """
        if self.num_workers != num_workers:
            raise ResumeMismatch(
                f"the state is that of one of {self.num_workers} DataLoader workers, there are {num_workers} here; "
                "use as many, or take states from StreamingDataLoader: those load on any number"
            )
        if self.global_batch != global_batch:
            raise ResumeMismatch(
                f"the state is that of a DataLoader worker with steps of {self.global_batch:,} samples over all ranks, "
                f"there are {global_batch:,} here; use the same batch_size and world size, or take states from "
                "StreamingDataLoader: those load on any"
            )

    def differences(self, ours: State) -> dict[str, tuple[Any, Any]]:
        """Return what *ours*, a state of what is open here, has otherwise: name → (here, in the state).

        Only what must be equal for a resume to be exact: not the place, and not the order's shape, which the state
        brings with it.
        """
        return dict(
            _differences(
                {
                    "num_samples": ours.num_samples,
                    **ours.identity,
                    "seed": ours.order.seed,
                    "shuffle": ours.order.shuffle,
                },
                {
                    "num_samples": self.num_samples,
                    **self.identity,
                    "seed": self.order.seed,
                    "shuffle": self.order.shuffle,
                },
            )
        )

    @property
    def is_between_epochs(self) -> bool:
        """Whether nothing of its epoch has been received, or everything."""
        return not self.worker_batches and self.position in (0, self.num_samples)


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in (*ours, *(name for name in theirs if name not in ours)):
        here, there = ours.get(name), theirs.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from _differences(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}", (here, there)


def mismatch(url: str, differences: Mapping[str, tuple[Any, Any]], advice: str) -> ResumeMismatch:
    """Return the error that lists all *differences* (name → here, in the state) and says what to do."""
    words = "; ".join(
        f"{name} is {_word(here)} here and {_word(there)} in the state" for name, (here, there) in differences.items()
    )
    if "kind" in differences:
        ours, theirs = (f"a {kind or 'dataset'}" for kind in differences["kind"])
        return ResumeMismatch(f"{url}: the state is of {theirs}, this is {ours}")
    return ResumeMismatch(f"{url}: the state is of another dataset or order: {words}. {advice}")


def _hint(state: Mapping[str, Any]) -> str:
    """Return what to pass instead of a dict that is no state."""
    if any(str(name).startswith("_") for name in state):
        return "it looks like one of torchdata's StatefulDataLoader, which only that loader takes back"
    inner = [name for name, value in state.items() if isinstance(value, Mapping) and "fingerprint" in value]
    if inner:
        return f"there is one under {inner[0]!r}: pass that part"
    return "pass what state_dict() returned, unchanged"


def _word(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
