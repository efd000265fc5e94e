from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import ShardWriter, StreamingDataset
from streamshards.convert.files import find_files, load_files, natural_key
from streamshards.convert.indexing import build_index
from streamshards.convert.packing import batch_of, pack
from streamshards.convert.place import Place
from streamshards.errors import (
    IndexInvalid,
    OptionInvalid,
    SampleInvalid,
    ShardCorrupt,
    StreamShardsError,
    UnsafePickle,
)
from streamshards.options import RetryOptions
from streamshards.shard.columns import RowBuffer, to_samples
from streamshards.storage import open_store
from streamshards.testing.stores import FaultyStore, MemoryStore
from tests.conftest import StoreUrl
from tests.datasets import assert_same, sample
from tests.pt_files import LAYOUTS, NUM_FILES, Custom, all_expected, expected, fill, names, payload, pt_bytes


def assert_samples(url: str, wanted: list[dict[str, Any]], **options: Any) -> None:
    """Check that the dataset at *url* has exactly these samples, in this order."""
    got = list(StreamingDataset(url, **options))
    assert len(got) == len(wanted)
    for actual, right in zip(got, wanted, strict=True):
        assert_same(actual, right)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".pt.zst", ".pth.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_packed_sample_for_sample(tmp_path: Path, layout: str, ending: str) -> None:
    """What plain torch.save wrote comes out of the packed dataset equal, type for type, in natural order of names."""
    packed = pack(fill(tmp_path / "src", layout, ending=ending), tmp_path / "dst", shard_bytes=500)
    wanted = all_expected(layout)
    assert (packed.num_files, packed.num_samples, packed.layout) == (NUM_FILES, len(wanted), LAYOUTS[layout])
    assert packed.index.num_samples == len(wanted)
    assert_samples(str(tmp_path / "dst"), wanted)


def test_files_from_before_torch_1_6_are_packed(tmp_path: Path) -> None:
    """The legacy format of torch.save is read, too."""
    pack(fill(tmp_path / "src", "samples", legacy=True), tmp_path / "dst")
    assert_samples(str(tmp_path / "dst"), all_expected("samples"))


def test_any_store_to_any_store(store_url: StoreUrl) -> None:
    """Files in a store become a dataset in that store; folders below the url are entered."""
    store = open_store(store_url.url, store_url.storage_options)
    for number in range(3):
        store.put(f"src/deep/{number}.pt.zst", pt_bytes(payload("samples", number), ending=".zst"), timeout_s=30)
    options = store_url.storage_options
    pack(f"{store_url.url}/src", f"{store_url.url}/dst", storage_options=options)
    wanted = [sample for number in range(3) for sample in expected("samples", number)]
    assert_samples(f"{store_url.url}/dst", wanted, storage_options=options)


def test_names_are_in_natural_order() -> None:
    """Digits compare as numbers, however long, and no two names are equal."""
    right = ["a.pt", "a-1.pt", "a-01.pt", "a-2.pt", "a-10.pt", "a-10-2.pt", "a-10-11.pt", "b/1.pt", "b/" + "9" * 5000]
    for shift in range(len(right)):
        mixed = right[shift:] + right[:shift]
        assert sorted(mixed, key=natural_key) == sorted(right, key=natural_key)
    ordered = sorted(right, key=natural_key)
    assert ordered.index("a-2.pt") < ordered.index("a-10.pt")
    assert ordered.index("a-10-2.pt") < ordered.index("a-10-11.pt")
    assert len({json.dumps(natural_key(name)) for name in right}) == len(right)


def test_hidden_and_other_files_are_left_out() -> None:
    """Only .pt and .pth, plain, .zst or .gz; nothing whose name or folder begins with a dot."""
    kept = ["a.pt", "b.PTH", "c/d.pt.gz", "e.pth.zst"]
    left = [".a.pt", "._b.pt", ".ipynb/c.pt", "d.txt", "e.pt.tmp", "pt", "f.tar.gz"]
    place = Place(store=MemoryStore(dict.fromkeys(kept + left, b"")), retry=RetryOptions())
    assert [file.name for file in find_files(place)] == kept


