"""Writes ``rows.arrow``: who and when each row of a collection is, and what the model made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.arrow_arrays import primitive
from metaql.storage.arrow_writer import ArrowWriter
from metaql.storage.manifest import DataFile

ROW_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("step", pa.int64()),
        pa.field("loss", pa.float64()),
        pa.field("prediction", pa.int64()),
        pa.field("confidence", pa.float32()),
    ]
)


def row_batch(ids: Any, step: int | None, loss: Any, prediction: Any, confidence: Any) -> Any:
    """The rows of one batch of samples; None stands for a column of NULLs. Anything numpy understands."""
    count = len(ids)
    steps = pa.nulls(count, pa.int64()) if step is None else primitive(np.full(count, step, dtype=np.int64), pa.int64())
    columns = [
        _column(ids, np.int64, pa.int64(), count),
        steps,
        _column(loss, np.float64, pa.float64(), count),
        _column(prediction, np.int64, pa.int64(), count),
        _column(confidence, np.float32, pa.float32(), count),
    ]
    return pa.record_batch(columns, schema=ROW_SCHEMA)


def _column(values: Any, dtype: Any, kind: Any, count: int) -> Any:
    if values is None:
        return pa.nulls(count, kind)
    # A copy, for the caller may use its buffer again.
    return primitive(np.array(values, dtype=dtype).reshape(count), kind)


class RowWriter:
    """The file of one collection."""

    def __init__(self, folder: Path) -> None:
        self._writer = ArrowWriter(folder / "rows.arrow", ROW_SCHEMA)

    def write(self, batches: Sequence[Any]) -> None:
        """Appends the batches as one."""
        table = pa.Table.from_batches(batches, ROW_SCHEMA).combine_chunks()
        for batch in table.to_batches():
            self._writer.write(batch)

    def close(self) -> DataFile:
        """Completes the file and brings it to the disk."""
        return self._writer.close()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._writer.abandon()
