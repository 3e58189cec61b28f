"""Texts that mean the same thing get the same plan, whatever that is.

The files of ``equal_plans/`` hold texts under labels, ``==== label``: a title behind ``--``, and statements, of which
the last is explained. Compared are the steps of the plan, without their estimates and without what a text is free to
choose: names of relations and of columns, and cases. A step that hands on a sub-query's rows is none. Labels of a file
have different plans, or too much would be left out of the comparison.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import metaql
from metaql.connection import Connection
from tests.queries.stores import record
from tests.test_spellings import RECIPE

FILES = sorted((Path(__file__).parent / "equal_plans").glob("*.sql"))
# A step stands at the top or behind a branch; what has neither says more about the step above it.
_BRANCH = re.compile(r"([│ ]*)[├└]─ (.*)")
_NAME = r'(?:\w+|"[^"]*")'
_ALIASES = re.compile(rf"^Scan ({_NAME})(?: AS ({_NAME}))?|^({_NAME}): ")


@dataclass(frozen=True)
class Text:
    """A text under its label."""

    label: str
    title: str
    statements: tuple[str, ...]


def texts(path: Path) -> Iterator[Text]:
    label = ""
    for chunk in re.split(r"\n\n+", path.read_text().strip())[1:]:
        if chunk.startswith("===="):
            label = chunk.removeprefix("==== ")
            continue
        title, query = chunk.split("\n", 1)
        yield Text(label, title.removeprefix("-- "), tuple(re.split(r";\n", query)))


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """The store of the spellings: 60 and 40 samples, where it is clear what costs less."""
    path = tmp_path_factory.mktemp("equal") / "store"
    record(path, RECIPE, 4)
    with metaql.connect(path) as connection:
        yield connection


def plan_of(db: Connection, text: Text) -> str:
    for statement in text.statements[:-1]:
        db.sql(statement)
    lines = [str(row[0]) for row in db.sql(f"EXPLAIN {text.statements[-1]}").fetchall()]
    return steps(lines)


def steps(lines: list[str]) -> str:
    """The steps of an EXPLAIN's tree, in a form that is free of names."""
    found = list(_steps(lines))
    aliases = {name for _, step in found for names in re.findall(_ALIASES, step) for name in names if name}
    plain: list[str] = []
    # The depths of steps that were left out, above the present one.
    dropped: list[int] = []
    for (depth, step), (below, _) in zip(found, [*found[1:], (0, "")], strict=True):
        dropped = [one for one in dropped if one < depth]
        if re.fullmatch(rf"Scan (?:{_NAME}|\(\d+\))", step) and below > depth:
            dropped.append(depth)
        else:
            plain.append("  " * (depth - len(dropped)) + without_names(step, aliases))
    return "\n".join(plain)


def _steps(lines: list[str]) -> Iterator[tuple[int, str]]:
    """How deep each step stands, and its text."""
    yield 0, lines[0].split("  ")[0]
    for line in lines[1:]:
        if re.match(r"Chosen:|Pair by pair:|$", line):
            return
        branch = _BRANCH.match(line)
        if branch:
            yield len(branch[1]) // 3 + 1, branch[2].split("  ")[0]


def without_names(step: str, aliases: set[str]) -> str:
    """Which relation a column is of stands in the tree: by what the step reads."""
    for alias in aliases:
        step = re.sub(rf"(?<![\w']){re.escape(alias)}\.", "", step)
    return re.sub(rf"^(scan {_NAME}) as {_NAME}", r"\1", step.lower()).replace('"', "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_plan_for_each_label(path: Path, db: Connection) -> None:
    plans: dict[str, dict[str, list[str]]] = {}
    for text in texts(path):
        plans.setdefault(text.label, {}).setdefault(plan_of(db, text), []).append(text.title)
    several = {label: found for label, found in plans.items() if len(found) > 1}
    assert not several, "\n\n".join(
        f"{label}: {', '.join(titles)}\n{plan}" for label, found in several.items() for plan, titles in found.items()
    )
    single = [plan for found in plans.values() for plan in found]
    assert len(set(single)) == len(plans), "labels with the same plan"
    assert len(plans) > 1


def test_what_is_left_of_a_plan() -> None:
    lines = [
        "Scan (0)                              ~60 rows",
        '└─ Score ⟨T.Gradient, avg("the others".gradient)⟩   60 rows, 8.1 kB',
        "   │  fc1: contract 15 µs (instead of full 30 µs)",
        "   ├─ Scan Train AS T where T.loss > 1.5   60 rows",
        '   └─ Gather avg("the others".gradient)  1 row',
        '      └─ Scan validation AS "the others"  40 rows',
        "Chosen: gather v, 100 vector operations",
    ]
    assert steps(lines) == "\n".join(
        [
            "score ⟨gradient, avg(gradient)⟩",
            "  scan train where loss > 1.5",
            "  gather avg(gradient)",
            "    scan validation",
        ]
    )
