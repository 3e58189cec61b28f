"""Measures what scoring costs on this machine, once for each user, and remembers it.

The figures decide which of several equal ways is taken, never what the answer is. They are kept under
``$XDG_CACHE_HOME/metaql`` by processor, torch version and device; a file named in ``METAQL_COSTS`` goes before them.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import torch
from duckdb.func import PythonUDFType
from torch import Tensor

from metaql.errors import QueryError
from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.udfs.contract import contract
from metaql.udfs.costs import CALL_ROWS, SHIPPED, Constants
from metaql.udfs.function import both, scores
from metaql.udfs.references import GRADIENT

OVERRIDE = "METAQL_COSTS"
# What a file may set: everything but the ways that tests force.
NAMES = tuple(field.name for field in fields(Constants) if field.name != "forced")
# Each figure is the best of so many rounds, of which none takes much more than a hundredth of a second.
ROUNDS = 9


def constants(device: str | torch.device | None = None) -> Constants:
    """What things cost on a device (None: the processor), from ``METAQL_COSTS``, the user's cache, or a measurement.

    Never fails: where nothing can be read or measured, the constants that MetaQL was shipped with have to do.
    """
    override = os.environ.get(OVERRIDE)
    return _override(override) if override else _remembered(str(torch.device(device or "cpu")))


def measure(device: str | torch.device | None = None) -> Constants:
    """The constants of this machine and device as they are now; takes a second or two."""
    place = torch.device(device or "cpu")
    threads = torch.get_num_threads()
    # As within DuckDB, which calls functions from all its threads at once.
    torch.set_num_threads(1)
    try:
        return _measured(_Clock(place))
    finally:
        torch.set_num_threads(threads)


def report(device: str | torch.device | None = None) -> str:
    """Measures anew, remembers the result, and says what it is, with machine and date."""
    try:
        place = str(torch.device(device or "cpu"))
        found = measure(place)
    except _DEVICE_ERRORS as error:
        raise QueryError(f"device '{device}' can't be measured: {error}") from None
    lines = [f"{datetime.now(UTC):%Y-%m-%d}  {machine(place)}"]
    lines += [f"{name:<10}{seconds:.2e} s" for name, seconds in zip(NAMES, _values(found), strict=True)]
    kept = _write(_file(place), found)
    lines.append(f"kept in {_file(place)}" if kept else f"{_file(place)} can't be written: measured again next time")
    return "\n".join(lines)


def machine(device: str) -> str:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return f"{name}, torch {torch.__version__}, {device}"


def _override(path: str) -> Constants:
    """The user's own file; a bad one is worth a warning, not a failed query."""
    try:
        return _read(Path(path))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{OVERRIDE} names {path}, which is no file of costs ({error}): the shipped ones are used. It has to be a"
            f" JSON object of seconds, of {', '.join(NAMES)}; `metaql calibrate` prints those of this machine",
            stacklevel=2,
        )
        return SHIPPED


_lock = threading.Lock()
# What torch raises for a device that it does not know, does not have, or that fails.
_DEVICE_ERRORS = (RuntimeError, AssertionError)


@lru_cache
def _remembered(device: str) -> Constants:
    with _lock:
        try:
            return _read_or_measured(device)
        except _DEVICE_ERRORS:
            # A device that fails, or has no room: the query will say so if it has to.
            return SHIPPED


def _read_or_measured(device: str) -> Constants:
    path = _file(device)
    try:
        return _read(path)
    except (OSError, ValueError):
        found = measure(device)
        _write(path, found)
        return found


def _file(device: str) -> Path:
    # Without a home there is no cache; the folder is then one that can't be made.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = "".join(letter if letter.isalnum() else "-" for letter in machine(device))
    return Path(home) / "metaql" / f"costs {name}.json"


