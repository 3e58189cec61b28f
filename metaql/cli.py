"""The ``metaql`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# The heavy modules are imported by the commands that need them: ``metaql --help`` should not wait for torch.

_UDF_PREFIX = "Invalid Input Error: Python exception occurred while executing the UDF: "


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 when it went well, 1 after an error, which is told in a sentence."""
    options = _parser().parse_args(arguments)
    return _without_traceback(options.run, options)


def sql(options: argparse.Namespace) -> int:
    """Prints the answer to a query as a table."""
    import duckdb

    from metaql.connection import connect
    from metaql.errors import QueryError

    query = sys.stdin.read() if options.query == "-" else options.query
    if not duckdb.extract_statements(query):
        raise QueryError("there is no query: give one, or write it to standard input")
    with connect(options.store, database=options.database) as connection:
        result = connection.sql(query)
        if result is not None and result.columns == ["plan"]:
            # A plan is a text, which a table would wrap.
            print(*(line for (line,) in result.fetchall()), sep="\n")
        elif result is not None:
            result.show(max_rows=options.rows)
    return 0


def info(options: argparse.Namespace) -> int:
    """Prints what is in a store."""
    from metaql.storage.info import info as summary

    print(summary(options.store))
    return 0


def check(options: argparse.Namespace) -> int:
    """Prints what is damaged in a store; 1 when something is."""
    from metaql.storage.check import check as problems

    count = 0
    for problem in problems(options.store):
        print(problem)
        count += 1
    print(f"problems: {count}" if count else "everything is as it was written")
    return 1 if count else 0


def vacuum(options: argparse.Namespace) -> int:
    """Removes what only older versions of a store need."""
    from metaql.storage.maintenance import vacuum as free

    print(f"freed {free(options.store) / 1e6:,.1f} MB")
    return 0


def drop_checkpoint(options: argparse.Namespace) -> int:
    """Takes a checkpoint, and what was recorded at it, out of a store."""
    from metaql.storage.maintenance import drop_checkpoint as drop

    drop(options.store, options.checkpoint)
    print(f"checkpoint {options.checkpoint} is dropped; `metaql vacuum {options.store}` frees its space")
    return 0


def calibrate(options: argparse.Namespace) -> int:
    """Measures what scoring costs on this machine, which decides how queries are run, and remembers it."""
    from metaql.calibrate import report

    print(report(options.device))
    return 0


def demo(options: argparse.Namespace) -> int:
    """Trains on handwritten digits with some wrong labels, records it, and finds them in SQL."""
    from metaql.demo import main as run

    run(options.store, options.seed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metaql", description="SQL over the gradients of a training run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    asking = command("sql", sql)
    asking.add_argument("store", help="the store's folder")
    asking.add_argument("query", nargs="?", default="-", help="SQL; - or nothing reads it from standard input")
    asking.add_argument("--database", default=":memory:", help="a DuckDB file with tables of your own")
    asking.add_argument("--rows", type=_count, default=40, help="how many rows are shown at most (%(default)s)")
    for name, run in (("info", info), ("check", check), ("vacuum", vacuum)):
        command(name, run).add_argument("store", help="the store's folder")
    dropping = command("drop-checkpoint", drop_checkpoint)
    dropping.add_argument("store", help="the store's folder")
    dropping.add_argument("checkpoint", type=int, help="its number, as in the relation checkpoints")
    measuring = command("calibrate", calibrate)
    measuring.add_argument("--device", default="cpu", help="the device that scores are computed on (%(default)s)")
    showing = command("demo", demo)
    showing.add_argument("store", nargs="?", type=Path, help="where to record (runs/digits); made anew if it is there")
    showing.add_argument("--seed", type=int, default=0, help="decides which labels are wrong (%(default)s)")
    return parser


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return min(int(text), sys.maxsize)


def _without_traceback(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    import duckdb

    from metaql.errors import InternalError, MetaQLError

    try:
        return run(options)
    except InternalError:
        raise
    except (MetaQLError, duckdb.Error) as error:
        print(f"metaql: {_message(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads the output has seen enough.
        sys.stderr.close()
        return 1


def _message(text: str) -> str:
    """Without DuckDB's wrapping of an error that one of our functions raised."""
    if not text.startswith(_UDF_PREFIX):
        return text
    return text[len(_UDF_PREFIX) :].split(": ", 1)[-1]
