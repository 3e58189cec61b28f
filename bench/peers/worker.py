"""Asks one way in a process of its own, in whichever environment has it, and says what that cost.

python -m bench.peers.worker NAME CASE FOLDER
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from bench.peers.case import Case
from bench.peers.ways import WAYS

MEASURED = "measured.json"


@dataclass(frozen=True)
class Measured:
    """Wall and CPU seconds: ``cold`` from nothing to the first scores, importing included, ``second`` the next ones.

    ``memory`` is the most that the process held, torch and the data included, ``disk`` what lay on the disk after
    the first query; both in bytes.
    """

    version: str
    importing: float
    cold: float
    cold_cpu: float
    second: float
    second_cpu: float
    memory: int
    disk: int


def measure(name: str, case: Case, folder: Path) -> Measured:
    """Writes the scores of both queries into the folder."""
    way = WAYS[name]
    begin, begin_cpu = time.perf_counter(), cpu()
    for module in way.imports:
        import_module(module)
    importing = time.perf_counter() - begin
    (folder / "own").mkdir()
    ask = way.start(case, folder / "own")
    first = ask(0)
    cold, cold_cpu = time.perf_counter() - begin, cpu() - begin_cpu
    disk = sum(file.stat().st_size for file in (folder / "own").rglob("*") if file.is_file())
    begin, begin_cpu = time.perf_counter(), cpu()
    second = ask(1)
    seconds, seconds_cpu = time.perf_counter() - begin, cpu() - begin_cpu
    for number, scores in enumerate((first, second)):
        torch.save(torch.as_tensor(scores).detach(), folder / f"scores{number}.pt")
    return Measured(version(way.package), importing, cold, cold_cpu, seconds, seconds_cpu, memory(), disk)


def memory() -> int:
    """The most bytes that this process held."""
    status = Path("/proc/self/status")
    if status.exists():
        # The maximum that getrusage knows is that of the process that started this one, where that was larger.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cpu() -> float:
    """CPU seconds so far, of all threads and of processes that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main() -> None:
    """Leaves ``measured.json`` and the scores in the folder."""
    name, case, folder = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = measure(name, Case.load(Path(case)), Path(folder))
    (Path(folder) / MEASURED).write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main()
