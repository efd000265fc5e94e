"""Stream zstd-compressed ``.pt`` shards into PyTorch: one exact sample order on any cluster, from disk or S3.

Names are imported on first use, so that ``import streamshards`` and ``streamshards --help`` do not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

__version__: Final = "0.1.0.dev0"

if TYPE_CHECKING:
    from streamshards.dataset import StreamingDataset as StreamingDataset
    from streamshards.dataset import open_shard as open_shard
    from streamshards.errors import AccessDenied as AccessDenied
    from streamshards.errors import DatasetReplaced as DatasetReplaced
    from streamshards.errors import IndexInvalid as IndexInvalid
    from streamshards.errors import ObjectExists as ObjectExists
    from streamshards.errors import OptionInvalid as OptionInvalid
    from streamshards.errors import ResumeMismatch as ResumeMismatch
    from streamshards.errors import SampleInvalid as SampleInvalid
    from streamshards.errors import ShardCorrupt as ShardCorrupt
    from streamshards.errors import ShardMissing as ShardMissing
    from streamshards.errors import StoreError as StoreError
    from streamshards.errors import StoreUnavailable as StoreUnavailable
    from streamshards.errors import StreamShardsError as StreamShardsError
    from streamshards.errors import TooManyCorrupt as TooManyCorrupt
    from streamshards.errors import UnsafePickle as UnsafePickle
    from streamshards.loader import StreamingDataLoader as StreamingDataLoader
    from streamshards.mixture import Mixture as Mixture
    from streamshards.options import CacheOptions as CacheOptions
    from streamshards.options import OrderOptions as OrderOptions
    from streamshards.options import PrefetchOptions as PrefetchOptions
    from streamshards.options import RetryOptions as RetryOptions
    from streamshards.plan.index import Index as Index
    from streamshards.plan.topology import Topology as Topology
    from streamshards.writer import ShardWriter as ShardWriter

_HOMES: Final = {
    "streamshards.dataset": ("StreamingDataset", "open_shard"),
    "streamshards.errors": (
        "AccessDenied", "DatasetReplaced", "IndexInvalid", "ObjectExists", "OptionInvalid", "ResumeMismatch",
        "SampleInvalid", "ShardCorrupt", "ShardMissing", "StoreError", "StoreUnavailable", "StreamShardsError",
        "TooManyCorrupt", "UnsafePickle",
    ),
    "streamshards.loader": ("StreamingDataLoader",),
    "streamshards.mixture": ("Mixture",),
    "streamshards.options": ("CacheOptions", "OrderOptions", "PrefetchOptions", "RetryOptions"),
    "streamshards.plan.index": ("Index",),
    "streamshards.plan.topology": ("Topology",),
    "streamshards.writer": ("ShardWriter",),
}  # fmt: skip
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'streamshards' has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
