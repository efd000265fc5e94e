"""Gathering batches: every field kind, any rows of any sources, in memory of the batch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamshards.engine.gather import BatchBuilder
from streamshards.shard.columns import Columns, to_samples
from streamshards.shard.data import part_dtype, part_shape
from streamshards.shard.reader import LoadedShard
from streamshards.shard.schema import DTYPES, Field, Schema, unite
from tests.engine.rig import columns_of
from tests.shard.shard_cases import DTYPE_PARAMS, mixed_samples, random_tensor, same

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

Pick = tuple[int, list[int]]
"""Some rows, in this order, of the source of that number."""


def gathered(schema: Schema, sources: list[Columns], picks: list[Pick]) -> Columns:
    builder = BatchBuilder(schema, sum(len(rows) for _, rows in picks))
    for source, rows in picks:
        builder.add(sources[source], torch.tensor(rows, dtype=torch.int64))
    return builder.finish()


def require_right(sources: list[Columns], picks: list[Pick]) -> Columns:
    """Gather, compare with copying row by row, and check that the result is well-formed; return it."""
    schema = sources[0].schema
    rows = [to_samples(source) for source in sources]
    expected = [rows[source][row] for source, picked in picks for row in picked]
    batch = gathered(schema, sources, picks)
    assert batch.num_rows == len(expected)
    assert batch.schema == schema
    for field in schema.fields:
        data = batch.data[field.path]
        total = 0 if data.offsets is None else int(data.offsets[-1])
        for part in field.parts:
            assert data.part(part).dtype == part_dtype(field, part)
            assert tuple(data.part(part).shape) == part_shape(field, part, len(expected), total)
            assert data.part(part).is_contiguous()
    assert same(to_samples(batch), expected)
    return batch


def sources_of(*groups: list[dict[str, Any]]) -> list[Columns]:
    """Return each group of samples as columns of the schema that all groups share."""
    columns = [columns_of(group) for group in groups]
    schema = columns[0].schema
    for part in columns[1:]:
        schema = schema.merge(part.schema)
    return [LoadedShard(part, "rows").columns(schema) for part in columns]


PICKS: list[list[Pick]] = [
    [(0, [0])],
    [(0, [3, 1, 2, 0])],
    [(0, [2, 2, 2])],
    [(0, [1]), (1, [3, 0]), (0, [1]), (1, [2])],
    [(1, [0]), (1, [1]), (1, [2]), (1, [3]), (0, [0, 1, 2, 3])],
    [(0, [0]), (1, []), (0, [3])],
    [(0, [])],
]


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_mixed_samples(picks: list[Pick]) -> None:
    """Every kind at once, optional and nested ones too: rows in any order, repeated, of several sources, or none."""
    one, two = mixed_samples(), [dict(row) for row in reversed(mixed_samples())]
    require_right(sources_of(one, two), picks)


SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dtype_as_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Fixed tensors of every dtype torch can save, 0-d and empty ones included, come through bit for bit."""
    one = [{"x": random_tensor(shape, dtype, row)} for row in range(4)]
    two = [{"x": random_tensor(shape, dtype, row)} for row in range(4, 8)]
    for picks in PICKS:
        require_right(sources_of(one, two), picks)


@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
@pytest.mark.parametrize("lengths", [(0, 3, 1, 2), (0, 0, 0, 1), (400, 0, 700, 900)], ids=str)
@pytest.mark.parametrize("is_deep", [False, True], ids=["first dim", "all dims"])
def test_every_dtype_as_ragged(dtype: torch.dtype, lengths: tuple[int, ...], is_deep: bool) -> None:
    """Ragged tensors of every dtype, short and long rows, empty ones included, come through bit for bit."""

    def group(start: int) -> list[dict[str, Any]]:
        shapes = [(n, 2 + n % 2) if is_deep else (n, 2) for n in lengths]
        return [{"x": random_tensor(shape, dtype, start + row)} for row, shape in enumerate(shapes)]

    for picks in PICKS:
        require_right(sources_of(group(0), group(4)), picks)


