from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streamshards import ShardWriter, StreamingDataset
from streamshards.convert.checking import verify
from streamshards.convert.indexing import build_index
from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid, ShardCorrupt
from streamshards.shard.frames import inflate
from streamshards.shard.payload import digest_of
from streamshards.storage import open_store
from tests.conftest import StoreUrl
from tests.datasets import assert_same, sample
from tests.pt_files import LAYOUTS, all_expected, expected, fill, names, payload, pt_bytes


def assert_samples(url: str, wanted: list[dict[str, Any]], **options: Any) -> None:
    """Check that the dataset at *url* has exactly these samples, in this order."""
    got = list(StreamingDataset(url, **options))
    assert len(got) == len(wanted)
    for actual, right in zip(got, wanted, strict=True):
        assert_same(actual, right)


@pytest.mark.parametrize("ending", [".pt", ".pth.zst", ".pt.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_every_layout_are_streamed_in_place(tmp_path: Path, layout: str, ending: str) -> None:
    """The index names the untouched files, and a StreamingDataset gives their samples, in natural order of names."""
    src = fill(tmp_path, layout, ending=ending)
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    index = build_index(src)
    assert index.layout == LAYOUTS[layout]
    assert list(index.names) == names(ending)
    assert list(index.digests) == [digest_of(before[name]) for name in index.names]
    assert index.sizes.tolist() == [len(before[name]) for name in index.names]
    assert {path.name: path.read_bytes() for path in src.iterdir() if path.name != "index.json"} == before
    assert_samples(str(src), all_expected(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_in_place_are_shuffled_like_shards(tmp_path: Path, layout: str) -> None:
    """A shuffled epoch has each sample once, in another order, and in the same one as random access says."""
    src = fill(tmp_path, layout)
    build_index(src)
    dataset = StreamingDataset(str(src), shuffle=True, seed=3)
    shuffled, wanted = [repr(item) for item in dataset], [repr(item) for item in all_expected(layout)]
    assert sorted(shuffled) == sorted(wanted)
    assert shuffled != wanted
    assert_same(dataset[5], all_expected(layout)[5])


def test_files_in_any_store_are_streamed_in_place(store_url: StoreUrl) -> None:
    """Folders below the url are entered; names in the index are relative; verify agrees."""
    store = open_store(store_url.url, store_url.storage_options)
    for number in range(3):
        store.put(f"deep/{number}.pt.gz", pt_bytes(payload("samples", number), ending=".gz"), timeout_s=30)
    index = build_index(store_url.url, storage_options=store_url.storage_options)
    assert list(index.names) == ["deep/0.pt.gz", "deep/1.pt.gz", "deep/2.pt.gz"]
    wanted = [item for number in range(3) for item in expected("samples", number)]
    assert_samples(store_url.url, wanted, storage_options=store_url.storage_options)
    assert verify(store_url.url, storage_options=store_url.storage_options).bad == []


def _write_own(folder: Path) -> list[dict[str, Any]]:
    with ShardWriter(folder, shard_bytes=2_000) as out:
        for number in range(60):
            out.write(sample(number))
    return [sample(number) for number in range(60)]


def test_a_lost_index_is_rebuilt(tmp_path: Path) -> None:
    """From the shards alone comes an index that says the same about them, and the dataset reads as before."""
    wanted = _write_own(tmp_path)
    lost = StreamingDataset(str(tmp_path)).index
    (tmp_path / "index.json").unlink()
    index = build_index(tmp_path)
    assert index.num_shards > 3
    assert index.fingerprint == lost.fingerprint
    assert_samples(str(tmp_path), wanted)


def test_a_damaged_shard_does_not_get_an_index(tmp_path: Path) -> None:
    """Whichever bit is wrong: the shard is refused by name, or the bit carries nothing and every sample is right.

    (Some bits of a zstd frame do not change what it decodes to, which its checksum proves.)
    """
    wanted = _write_own(tmp_path)
    victim = sorted(tmp_path.glob("*.zst"))[1]
    good = victim.read_bytes()
    num_refused = 0
    for byte in range(0, len(good), max(1, len(good) // 40)):
        victim.write_bytes(good[:byte] + bytes([good[byte] ^ 0x10]) + good[byte + 1 :])
        try:
            build_index(tmp_path, mode="replace")
        except (ShardCorrupt, SampleInvalid) as error:
            assert victim.name in str(error)  # noqa: PT017 - either outcome is right
            num_refused += 1
        else:
            assert_samples(str(tmp_path), wanted)
    assert num_refused > 30


@pytest.mark.parametrize("first", ["own", "foreign"])
def test_shards_and_foreign_files_do_not_mix(tmp_path: Path, first: str) -> None:
    """Either kind among the other is named, and nothing is written."""
    _write_own(tmp_path)
    (tmp_path / "index.json").unlink()
    foreign = "zz.pt" if first == "own" else "0.pt"
    (tmp_path / foreign).write_bytes(pt_bytes(payload("samples", 0)))
    odd = foreign if first == "own" else sorted(tmp_path.glob("*.zst"))[0].name
    with pytest.raises(SampleInvalid, match=f"{odd}: .*different folders"):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_an_unpacked_shard_is_not_read_in_place(tmp_path: Path) -> None:
    """After ``zstd -d`` a shard is a plain .pt file: it can be packed, not indexed, and the error says so."""
    wanted = _write_own(tmp_path / "own")
    (tmp_path / "plain").mkdir()
    for number, name in enumerate(StreamingDataset(str(tmp_path / "own")).index.names):
        data = inflate((tmp_path / "own" / name).read_bytes(), name=name, max_raw_bytes=1 << 30)
        (tmp_path / "plain" / f"{number}.pt").write_bytes(data)
    with pytest.raises(SampleInvalid, match=r"0\.pt: .*streamshards pack"):
        build_index(tmp_path / "plain")
    from streamshards.convert.packing import pack

    pack(tmp_path / "plain", tmp_path / "again")
    assert_samples(str(tmp_path / "again"), wanted)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Another layout, and other fields, in the middle of the folder."""
    src = fill(tmp_path, "columns")
    (src / "part-5.pt").write_bytes(pt_bytes([{"x": 1}]))
    with pytest.raises(SampleInvalid, match=r"part-5\.pt: .*looks like layout 'samples'"):
        build_index(src)
    (src / "part-5.pt").write_bytes(pt_bytes({"x": torch.zeros(2, 3)}))
    with pytest.raises(SampleInvalid, match=r"part-5\.pt: does not fit the files before it: .*'label'"):
        build_index(src)
    assert not (src / "index.json").exists()


def test_a_file_without_rows_fits_everywhere(tmp_path: Path) -> None:
    """An empty tensor or list among others is a shard of no rows."""
    src = fill(tmp_path, "samples")
    (src / "part-5.pt").write_bytes(pt_bytes([]))
    index = build_index(src)
    assert index.rows.tolist()[5] == 0
    wanted = [item for number in range(len(names())) if number != 5 for item in expected("samples", number)]
    assert_samples(str(src), wanted)
    for path in src.iterdir():
        path.write_bytes(pt_bytes([]))
    with pytest.raises(IndexInvalid, match="holds a sample"):
        build_index(src, mode="replace")


def test_an_index_is_replaced_only_on_request(tmp_path: Path) -> None:
    """Without asking, nothing is read or written; a damaged index can be replaced."""
    src = fill(tmp_path, "rows")
    build_index(src)
    (src / "part-3.pt").unlink()
    with pytest.raises(OptionInvalid, match="an index already, of 48 samples"):
        build_index(src)
    assert build_index(src, mode="replace").num_samples == 44
    (src / "index.json").write_text("{")
    with pytest.raises(IndexInvalid, match="not JSON"):
        build_index(src)
    assert build_index(src, mode="replace").num_samples == 44
    assert_samples(str(src), [item for number in range(12) if number != 3 for item in expected("rows", number)])


def test_a_name_that_cannot_stand_in_an_index_is_refused(tmp_path: Path) -> None:
    """Not after hours of reading."""
    (tmp_path / "a\u200b.pt").write_bytes(pt_bytes(torch.zeros(2, 2)))
    with pytest.raises(OptionInvalid, match="cannot stand in an index"):
        build_index(tmp_path)
