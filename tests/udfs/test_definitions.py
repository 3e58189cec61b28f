"""Sums of sums: whichever way the inner ones are kept, the loop's numbers come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.storage.blocks import Factored, Full, lay_out
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.udfs.costs import CONTRACT, GRAM, Constants
from metaql.udfs.definitions import combine
from metaql.udfs.references import References
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

WIDE = Layer(
    "fc", "linear", (Parameter("fc.weight", (13, 16)), Parameter("fc.bias", (13,))), FACTORED, "float64", 1, 16, 13, 1
)
ROWS = 20


def references(store: int, rows: list[int]) -> References:
    return References(np.full(len(rows), store), np.array(rows), None, ("",))


GROUPS = [[[0, 1], [2, 3, 4]], [list(range(10)), list(range(10, 20))], [list(range(2, 12)), [0], [1]]]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("inner_form", [GRAM, CONTRACT])
@pytest.mark.parametrize("outer_form", [GRAM, CONTRACT])
def test_sums_of_sums(
    groups: list[list[int]], inner_form: str, outer_form: str, plain: SimpleNamespace, fake_store: Any
) -> None:
    """Sums that are kept as factors and sums that are laid out, of sums of either form."""
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
    session.costs = Constants(forced=frozenset({inner_form}))
    forms = [type(session.vectors.block(one, WIDE)) for one in inner]
    assert set(forms) == {Factored if inner_form == GRAM else Full}
    session.costs = Constants(forced=frozenset({outer_form}))
    number = session.vectors.add(combine(session, references(session.id, inner), outer_weights))
    block = session.vectors.block(number, WIDE)
    assert isinstance(block, Factored if inner_form == outer_form == GRAM else Full)
    np.testing.assert_allclose(lay_out(WIDE, block)[0].numpy(), expected, rtol=1e-9, atol=1e-12)