def test_ragged_items_of_no_size() -> None:
    """Rows of a varying number of empty items keep their lengths, though there is nothing to copy."""
    group = [{"x": torch.empty((n, 0, 2), dtype=torch.float16)} for n in (3, 0, 1, 2)]
    for picks in PICKS:
        batch = require_right(sources_of(group, group), picks)
        assert batch.data[("x",)].values.numel() == 0


@pytest.mark.parametrize("item_shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("longest", [1, 10, 100, 10_000])
def test_short_and_long_rows_in_one_batch(item_shape: tuple[int, ...], dtype: torch.dtype, longest: int) -> None:
    """From no item to ten thousand, side by side and repeated: however spans are copied, they come through whole."""
    group = [{"x": random_tensor((n, *item_shape), dtype, n)} for n in (0, 5, 1, longest, 0, 2)]
    require_right(sources_of(group), [(0, [3, 0, 5, 5, 4, 1, 3, 2])])
    require_right(sources_of(group), [(0, [3])])


def test_a_source_that_starts_inside_its_values() -> None:
    """Spans are found through the offsets: rows before the first that is taken may have any length."""
    group = [{"x": torch.arange(n)} for n in (1000, 1, 2)]
    batch = require_right(sources_of(group), [(0, [2, 1])])
    assert batch.data[("x",)].values.tolist() == [0, 1, 0]


def tensors_of(columns: Columns) -> list[torch.Tensor]:
    return [columns.data[field.path].part(part) for field in columns.schema.fields for part in field.parts]


@pytest.mark.parametrize("picks", PICKS, ids=str)
def test_a_batch_owns_its_memory(picks: list[Pick]) -> None:
    """Each tensor of a batch is the whole of a storage of its own: overwriting the sources changes nothing in it."""
    sources = sources_of(mixed_samples(), mixed_samples())
    batch = gathered(sources[0].schema, sources, picks)
    before = [tensor.clone() for tensor in tensors_of(batch)]
    addresses = {tensor.untyped_storage().data_ptr() for source in sources for tensor in tensors_of(source)}
    for tensor in tensors_of(batch):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert not tensor.nbytes or tensor.untyped_storage().data_ptr() not in addresses
    for source in sources:
        for tensor in tensors_of(source):
            tensor.zero_()
    assert all(same(now, then) for now, then in zip(tensors_of(batch), before, strict=True))


# -- any schema --------------------------------------------------------------------------------------------------------

NAMES = sorted(DTYPES)


@st.composite
def fields(draw: st.DrawFn) -> tuple[Field, list[Any]]:
    """Draw a field, and three groups of values for it, four rows each."""
    kind = draw(st.sampled_from(["tensor", "first", "all", "str", "bytes", "json", "null"]))
    dtype = DTYPES[draw(st.sampled_from(NAMES))]
    tail = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    is_optional = draw(st.booleans())
    longest = draw(st.sampled_from([3, 300]))

    def value(seed: int) -> Any:
        if kind == "null" or (is_optional and draw(st.booleans())):
            return None
        if kind == "tensor":
            return random_tensor(tail, dtype, seed)
        if kind == "first":
            return random_tensor((draw(st.integers(0, longest)), *tail), dtype, seed)
        if kind == "all":
            return random_tensor((draw(st.integers(0, longest)), draw(st.integers(0, 3))), dtype, seed)
        text = "é" * draw(st.integers(0, longest))
        return {"str": text, "bytes": text.encode(), "json": [text, seed, None]}[kind]

    return kind, [[value(10 * group + row) for row in range(4)] for group in range(3)]


@given(
    st.lists(fields(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), max_size=6)), max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_any_fields_any_rows(columns: list[tuple[Any, list[list[Any]]]], picks: list[Pick]) -> None:
    """Whatever the fields and the rows: what is gathered is what copying row by row gives."""
    groups = [
        [{f"f{n}": values[group][row] for n, (_, values) in enumerate(columns)} for row in range(4)]
        for group in range(3)
    ]
    sources = sources_of(*groups)
    if picks:
        require_right(sources, picks)


# -- put in order, and absent ------------------------------------------------------------------------------------------


def reordered(sources: list[Columns], picks: list[Pick], reordering: list[int]) -> Columns:
    schema = sources[0].schema
    builder = BatchBuilder(schema, sum(len(rows) for _, rows in picks))
    for source, rows in picks:
        builder.add(sources[source], torch.tensor(rows, dtype=torch.int64))
    return builder.finish(torch.tensor(reordering, dtype=torch.int64))


@given(
    st.lists(fields(), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), max_size=6)), min_size=1, max_size=5),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_rows_put_in_order_are_the_rows_added_in_that_order(
    columns: list[tuple[Any, list[list[Any]]]], picks: list[Pick], data: st.DataObject
) -> None:
    """Adding rows source by source and putting them in order is adding them in order, one by one, bit for bit."""
    groups = [
        [{f"f{n}": values[group][row] for n, (_, values) in enumerate(columns)} for row in range(4)]
        for group in range(3)
    ]
    sources = sources_of(*groups)
    added = [(source, row) for source, rows in picks for row in rows]
    reordering = data.draw(st.permutations(range(len(added))))
    one_by_one: list[Pick] = [(added[place][0], [added[place][1]]) for place in reordering] or [(0, [])]
    got = reordered(sources, picks, reordering)
    expected = gathered(sources[0].schema, sources, one_by_one)
    assert got.num_rows == expected.num_rows
    assert got.schema == expected.schema
    assert same(to_samples(got), to_samples(expected))
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.is_contiguous()
        assert one.untyped_storage().nbytes() == one.nbytes


