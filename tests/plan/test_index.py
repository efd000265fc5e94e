"""The index: what is written is read back, and nothing damaged or hostile gets past `parse`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamshards.errors import IndexInvalid
from streamshards.plan import index as index_module
from streamshards.plan.index import Index, is_safe_name

URL = "s3://bucket/train/index.json"

GOOD_NAMES = (
    "a.pt.zst",
    "part-00001.pt.zst",
    "2024/01/a.pt",
    "a b/c=d,e+f@g.pt",
    "...",
    "..a/b..",
    ".hidden",
    "été/日本/🙂.pt",
    "1:2",
    "%2e%2e",
    "x" * 1024,
)

BAD_NAMES = (
    "",
    ".",
    "..",
    "../a",
    "a/..",
    "a/../b",
    "a/./b",
    "./a",
    "a/.",
    "/",
    "/etc/passwd",
    "//host/share",
    "a/",
    "a//b",
    "a\\b",
    "..\\a",
    "\\\\host\\share",
    "C:/a",
    "c:a",
    "s3://bucket/a",
    "file:///etc/passwd",
    "http:a",
    "simplecache::s3://bucket/a",
    "git+ssh://a",
    "a\x00b",
    "a\nb",
    "a\n",
    "a\rb",
    "a\tb",
    "\x1b[2J",
    "a\x7f",
    "a\x85b",
    "a\u2028b",
    "a\u00a0b",  # a no-break space looks like a space
    "a\u202ezst.tp",  # right-to-left override
    "a\u2066b",  # left-to-right isolate
    "a\u200bb",  # zero-width space
    "a\ufeffb",  # byte order mark
    "a\u00adb",  # soft hyphen
    "a\U000e0041b",  # tag letter
    "a\ud800b",  # half a surrogate pair
    "a\ue000b",  # private use
    "x" * 1025,
)


def make(names: Any = ("a.pt.zst", "b/c.pt.zst"), rows: Any = None, **changes: Any) -> Index:
    n = len(names)
    chosen: dict[str, Any] = {
        "schema": {"x": {"kind": "tensor", "dtype": "float32", "shape": [3]}},
        "names": list(names),
        "rows": np.arange(1, n + 1, dtype=np.int64) if rows is None else np.array(rows, dtype=np.int64),
        "sizes": np.arange(n, dtype=np.int64) + 100,
        "raw_sizes": np.arange(n, dtype=np.int64) + 1000,
        "digests": [f"{i:032x}" for i in range(n)],
        "layout": "shard",
        "codec": "zstd:3",
        "created": "2025-01-01T00:00:00Z",
        "writer": "streamshards",
        **changes,
    }
    return Index(**chosen)


def as_json(index: Index | None = None) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((index or make()).dump())
    return content


def parse(content: Any) -> Index:
    return Index.parse(content if isinstance(content, bytes) else json.dumps(content).encode(), url=URL)


def refusal(content: Any) -> str:
    """Return why *content* is refused; the reason names the url."""
    with pytest.raises(IndexInvalid) as caught:
        parse(content)
    assert str(caught.value).startswith(f"{URL}: ")
    return str(caught.value).removeprefix(f"{URL}: ")


# -- there and back ------------------------------------------------------------------------------------------------

names_strategy = st.lists(st.text(max_size=12).filter(is_safe_name), max_size=8, unique=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_what_is_written_is_read_back(data: st.DataObject) -> None:
    """Any index comes back from its own JSON, field by field, with the same fingerprint."""
    names = data.draw(names_strategy)
    n = len(names)
    counts = st.lists(st.integers(0, 2**48), min_size=n, max_size=n).map(lambda v: np.array(v, dtype=np.int64))
    index = Index(
        schema=data.draw(st.dictionaries(texts, json_values.filter(is_encodable), max_size=3)),
        names=names,
        rows=data.draw(counts),
        sizes=data.draw(counts),
        raw_sizes=data.draw(counts),
        digests=data.draw(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=n, max_size=n)),
        layout=data.draw(texts),
        codec=data.draw(texts),
        created=data.draw(texts),
        writer=data.draw(texts),
    )
    back = Index.parse(index.dump(), url=URL)
    for name in ("schema", "names", "digests", "layout", "codec", "created", "writer", "num_samples", "fingerprint"):
        assert getattr(back, name) == getattr(index, name)
    for name in ("rows", "sizes", "raw_sizes"):
        assert getattr(back, name).tolist() == getattr(index, name).tolist()
        assert getattr(back, name).dtype == np.int64
    assert back.num_samples == sum(index.rows.tolist())
    assert back.num_shards == n
    assert back.dump() == index.dump()


def is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def test_an_index_is_one_line_of_readable_json() -> None:
    """The JSON says what it is, and holds the shards in columns; other tools may rely on these names."""
    data = make(["a", "b"], rows=[3, 4], schema={}).dump()
    assert data.endswith(b"}\n")
    assert json.loads(data) == {
        "format": "streamshards",
        "version": 1,
        "num_samples": 7,
        "fingerprint": make(["a", "b"], rows=[3, 4], schema={}).fingerprint,
        "created": "2025-01-01T00:00:00Z",
        "writer": "streamshards",
        "codec": "zstd:3",
        "layout": "shard",
        "schema": {},
        "shards": {
            "name": ["a", "b"],
            "rows": [3, 4],
            "bytes": [100, 101],
            "raw_bytes": [1000, 1001],
            "digest": ["0" * 32, "0" * 31 + "1"],
        },
    }


def test_unknown_keys_are_left_alone() -> None:
    """Keys that this version does not know, in the index or beside the columns, don't stop it from being read."""
    content = as_json()
    content["comment"] = "ours"
    content["shards"]["etag"] = ["x", "y"]
    assert parse(content).fingerprint == make().fingerprint


