"""The layers of the house look downwards only, and ``import metaql`` loads next to nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "metaql"
# What each part may import of ours; the front end (everything else) may import all.
BORDERS = {
    "errors": (),
    "storage": ("storage", "errors"),
    "methods": ("methods", "errors"),
    "udfs": ("udfs", "storage", "methods", "errors"),
}


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.split(".")[0] == "metaql")


@pytest.mark.parametrize("part", BORDERS)
def test_parts_import_only_what_lies_below_them(part: str) -> None:
    files = [ROOT / f"{part}.py"] if part == "errors" else sorted((ROOT / part).rglob("*.py"))
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if name.partition(".")[2].partition(".")[0] not in BORDERS[part]
    ]
    assert not wrong


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import metaql", {"torch", "duckdb", "sqlglot", "pyarrow", "numpy"}),
        ("import metaql.cli", {"torch", "duckdb", "sqlglot", "pyarrow", "numpy"}),
        ("import metaql.storage.store", {"duckdb", "sqlglot", "metaql.connection", "metaql.udfs"}),
    ],
)
def test_heavy_modules_wait(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []
