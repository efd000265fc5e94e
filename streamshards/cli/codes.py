"""Exit codes: what a command tells a script."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from streamshards.errors import (
    DatasetReplaced,
    IndexInvalid,
    OptionInvalid,
    ResumeMismatch,
    SampleInvalid,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StreamShardsError,
    TooManyCorrupt,
    UnsafePickle,
)


class ExitCode(IntEnum):
    """What a command tells a script. docs/cli.md and ``--help`` show this table."""

    OK = 0
    BAD_SHARDS = 1
    USAGE = 2
    NO_DATASET = 3
    STORE = 4
    BAD_DATA = 5
    MISMATCH = 6
    INTERNAL = 70
    INTERRUPTED = 130
    PIPE_CLOSED = 141


MEANINGS: Final = {
    ExitCode.OK: "done",
    ExitCode.BAD_SHARDS: "verify found bad shards",
    ExitCode.USAGE: "wrong command, option or value, or a dataset is there already",
    ExitCode.NO_DATASET: "no dataset or no .pt files at the url, or its index is damaged or from a newer version",
    ExitCode.STORE: "the store failed, refused our credentials, or has no such bucket or object",
    ExitCode.BAD_DATA: "a shard or file is damaged, unsafe to unpickle, or does not fit the others",
    ExitCode.MISMATCH: "the checkpoint has no state, or one of another dataset",
    ExitCode.INTERNAL: "a defect of streamshards: please report it, with what --debug shows",
    ExitCode.INTERRUPTED: "stopped by Ctrl-C",
    ExitCode.PIPE_CLOSED: "whoever read our output stopped reading",
}

_CODES: Final[tuple[tuple[type[StreamShardsError], ExitCode], ...]] = (
    (OptionInvalid, ExitCode.USAGE),
    (IndexInvalid, ExitCode.NO_DATASET),
    (SampleInvalid, ExitCode.BAD_DATA),
    (ShardCorrupt, ExitCode.BAD_DATA),
    (ShardMissing, ExitCode.BAD_DATA),
    (TooManyCorrupt, ExitCode.BAD_DATA),
    (DatasetReplaced, ExitCode.BAD_DATA),
    (UnsafePickle, ExitCode.BAD_DATA),
    (ResumeMismatch, ExitCode.MISMATCH),
    (StoreError, ExitCode.STORE),
)
"""The first that fits decides: ``ShardMissing`` is a ``StoreError``, too."""


class Stopped(Exception):
    """The command was stopped from outside: by Ctrl-C, or because nobody reads its output any more."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(MEANINGS[code])
        self.code = code


def code_of(error: StreamShardsError) -> ExitCode:
    """Return the exit code for *error*."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.INTERNAL)