KINDS: dict[str, list[Any]] = {
    "int": [1, -2, 3],
    "float": [0.5, float("inf"), -1.0],
    "bool": [True, False, True],
    "complex": [1j, 2 + 0j, -1j],
    "fixed": [torch.full((2, 3), number, dtype=torch.bfloat16) for number in range(3)],
    "empty": [torch.empty((2, 0)) for _ in range(3)],
    "ragged": [torch.arange(number, dtype=torch.int16) for number in (2, 0, 5)],
    "ragged rows": [torch.full((number, 2), number, dtype=torch.complex128) for number in (1, 0, 2)],
    "ragged everywhere": [torch.full((number, number + 1), number, dtype=torch.float16) for number in (1, 0, 2)],
    "str": ["a", "", "löwe"],
    "bytes": [b"\0", b"", b"abc"],
    "json": [[1, {"a": None}], [], ["x"]],
    "null": [None, None, None],
}


@pytest.mark.parametrize("optional", [False, True], ids=["always there", "None in some rows"])
@pytest.mark.parametrize("picks", [[(0, [2, 0]), (1, [1, 1]), (0, [1])], [(1, [0, 2])], [(1, []), (0, [0])]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_reordered", [False, True])
def test_a_field_that_a_source_lacks_is_absent_there(
    kind: str, picks: list[Pick], optional: bool, is_reordered: bool
) -> None:
    """None in samples, zeros and a False mask in batches, for every kind of field, between rows that have it."""
    values = [None, *KINDS[kind][1:]] if optional else KINDS[kind]
    having = [{"id": row, "x": value} for row, value in enumerate(values)]
    lacking = [{"id": 10 + row} for row in range(3)]
    one, two = columns_of(having), columns_of(lacking)
    schema = unite({"one": one.schema, "two": two.schema})
    sources = [LoadedShard(one, "one").columns(schema), two]
    rows = [having, [{**row, "x": None} for row in lacking]]
    expected = [rows[source][row] for source, picked in picks for row in picked]
    builder = BatchBuilder(schema, len(expected))
    for source, picked in picks:
        builder.add(sources[source], torch.tensor(picked, dtype=torch.int64))
    backwards = list(range(len(expected)))[::-1]
    if is_reordered:
        batch, expected = builder.finish(torch.tensor(backwards)), [expected[row] for row in backwards]
    else:
        batch = builder.finish()
    assert same(to_samples(batch), expected)
    field = schema.field(("x",))
    assert field is not None
    assert field.optional
    if field.kind == "tensor":
        absent = ~batch.data[("x",)].part("present")
        assert absent.tolist() == [row["x"] is None for row in expected]
        assert not batch.data[("x",)].values[absent].to(torch.complex128).any()
