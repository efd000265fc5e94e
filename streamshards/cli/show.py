"""Values as text: samples, summaries and sizes. Returns lines, prints nothing."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from streamshards.convert.caching import CacheInfo
from streamshards.convert.checking import Verified
from streamshards.convert.packing import Packed
from streamshards.convert.replay import Fit, Seen
from streamshards.convert.states import FoundState
from streamshards.convert.summary import summary_of
from streamshards.plan.state import State

_WORDS: Final = 6
"""Elements of a tensor that are shown."""
_TEXT: Final = 100
"""Characters of a string, a list or bytes that are shown."""
_BAR: Final = 30
_LISTABLE: Final = frozenset(
    {
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128,
    }
)  # fmt: skip
_UNSIGNED: Final = frozenset(getattr(torch, name) for name in ("uint16", "uint32", "uint64") if hasattr(torch, name))


def human_bytes(size: float) -> str:
    """Return *size* in the unit that leaves one to four digits: ``"32.0 MiB"``."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def counted(number: int, what: str) -> str:
    """Return ``"1 shard"`` or ``"2,000 shards"``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# -- samples -----------------------------------------------------------------------------------------------------------


def sample_lines(headline: str, sample: Mapping[str, Any]) -> Iterator[str]:
    """Yield the headline and one line per field."""
    leaves = list(_leaves(sample, ""))
    width = max((len(name) for name, _ in leaves), default=0)
    yield headline
    for name, value in leaves:
        yield f"  {name:<{width}}  {_brief(value)}"


def seen_line(seen: Seen) -> str:
    """Return where a sample was delivered and where it came from, in one line."""
    where = f"shard {seen.shard:,} ({seen.name}), row {seen.row:,}"
    return f"epoch {seen.epoch:,}, position {seen.position:,}: {where}"


def seen_json(seen: Seen) -> dict[str, Any]:
    """Return the same for machines; what ``with_keys=True`` gives, and the shard's name."""
    return seen._asdict()


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _brief(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return _cut(repr(value))
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    flat = _listable(value.reshape(-1)[:_WORDS])
    words = [_word(item) for item in flat.tolist()]
    if not shape:
        return f"{dtype} () {words[0]}"
    rest = [", …"] if value.numel() > _WORDS else []
    return f"{dtype} {shape} [{''.join([', '.join(words), *rest])}]"


def _word(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text):,} characters)"


def plain(value: object) -> Any:
    """Return *value* as JSON values, whole.

    Tensors become nested lists, complex numbers ``[real, imaginary]``, bytes base64, and what JSON has no number for
    the words ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
    """
    if isinstance(value, torch.Tensor):
        return plain(_listable(value).tolist())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, complex):
        return [plain(value.real), plain(value.imag)]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _listable(tensor: torch.Tensor) -> torch.Tensor:
    """Return *tensor* in a dtype that ``tolist`` knows in every torch, with the same values."""
    if tensor.dtype in _LISTABLE or tensor.dtype in _UNSIGNED:
        return tensor
    return tensor.to(torch.complex64 if tensor.dtype.is_complex else torch.float32)