def test_an_empty_dataset_is_a_dataset() -> None:
    """No shards, or only empty ones, are read back as no samples."""
    assert parse(as_json(make([]))).num_samples == 0
    assert parse(as_json(make(["a"], rows=[0]))).num_shards == 1


# -- fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_never_changes() -> None:
    """Checkpoints carry the fingerprint: the same content must give these digits in every version, for ever."""
    assert make(["a", "b/c"], rows=[3, 4]).fingerprint == "b3a27efa88cff6c352435b064aac54e2"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": {}},
        {"schema": {"x": {"kind": "tensor", "dtype": "float32", "shape": [4]}}},
        {"names": ["a.pt.zst", "b/d.pt.zst"]},
        {"names": ["b/c.pt.zst", "a.pt.zst"]},
        {"rows": np.array([2, 1])},
        {"rows": np.array([1, 3])},
        {"sizes": np.array([100, 102])},
        {"raw_sizes": np.array([1000, 1002])},
        {"sizes": np.array([1000, 1001]), "raw_sizes": np.array([100, 101])},
        {"digests": ["0" * 32, "0" * 31 + "2"]},
        {"layout": "rows"},
    ],
    ids=str,
)
def test_the_fingerprint_names_the_content(changes: dict[str, Any]) -> None:
    """Any change of schema, layout, names, rows, sizes or digests, or of their sequence, changes the fingerprint."""
    assert replace(make(), **changes).fingerprint != make().fingerprint


def test_the_fingerprint_leaves_out_what_is_for_people() -> None:
    """When, by what and with which codec a dataset was written does not make it another one; nor does the sequence of
    keys in its schema."""
    for changes in ({"created": "later"}, {"writer": "another"}, {"codec": "zstd:19"}):
        assert replace(make(), **changes).fingerprint == make().fingerprint
    one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert make(schema=one).fingerprint == make(schema=other).fingerprint


@given(names_strategy, names_strategy)
@settings(deadline=None, max_examples=100)
def test_other_names_are_another_dataset(one: list[str], other: list[str]) -> None:
    """Two lists of names share a fingerprint only if they are equal, however names are cut."""
    assert (make(one).fingerprint == make(other).fingerprint) == (one == other)


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD_NAMES, ids=ascii)
def test_ordinary_names_are_welcome(name: str) -> None:
    """Relative, printable names are read, in any script."""
    assert is_safe_name(name)
    assert parse(as_json(make([name]))).names == [name]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:30])
def test_no_name_leaves_the_dataset(name: str) -> None:
    """A name that could mean another place, or look like another name, is refused; the message shows it escaped."""
    assert not is_safe_name(name)
    content = as_json()
    content["shards"]["name"][1] = name
    reason = refusal(content)
    assert "shard 1 is named" in reason
    assert len(reason) < 1000
    assert reason.isprintable() or "\u00a0" in reason


@pytest.mark.parametrize("name", [None, 3, True, ["a"], {"a": 1}, 1.5])
def test_a_name_is_text(name: object) -> None:
    """Anything but text is no name."""
    assert not is_safe_name(name)
    content = as_json()
    content["shards"]["name"][0] = name
    assert "shard 0 is named" in refusal(content)