def _read(path: Path) -> Constants:
    """The constants in a file; those that it does not name are the shipped ones."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    for name, value in found.items():
        if name not in NAMES:
            raise ValueError(f"there is no cost '{name}'")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise ValueError(f"'{name}' is not a number of seconds between 0 and 1")
    return replace(SHIPPED, **found)


def _write(path: Path, found: Constants) -> bool:
    """Whether the file could be written; another process may be doing the same."""
    text = json.dumps(dict(zip(NAMES, _values(found), strict=True)), indent=2)
    mine = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(text + "\n")
        mine.replace(path)
    except OSError:
        return False
    return True


class _Clock:
    """Times work on one device, in seconds of the processor's time or, elsewhere, of waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        """The shortest of some rounds: what disturbs them only ever makes them longer."""
        return min(self._once(work) for _ in range(ROUNDS))

    def _once(self, work: Callable[[], Any]) -> float:
        if self.device.type == "cpu":
            begin = time.thread_time()
            work()
            return time.thread_time() - begin
        torch.cuda.synchronize(self.device)
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def numbers(self, *shape: int) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(*shape, device=self.device)


def _measured(clock: _Clock) -> Constants:
    """One figure after another, each from work that consists mostly of it, less what is known of the rest."""
    square, vector = clock.numbers(512, 512), clock.numbers(1024)
    # More than the caches hold: rows of a store come from memory.
    rows, thin = clock.numbers(1 << 14, 1024), clock.numbers(1024, 16)
    flop = clock(lambda: square @ square) / (2 * 512**3)
    stream = clock(lambda: rows @ vector) / rows.numel()
    load = clock(lambda: rows[:2048] @ thin) / (2048 * 1024) - 2 * 16 * flop
    result = clock(lambda: square.mul_(1.0).sum(1)) / square.numel()
    gather, row = _gathering(clock, rows.view(-1))
    found = (flop, load, stream, result, gather, row, _call(clock), _function())
    # Differences of noisy figures may come out below zero.
    return _named(max(value, shipped / 10) for value, shipped in zip(found, _values(SHIPPED), strict=True))


def _gathering(clock: _Clock, numbers: Tensor) -> tuple[float, float]:
    """Seconds for a number, and for a row, of rows that lie apart."""
    seconds = [_gathered_row(clock, numbers.view(-1, width)) for width in (32, 1024)]
    gather = (seconds[1] - seconds[0]) / (1024 - 32)
    return gather, seconds[0] - 32 * gather


def _gathered_row(clock: _Clock, table: Tensor) -> float:
    # Other rows in every round: those of the last one are in the caches.
    rounds = iter(torch.randperm(len(table), device=clock.device).split(len(table) // ROUNDS))
    return clock(lambda: table.index_select(0, next(rounds))) / (len(table) // ROUNDS)


def _call(clock: _Clock) -> float:
    """Seconds for a kernel's step, from one that has next to nothing to compute."""
    layer = Layer("call", "linear", (Parameter("call.weight", (4, 4)),), FACTORED, "float32", 1, 4, 4, 1)
    block, gradient = Factored(clock.numbers(2, 4), clock.numbers(2, 4), 2), clock.numbers(16)
    return clock(lambda: contract(layer, block, gradient, weight=True, bias=False))


def _function() -> float:
    """Seconds for a call from DuckDB to a function of two gradients that computes nothing."""

    def evaluate(left: Any, right: Any) -> pa.Array:
        found, _, mask = both(left, right)
        return scores(np.zeros(len(found)), mask)

    calls = 16
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.create_function("nothing", evaluate, [GRADIENT, GRADIENT], "DOUBLE", type=PythonUDFType.ARROW)
        gradient = "struct_pack(store := 1::BIGINT, \"row\" := range, layers := '')"
        query = f"SELECT sum(nothing({gradient}, {gradient})) FROM range({calls * CALL_ROWS})"
        times = []
        for _ in range(ROUNDS):
            begin = time.thread_time()
            connection.execute(query).fetchall()
            times.append(time.thread_time() - begin)
    return min(times) / calls


def _values(found: Constants) -> tuple[float, ...]:
    return tuple(getattr(found, name) for name in NAMES)


def _named(values: Iterable[float]) -> Constants:
    named: dict[str, Any] = dict(zip(NAMES, values, strict=True))
    return replace(SHIPPED, **named)


def _processor() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
