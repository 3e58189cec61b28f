"""Runs a function in several processes that make a group over gloo; brings back what each gave or raised."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported all that recording takes forks the processes, so that each begins within milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [__name__, "torch._dynamo", "metaql.storage.recording.recorder"]
_CONTEXT.set_forkserver_preload(_PRELOADED)
# Only a hang lasts so long, in seconds.
_PATIENCE = 300


def preload(*modules: str) -> None:
    """Lets the server import these too, once for all ranks; call it where a test's module is imported."""
    _PRELOADED.extend(modules)
    _CONTEXT.set_forkserver_preload(_PRELOADED)


@dataclass(frozen=True)
class Outcome:
    """What a rank's function returned, or the error it ended with, and its warnings; ``exit`` is the process's code."""

    value: Any
    error: BaseException | None
    warnings: list[str]
    exit: int | None


def run(function: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Outcome]:
    """``function(rank, *arguments)`` in each of ``size`` ranks; ``folder`` is for files of this run alone."""
    folder.mkdir()
    processes = [_CONTEXT.Process(target=_rank, args=(function, rank, size, folder, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        return [_outcome(process, folder / str(rank)) for rank, process in enumerate(processes)]
    finally:
        for process in processes:
            process.kill()


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned; raises what one of them raised."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
        assert (outcome.exit, outcome.warnings) == (0, [])
    return [outcome.value for outcome in outcomes]


def _rank(function: Callable[..., Any], rank: int, size: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # What a shell starts in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    value, error = None, None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(0)
            value = function(rank, *arguments)
        except BaseException as raised:
            error = raised
    (folder / str(rank)).write_bytes(pickle.dumps((value, error, [str(each.message) for each in warned])))


def _outcome(process: BaseProcess, file: Path) -> Outcome:
    process.join(_PATIENCE)
    value, error, warned = pickle.loads(file.read_bytes()) if file.exists() else (None, None, [])
    return Outcome(value, error, warned, process.exitcode)
