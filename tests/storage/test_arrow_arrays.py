"""Arrow arrays made without pyarrow's own conversions, beside these."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from metaql.storage.arrow_arrays import as_numpy, column, empty, primitive, repeated, truths


@pytest.mark.parametrize(
    "values, kind",
    [
        ([1, None, -(2**63), 2**63 - 1], pa.int64()),
        ([0.5, None, float("inf"), 3], pa.float64()),
        ([True, None, False] * 5, pa.bool_()),
        (["a", None, "", "Größe"], pa.string()),
        ([1, 2], pa.int64()),
        (["x"], pa.string()),
        ([None], pa.int64()),
        ([], pa.string()),
        ([], pa.bool_()),
        ([], pa.float64()),
    ],
)
def test_columns_of_python_values(values: list[Any], kind: Any) -> None:
    made = column(values, kind)
    made.validate(full=True)
    assert made.equals(pa.array(values, kind))


def test_numbers_of_numpy() -> None:
    values, there = np.arange(19.0), np.arange(19) % 3 > 0
    assert primitive(values, pa.float64()).equals(pa.array(values))
    assert primitive(values, pa.float64(), there).equals(pa.array(values, mask=~there))
    assert truths(there).equals(pa.array(there))
    assert primitive(values[:0], pa.float64(), there[:0]).equals(pa.array([], pa.float64()))


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float32(), pa.bool_()])
@pytest.mark.parametrize("count", [0, 1, 21])
def test_numpy_of_arrays(kind: Any, count: int) -> None:
    values = pa.array([place % 2 for place in range(count)]).cast(kind)
    for some in (values, values.slice(3), values.slice(9, 4)):
        expected = some.to_numpy(zero_copy_only=False)
        for found in (
            as_numpy(some),
            as_numpy(pa.chunked_array([some[:5], some[5:]])),
            as_numpy(pa.chunked_array([some])),
        ):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == np.dtype(kind.to_pandas_dtype())
    assert as_numpy(pa.chunked_array([], kind)).dtype == np.dtype(kind.to_pandas_dtype())


def test_numbers_are_not_copied() -> None:
    values = np.arange(5)
    assert np.shares_memory(as_numpy(primitive(values, pa.int64())), values)


def test_repeated_and_empty() -> None:
    assert repeated("train", pa.string(), 3).equals(pa.array(["train"] * 3))
    assert repeated(7, pa.int64(), 2).equals(pa.array([7, 7]))
    assert repeated(None, pa.int64(), 2).equals(pa.nulls(2, pa.int64()))
    assert repeated(7, pa.int64(), 0).equals(pa.array([], pa.int64()))
    schema = pa.schema([("a", pa.int64()), ("b", pa.list_(pa.string())), ("c", pa.dictionary(pa.int8(), pa.string()))])
    assert empty(schema).equals(schema.empty_table())
