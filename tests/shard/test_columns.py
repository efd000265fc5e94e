from __future__ import annotations

import io
import os
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamshards.errors import SampleInvalid, ShardCorrupt
from streamshards.shard.columns import RaggedList, RowBuffer, to_batch, to_samples
from streamshards.shard.payload import LoadedShard
from streamshards.shard.schema import Field, Schema

from .shard_cases import DTYPE_PARAMS, columns_of_samples, mixed_samples, random_tensor, same


def round_trip(*samples: dict[str, Any]) -> list[dict[str, Any]]:
    return to_samples(columns_of_samples(list(samples)))


def test_every_kind_comes_back_as_it_went_in() -> None:
    assert same(round_trip(*mixed_samples()), mixed_samples())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
@pytest.mark.parametrize("shapes", [[(), ()], [(3,), (3,)], [(2,), (0,)], [(2, 3), (1, 4)], [(0, 2), (3, 2)]], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    samples = [{"x": random_tensor(shape, dtype, seed), "o": None} for seed, shape in enumerate(shapes)]
    samples.append({"x": None, "o": random_tensor((2,), dtype)})
    assert same(round_trip(*samples), samples)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
sizes = st.integers(0, 3)
tensors = st.builds(lambda a, b, seed: random_tensor((a, b), torch.float32, seed), sizes, sizes, st.integers(0, 9))
rows = st.fixed_dictionaries(
    {
        "t": st.none() | tensors,
        "i": st.none() | st.integers(-(2**63), 2**63 - 1),
        "f": st.floats(),
        "s": st.none() | st.text(),
        "b": st.binary(),
        "j": st.none() | st.lists(json_values),
        "n": st.fixed_dictionaries({"x": st.booleans(), "e": st.just({})}),
    }
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # shared machines
@given(st.lists(rows, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_any_samples_come_back_however_they_are_cut(samples: list[dict[str, Any]], cut: int, lo: int) -> None:
    """Also as some rows of the columns, and after an extend with what to_batch gave."""
    columns = columns_of_samples(samples)
    assert same(to_samples(columns), samples)
    if samples:
        lo = min(lo, len(samples))
        assert same(to_samples(LoadedShard(columns, "x").columns(lo=lo)), samples[lo:])
        buffer = RowBuffer()
        for sample in samples[:cut]:
            buffer.append(sample)
        for sample in samples[cut:]:
            buffer.extend({**{key: [value] for key, value in sample.items()}, "n": {"x": [sample["n"]["x"]], "e": {}}})
        assert buffer.num_rows == len(samples)
        assert buffer.schema == columns.schema
        assert same(to_samples(buffer.finish()), samples)
        buffer.extend(to_batch(columns))
        assert same(to_samples(buffer.finish()), samples)


def test_no_rows() -> None:
    buffer = RowBuffer()
    assert buffer.finish().num_rows == 0
    columns = columns_of_samples(mixed_samples())
    buffer = RowBuffer(columns.schema)
    blank = buffer.finish()
    assert blank.schema == columns.schema
    assert to_samples(blank) == []
    batch = to_batch(blank)
    assert batch["image"].shape == (0, 2, 3)
    assert batch["tokens"] == []


def test_numpy_goes_in_and_tensors_come_out() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4)[::-1, ::2]
    frozen = np.ones(2, np.float16)
    frozen.setflags(write=False)
    (sample,) = round_trip({"a": array, "s": np.float32(2.5), "z": np.array(3), "f": frozen, "b": np.bool_(True)})
    assert same(sample["a"], torch.tensor([[8, 10], [4, 6], [0, 2]], dtype=torch.int32))
    assert same(sample["s"], torch.tensor(2.5))
    assert same(sample["z"], torch.tensor(3))
    assert same(sample["b"], torch.tensor(True))


def test_views_conjugates_gradients_and_subclasses_are_stored_as_plain_values() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    (sample,) = round_trip({"conj": z.conj(), "imag": z.conj().imag, "weight": weight.t()})
    assert same(sample["conj"], torch.tensor([1 - 2j, 3 + 1j]))
    assert same(sample["imag"], torch.tensor([-2.0, 1.0]))
    assert same(sample["weight"], torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    assert not sample["weight"].requires_grad


def test_tuples_come_back_as_lists_and_bytearrays_as_bytes() -> None:
    assert round_trip({"t": (1, (2, "x")), "b": bytearray(b"ab")}) == [{"t": [1, [2, "x"]], "b": b"ab"}]


BAD: list[tuple[Any, str]] = [
    ({1: 2}, "key 1 is int, not str"),
    ({"": 2}, "is empty or holds a NUL"),
    ({"a\0b": 2}, "is empty or holds a NUL"),
    ({"a?": 2}, 'ends in "?"'),
    ({"a": {"b?": 2}}, r"in 'a'"),
    ({"a": {3: 2}}, r"key 3 is int"),
    ({"\ud800": 1}, "not valid Unicode"),
    ({}, "without any value"),
    ({"x": {}}, "without any value"),
    ([1], "is a dict of values, not list"),
    ({"x": 2**63}, r"field 'x': 9223372036854775808 does not fit into int64"),
    ({"x": 10**5000}, "an int does not fit"),
    ({"x": object()}, r"field 'x': builtins\.object cannot be stored"),
    ({"x": {1, 2}}, r"builtins\.set cannot be stored"),
    ({"x": "\ud800"}, "not valid Unicode"),
    ({"x": [1, {2: 3}]}, "key 2 inside a list is int"),
    ({"x": [object()]}, "object inside a list is not a JSON value"),
    ({"x": [torch.zeros(2)]}, "list of tensors or numpy values; stack"),
    ({"x": [np.float64(1)]}, "list of tensors or numpy values"),
    ({"x": np.array(["a"])}, "numpy <U1 cannot be stored"),
    ({"x": np.str_("a")}, "numpy <U1 cannot be stored"),
    ({"x": np.array([None])}, "numpy object cannot be stored"),
    ({"x": np.array(["2020-01-01"], "M8[D]")}, "cannot be stored"),
    ({"x": np.zeros(2, np.longdouble)}, "numpy float128 has no dtype in torch|numpy longdouble"),
    ({"x": np.ma.masked_array([1, 2], [0, 1])}, "lose its mask"),
    ({"x": torch.eye(2).to_sparse()}, "sparse_coo tensor cannot be stored"),
    ({"x": torch.empty(2, device="meta")}, "meta device"),
]  # fmt: skip


@pytest.mark.parametrize(("sample", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_what_cannot_be_stored_is_refused_with_the_reason(sample: Any, message: str) -> None:
    buffer = RowBuffer()
    with pytest.raises(SampleInvalid, match=message) as caught:
        buffer.append(sample)
    assert str(caught.value).startswith("sample 0: ")
    assert buffer.num_rows == buffer.nbytes == 0
    assert buffer.schema == Schema(())


@pytest.mark.filterwarnings("ignore::UserWarning")  # quantised and nested tensors are deprecated, or prototypes
def test_quantised_and_nested_tensors_are_refused() -> None:
    with pytest.raises(SampleInvalid, match="quint8 cannot be stored"):
        RowBuffer().append({"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)})
    with pytest.raises(SampleInvalid, match="nested tensor cannot be stored"):
        RowBuffer().append({"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})


def test_lists_and_dicts_that_hold_themselves_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(SampleInvalid, match="holds itself"):
        RowBuffer().append({"x": loop})
    knot: dict[str, Any] = {}
    knot["x"] = knot
    with pytest.raises(SampleInvalid, match="nested more than 64 deep"):
        RowBuffer().append(knot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 1.5}, "sample 4: field 'label': expected int, got float"),
        ({"label": True}, "sample 4: field 'label': expected int, got bool"),
        ({"label": torch.tensor(1)}, r"field 'label': expected int, got int64 \(\)"),
        ({"image": torch.zeros(2, 3)}, r"field 'image': expected uint8 \(2, 3\), got float32 \(2, 3\)"),
        ({"image": torch.zeros(2, dtype=torch.uint8)}, r"expected uint8 \(2, 3\), got uint8 \(2,\)"),
        ({"tokens": "x"}, r"field 'tokens': expected int32 \(\*,\), got str"),
        ({"caption": b"x"}, "field 'caption': expected optional str, got bytes"),
        (
            {"meta": {"id": 3, "deep": {"zero_d": torch.tensor(1.0), "nothing": {}}, "never": None}},
            r"'meta\.id': expected str",
        ),
        ({"meta": None}, r"without 'meta\.deep\.nothing', .* with 'meta', which the first sample did not have"),
        ({"extra": 1}, "sample 4: came with 'extra', which the first sample did not have"),
    ],
)
def test_a_sample_that_does_not_fit_leaves_no_trace(change: dict[str, Any], message: str) -> None:
    """The bad field may stand last: nothing before it may have been added."""
    samples = mixed_samples()
    buffer = RowBuffer()
    for sample in samples:
        buffer.append(sample)
    before = buffer.schema, buffer.nbytes, buffer.num_rows
    with pytest.raises(SampleInvalid, match=message):
        buffer.append({**samples[0], **change})
    with pytest.raises(SampleInvalid):
        buffer.extend({key: [value] for key, value in {**samples[0], **change}.items()})
    assert (buffer.schema, buffer.nbytes, buffer.num_rows) == before
    assert same(to_samples(buffer.finish()), samples)


def test_rows_are_counted_over_all_shards_in_messages() -> None:
    buffer = RowBuffer()
    buffer.append({"x": 1})
    buffer.finish()
    buffer.append({"x": 1})
    with pytest.raises(SampleInvalid, match="sample 2: field 'x'"):
        buffer.append({"x": "one"})


def test_a_missing_field_is_named_with_the_way_out() -> None:
    buffer = RowBuffer()
    buffer.append({"x": 1, "y": 2})
    with pytest.raises(SampleInvalid, match=r"came without 'y' \(write None where there is no value\)"):
        buffer.append({"x": 1})


def test_the_caller_may_reuse_its_buffers() -> None:
    tensor, array, blob = torch.zeros(3), np.zeros(3), bytearray(b"abc")
    buffer = RowBuffer()
    for _ in range(2):  # the first sample and the quick way of later ones
        buffer.append({"t": tensor, "a": array, "b": blob})
    buffer.extend({"t": tensor.view(1, 3), "a": array.reshape(1, 3), "b": [blob]})
    tensor.fill_(7)
    array.fill(7)
    blob[:] = b"xyz"
    for sample in to_samples(buffer.finish()):
        assert sample["t"].tolist() == sample["a"].tolist() == [0, 0, 0]
        assert sample["b"] == b"abc"


def test_extend_equals_many_appends() -> None:
    x, y = torch.arange(12.0).view(4, 3), np.arange(4, dtype=np.int16)
    appended, extended = RowBuffer(), RowBuffer()
    extended.extend(
        {"x": x, "n": {"y": y, "s": list("abcd"), "r": [x[0], x[1, :2], None, x[2]], "j": [[1], [], None, [2]]}}
    )
    for i in range(4):
        nested = {"y": y[i], "s": "abcd"[i], "r": [x[0], x[1, :2], None, x[2]][i], "j": [[1], [], None, [2]][i]}
        appended.append({"x": x[i], "n": nested})
    assert appended.schema == extended.schema
    one, two = appended.finish(), extended.finish()
    assert one.schema == two.schema
    for path in one.data:
        for part in ("values", "offsets", "shapes", "present"):
            assert same(getattr(one.data[path], part), getattr(two.data[path], part))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": torch.zeros(2), "b": [1, 2, 3]}, "columns differ in length: 2 rows in 'a', 3 in 'b'"),
        ({"a": torch.tensor(1)}, "field 'a': a 0-d tensor is not a column"),
        ({"a": "text"}, "field 'a': str is not a column"),
        ({"a": [1, "x"]}, "item 1: field 'a': expected int, got str"),
        ({"a": torch.zeros(2), "a?": torch.ones(3, dtype=torch.bool)}, r"field 'a\?': a mask is bool \(2,\)"),
        ({"b?": torch.ones(3, dtype=torch.bool)}, 'ends in "?"'),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused(batch: dict[str, Any], message: str) -> None:
    buffer = RowBuffer()
    with pytest.raises(SampleInvalid, match=message.replace('"?"', r'"\?"')):
        buffer.extend(batch)
    assert buffer.num_rows == 0
    assert buffer.schema == Schema(())


def test_an_empty_batch_adds_nothing_and_fixes_nothing() -> None:
    buffer = RowBuffer()
    buffer.extend({"x": torch.zeros(0, 3)})
    buffer.append({"x": "text"})
    assert buffer.num_rows == 1


def test_a_column_of_numbers_extends_a_python_scalar() -> None:
    buffer = RowBuffer()
    buffer.append({"label": 3})
    buffer.extend({"label": torch.tensor([4, 5])})
    assert to_samples(buffer.finish()) == [{"label": 3}, {"label": 4}, {"label": 5}]


def test_a_given_schema_binds_types_not_sizes() -> None:
    schema = Schema((Field(("x",), "tensor", "float32", (2,)), Field(("y",), "str")))
    buffer = RowBuffer(schema)
    with pytest.raises(SampleInvalid, match="float32"):
        buffer.append({"x": torch.zeros(2).double(), "y": "a"})
    buffer.append({"x": torch.zeros(3), "y": "a"})
    assert buffer.finish().schema.fields[0].shape == (3,), "a shard is as special as its rows"
    assert buffer.schema.fields[0].shape == (None,), "the dataset holds what was there, too"


def test_batches_have_masks_and_lists() -> None:
    batch = to_batch(columns_of_samples(mixed_samples()))
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["score?"].tolist() == [True, False, True, True]
    assert batch["score"].tolist() == [0.0, 0.0, 1.0, 1.5]
    assert batch["caption"] == ["löwe 0", "löwe 1", None, "löwe 3"]
    assert [row.shape for row in batch["boxes"]] == [(0, 1), (1, 2), (2, 3), (0, 4)]
    assert batch["meta"]["never"] == [None] * 4
    assert batch["meta"]["deep"]["nothing"] == {}
    assert "label?" not in batch


def test_samples_are_views() -> None:
    columns = columns_of_samples(mixed_samples())
    values = columns.data["image",].values
    assert all(
        row["image"].untyped_storage().data_ptr() == values.untyped_storage().data_ptr() for row in to_samples(columns)
    )


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("str", b"\xff", "field 'x', row 1: stored str"),
        ("json", b"[", "stored json"),
        ("json", b"[" * 10**5, "stored json"),
    ],
)
def test_stored_text_that_does_not_decode_is_corrupt(kind: str, values: bytes, message: str) -> None:
    columns = columns_of_samples([{"x": "" if kind == "str" else []}, {"x": "a" if kind == "str" else [1]}])
    data = columns.data["x",]
    start = int(data.offsets[1])
    data.values = torch.cat([data.values[:start], torch.frombuffer(bytearray(values), dtype=torch.uint8)])
    data.offsets[2] = start + len(values)
    with pytest.raises(ShardCorrupt, match=message):
        to_samples(columns)


def ragged(with_shapes: bool = False) -> RaggedList:
    values = torch.arange(600.0).clone()
    shapes = torch.tensor([[2, 1], [0, 5], [298, 2]]) if with_shapes else None
    lengths = torch.tensor([2, 0, 596 + 2]) if not with_shapes else torch.tensor([2, 0, 596])
    return RaggedList(values[: int(lengths.sum())], lengths, shapes, torch.tensor([True, False, True]))


@pytest.mark.parametrize("with_shapes", [False, True])
def test_a_ragged_list_is_sent_as_a_few_tensors_and_rebuilt(with_shapes: bool) -> None:
    rows = ragged(with_shapes)
    back = pickle.loads(pickle.dumps(rows))
    assert isinstance(back, RaggedList)
    assert same(list(back), list(rows))
    assert back[1] is None


def test_a_ragged_list_costs_a_few_file_descriptors_in_a_queue() -> None:
    """256 tensors would cost 256; and a view must not ship the whole block that it looks at."""
    block = torch.zeros(10_000)
    many = RaggedList(block[:512], torch.full((256,), 2))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    sent = bytes(ForkingPickler.dumps(many))
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after - before <= 4
    assert len(sent) < 4096
    back = pickle.loads(sent)
    assert same(list(back), list(many))
    assert back.values.untyped_storage().nbytes() == 512 * 4


def test_a_ragged_list_that_was_changed_is_sent_as_it_is_now() -> None:
    rows = ragged()
    rows[0] = torch.ones(1)
    del rows[2]
    back = pickle.load(io.BytesIO(pickle.dumps(rows)))
    assert same(list(back), [torch.ones(1), None])
