"""The ``metaql`` command: what it prints, and how it fails."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metaql.cli import main

Record = Callable[..., Path]


def test_sql_prints_a_table(small_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = "SELECT norm(avg(gradient)) > 0 AS it_works FROM train"
    assert main(["sql", str(small_store), query]) == 0
    assert "it_works" in capsys.readouterr().out


@pytest.mark.parametrize("given", [[], ["-"]])
def test_sql_reads_the_query_from_standard_input(
    given: list[str], small_store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 6 * 7 AS answer"))
    assert main(["sql", str(small_store), *given]) == 0
    assert "42" in capsys.readouterr().out


@pytest.mark.parametrize(
    "query, message",
    [
        ("SELECT nothing FROM train", 'Referenced column "nothing" not found'),
        ("SELECT norm(layers(gradient, 'x')) FROM train", "metaql: no recorded parameter matches"),
        ("SELECT norm(layers(gradient, 'x' || label)) FROM train", "metaql: no recorded parameter matches"),
    ],
)
def test_errors_are_a_sentence(query: str, message: str, small_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", str(small_store), query]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("query", ["", " \n", ";", "-- nothing yet"])
def test_there_must_be_a_query(query: str, small_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", str(small_store), query]) == 1
    assert capsys.readouterr().err.startswith("metaql: there is no query")


@pytest.mark.parametrize("rows", ["-1", "0", "x", "1.5"])
def test_rows_shown_are_counted_from_one(rows: str, small_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sql", str(small_store), "SELECT 1", "--rows", rows])
    assert stopped.value.code == 2
    assert f"'{rows}' is not a whole number of at least 1" in capsys.readouterr().err


def test_as_many_rows_as_one_likes(small_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sql", str(small_store), "SELECT 6 * 7", "--rows", "9" * 20]) == 0
    assert "42" in capsys.readouterr().out


def test_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "nowhere")]) == 1
    assert "There is no store at" in capsys.readouterr().err


def test_looking_after_a_store(record_small_store: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(record_small_store(tmp_path / "store"))
    assert main(["drop-checkpoint", store, "1"]) == 0
    assert main(["vacuum", store]) == 0
    assert main(["check", store]) == 0
    assert main(["info", store]) == 0
    printed = capsys.readouterr().out
    assert "everything is as it was written" in printed
    assert "checkpoints  1" in printed
    segment = next((tmp_path / "store").rglob("0-*.arrow"))
    segment.write_bytes(segment.read_bytes()[:-8])
    assert main(["check", store]) == 1
    assert "problems: 1" in capsys.readouterr().out


def test_it_can_be_run_as_a_module(small_store: Path) -> None:
    command = [sys.executable, "-m", "metaql", "sql", str(small_store), "SELECT count(*) AS n FROM train"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "8" in done.stdout
    assert done.stderr == ""
