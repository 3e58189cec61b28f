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
    "storage": ("storage", "methods", "errors"),
    "methods": ("methods", "errors"),
    "udfs": ("udfs", "storage", "methods", "errors"),
    "integrations": ("integrations", "storage", "errors"),
}

# That people train with: each is imported in the file of its name, and required by none.
LIBRARIES = {"transformers", "lightning"}


def imports(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports anywhere, also within functions."""
    return (name for name in modules(file) if name.split(".")[0] == "metaql")


def imported(file: Path) -> set[str]:
    """The packages that a file imports anywhere."""
    return {name.split(".")[0] for name in modules(file)}


def modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module or ""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


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


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_is_imported_only_by_the_file_of_its_name(library: str) -> None:
    importing = [file for file in ROOT.rglob("*.py") if library in imported(file)]
    assert importing == [ROOT / "integrations" / f"{library}.py"]


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import metaql, metaql.integrations", {"torch", "duckdb", "sqlglot", "pyarrow", "numpy", *LIBRARIES}),
        ("import metaql.cli", {"torch", "duckdb", "sqlglot", "pyarrow", "numpy"}),
        ("import metaql.storage.store", {"duckdb", "sqlglot", "metaql.connection", "metaql.udfs"}),
        ("import metaql.integrations.recording, metaql.integrations.samples", LIBRARIES),
    ],
)
def test_heavy_modules_wait(statement: str, absent: set[str]) -> None:
    code = f"{statement}; import sys; print(*sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


RECORD_AND_ASK = """
import sys, torch, metaql
with metaql.Recorder(torch.nn.Linear(3, 2), sys.argv[1]) as recorder:
    recorder.checkpoint(torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1))
    for split in ("train", "validation"):
        recorder.collect([(torch.arange(4), (torch.randn(4, 3), torch.randint(0, 2, (4,))))], split)
with metaql.connect(sys.argv[1]) as db:
    pair = "inner_product(t.gradient, v.gradient)"
    for query in (
        f"SELECT t.sample_id, v.sample_id, {pair} AS s FROM train t, validation v",
        f"SELECT t.sample_id, avg({pair}) AS s FROM train t, validation v GROUP BY ALL ORDER BY s LIMIT 2",
        f"SELECT {pair} AS s FROM train t, validation v QUALIFY row_number() OVER (ORDER BY s) < 3",
        "SELECT cosine_similarity(gradient, gradient), norm(gradient) FROM train",
        "SELECT * FROM p2b()",
        "SELECT * EXCLUDE gradient FROM gradients",
    ):
        assert db.sql(query).fetchall()
    for relation in ("samples", "checkpoints", "layers", "outputs"):
        assert db.sql(f"FROM {relation}").fetchall()
print("pandas" in sys.modules)
"""


def test_recording_and_asking_do_without_pandas(tmp_path: Path) -> None:
    # pyarrow imports it behind our back, which takes longer than all of this.
    pytest.importorskip("pandas")
    command = [sys.executable, "-c", RECORD_AND_ASK, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == ["False"]
