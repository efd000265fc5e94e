from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamshards.errors import IndexInvalid, OptionInvalid, SampleInvalid
from streamshards.shard.schema import DTYPES, Field, Schema, is_at_or_below, join, unite

NULL = Field(("x",), "null", optional=True)
FIXED = Field(("x",), "tensor", "float32", (3, 4))
OTHER = Field(("x",), "tensor", "float32", (5, 4))
WIDE = Field(("x",), "tensor", "float32", (3, 7))
FIRST = Field(("x",), "ragged", "float32", (None, 4))
ALL = Field(("x",), "ragged", "float32", (None, None))
OPTIONAL = Field(("x",), "tensor", "float32", (3, 4), optional=True)
LATTICE = [NULL, FIXED, OTHER, WIDE, FIRST, ALL, OPTIONAL]

shapes = st.lists(st.integers(0, 3), min_size=2, max_size=2).map(tuple)
fields = st.one_of(
    st.just(NULL),
    st.builds(lambda shape, optional: Field(("x",), "tensor", "int8", shape, optional), shapes, st.booleans()),
    st.builds(
        lambda size, optional: Field(("x",), "ragged", "int8", (None, size), optional), st.integers(0, 3), st.booleans()
    ),
    st.builds(lambda optional: Field(("x",), "ragged", "int8", (None, None), optional), st.booleans()),
)


@pytest.mark.parametrize(
    ("left", "right", "joined"),
    [
        (FIXED, OTHER, FIRST),
        (FIXED, WIDE, ALL),
        (FIRST, WIDE, ALL),
        (FIRST, FIXED, FIRST),
        (NULL, FIXED, OPTIONAL),
        (NULL, NULL, NULL),
        (OPTIONAL, OTHER, Field(("x",), "ragged", "float32", (None, 4), optional=True)),
    ],
)
def test_sizes_that_differ_make_a_field_ragged_and_none_makes_it_optional(
    left: Field, right: Field, joined: Field
) -> None:
    assert join(left, right) == join(right, left) == joined


@given(fields, fields, fields)
def test_join_is_a_lattice_join(a: Field, b: Field, c: Field) -> None:
    assert join(a, b) == join(b, a)
    assert join(a, a) == a
    assert join(join(a, b), c) == join(a, join(b, c))
    assert is_at_or_below(a, join(a, b))
    assert is_at_or_below(b, join(a, b))


CONFLICTS = [
    FIXED,
    Field(("x",), "tensor", "float64", (3, 4)),
    Field(("x",), "tensor", "float32", (3,)),
    Field(("x",), "tensor", "int64", (), python="int"),
    Field(("x",), "tensor", "int64", ()),
    Field(("x",), "tensor", "bool", (), python="bool"),
    Field(("x",), "str"),
    Field(("x",), "bytes"),
    Field(("x",), "json"),
]


@pytest.mark.parametrize(("stands", "came"), list(itertools.permutations(CONFLICTS, 2)))
def test_types_never_change(stands: Field, came: Field) -> None:
    """The message says which field, what stands and what came."""
    with pytest.raises(SampleInvalid, match="'x'") as caught:
        join(stands, came)
    assert f"expected {stands.describe()}" in str(caught.value)
    assert f"got {came.describe()}" in str(caught.value)


def test_merge_keeps_the_order_of_the_first_and_refuses_other_fields() -> None:
    one, two = Field(("a",), "str"), Field(("b",), "bytes")
    assert Schema((one, two)).merge(Schema((two, one))) == Schema((one, two))
    with pytest.raises(SampleInvalid, match="without 'b'"):
        Schema((one, two)).merge(Schema((one,)))
    with pytest.raises(SampleInvalid, match="with 'b', which the first sample did not have"):
        Schema((one,)).merge(Schema((one, two)))
    with pytest.raises(SampleInvalid, match="empty dicts 'e' stand, none came"):
        Schema((one,), (("e",),)).merge(Schema((one,)))


def field(path: str, **changes: Any) -> Field:
    return replace(Field(tuple(path.split(".")), "str"), **changes)


def test_unite_keeps_the_order_of_first_sight_and_makes_optional_what_one_lacks() -> None:
    one, two = Schema((field("a"), field("b.c"))), Schema((field("d"), field("a")))
    assert unite({"one": one, "two": two}).fields == (
        field("a"),
        field("b.c", optional=True),
        field("d", optional=True),
    )
    assert unite({"one": one}) == one


@given(fields, fields, fields)
def test_unite_is_above_each_schema_and_says_the_same_in_any_grouping(a: Field, b: Field, c: Field) -> None:
    """Whatever three sources have at one path, each reads as the united field, which is the join of all."""
    united = unite({"a": Schema((a,)), "b": Schema((b,)), "c": Schema((c,)), "d": Schema((replace(c, path=("y",)),))})
    (at_x, at_y) = united.fields
    assert replace(at_x, optional=True) == replace(join(join(a, b), c), optional=True)
    assert at_x.optional
    assert at_y == replace(c, path=("y",), optional=True)
    for of_one in (a, b, c):
        assert is_at_or_below(of_one, at_x)