def test_one_file_is_read_at_a_time() -> None:
    """A file is not fetched before the one before it was taken."""
    store = FaultyStore(MemoryStore({name: pt_bytes(payload("rows", i)) for i, name in enumerate(names())}), [])
    place = Place(store=store, retry=RetryOptions())
    pieces = load_files(place, find_files(place), layout="auto", trust_pickle=False)
    for number, (file, _) in enumerate(pieces, start=1):
        assert store.gets == names()[:number]
        assert file.name == names()[number - 1]


def test_progress_is_told_after_each_file(tmp_path: Path) -> None:
    """How many are done, how many there are, and the name, in order."""
    told: list[tuple[int, int, str]] = []
    pack(fill(tmp_path / "src", "rows"), tmp_path / "dst", progress=lambda *step: told.append(step))
    assert told == [(number, NUM_FILES, name) for number, name in enumerate(names(), start=1)]


def test_an_index_made_in_place_neither_hides_files_nor_overrules_the_layout(tmp_path: Path) -> None:
    """Files that came after the index count, and ``layout`` wins over what the index says."""
    source = tmp_path / "src"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.pt").write_bytes(pt_bytes({"x": torch.zeros(4), "y": torch.ones(4)}))
    build_index(str(source))
    (source / "3.pt").write_bytes(pt_bytes({"x": torch.zeros(4), "y": torch.ones(4)}))
    assert pack(str(source), str(tmp_path / "auto")).num_samples == 16
    assert pack(str(source), str(tmp_path / "sample"), layout="sample").num_samples == 4
    with pytest.raises(OptionInvalid, match="dataset of shards"):
        pack(str(tmp_path / "auto"), str(tmp_path / "again"), layout="sample")


def test_a_dataset_is_packed_anew_without_its_orphans(tmp_path: Path) -> None:
    """SRC may be a dataset: the shards of its index in their order, and nothing else that lies there."""
    with ShardWriter(tmp_path / "src", shard_bytes=2_000) as out:
        for number in range(50):
            out.write(sample(number))
    fill(tmp_path / "src" / "orphans", "rows")
    packed = pack(tmp_path / "src", tmp_path / "dst", compression="zstd:9")
    assert packed.num_samples == 50
    assert packed.index.codec == "zstd:9"
    assert_samples(str(tmp_path / "dst"), [sample(number) for number in range(50)])


def test_columns_go_through_a_batch_unchanged() -> None:
    """``batch_of`` loses nothing: Python numbers, optional fields, ragged ones, text, JSON and empty dicts."""
    buffer = RowBuffer()
    for number in range(20):
        buffer.append({**sample(number), "none": None, "empty": {}, "maybe_int": None if number % 2 else number})
    columns = buffer.finish()
    again = RowBuffer()
    again.extend(batch_of(columns))
    copy = again.finish()
    assert copy.schema == columns.schema
    for actual, right in zip(to_samples(copy), to_samples(columns), strict=True):
        assert_same(actual, right)


def test_append_and_replace(tmp_path: Path) -> None:
    """A second pack is refused, adds to the dataset, or takes its place, as asked."""
    src, dst = fill(tmp_path / "src", "samples"), tmp_path / "dst"
    wanted = all_expected("samples")
    pack(src, dst)
    with pytest.raises(OptionInvalid, match="a dataset of 48 samples is here"):
        pack(src, dst)
    added = pack(src, dst, mode="append")
    assert (added.num_samples, added.index.num_samples) == (48, 96)
    assert_samples(str(dst), wanted + wanted)
    pack(src, dst, mode="replace")
    assert_samples(str(dst), wanted)