def test_a_name_names_one_shard() -> None:
    """A name that appears twice is refused."""
    content = as_json()
    content["shards"]["name"] = ["a", "a"]
    assert "twice" in refusal(content)


# -- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["rows", "bytes", "raw_bytes"])
@pytest.mark.parametrize("value", [-1, 1.0, 1.5, True, None, "1", [1], {}, 2**48 + 1, 2**63, 10**100], ids=str)
def test_counts_are_whole_numbers(key: str, value: object) -> None:
    """A count that is negative, fractional, a truth value, text or absurdly large is refused by its column."""
    content = as_json()
    content["shards"][key][1] = value
    assert f"shards.{key} must hold whole numbers" in refusal(content)


def test_sums_of_counts_stay_in_64_bits() -> None:
    """Counts that are each possible, but whose sum wraps around 64 bits, are refused: 2¹⁶ shards of 2⁴⁸ rows must not
    pass as a dataset of 0 samples."""
    num_shards = 2**16
    content = as_json(make([str(i) for i in range(num_shards)], rows=[0] * num_shards))
    for key in ("rows", "bytes", "raw_bytes"):
        shards = {**content["shards"], key: [2**48] * num_shards}
        assert f"shards.{key} adds up to" in refusal({**content, "shards": shards})


@pytest.mark.parametrize("key", ["name", "rows", "bytes", "raw_bytes", "digest"])
def test_columns_have_one_length(key: str) -> None:
    """A column that is shorter or longer than the others is refused, with both lengths."""
    content = as_json(make(["a", "b", "c"]))
    content["shards"][key].pop()
    assert "2" in refusal(content)
    assert "3" in refusal(content)