@pytest.mark.parametrize(("stands", "came"), list(itertools.permutations(CONFLICTS, 2)))
def test_unite_names_both_sources_and_the_field_that_clash(stands: Field, came: Field) -> None:
    """Also when a source between them lacks the field."""
    with pytest.raises(OptionInvalid, match=r"'web' and 'code' cannot be mixed: field 'x'.*columns=") as caught:
        unite({"web": Schema((stands,)), "books": Schema((field("y"),)), "code": Schema((came,))})
    assert f"expected {stands.describe()}" in str(caught.value)
    assert f"got {came.describe()}" in str(caught.value)


def test_unite_of_a_value_and_a_dict_is_refused() -> None:
    """A field here that is a dict there, with fields or empty, cannot come back as it went in."""
    value = Schema((field("a.b"),))
    for other in (Schema((field("a.b.c"),)), Schema((field("z"),), (("a", "b"),)), Schema((), (("a", "b", "c"),))):
        for schemas in ({"one": value, "two": other}, {"two": other, "one": value}):
            with pytest.raises(OptionInvalid, match=r"'a\.b' is a value in 'one' and a dict in another source"):
                unite(schemas)


def test_unite_keeps_empty_dicts_unless_another_source_fills_them() -> None:
    empty, full = Schema((field("z"),), (("a",), ("e", "f"))), Schema((field("a.b"),))
    united = unite({"empty": empty, "full": full})
    assert united.empty == (("e", "f"),)
    assert [(one.name, one.optional) for one in united.fields] == [("z", True), ("a.b", True)]
    assert Schema.from_json(united.to_json()) == united


def nested() -> Schema:
    paths = [("image",), ("meta", "id"), ("meta", "size"), ("metal",)]
    return Schema(tuple(Field(path, "str") for path in paths), (("meta", "none"),))


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (["image"], ["image"]),
        (["meta"], ["meta.id", "meta.size"]),
        (["meta.size", "image"], ["image", "meta.size"]),
        ([], []),
    ],
)
def test_select_takes_names_dotted_paths_and_structs(columns: list[str], names: list[str]) -> None:
    assert [field.name for field in nested().select(columns).fields] == names


def test_select_lists_what_exists() -> None:
    with pytest.raises(OptionInvalid, match=r"no 'imag'; the dataset has image, meta\.id, meta\.size, metal"):
        nested().select(["imag"])
    with pytest.raises(OptionInvalid, match="must be a list"):
        nested().select("image")


@pytest.mark.parametrize("field", [*LATTICE, *CONFLICTS])
def test_json_round_trip(field: Field) -> None:
    schema = Schema((field,), (("e", "f"),))
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert field.name in schema.describe()


def field_json(**changes: Any) -> dict[str, Any]:
    return {"fields": [{"path": ["x"], "kind": "tensor", "dtype": "int8", "shape": [2], **changes}]}


HOSTILE: list[Any] = [
    None, [], 1, {}, {"fields": 3}, {"fields": [3]}, {"fields": [], "empty": 1}, {"fields": [], "more": 1},
    {"fields": [{"path": ["x"]}]}, field_json(more=1), field_json(path=[]), field_json(path="x"),
    field_json(path=[1]), field_json(path=[""]), field_json(path=["a\0"]), field_json(path=["a?"]),
    field_json(path=["x"] * 1000), field_json(kind="object"), field_json(kind=["tensor"]), field_json(kind=None),
    field_json(dtype="quint8"), field_json(dtype="__class__"), field_json(dtype=None), field_json(dtype=["int8"]),
    field_json(shape=None), field_json(shape=[None]), field_json(shape=[-1]), field_json(shape=[2**63]),
    field_json(shape=[2**40, 2**40]), field_json(shape=[1.0]), field_json(shape=[True]), field_json(shape=[1] * 65),
    field_json(kind="ragged"), field_json(kind="ragged", shape=[]), field_json(kind="ragged", shape=[2, None]),
    field_json(kind="ragged", shape=[None, None, 3]), field_json(kind="str"), field_json(optional=1),
    field_json(python="int"), field_json(python="str", shape=[]), field_json(python=["int"], shape=[]),
    {"fields": [{"path": ["x"], "kind": "null"}]},
    {"fields": [{"path": ["x"], "kind": "str"}, {"path": ["x"], "kind": "str"}]},
    {"fields": [{"path": ["x"], "kind": "str"}, {"path": ["x", "y"], "kind": "str"}]},
    {"fields": [{"path": ["x"], "kind": "str"}], "empty": [["x"]]},
]  # fmt: skip


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: json.dumps(value)[:60])
def test_from_json_believes_nothing(value: Any) -> None:
    with pytest.raises(IndexInvalid):
        Schema.from_json(value)


def test_no_dtype_is_quantised_and_all_are_of_this_torch() -> None:
    assert all(
        isinstance(dtype, torch.dtype) and dtype not in (torch.quint8, torch.qint8, torch.qint32)
        for dtype in DTYPES.values()
    )
    assert {"bool", "bfloat16", "float8_e4m3fn", "complex64", "uint16"} <= DTYPES.keys()
