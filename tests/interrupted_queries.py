"""Asks what takes for ever, in one way after another, and says when it was interrupted; for ``test_watched.py``."""

from __future__ import annotations

import signal
import sys

import metaql

PAIRS = "train t, validation v, range(1000000000) r"
FOREVER = f"SELECT max(inner_product(t.gradient, v.gradient)) FROM {PAIRS}"
ROWS = f"SELECT inner_product(t.gradient, v.gradient) AS s FROM {PAIRS}"
# What no function of ours sees.
SHORT = "SELECT count(*), max(inner_product(t.gradient, v.gradient)) IS NOT NULL FROM train t, validation v"
TRAINING = "FROM elite((SELECT range AS sample_id, range AS x FROM range(1000)), epochs := 1000000, save_as := 'never')"

WAYS = {
    "fetchall": lambda db: db.sql(FOREVER).fetchall(),
    "show": lambda db: db.sql(FOREVER).show(),
    "to_arrow_table": lambda db: db.sql(FOREVER).to_arrow_table(),
    "df": lambda db: db.sql(FOREVER).df(),
    "pl": lambda db: db.sql(FOREVER).pl(),
    "an aggregate of it": lambda db: db.sql(ROWS).aggregate("max(s)").fetchall(),
    "to_parquet": lambda db: db.sql(FOREVER).to_parquet("/dev/null"),
    "CREATE TABLE": lambda db: db.sql(f"CREATE TABLE kept AS {FOREVER}"),
    "COPY": lambda db: db.sql(f"COPY ({FOREVER}) TO '/dev/null' (FORMAT csv)"),
    "a training": lambda db: db.sql(TRAINING).fetchall(),
    "a state of its own": lambda db: (db.sql("CREATE TEMP TABLE own AS SELECT 1"), db.sql(FOREVER).fetchall()),
}


def main() -> None:
    """Prints a line before each way and one when it was interrupted."""
    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with metaql.connect(sys.argv[1]) as db:
        for way, ask in WAYS.items():
            print(f"asks {way}", flush=True)
            try:
                ask(db)
            except KeyboardInterrupt:
                print(f"interrupted {way}", flush=True)
            assert db.sql(SHORT).fetchall() == [(40, True)]


if __name__ == "__main__":
    main()