# -- datasets ----------------------------------------------------------------------------------------------------------


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what ``inspect`` shows of a summary with its url."""
    yield summary["url"]
    for label, text in _facts(summary):
        yield f"  {label:<11}  {text}"
    yield ""
    fields = summary["schema"]
    width = max((len(field["name"]) for field in fields), default=0)
    yield "schema"
    for field in fields:
        yield f"  {field['name']:<{width}}  {field['type']}"
    yield ""
    yield "shards by stored size"
    yield from _histogram_lines(summary["shard_sizes"])


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows = summary["shard_rows"]
    each = f", {rows['min']:,} to {rows['max']:,} samples each" if rows else ""
    yield "samples", f"{summary['num_samples']:,}"
    yield "shards", f"{summary['num_shards']:,}{each}"
    yield "stored", human_bytes(summary["stored_bytes"])
    ratio = f", ratio {summary['ratio']:.2f}" if summary["ratio"] else ""
    yield "decoded", human_bytes(summary["raw_bytes"]) + ratio
    yield "codec", summary["codec"]
    yield "layout", summary["layout"]
    yield "created", f"{summary['created']} by {summary['writer']}"
    yield "fingerprint", summary["fingerprint"]


def _histogram_lines(bins: list[dict[str, int]]) -> Iterator[str]:
    most = max((entry["shards"] for entry in bins), default=0)
    for entry in bins:
        bar = "█" * math.ceil(_BAR * entry["shards"] / most)
        span = f"{human_bytes(entry['from_bytes']):>10} to {human_bytes(entry['below_bytes']):>10}"
        yield f"  {span}  {entry['shards']:>7,}  {bar}".rstrip()


# -- outcomes ----------------------------------------------------------------------------------------------------------


def packed_line(packed: Packed, url: str) -> str:
    """Return what ``pack`` did, in one line."""
    index, samples = packed.index, counted(packed.num_samples, "sample")
    now = f"{counted(index.num_shards, 'shard')}, {human_bytes(int(index.sizes.sum()))}"
    if index.num_samples != packed.num_samples:
        now = f"now {counted(index.num_samples, 'sample')} in {now}"
    return f"packed {counted(packed.num_files, 'file')} of layout {packed.layout}, {samples}, into {url}: {now}"


def packed_json(packed: Packed, url: str) -> dict[str, Any]:
    """Return the same for machines, with the summary of what is there now."""
    did = {"files": packed.num_files, "samples": packed.num_samples, "layout": packed.layout}
    return {"packed": did, "url": url, **summary_of(packed.index)}


def verified_lines(found: Verified) -> Iterator[str]:
    """Yield the bad shards, the orphans if asked for, and the sum of it."""
    for bad in found.bad:
        yield f"bad  {bad.name}  {counted(bad.num_samples, 'sample')}: {' '.join(bad.cause.split())}"
    for orphan in found.orphans or ():
        yield f"orphan  {orphan.name}  {human_bytes(orphan.size_bytes)}"
    index = found.index
    shards = counted(index.num_shards, "shard")
    if found.bad:
        lost = sum(bad.num_samples for bad in found.bad)
        yield f"{len(found.bad):,} of {shards} bad, with {lost:,} of {counted(index.num_samples, 'sample')}"
    else:
        size = human_bytes(int(index.sizes.sum()))
        yield f"ok: {shards}, {counted(index.num_samples, 'sample')}, {size} hashed and decoded"
    if found.orphans is not None:
        size = human_bytes(sum(orphan.size_bytes for orphan in found.orphans))
        yield f"{counted(len(found.orphans), 'object')} that the index does not name, {size}"


def verified_json(found: Verified) -> dict[str, Any]:
    """Return the same for machines; ``orphans`` is null if nobody asked."""
    return {
        "url": found.url,
        "fingerprint": found.index.fingerprint,
        "num_shards": found.index.num_shards,
        "num_samples": found.index.num_samples,
        "bad": [bad._asdict() for bad in found.bad],
        "orphans": None if found.orphans is None else [orphan._asdict() for orphan in found.orphans],
    }


# -- checkpoints -------------------------------------------------------------------------------------------------------


def state_lines(file: str, found: FoundState, fit: Fit | None) -> Iterator[str]:
    """Yield what ``state show`` shows of one state."""
    yield f"{file} at {found.path}" if found.path else file
    facts = [*_state_facts(found.state), *([] if fit is None else [("fits", _fit_words(fit))])]
    width = max(len(label) for label, _ in facts)
    for label, text in facts:
        yield f"  {label:<{width}}  {text}"


def _state_facts(state: State) -> Iterator[tuple[str, str]]:
    yield "epoch", f"{state.epoch:,}"
    yield "position", _place(state)
    if state.worker_batches:
        batches = f"{state.worker_batches:,} batch{'' if state.worker_batches == 1 else 'es'}"
        yield "worker", f"one of {state.num_workers:,}, {batches} after the position; loads with as many workers only"
    order = state.order
    lanes = f"{counted(order.lanes, 'lane')} in chunks of {order.chunk:,}"
    if order.shuffle:
        yield "order", f"shuffled with seed {order.seed}, {lanes}, blocks of about {order.shuffle_block:,} samples"
    else:
        yield "order", f"not shuffled, {lanes}"
    yield "fingerprint", str(state.identity.get("fingerprint"))
    for name in ("num_shards", "subset", "stop"):
        if name in state.identity:
            yield name.removeprefix("num_"), _cut(str(state.identity[name]))
    yield from _source_facts(state.identity)


def _place(state: State) -> str:
    whole = f"{state.position:,} of {state.num_samples:,}"
    if state.worker_batches or not state.num_samples:
        return whole
    if state.position in (0, state.num_samples):
        return f"{whole} (the epoch's {'end' if state.position else 'beginning'})"
    return f"{whole} ({100 * state.position / state.num_samples:.1f} %)"


def _source_facts(identity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    weights, sources = identity.get("weights"), identity.get("sources")
    if isinstance(sources, Mapping):
        for name, source in sources.items():
            weight = weights.get(name) if isinstance(weights, Mapping) else None
            what = source if isinstance(source, Mapping) else {}
            known = [f"{key} {value}" for key, value in what.items()]
            yield f"source {name}", ", ".join([f"weight {weight}", *known])


def _fit_words(fit: Fit) -> str:
    told = " ".join(fit.told.split())
    return f"{'yes' if fit.fits else 'no'}{': ' if told else ''}{told}"


def state_json(found: FoundState, fit: Fit | None) -> dict[str, Any]:
    """Return the same for machines; ``fits`` is null if nobody asked."""
    state = found.state
    return {
        "path": found.path,
        "state": state.to_dict(),
        "fits": None if fit is None else fit.fits,
        "told": None if fit is None else fit.told,
    }


# -- the node cache ----------------------------------------------------------------------------------------------------


def cache_lines(info: CacheInfo) -> Iterator[str]:
    """Yield what is in a node cache, for people."""
    yield info.home
    yield f"  shards  {info.num_entries:,}, {info.num_raw:,} of them decoded"
    yield f"  disk    {human_bytes(info.nbytes)}"


def cache_json(info: CacheInfo) -> dict[str, Any]:
    """Return the same for machines."""
    return {"directory": info.home, "entries": info.num_entries, "raw": info.num_raw, "bytes": info.nbytes}