@pytest.mark.parametrize(
    "digest", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 31 + "\n", None, 0, "\uff10" * 32]
)
def test_digests_are_32_hex_digits(digest: object) -> None:
    """A digest is 32 lowercase hex digits; anything else is refused."""
    content = as_json()
    content["shards"]["digest"][0] = digest
    assert "digest must hold 32 hex digits" in refusal(content)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("format", None, "not a streamshards index"),
        ("format", "parquet", "not a streamshards index"),
        ("format", ["streamshards"], "not a streamshards index"),
        ("version", 2, "reads up to 1; upgrade streamshards"),
        ("version", 10**30, "upgrade streamshards"),
        ("version", 0, "version 0 is not a version number"),
        ("version", -1, "version -1 is not"),
        ("version", True, "version True is not"),
        ("version", 1.0, "version 1.0 is not"),
        ("version", "1", "version '1' is not"),
        ("version", None, "version None is not"),
        ("num_samples", 4, "num_samples says 4, the shards' rows add up to 3"),
        ("num_samples", -3, "num_samples says -3"),
        ("num_samples", 3.0, "'num_samples' must be a int, found float"),
        ("num_samples", True, "'num_samples' must be a int, found bool"),
        ("num_samples", 10**1000, "num_samples says"),
        ("fingerprint", "0" * 32, "the fingerprint does not fit"),
        ("fingerprint", None, "'fingerprint' must be a str"),
        ("schema", [], "'schema' must be a dict"),
        ("shards", [], "'shards' must be a dict"),
        ("layout", 1, "'layout' must be a str"),
        ("codec", None, "'codec' must be a str"),
        ("created", 0, "'created' must be a str"),
        ("writer", {}, "'writer' must be a str"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_each_wrong_value_is_refused_by_name(key: str, value: object, reason: str) -> None:
    """A value of the wrong kind, or one that contradicts the rest, is refused by its key."""
    assert reason in refusal({**as_json(), key: value})


@pytest.mark.parametrize("key", sorted(as_json()))
def test_each_missing_key_is_noticed(key: str) -> None:
    """An index without one of its keys is refused."""
    content = as_json()
    del content[key]
    assert key in refusal(content)


@pytest.mark.parametrize("key", sorted(as_json()["shards"]))
def test_each_missing_column_is_noticed(key: str) -> None:
    """An index without one of its columns, or with something else in its place, is refused by the column's name."""
    content = as_json()
    for value in (None, {}, "ab", 3):
        content["shards"][key] = value
        assert f"'{key}' must be a list" in refusal(content)
    del content["shards"][key]
    assert f"'{key}' must be a list" in refusal(content)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["shards"]["rows"].reverse(),
        lambda c: c["shards"]["bytes"].__setitem__(0, 99),
        lambda c: c["shards"]["raw_bytes"].__setitem__(0, 99),
        lambda c: c["shards"]["name"].reverse(),
        lambda c: c["shards"]["digest"].reverse(),
        lambda c: c["schema"].clear(),
        lambda c: c.__setitem__("layout", "rows"),
    ],
)
def test_edits_by_hand_are_noticed(edit: Callable[[dict[str, Any]], None]) -> None:
    """Content that still holds together but was changed after it was written does not fit its fingerprint."""
    content = as_json()
    edit(content)
    assert "the fingerprint does not fit the content" in refusal(content)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{",
        b"<html>404</html>",
        make().dump()[:-20],
        make().dump() + b"x",
        make().dump().replace(b"zstd:3", b"zstd\xff3"),
        b"\xff\xfe\x00",
        b"\x28\xb5\x2f\xfd\x00\x00",
        b'{"format": "streamshards", "version": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda data: ascii(data)[:30],
)
def test_bytes_that_are_not_json_are_refused(data: bytes) -> None:
    """Empty, cut off, followed by rubbish, not UTF-8, or compressed: refused as not JSON."""
    assert "not JSON" in refusal(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"streamshards"', b"{}", b'[{"format": "streamshards"}]'])
def test_other_json_is_not_an_index(data: bytes) -> None:
    """JSON that is not a streamshards index is refused as that."""
    assert "not a streamshards index" in refusal(data)


def test_an_index_beyond_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """More JSON than the limit is refused before it is parsed, one byte less is not."""
    data = make().dump()
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", len(data))
    assert parse(data).num_shards == 2
    monkeypatch.setattr(index_module, "MAX_INDEX_BYTES", len(data) - 1)
    assert f"{len(data):,} bytes of JSON" in refusal(data)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_bottomless_nesting_is_refused(opening: bytes) -> None:
    """100,000 opening brackets are refused like any other rubbish."""
    assert "nest" in refusal(opening * 100_000) or "recursion" in refusal(opening * 100_000)


@pytest.mark.parametrize("place", ["schema", "version", "format", "num_samples", "layout", "comment", "name"])
def test_nesting_of_any_depth_is_read_or_refused(place: str) -> None:
    """Nesting too deep to be handled somewhere after the JSON was read is refused too, whatever the exact limit is."""
    content = as_json()
    target = content["shards"]["name"] if place == "name" else content
    key: Any = 0 if place == "name" else place
    for depth in [*range(100, 900, 100), *range(900, 1010, 2)]:
        target[key] = "HERE"
        inner = (b'{"a":' * depth + b"1" + b"}" * depth) if place == "schema" else b"[" * depth + b"]" * depth
        data = json.dumps(content).encode().replace(b'"HERE"', inner)
        try:
            Index.parse(data, url=URL)
        except IndexInvalid as error:
            assert str(error).startswith(URL)  # noqa: PT017  # being read is right too


@pytest.mark.parametrize("place", ["schema", "layout", "codec", "created", "writer", "fingerprint"])
@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"], ids=ascii)
def test_text_that_is_not_unicode_is_refused(place: str, text: str) -> None:
    """JSON can escape half a surrogate pair, which no encoding can write again: refused wherever it stands."""
    content = as_json()
    content[place] = {text: 1} if place == "schema" else text
    assert refusal(content)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within *value*."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, child in inner for path in paths(child, (*at, key)))]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_value_may_be_anything(data: st.DataObject) -> None:
    """Whatever JSON value stands in whichever place, an index is read or refused with `IndexInvalid`."""
    content = as_json()
    path = data.draw(st.sampled_from(paths(content)))
    value = data.draw(json_values | st.text(st.characters(), max_size=4) | st.just(float("nan")))
    if path:
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
    else:
        content = value
    try:
        parse(content)
    except IndexInvalid as error:
        assert str(error).startswith(URL)  # noqa: PT017  # being read is right too


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_byte_may_be_any_other(data: st.DataObject) -> None:
    """With some bytes changed, removed or inserted, an index is refused, or nothing of its content has changed."""
    original = make().dump()
    at = data.draw(st.integers(0, len(original)))
    damaged = original[:at] + data.draw(st.binary(max_size=3)) + original[at + data.draw(st.integers(0, 3)) :]
    try:
        assert parse(damaged).fingerprint == make().fingerprint
    except IndexInvalid as error:
        assert str(error).startswith(URL)  # noqa: PT017  # being read is right too


@given(st.binary(max_size=60))
@example(b"\xed\xa0\x80")
@example(b"\xef\xbb\xbf{}")
@settings(deadline=None, max_examples=100)
def test_rubbish_is_refused(data: bytes) -> None:
    """Bytes at random are refused with `IndexInvalid`."""
    refusal(data)


# -- joining -------------------------------------------------------------------------------------------------------


def test_joined_indexes_follow_each_other() -> None:
    """Shards of the other index follow ours, with all that is known of each; neither index changes."""
    ours, other = make(["a", "b"]), make(["c"], rows=[9], digests=["f" * 32], codec="zstd:9", created="x", writer="y")
    before = copy.deepcopy((ours.dump(), other.dump()))
    joined = ours.extended(other, schema={"merged": 1})
    assert joined.names == ["a", "b", "c"]
    assert joined.rows.tolist() == [1, 2, 9]
    assert joined.sizes.tolist() == [100, 101, 100]
    assert joined.raw_sizes.tolist() == [1000, 1001, 1000]
    assert joined.digests[-1] == "f" * 32
    assert (joined.num_samples, joined.schema) == (12, {"merged": 1})
    assert (joined.codec, joined.created, joined.writer) == ("zstd:9", "x", "y")
    assert (ours.dump(), other.dump()) == before
    assert parse(joined.dump()).fingerprint == joined.fingerprint


def test_joined_indexes_have_no_shard_in_common() -> None:
    """Two indexes that name the same shard, or are laid out differently, are not joined."""
    with pytest.raises(IndexInvalid, match="twice"):
        make(["a", "b"]).extended(make(["b"]), schema={})
    with pytest.raises(IndexInvalid, match="layout 'shard' with 'rows'"):
        make(["a"]).extended(make(["b"], layout="rows"), schema={})


def test_an_index_says_what_it_is() -> None:
    """The repr names samples, shards, bytes and the fingerprint."""
    index = make(["a"], rows=[12_345])
    assert repr(index) == f"Index(samples=12,345, shards=1, bytes=100, fingerprint={index.fingerprint})"


# -- tails ---------------------------------------------------------------------------------------------------------


def test_tails_come_back_and_are_not_the_fingerprint() -> None:
    """They say how to read the same bytes."""
    plain = make()
    index = make(tails=np.array([[50, 7], [60, (1 << 48) - 1]], dtype=np.int64))
    assert parse(index.dump()).tails.tolist() == [[50, 7], [60, (1 << 48) - 1]]
    assert index.fingerprint == plain.fingerprint
    assert "tail_bytes" not in as_json(plain)["shards"]
    assert parse(plain.dump()).tails.tolist() == [[0, 0], [0, 0]]


def test_tails_follow_their_shards() -> None:
    """A dataset from before may be appended to: its shards have none."""
    old, new = make(["a"]), make(["b"], tails=np.array([[50, 7]], dtype=np.int64))
    joined = old.extended(new, schema={})
    assert joined.tails.tolist() == [[0, 0], [50, 7]]
    assert parse(joined.dump()).tails.tolist() == joined.tails.tolist()
    assert joined.head(1).tails.tolist() == [[0, 0]]


def test_tails_lie_inside_their_shards() -> None:
    content = as_json(make(tails=np.array([[50, 7], [60, 8]], dtype=np.int64)))
    content["shards"]["tail_bytes"][1] = 102
    assert "shards.tail_bytes says more than shards.bytes" in refusal(content)
    del content["shards"]["tail_check"]
    assert "'tail_check' must be a list" in refusal(content)


def test_checksums_are_not_added_up() -> None:
    """Those of 20,000 shards are more than any dataset has bytes."""
    index = make([f"{number}" for number in range(20_000)], tails=np.tile([50, (1 << 48) - 1], (20_000, 1)))
    assert parse(index.dump()).tails.tolist() == index.tails.tolist()


@given(st.lists(st.text(st.sampled_from("ab.-_/\\:\n\0 é"), max_size=4), max_size=4, unique=True))
@settings(deadline=None, max_examples=300)
def test_names_are_refused_together_as_they_are_one_by_one(names: list[str]) -> None:
    """The quick look at all of them lets nothing pass."""
    content = as_json(make([f"{number}" for number in range(len(names))]))
    content["shards"]["name"] = names
    if all(map(is_safe_name, names)):
        assert not names or "fingerprint" in refusal(content)
    else:
        assert "names must be relative, printable" in refusal(content)
