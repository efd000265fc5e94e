"""The errors streamshards raises, as one tree.

Branches are cut by what the caller can do about it::

    StreamShardsError
    ├── OptionInvalid        change the call (also a ValueError)
    ├── SampleInvalid        change the sample handed to the writer (also a ValueError)
    ├── IndexInvalid         point at a dataset, or rebuild its index
    ├── ResumeMismatch       resume with the settings the checkpoint was made with
    ├── DatasetReplaced      begin anew with the dataset that is there now
    ├── TooManyCorrupt       repair the dataset, or raise ``max_corrupt``
    ├── UnsafePickle         trust a foreign file's code, or convert the file
    ├── ShardCorrupt         repair that shard (``streamshards verify`` lists all of them)
    └── StoreError           look at the store
        ├── ObjectMissing    the object is not there
        │   └── ShardMissing the index names it, the store does not have it
        ├── ObjectTooLarge   not the object that was meant, or one that grew
        ├── ObjectExists     another writer was first: choose another key, or read what is there
        ├── AccessDenied     mend the credentials or the bucket policy
        └── StoreUnavailable wait and try again; the only *transient* one

Every error is constructible from one string, because a DataLoader rebuilds a worker's error as
``type(error)(text)``; anything that needs more arguments would arrive as a bare RuntimeError.
"""

from __future__ import annotations

from typing import ClassVar


class StreamShardsError(Exception):
    """Anything that streamshards raises on purpose."""

    transient: ClassVar[bool] = False
    """Whether trying the same thing again, later, may succeed."""


class OptionInvalid(StreamShardsError, ValueError):
    """An argument or option cannot be what it was set to."""


class SampleInvalid(StreamShardsError, ValueError):
    """A sample does not fit the dataset, or holds something that cannot be stored."""


class IndexInvalid(StreamShardsError):
    """There is no dataset at this url, or its index is damaged, hostile or from a newer version."""


class ResumeMismatch(StreamShardsError):
    """A checkpoint belongs to another dataset or to other order settings."""


class DatasetReplaced(StreamShardsError):
    """The index in the store is another one than was opened, and a shard of the opened one is gone or changed."""


class TooManyCorrupt(StreamShardsError):
    """More of the epoch's rows were lost to bad shards than ``max_corrupt`` allows."""


class UnsafePickle(StreamShardsError):
    """A foreign ``.pt`` file can only be loaded by running code that it names; never retried, never skipped."""


class ShardCorrupt(StreamShardsError):
    """A shard's bytes are not what the index promises, or do not decode."""


class StoreError(StreamShardsError):
    """The store (a disk, an S3 endpoint, …) did not do what was asked."""


class ObjectMissing(StoreError):
    """The store has no object under this key."""


class ShardMissing(ObjectMissing):
    """The index names a shard that the store does not have."""


class ObjectTooLarge(StoreError):
    """The object is longer than the caller is ready to take."""


class ObjectExists(StoreError):
    """The object was to be created, and is there already."""


class AccessDenied(StoreError):
    """The store refused our credentials, or we have none."""


class StoreUnavailable(StoreError):
    """The store did not answer, or answered that it cannot right now."""

    transient: ClassVar[bool] = True
    retry_after_s: float = 0.0
    """How long the store itself asks us to wait (``Retry-After``)."""
