"""Rows of features, as SQL has them, as tensors: one list column, nested or not, or several columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import as_numpy, truths
from metaql.udfs.references import ARROW_TYPE, Bools, Ints

# Whose whole numbers float32 does not change; what is larger keeps its digits until it is scaled.
_SMALL = (pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.bool_())
# What DuckDB calls them, and how they become numbers, if there is a usual way.
_OTHERS = (
    (lambda kind: kind == ARROW_TYPE, "GRADIENT", "restore({0}, '*')"),
    (pa.types.is_string, "VARCHAR", "{0}::DOUBLE, or {0}::FLOAT[] for texts like '[1.5, 2]'"),
    (pa.types.is_large_string, "VARCHAR", "{0}::DOUBLE, or {0}::FLOAT[] for texts like '[1.5, 2]'"),
    (pa.types.is_timestamp, "TIMESTAMP", "epoch({0})"),
    (pa.types.is_date, "DATE", "epoch({0})"),
    (pa.types.is_time, "TIME", "epoch({0})"),
    (pa.types.is_interval, "INTERVAL", "epoch({0})"),
    (pa.types.is_dictionary, "ENUM", "enum_code({0})"),
    (pa.types.is_binary, "BLOB", ""),
    (pa.types.is_map, "MAP", ""),
    (pa.types.is_struct, "STRUCT", ""),
)


@dataclass(frozen=True)
class GivenRows:
    """Columns of features, and how errors name where they were given and which row is meant."""

    where: str
    columns: Mapping[str, Any]
    ids: Any = None
    # What to do, in the words of a SELECT.
    lacks: str = "there is no column of features beside sample_id: add a list of numbers, or columns of numbers"
    alone: str = "SELECT sample_id, {}"
    without: str = " (SELECT * EXCLUDE ({}))"

    def row(self, place: int) -> str:
        """A row in the user's words."""
        if self.ids is None:
            return f"row {place + 1}"
        return f"sample_id {self.ids[place].as_py()!r}"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True)
class FeatureRows:
    """Rows without NULLs [n, *shape], float32 or, where that would change numbers, float64; and which they are.

    ``there`` says for all rows whether they are among them, None for all of them.
    """

    values: Tensor
    there: Bools | None

    @property
    def places(self) -> Ints:
        """Where the rows stand among all."""
        return np.arange(len(self.values)) if self.there is None else np.flatnonzero(self.there)


def feature_rows(given: GivenRows) -> FeatureRows:
    """The rows as tensors, without a copy where one column's lists are of numbers that lie as torch has them.

    QueryError for columns that are no numbers, lists beside other columns, and rows of different sizes. Whether the
    numbers are finite is not looked at; ``require_finite`` does.
    """
    columns = _fields(given.where, given.columns)
    lists = _require_numbers(given, columns)
    there = _without_nulls(columns)
    if there is not None:
        columns = {name: column.filter(truths(there)) for name, column in columns.items()}
    arrays = list(columns.values())
    if lists:
        values = _dense(given, lists[0], arrays[0], there)
    else:
        flat = [_numbers(column) for column in arrays]
        dtype = torch.float64 if any(one.dtype == torch.float64 for one in flat) else torch.float32
        values = torch.stack([one.to(dtype) for one in flat], dim=1)
    return FeatureRows(values, there)


def require_finite(given: GivenRows, rows: FeatureRows) -> None:
    """QueryError, saying how many and which is the first, for NaN or infinity."""
    bad = ~rows.values.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        first = int(rows.places[int(bad.nonzero()[0])])
        raise QueryError(
            f"{given.where}: {int(bad.sum()):,} of {len(given):,} rows have NaN or infinity among their features, the"
            f" first is {given.row(first)}. Leave these rows out in WHERE (isfinite(x) is true of all other numbers),"
            " or make the values NULL: rows with NULL are not trained on, and their score is NULL"
        )


def in_order_of(columns: Mapping[str, Any], given: GivenRows, where: str) -> GivenRows:
    """The same columns in another's order, by their names; a list column may have any name.

    QueryError, saying which, where one has columns that the other lacks.
    """
    own = {name.lower(): name for name in given.columns}
    if len(own) == 1 == len(columns):
        return given
    missing = [name for name in columns if name.lower() not in own]
    known = {name.lower() for name in columns}
    extra = [name for low, name in own.items() if low not in known]
    if missing or extra:
        told = [f"{given.where} lacks {', '.join(missing)}"] * bool(missing)
        told += [f"{given.where} has {', '.join(extra)}, which {where} does not"] * bool(extra)
        raise QueryError(f"{' and '.join(told)}: both need the same columns of features; SELECT those in both")
    return replace(given, columns={name: given.columns[own[name.lower()]] for name in columns})


def fields_of(where: str, structs: Any) -> dict[str, Any]:
    """The columns of structs by their names; QueryError for a UNION, which Arrow can't take out of a struct."""
    for each in structs.type:
        if _has_union(each.type):
            raise QueryError(
                f"{where}: {each.name} is a UNION: take what is in it, as in union_extract({each.name}, 'member')"
            )
    return {each.name: part for each, part in zip(structs.type, structs.flatten(), strict=True)}


def _has_union(kind: Any) -> bool:
    inside = [kind.field(place).type for place in range(kind.num_fields)]
    return bool(pa.types.is_union(kind)) or any(map(_has_union, inside))


