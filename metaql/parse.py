"""From SQL text to a syntax tree, and whether there is any point in looking at one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.errors import SqlglotError
from sqlglot.tokenizer_core import TokenType

# A text with none of these words goes to DuckDB untouched. One that averages gradients under another name, taken
# from a view for instance, is noticed by DuckDB's binder, and then planned after all (see execute.py).
_FUNCTIONS = ("inner_product", "cosine_similarity", "norm", "layers", "restore", "precondition")
_SHORT_FORMS = ("p2p", "p2b", "b2p", "b2b", "hydra", "tracin", "in_run", "elite", "elite_candidates")
# What takes long without any gradient, also in views, which keep the SQL that a table function stands for.
_LONG = ("anomaly_score", "metaql_elite_fit")
_NAMES = ("gradients?", *_FUNCTIONS, *_SHORT_FORMS, *_LONG)
_SPACE = r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*"
# What sqlglot would not look behind.
_PREFIX = re.compile(rf"{_SPACE}(explain(\s+analyze)?(\s*\([^()]*\))?|prepare\s+\w+\s+as)\s", re.IGNORECASE | re.DOTALL)
# Of other statements it would make an opaque command, and say so on standard error.
_PARSED = re.compile(
    _SPACE + r"(select|with|from|values|table|create|insert|copy|update|delete|merge|pivot|unpivot)\b",
    re.IGNORECASE | re.DOTALL,
)
_QUERY = re.compile(
    _SPACE + r"(select|with|from|values|table|describe|summarize|show|explain|pivot)\b", re.IGNORECASE | re.DOTALL
)
# sqlglot would import it for the first query, and look it up for each text.
_DUCKDB = DuckDB()


@dataclass(frozen=True)
class Statement:
    """A parsed statement; ``prefix`` is its EXPLAIN or PREPARE."""

    prefix: str
    tree: exp.Expr


def words(names: Iterable[str] = ()) -> re.Pattern[str]:
    """What to look for in a text: gradient constructs, and names of views that hold some."""
    return re.compile(rf"\b({'|'.join((*_NAMES, *map(re.escape, names)))})\b", re.IGNORECASE)


_WORDS = words()


def mentions_gradients(text: str, words: re.Pattern[str] = _WORDS) -> bool:
    """Whether the text may hold a gradient expression; takes microseconds."""
    return words.search(text) is not None


def is_query(text: str) -> bool:
    """Whether the text is one statement that reads and changes nothing, as far as its first word tells."""
    return _QUERY.match(text) is not None and ";" not in text.rstrip().rstrip(";")


def parse(text: str) -> Statement | None:
    """The one statement in the text; None for several, and for what sqlglot can't parse."""
    before = _PREFIX.match(text)
    prefix = before.group() if before else ""
    if not _PARSED.match(text, len(prefix)):
        return None
    try:
        trees = sqlglot.parse(_numbered(text[len(prefix) :]), dialect=_DUCKDB)
    except SqlglotError:
        return None
    if len(trees) != 1 or not isinstance(trees[0], exp.Expr) or isinstance(trees[0], exp.Command):
        return None
    for node in list(trees[0].walk()):
        if node.meta_get("line") is not None:
            # Where it stood in the text would be copied whenever the node is.
            node.meta.clear()
        if isinstance(node, exp.Select):
            _normalize(node)
    return Statement(prefix, trees[0])


def name_of_output(item: exp.Expr) -> str:
    """What DuckDB calls a column without an alias: its text, as it was before anything was planned."""
    return item.name if isinstance(item, exp.Column) else item.meta.get("text") or _text(item)


def _normalize(select: exp.Select) -> None:
    """FROM a JOIN b SELECT … is parsed with the joins at the relation; and texts that are names are kept."""
    source = select.args.get("from_")
    if source is not None and isinstance(source.this, exp.Table | exp.Subquery) and source.this.args.get("joins"):
        joins = source.this.args["joins"]
        source.this.set("joins", None)
        select.set("joins", [*joins, *(select.args.get("joins") or [])])
    for item in select.expressions:
        if not isinstance(item, exp.Alias | exp.Column | exp.Star):
            item.meta["text"] = _text(item)


def _text(item: exp.Expr) -> str:
    return to_sql(item, normalize_functions="lower")


def standing_for(node: exp.Expr, before: exp.Expr) -> exp.Expr:
    """The node, which says from now on what it stands for in the text as it was written."""
    node.meta["was"] = before.meta.get("was") or to_sql(before)
    return node


def explain_options(prefix: str) -> frozenset[str]:
    """The words of an EXPLAIN, in lower case: analyze, verbose, and whatever else stands between its parentheses."""
    found = re.findall(r"[a-z_]+", re.sub(r"--[^\n]*|/\*.*?\*/", " ", prefix, flags=re.DOTALL).lower())
    return frozenset(found) - {"explain"}


def _numbered(text: str) -> str:
    """``?`` as ``$1``, ``$2``, … in the order of the text, so that a rewrite may move and repeat them."""
    if "?" not in text:
        return text
    places = [token for token in sqlglot.tokenize(text, read=_DUCKDB) if token.token_type == TokenType.PLACEHOLDER]
    for number, token in reversed(list(enumerate(places, start=1))):
        text = f"{text[: token.start]}${number}{text[token.end + 1 :]}"
    return text


def to_sql(tree: exp.Expr, **options: Any) -> str:
    """DuckDB's SQL for a tree; function names keep their case."""
    return tree.sql(dialect=_DUCKDB, **{"normalize_functions": False, **options})
