"""Sums of sums: whichever way the inner ones are kept, the loop's numbers come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.storage.blocks import Factored, Full, lay_out
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.udfs.definitions import combine
from metaql.udfs.references import References
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

# 221 numbers laid out, 29 for the factors of a row.
WIDE = Layer(
    "fc", "linear", (Parameter("fc.weight", (13, 16)), Parameter("fc.bias", (13,))), FACTORED, "float64", 1, 16, 13, 1
)
ROWS = 20


def references(store: int, rows: list[int]) -> References:
    return References(np.full(len(rows), store), np.array(rows), None, ("",))


# (rows of each inner sum, whether the outer sum is kept as factors)
@pytest.mark.parametrize(
    "groups, factors",
    [
        ([[0, 1], [2, 3, 4]], True),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], False),
        ([list(range(10))], False),
        ([list(range(10)), list(range(10, 20))], False),
        ([[0, 1], list(range(2, 12))], False),
        ([list(range(2, 12)), [0], [1]], False),
    ],
)
def test_sums_of_sums(groups: list[list[int]], factors: bool, plain: SimpleNamespace, fake_store: Any) -> None:
    rng = np.random.default_rng(len(groups[0]))
    samples = Factored(
        torch.from_numpy(rng.standard_normal((ROWS, 16))), torch.from_numpy(rng.standard_normal((ROWS, 13))), ROWS
    )
    gradients, session = plain.gradients(WIDE, samples), Session()
    session.add(StoreSource(fake_store({WIDE: samples}), "world"))
    inner, expected = [], np.zeros(WIDE.width)
    outer_weights = rng.standard_normal(len(groups))
    for rows, outer in zip(groups, outer_weights, strict=True):
        weights = rng.standard_normal(len(rows))
        inner.append(session.vectors.add(combine(session, references(7, rows), weights)))
        expected += outer * (weights @ gradients[rows])
    number = session.vectors.add(combine(session, references(session.id, inner), outer_weights))
    block = session.vectors.block(number, WIDE)
    assert isinstance(block, Factored if factors else Full)
    np.testing.assert_allclose(lay_out(WIDE, block)[0].numpy(), expected, rtol=1e-9, atol=1e-12)
