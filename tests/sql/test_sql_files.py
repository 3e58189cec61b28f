"""Runs the ``.test`` files beside it.

A file is a list of paragraphs with empty lines between them; lines that begin with ``#`` are comments. The first
line of a paragraph says what it is:

    statement        SQL that must run
    query            SQL, a line ``----``, and its rows: values with `` | `` between them
    same             SQL, a line ``----``, and other SQL that must give the same rows, in whatever order
    planned          SQL that must be rewritten, and give the same rows as without any rewriting
    unplanned        SQL that no rule may touch, and that must run
    error            SQL, a line ``----``, and a part of the message

All paragraphs of a file share one connection to the small store of ``tests/conftest.py``. A file that begins with
``# load`` has a plain DuckDB connection instead, with that store as ``run1`` and one of another seed as ``run2``.

``pytest tests/sql --complete`` writes the rows and messages that came into the files: read the diff.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

import metaql
from metaql.errors import MetaQLError

FILES = sorted(Path(__file__).parent.glob("*.test"))


@dataclass
class Paragraph:
    """One test of a file; ``expected`` is None where the paragraph has no ``----``."""

    kind: str
    comments: list[str]
    sql: str
    expected: list[str] | None

    def text(self) -> str:
        """As it stands in the file."""
        expected = [] if self.expected is None else ["----", *self.expected]
        return "\n".join([*self.comments, *filter(None, [self.kind, self.sql]), *expected])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sql_file(
    path: Path, record_small_store: Callable[..., Path], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    text = path.read_text()
    paragraphs = list(paragraphs_of(text))
    connection: Any
    if text.startswith("# load"):
        connection = duckdb.connect()
        for seed, name in ((0, "run1"), (1, "run2")):
            metaql.load(connection, record_small_store(tmp_path / name, seed), schema=name)
    else:
        connection = metaql.connect(record_small_store(tmp_path / "store"))
    try:
        problems = [problem for one in paragraphs if (problem := run(connection, one, pytestconfig))]
    finally:
        connection.close()
    if pytestconfig.getoption("--complete"):
        path.write_text("\n\n".join(one.text() for one in paragraphs) + "\n")
    assert not problems, "\n\n".join(problems)


def paragraphs_of(text: str) -> Iterator[Paragraph]:
    """The paragraphs of a file; a comment alone is one of no kind."""
    for chunk in re.split(r"\n\n+", text.strip()):
        lines = chunk.splitlines()
        comments = [line for line in lines if line.startswith("#")]
        kind, *body = [line for line in lines if not line.startswith("#")] or [""]
        expected = None
        if "----" in body:
            place = body.index("----")
            body, expected = body[:place], body[place + 1 :]
        yield Paragraph(kind, comments, "\n".join(body), expected)


def run(connection: Any, paragraph: Paragraph, config: pytest.Config) -> str | None:
    """What is wrong, or None. With --complete what was expected becomes what came."""
    if not paragraph.kind:
        return None
    try:
        found = KINDS[paragraph.kind](connection, paragraph)
    except (duckdb.Error, MetaQLError) as error:
        return f"{paragraph.sql}\n=> {error}"
    if paragraph.kind in ("query", "error") and config.getoption("--complete"):
        paragraph.expected = found
    if found == paragraph.expected or found is None:
        return None
    return "\n".join([paragraph.sql, "=> expected", *(paragraph.expected or []), "=> got", *found])


def statement(connection: Any, paragraph: Paragraph) -> None:
    result = connection.sql(paragraph.sql)
    if result is not None:
        result.fetchall()


def query(connection: Any, paragraph: Paragraph) -> list[str]:
    return written(connection.sql(paragraph.sql).fetchall())


def same(connection: Any, paragraph: Paragraph) -> list[str] | None:
    expected = sorted(written(connection.sql("\n".join(paragraph.expected or [])).fetchall()))
    found = sorted(written(connection.sql(paragraph.sql).fetchall()))
    return None if found == expected else found


def planned(connection: Any, paragraph: Paragraph) -> list[str] | None:
    if rewritten(connection, paragraph.sql) == paragraph.sql:
        return ["no rule applied"]
    plain = sorted(written(connection._executor.run(paragraph.sql, None, sys._getframe()).fetchall()))
    found = sorted(written(connection.sql(paragraph.sql).fetchall()))
    return None if found == plain else ["with rewriting", *found, "without", *plain]


def unplanned(connection: Any, paragraph: Paragraph) -> list[str] | None:
    text = rewritten(connection, paragraph.sql)
    if text != paragraph.sql:
        return ["became", text]
    connection.sql(paragraph.sql).fetchall()
    return None


def error(connection: Any, paragraph: Paragraph) -> list[str]:
    try:
        found = connection.sql(paragraph.sql)
        if found is not None:
            found.fetchall()
    except (duckdb.Error, MetaQLError) as problem:
        lines = [line for line in str(problem).splitlines() if line.strip()]
        wanted = "\n".join(paragraph.expected or [])
        return (paragraph.expected or []) if wanted and wanted in "\n".join(lines) else lines
    return ["no error"]


KINDS: dict[str, Callable[[Any, Paragraph], list[str] | None]] = {
    "statement": statement,
    "query": query,
    "same": same,
    "planned": planned,
    "unplanned": unplanned,
    "error": error,
}


def rewritten(connection: Any, text: str) -> str:
    return str(connection._planned(text, sys._getframe()))


def written(rows: list[tuple[Any, ...]]) -> list[str]:
    """A line a row; floats with five digits, so that the order of a sum does not show."""
    return [" | ".join("NULL" if value is None else _value(value) for value in row) for row in rows]


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
