"""MetaQL: recorded first, then asked in SQL."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.case import Case, batches, last_layer
from bench.peers.way import ALL, LAST, Ask, Way

BATCH = 100
PAIRS = """
SELECT t.sample_id, v.sample_id AS query_id, inner_product(t.gradient, v.gradient) AS score
FROM train t, "query{}" v
"""
PRECONDITIONED = PAIRS.replace("v.gradient", "precondition(v.gradient, 'ekfac')")
BEST = " QUALIFY row_number() OVER (PARTITION BY v.sample_id ORDER BY score DESC) <= 10"


def _recorder(case: Case, folder: Path, covers: str) -> Any:
    import metaql

    model = case.model()
    recorder = metaql.Recorder(model, folder / "store", layers=None if covers == ALL else [last_layer(model)])
    recorder.checkpoint()
    recorder.collect(_numbered(case.train), "train")
    return recorder


def _numbered(samples: tuple[Tensor, Tensor]) -> list[Any]:
    return list(zip(torch.arange(len(samples[0])).split(BATCH), batches(samples, BATCH), strict=True))


def _connected(folder: Path) -> Any:
    import metaql

    database = metaql.connect(folder / "store")
    database.sql("SET threads = 1")
    return database


def _scores(case: Case, database: Any, number: int, query: str = PAIRS) -> Tensor:
    found = database.sql(query.format(number)).fetchnumpy()
    scores = torch.full((len(case.train[0]), len(case.queries[number][0])), torch.nan)
    rows, columns, values = (torch.from_numpy(found[name]) for name in ("sample_id", "query_id", "score"))
    scores[rows, columns] = values.float()
    return scores


def newcomers(case: Case, folder: Path, covers: str) -> Ask:
    """Each query's samples are recorded when they are asked for; a connection sees what was there when it was made."""
    recorder = _recorder(case, folder, covers)

    def ask(number: int) -> Tensor:
        recorder.collect(_numbered(case.queries[number]), f"query{number}")
        with _connected(folder) as database:
            return _scores(case, database, number)

    return ask


def first_time(case: Case, folder: Path) -> Ask:
    """As on a machine that MetaQL has not measured yet."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    return newcomers(case, folder, ALL)


def recorded(case: Case, folder: Path, query: str) -> Ask:
    """All query samples were recorded with the training samples."""
    with _recorder(case, folder, ALL) as recorder:
        for number, samples in enumerate(case.queries):
            recorder.collect(_numbered(samples), f"query{number}")
    database = _connected(folder)
    return lambda number: _scores(case, database, number, query)


def influence(case: Case, folder: Path) -> Ask:
    """All query samples were recorded with the training samples, and curvature gathered over the latter."""
    with _recorder(case, folder, ALL) as recorder:
        recorder.curvature(_numbered(case.train), labels="recorded")
        for number, samples in enumerate(case.queries):
            recorder.collect(_numbered(samples), f"query{number}")
    database = _connected(folder)
    return lambda number: _scores(case, database, number, PRECONDITIONED)


_IMPORTS = ("metaql", "metaql.connection", "metaql.storage.recording.recorder")


def _way(
    name: str, start: Any, settings: str, covers: str = ALL, ten_best: bool = False, like: str | None = None
) -> Way:
    return Way(
        name,
        "metaql",
        start,
        _IMPORTS,
        settings,
        covers,
        exact=like is None,
        recomputes=False,
        ours=True,
        ten_best=ten_best,
        agrees_with=like,
    )


EKFAC = "MetaQL, EK-FAC"
RECORDED, NEW, NEW_LAST = "MetaQL, recorded already", "MetaQL, new query samples", "MetaQL, last layer, new samples"

WAYS = [
    _way(NEW, partial(newcomers, covers=ALL), f"batches of {BATCH}; each query records its samples, connects and asks"),
    _way(
        "MetaQL, first time on this machine",
        first_time,
        "as new query samples; the constants of the cost formulas are measured first, once for each machine",
    ),
    _way(RECORDED, partial(recorded, query=PAIRS), f"batches of {BATCH}; cold records both sets of query samples"),
    _way(
        "MetaQL, ten best of each",
        partial(recorded, query=PAIRS + BEST),
        "as recorded already; asks for the ten best training samples of each query sample",
        ten_best=True,
    ),
    _way(
        EKFAC,
        influence,
        f"batches of {BATCH}, empirical Fisher matrix; cold records both sets of query samples",
        like="kronfluence, EK-FAC",
    ),
    _way(NEW_LAST, partial(newcomers, covers=LAST), "as new query samples, with layers= the last one", LAST),
]
