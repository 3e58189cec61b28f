"""Arrow arrays over numpy's memory, without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa


def primitive(values: np.ndarray[Any, np.dtype[Any]], kind: Any) -> Any:
    """A flat contiguous array of plain numbers as an Arrow array of this type and no nulls.

    ``pa.array`` would look for pandas objects in it, and for that import pandas.
    """
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