def _fields(where: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns, with a struct's fields in its place."""
    found: dict[str, Any] = {}
    for name, column in columns.items():
        if pa.types.is_struct(column.type) and column.type != ARROW_TYPE:
            found |= {f"{name}.{field}": part for field, part in fields_of(where, column).items()}
        else:
            found[name] = column
    return found


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _require_numbers(given: GivenRows, columns: Mapping[str, Any]) -> list[str]:
    """The list column, if there is one, and no other column beside it; QueryError, with the ways out, for the rest."""
    if not columns:
        raise QueryError(f"{given.where}: {given.lacks}")
    lists = [name for name, column in columns.items() if _is_list(column.type)]
    others = [name for name, column in columns.items() if _other(column.type) is not None]
    if lists and len(columns) > 1:
        beside = ", ".join(name for name in columns if name != lists[0])
        raise QueryError(
            f"{given.where}: {lists[0]} is a list, which holds all features of a row, and there is {beside} beside it."
            f" Take the list alone ({given.alone.format(lists[0])}), or put all numbers into one list"
        )
    if others:
        raise QueryError(_not_numbers(given, columns, others))
    return lists


def _other(kind: Any) -> tuple[str, str] | None:
    """The SQL name of a type that is neither numbers nor lists of them, and how it becomes numbers."""
    while _is_list(kind):
        kind = kind.value_type
    types = pa.types
    numbers = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
    if any(fits(kind) for fits in numbers):
        return None
    return next(((word, how) for fits, word, how in _OTHERS if fits(kind)), (str(kind), ""))


def _not_numbers(given: GivenRows, columns: Mapping[str, Any], others: list[str]) -> str:
    called, how = _other(columns[others[0]].type) or ("", "")
    if _is_list(columns[others[0]].type):
        return (
            f"{given.where}: the lists in {others[0]} hold {called} values, and features must be numbers: make them"
            f" numbers ({others[0]}::DOUBLE[])"
        )
    told = ", ".join(f"{name} is a {(_other(columns[name].type) or ('',))[0]}" for name in others)
    conversion = f", or make it a number ({how.format(others[0])})" if how else ""
    out = given.without.format(", ".join(others))
    return f"{given.where}: {told}, and features must be numbers. Leave it out{out}{conversion}"


def _without_nulls(columns: Mapping[str, Any]) -> Bools | None:
    """Where no column has a NULL, or a list with a NULL somewhere in it; None for everywhere."""
    masks = [mask for column in columns.values() if (mask := _has_no_null(column)) is not None]
    return None if not masks else np.logical_and.reduce(masks)


def _has_no_null(column: Any) -> Bools | None:
    if not _may_have_null(column):
        return None
    result, owner = np.ones(len(column), dtype=np.bool_), np.arange(len(column))
    while True:
        valid = as_numpy(column.is_valid())
        result[owner[~valid]] = False
        if not _is_list(column.type):
            return result
        column, owner = column.filter(truths(valid)), owner[valid]
        owner = owner[as_numpy(pc.list_parent_indices(column))]
        column = column.flatten()


def _may_have_null(column: Any) -> bool:
    if column.null_count:
        return True
    return _is_list(column.type) and _may_have_null(column.flatten())


def _dense(given: GivenRows, name: str, column: Any, there: Bools | None) -> Tensor:
    """Lists without NULLs, all of one size at each depth, as a tensor."""
    shape = [len(column)]
    while _is_list(column.type):
        size = _size(column)
        if size is None:
            raise QueryError(_ragged(given, name, column, shape, there))
        shape.append(size)
        column = column.flatten()
    if 0 in shape[1:] and shape[0]:
        raise QueryError(f"{given.where}: the lists in {name} are empty, and features are at least one number")
    return _numbers(column).reshape(shape)


def _size(column: Any) -> int | None:
    """How long the lists are; None where they differ."""
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)
    lengths = _lengths(column)
    if not len(lengths):
        return 0
    return int(lengths[0]) if (lengths == lengths[0]).all() else None


def _lengths(column: Any) -> Ints:
    return np.diff(as_numpy(column.offsets)).astype(np.int64)


def _ragged(given: GivenRows, name: str, column: Any, shape: list[int], there: Bools | None) -> str:
    lengths = _lengths(column)
    counts = np.unique(lengths, return_counts=True)
    usual = int(counts[0][counts[1].argmax()])
    inside = math.prod(shape[1:])
    places = np.arange(shape[0]) if there is None else np.flatnonzero(there)

    def told(which: Bools) -> str:
        first = int(np.flatnonzero(which)[0])
        deep = "" if inside == 1 else f" (in list {first % inside + 1} of its {inside})"
        return f"{given.row(int(places[first // inside]))} has {int(lengths[first])}{deep}"

    return (
        f"{given.where}: rows of {name} differ in size: {told(lengths == usual)}, and {told(lengths != usual)}."
        f" All rows need the same size: keep those of one (WHERE len({name}) = {usual}), or cut or fill"
        f" up the others (list_resize({name}, {usual}, 0))"
    )


def _numbers(column: Any) -> Tensor:
    """Numbers without NULLs as a flat tensor: float32 where that has all their digits, else float64."""
    if not len(column):
        return torch.empty(0)
    if column.type in (pa.float32(), pa.float64()):
        return from_dlpack(column)
    return from_dlpack(column.cast(pa.float32() if column.type in _SMALL else pa.float64(), safe=False))
