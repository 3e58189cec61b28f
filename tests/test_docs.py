"""The pages say what there is: their SQL runs, and every function and relation is described."""

from __future__ import annotations

import re
from pathlib import Path

import metaql
from metaql.storage.tables import RELATIONS
from metaql.udfs.register import FUNCTIONS, OPERATORS
from metaql.udfs.session import Session

PAGE = Path(__file__).parents[1] / "docs" / "sql.md"


def test_the_sql_of_the_page_runs(small_store: Path) -> None:
    blocks = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    statements = [one for block in blocks for one in block.split(";") if one.strip()]
    # There is no model here to run.
    without_model = [one for one in statements if "gradient($" not in one]
    assert len(without_model) > 10
    with metaql.connect(small_store) as db:
        for statement in without_model:
            db.sql(statement).fetchall()


def test_every_function_short_form_and_relation_is_described() -> None:
    text = PAGE.read_text()
    names = [make(Session()).name for make in FUNCTIONS]
    for name in (name for name in names if not name.startswith("metaql_")):
        assert f"**`{name}(" in text, name
    for operator in OPERATORS:
        columns = ", ".join(f"`{column}`" for column in operator.columns)
        assert f"| `{operator.name}(…)` | {columns} |" in text, operator.name
    for relation in RELATIONS:
        assert f"| `{relation}` |" in text, relation
