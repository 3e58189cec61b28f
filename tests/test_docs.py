"""The pages say what there is: their SQL runs, and every function and relation is described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import metaql
from metaql.methods.curvature import LayerCurvature
from metaql.storage.curvatures import pack
from metaql.storage.tables import RELATIONS
from metaql.storage.writer import Writer
from metaql.udfs.precondition import MACRO
from metaql.udfs.register import FUNCTIONS, TABLE_FUNCTIONS
from metaql.udfs.session import Session
from tests.conftest import record_small, small_layers

PAGE = Path(__file__).parents[1] / "docs" / "sql.md"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The small store, with a curvature of ones."""
    path = record_small(tmp_path / "store")
    fitted = {
        one.name: LayerCurvature(torch.ones(1, 1, one.width).double(), None, bias=False) for one in small_layers()
    }
    with Writer.open(path) as writer:
        writer.add_curvature(pack(fitted, "ekfac"), 2, "ekfac", "sampled", 8, dict.fromkeys(fitted, 1.0))
    return path


def test_the_sql_of_the_page_runs(store: Path) -> None:
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    statements = [one for block in blocks for one in block.split(";") if one.strip()]
    # There is no model here to run.
    without_model = [one for one in statements if "gradient($" not in one]
    assert len(without_model) > 10
    with metaql.connect(store) as db:
        for statement in without_model:
            db.sql(statement).fetchall()


def test_every_function_short_form_and_relation_is_described() -> None:
    text = PAGE.read_text()
    names = [make(Session()).name for make in FUNCTIONS] + [MACRO]
    for name in (name for name in names if not name.startswith("metaql_")):
        assert f"**`{name}(" in text, name
    for operator in TABLE_FUNCTIONS:
        columns = ", ".join(f"`{column}`" for column in operator.columns)
        assert f"| `{operator.name}(…)` | {columns} |" in text, operator.name
    for relation in RELATIONS:
        assert f"| `{relation}` |" in text, relation
