"""States in checkpoints: found wherever they lie in a JSON file or in one of ``torch.save``."""

from __future__ import annotations

import json
import mmap
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from streamshards.errors import OptionInvalid, ResumeMismatch, UnsafePickle
from streamshards.plan.state import State
from streamshards.shard.layouts import SAFE_TORCH
from streamshards.shard.pickles import NeedsCode, Refused, require_loadable

STDIN: Final = "-"
"""The file name that means standard input, which must be JSON."""

_MAX_DEPTH: Final = 64
"""Deeper than any checkpoint nests, and far from what recursion can do."""
_MARKS: Final = frozenset({"position", "fingerprint", "num_samples", "shuffle_block"})
"""A dict with these keys is meant to be a state: if it is none that we can read, that is an error."""


class FoundState(NamedTuple):
    """A state, and where in its file it lies."""

    path: str
    """The keys that lead there: ``"loaders.train"``; empty where the file is the state."""
    state: State


def read_states(file: str) -> list[FoundState]:
    """Return the states in *file*, in its order.

    Args:
        file: A local JSON file, or one that ``torch.save`` wrote; ``"-"`` is JSON from standard input.

    Raises:
        OptionInvalid: There is no such file, or it is neither.
        UnsafePickle: torch cannot load it without running code from it.
        ResumeMismatch: No state is in it, or one that this version cannot read.
    """
    found = list(find_states(_load(file)))
    if not found:
        raise ResumeMismatch(f"{file}: no state in it; save what state_dict() of a loader or dataset returns")
    return found


def find_states(content: object) -> Iterator[FoundState]:
    """Yield the states in nested dicts and lists, in their order.

    Raises:
        ResumeMismatch: A dict is meant to be a state, but cannot be read.
    """
    yield from _search(content, "", 0)


def chosen_state(found: list[FoundState], *, file: str, path: str | None) -> State:
    """Return the state at *path*, or without one the only state there is.

    Raises:
        OptionInvalid: There is none at *path*, or without one there are several.
    """
    fitting = [each.state for each in found if path is None or each.path == path]
    distinct = [state for number, state in enumerate(fitting) if state not in fitting[:number]]
    if len(distinct) == 1:
        return distinct[0]
    where = ", ".join(repr(each.path) for each in found)
    if not distinct:
        raise OptionInvalid(f"{file}: no state at {path!r}; there are states at {where}")
    raise OptionInvalid(f"{file}: {len(distinct)} different states, at {where}; say which with --state-path")


def _search(node: object, path: str, depth: int) -> Iterator[FoundState]:
    if depth > _MAX_DEPTH:
        return
    if isinstance(node, Mapping) and node.keys() >= _MARKS:
        try:
            yield FoundState(path, State.from_dict(node))
        except ResumeMismatch as error:
            raise ResumeMismatch(f"at {path!r}: {error}" if path else str(error)) from error
        return
    children: Iterator[tuple[object, object]] = iter(())
    if isinstance(node, Mapping):
        children = iter(node.items())
    elif isinstance(node, (list, tuple)):
        children = iter(enumerate(node))
    for key, child in children:
        if isinstance(child, (Mapping, list, tuple)):
            yield from _search(child, f"{path}.{key}" if path else str(key), depth + 1)


def _load(file: str) -> Any:
    """Return what is in *file*."""
    try:
        if file == STDIN:
            return _parsed(sys.stdin.buffer.read(), "standard input")
        if zipfile.is_zipfile(file):
            return _load_torch(file)
        return _parsed(Path(file).read_bytes(), file)
    except OSError as error:
        raise OptionInvalid(f"{file}: cannot be read: {error.strerror or error}") from error


def _parsed(text: bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionInvalid(f"{name}: neither JSON nor a file that torch.save writes: {str(error)[:200]}") from error


def _load_torch(file: str) -> Any:
    """Return what ``torch.save`` wrote. Tensors stay on disk: nobody looks at them."""
    if torch.__version__ < SAFE_TORCH:  # type: ignore[operator]  # it compares with tuples, its stub does not say so
        safe = ".".join(map(str, SAFE_TORCH))
        raise OptionInvalid(
            f"{file}: torch {torch.__version__} has known holes in loading pickles safely; update to {safe}, "
            "or save the state as JSON"
        )
    try:
        with open(file, "rb") as opened:
            require_loadable(memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Refused as error:
        raise OptionInvalid(f"{file}: torch.load cannot read it safely: {error}") from None
    except NeedsCode as error:
        raise UnsafePickle(
            f"{file}: torch does not load it with weights_only=True: it needs {error}; save the state as JSON beside it"
        ) from None
    except pickle.UnpicklingError as error:
        reason = next(iter(str(error).strip().splitlines()), "no message")[:200]
        raise UnsafePickle(
            f"{file}: torch does not load it with weights_only=True: {reason}; save the state as JSON beside it"
        ) from error
    except Exception as error:  # torch.load raises what the damage happens to hit: KeyError, RuntimeError, EOFError, …
        reason = next(iter(str(error).strip().splitlines()), "no message")[:200]
        raise OptionInvalid(f"{file}: torch.load cannot read it: {type(error).__name__}: {reason}") from error
