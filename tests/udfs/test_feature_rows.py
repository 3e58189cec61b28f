"""Rows of features become tensors, whatever way SQL has them; compared with Python's values of DuckDB's."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest
import torch

from metaql.errors import QueryError
from metaql.udfs.feature_rows import GivenRows, feature_rows, in_order_of, require_finite


def given(sql: str) -> GivenRows:
    """The columns of a query, with ids if it has any."""
    with duckdb.connect() as con:
        table = con.sql(sql).to_arrow_table()
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    return GivenRows("here", columns, columns.pop("sample_id", None))


NESTED = "SELECT [[[i, 2, 3], [4, 5, i / 2]]] AS x FROM range(4) t(i)"


@pytest.mark.parametrize(
    "sql, dtype",
    [
        ("SELECT [i, i + 1]::FLOAT[] AS x FROM range(5) t(i)", torch.float32),
        ("SELECT [i, i + 1]::DOUBLE[] AS x FROM range(5) t(i)", torch.float64),
        ("SELECT [i, i + 1]::FLOAT[2] AS x FROM range(5) t(i)", torch.float32),
        ("SELECT [i, i + 1]::TINYINT[] AS x FROM range(5) t(i)", torch.float32),
        ("SELECT [i, i + 1]::BIGINT[2] AS x FROM range(5) t(i)", torch.float64),
        ("SELECT [i > 2, true] AS x FROM range(5) t(i)", torch.float32),
        ("SELECT [i / 4, 1]::DECIMAL(10, 2)[] AS x FROM range(5) t(i)", torch.float64),
        (NESTED, torch.float64),
        (
            NESTED.replace("AS x", "::FLOAT[3][2][1] AS x").replace("[[[", "([[[").replace("]]]", "]]])", 1),
            torch.float32,
        ),
    ],
)
def test_a_list_column(sql: str, dtype: torch.dtype) -> None:
    rows = feature_rows(given(sql))
    assert rows.there is None
    assert rows.values.dtype == dtype
    with duckdb.connect() as con:
        expected = [list(row[0]) for row in con.sql(sql).fetchall()]
    np.testing.assert_allclose(rows.values.numpy(), np.array(expected, dtype=np.float64))


def test_lists_of_floats_are_not_copied() -> None:
    rows = given("SELECT [i, i + 1]::FLOAT[2] AS x FROM range(5) t(i)")
    assert feature_rows(rows).values.data_ptr() == rows.columns["x"].flatten().buffers()[1].address


def test_columns_of_numbers_and_structs_of_them() -> None:
    sql = "SELECT i::FLOAT AS a, i % 2 = 0 AS b, i::TINYINT AS c FROM range(5) t(i)"
    expected = np.array([[i, i % 2 == 0, i] for i in range(5)], dtype=np.float32)
    found = feature_rows(given(sql)).values
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected)
    np.testing.assert_array_equal(feature_rows(given(f"SELECT t AS x FROM ({sql}) t")).values.numpy(), expected)


def test_large_numbers_keep_their_digits_until_they_are_scaled() -> None:
    nanoseconds = feature_rows(given("SELECT 1700000000000000000 + i * 1024 AS at FROM range(3) t(i)")).values
    assert (nanoseconds[1:] - nanoseconds[:-1]).flatten().tolist() == [1024, 1024]
    huge = feature_rows(given("SELECT 1e300 * i AS x FROM range(3) t(i)")).values
    assert huge.isfinite().all()


@pytest.mark.parametrize(
    "sql, there",
    [
        ("SELECT CASE WHEN i <> 2 THEN [i, 1]::FLOAT[] END AS x FROM range(4) t(i)", [0, 1, 3]),
        ("SELECT CASE WHEN i <> 2 THEN [i, 1]::FLOAT[2] END AS x FROM range(4) t(i)", [0, 1, 3]),
        ("SELECT [i, CASE WHEN i <> 2 THEN 1 END] AS x FROM range(4) t(i)", [0, 1, 3]),
        ("SELECT [[1], CASE WHEN i <> 0 THEN [CASE WHEN i <> 2 THEN 1 END] END] AS x FROM range(4) t(i)", [1, 3]),
        ("SELECT CASE WHEN i <> 2 THEN i END AS a, CASE WHEN i <> 3 THEN i END AS b FROM range(4) t(i)", [0, 1]),
        ("SELECT CASE WHEN i <> 2 THEN {'a': i, 'b': 1} END AS x FROM range(4) t(i)", [0, 1, 3]),
        ("SELECT NULL AS x FROM range(4) t(i)", []),
        ("SELECT [NULL] AS x FROM range(4) t(i)", []),
        ("SELECT [1] AS x FROM range(4) t(i) WHERE i > 4", []),
    ],
)
def test_rows_with_nulls_are_left_out(sql: str, there: list[int]) -> None:
    rows = feature_rows(given(sql))
    assert rows.places.tolist() == there
    assert len(rows.values) == len(there)
    assert rows.values.isfinite().all()


@pytest.mark.parametrize(
    "select, message",
    [
        ("'a' AS name, 1 AS x", r"name is a VARCHAR, .* \(SELECT \* EXCLUDE \(name\)\), .* \(name::DOUBLE, or"),
        ("now()::TIMESTAMP AS at, 'b' AS c", r"at is a TIMESTAMP, c is a VARCHAR.*EXCLUDE \(at, c\).*epoch\(at\)"),
        ("DATE '2020-01-01' AS day", r"day is a DATE, .*epoch\(day\)"),
        ("'a'::ENUM ('a', 'b') AS kind", r"kind is a ENUM, .*enum_code\(kind\)"),
        (
            "'a'::BLOB AS raw",
            r"raw is a BLOB, and .*Leave it out \(SELECT \* EXCLUDE \(raw\)\)$",
        ),
        ("map {1: 2} AS m", "m is a MAP"),
        ("['a'] AS words", r"the lists in words hold VARCHAR values, .* \(words::DOUBLE\[\]\)"),
        ("[i] AS x, 1 AS b, 'c' AS d", r"x is a list, .* there is b, d beside it.*\(SELECT sample_id, x\)"),
        ("[] AS x", "the lists in x are empty"),
        ("range(i) AS x", r"sample_id 0 has 0, and sample_id 1 has 1.*WHERE len\(x\) = 0.*list_resize\(x, 0, 0\)"),
        (
            "[range(2), range(2 + i)] AS x",
            r"sample_id 0 has 2 \(in list 1 of its 2\), and sample_id 1 has 3 \(in list 2",
        ),
        ("CASE WHEN i > 0 THEN range(i + 1) END AS x", "sample_id 1 has 2, and sample_id 2 has 3"),
    ],
)
def test_what_is_no_row_of_features(select: str, message: str) -> None:
    with pytest.raises(QueryError, match=f"here: .*{message}"):
        feature_rows(given(f"SELECT i AS sample_id, {select} FROM range(3) t(i)"))


def test_no_column_at_all() -> None:
    with pytest.raises(QueryError, match="no column of features beside sample_id"):
        feature_rows(given("SELECT 1 AS sample_id"))


def test_numbers_that_are_not_finite_are_counted_and_the_first_is_named() -> None:
    rows = given(
        "SELECT 's' || i AS sample_id,"
        " CASE i WHEN 1 THEN NULL WHEN 2 THEN 'nan'::FLOAT WHEN 3 THEN 'inf' ELSE 0 END AS x"
        " FROM range(5) t(i)"
    )
    with pytest.raises(QueryError, match=r"2 of 5 rows have NaN or infinity.* the first is sample_id 's2'\."):
        require_finite(rows, feature_rows(rows))


def test_columns_are_matched_by_name_and_lists_whatever_their_name() -> None:
    rows = given("SELECT 1 AS b, 2 AS A")
    found = in_order_of({"a": None, "B": None}, rows, "there").columns
    assert {name: column.to_pylist() for name, column in found.items()} == {"a": [2], "B": [1]}
    assert list(in_order_of({"features": None}, given("SELECT [1] AS window"), "there").columns) == ["window"]
    with pytest.raises(QueryError, match="here lacks c and here has b, which there does not"):
        in_order_of({"a": None, "c": None}, rows, "there")