BAD_FILES = {
    "another layout": (pt_bytes([{"x": 1}]), SampleInvalid, "layout 'samples'"),
    "another field": (pt_bytes({"x": torch.zeros(2, 3)}), SampleInvalid, "without 'label'"),
    "another dtype": (
        pt_bytes({**payload("columns", 0), "x": torch.zeros(4, 3).double()}),  # type: ignore[dict-item]
        SampleInvalid,
        "expected float32 (3,), got float64 (3,)",
    ),
    "unequal lengths": (
        pt_bytes({**payload("columns", 0), "x": torch.zeros(3, 3)}),  # type: ignore[dict-item]
        SampleInvalid,
        "differ in length",
    ),
    "an object": (pt_bytes({"x": 1j, "label": {1, 2}}), SampleInvalid, "part-5.pt"),
    "not a torch file": (b"hello", ShardCorrupt, "torch.load cannot read it"),
    "nothing": (b"", ShardCorrupt, "torch.load cannot read it"),
    "half a file": (pt_bytes(payload("columns", 0))[:500], ShardCorrupt, "torch.load cannot read it"),
    "half a .zst": (pt_bytes(payload("columns", 0), ending=".zst")[:-9], ShardCorrupt, "part-5.pt"),
    "half a .gz": (pt_bytes(payload("columns", 0), ending=".gz")[:-9], ShardCorrupt, "gzip"),
    "an unsafe pickle": (pt_bytes({"x": Custom()}), UnsafePickle, "tests.pt_files.Custom"),
}


@pytest.mark.parametrize(("data", "kind", "text"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_in_the_middle_is_named(
    tmp_path: Path, data: bytes, kind: type[StreamShardsError], text: str
) -> None:
    """The error has the file's whole name and what is wrong with it, and nothing is left at the destination."""
    src = fill(tmp_path / "src", "columns")
    (src / "part-5.pt").write_bytes(data)
    with pytest.raises(kind) as caught:
        pack(src, tmp_path / "dst", shard_bytes=100)
    assert str(caught.value).startswith(f"{src}/part-5.pt: ")
    assert text in str(caught.value)
    assert open_store(tmp_path / "dst").list() == []


def test_trust_pickle_runs_what_it_must(tmp_path: Path) -> None:
    """A pickle with a class of its own is refused, its class named; trusted, its object still has to be a sample."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.pt").write_bytes(pt_bytes({"x": torch.ones(2), "y": Custom().value}))
    pack(tmp_path / "src", tmp_path / "dst", trust_pickle=True)
    (tmp_path / "src" / "b.pt").write_bytes(pt_bytes({"x": torch.ones(2), "y": Custom()}))
    with pytest.raises(SampleInvalid, match=r"b\.pt: .*tests\.pt_files\.Custom cannot be stored"):
        pack(tmp_path / "src", tmp_path / "dst2", trust_pickle=True)


def test_nothing_to_pack(tmp_path: Path) -> None:
    """An empty folder, one that is not there, and one without .pt files are three clear errors."""
    with pytest.raises(IndexInvalid, match=r"no \.pt or \.pth files .* empty, or it does not exist"):
        pack(tmp_path, tmp_path / "dst")
    with pytest.raises(IndexInvalid, match=r"no \.pt or \.pth files"):
        pack(tmp_path / "nowhere", tmp_path / "dst")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(IndexInvalid, match=r"1 other file such as notes\.txt"):
        pack(tmp_path, tmp_path / "dst")


def test_a_place_is_not_packed_into_itself(tmp_path: Path) -> None:
    """SRC and DST are compared as places, not as words."""
    src = fill(tmp_path / "src", "rows")
    with pytest.raises(OptionInvalid, match="the same place"):
        pack(src, f"file://{tmp_path}/other/../src/")


def test_an_explicit_layout_wins(tmp_path: Path) -> None:
    """Two tensors of one length look like columns; told that each file is one sample, that is what comes out."""
    (tmp_path / "src").mkdir()
    content = {"image": torch.ones(3, 4), "mask": torch.zeros(3, 2)}
    (tmp_path / "src" / "a.pt").write_bytes(pt_bytes(content))
    assert pack(tmp_path / "src", tmp_path / "guessed").num_samples == 3
    assert pack(tmp_path / "src", tmp_path / "told", layout="sample").num_samples == 1
    assert_samples(str(tmp_path / "told"), [content])
    with pytest.raises(OptionInvalid, match="layout='what' is not one of"):
        pack(tmp_path / "src", tmp_path / "x", layout="what")
