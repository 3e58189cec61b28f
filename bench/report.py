"""What a benchmark found: raw numbers (JSON), a table (Markdown) and a plot (PNG) in ``bench/results``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import torch

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name as the system gives it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What it ran on, and when."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "duckdb": duckdb.__version__,
    }


@dataclass(frozen=True)
class Promise:
    """Something that was to be reached, whether it was, and the figure that says so."""

    text: str
    kept: bool
    measured: str


@dataclass
class Report:
    """One benchmark's findings; ``name`` is that of its files, ``question`` what it asks."""

    name: str
    question: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    promises: list[Promise] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, **values: Any) -> None:
        """A row of raw numbers, printed as it comes."""
        self.rows.append(values)
        print("  ".join(f"{key} {_shown(value)}" for key, value in values.items()), flush=True)

    def promise(self, text: str, kept: bool, measured: str) -> None:
        """A goal and what became of it."""
        self.promises.append(Promise(text, bool(kept), measured))
        print(f"{'kept' if kept else 'MISSED'}: {text}: {measured}", flush=True)

    def remark(self, text: str) -> None:
        """What a reader of the figures has to know."""
        self.remarks.append(text)

    def write(self, tables: Sequence[str], figure: Any = None, folder: Path | None = None) -> int:
        """Writes raw numbers, the page of ``tables`` (Markdown) and the plot; the process' exit status."""
        folder = folder or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        ran_on = machine()
        raw = {
            "question": self.question,
            "command": command(),
            "machine": ran_on,
            "rows": self.rows,
            "promises": [asdict(one) for one in self.promises],
            "remarks": self.remarks,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(raw, indent=1, default=float) + "\n")
        if figure is not None:
            figure.savefig(folder / f"{self.name}.png", dpi=120, bbox_inches="tight")
        page = self._page(tables, ran_on, figure is not None)
        (folder / f"{self.name}.md").write_text(page)
        print("\n" + page)
        return 0 if all(one.kept for one in self.promises) else 1

    def _page(self, tables: Sequence[str], ran_on: Mapping[str, Any], has_figure: bool) -> str:
        where = ", ".join(f"{key} {value}" for key, value in ran_on.items() if value is not None and key != "date")
        lines = [f"## {self.question}", "", f"`{command()}`, {ran_on['date']}: {where}.", ""]
        for each in tables:
            lines += [each, ""]
        lines += [f"- {'Kept' if one.kept else '**Missed**'}: {one.text}: {one.measured}." for one in self.promises]
        lines += [f"- {one}" for one in self.remarks]
        if has_figure:
            lines += ["", f"![{self.question}](results/{self.name}.png)"]
        return "\n".join(lines) + "\n"


def subplots(*arguments: Any, **settings: Any) -> Any:
    """A figure and its axes, as from ``pyplot.subplots``, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*arguments, **settings)


def bars(rows: Sequence[Mapping[str, Any]], name: str, keys: Mapping[str, str], unit: str) -> Any:
    """A figure with some bars for each row, ``keys`` (key => label) on one logarithmic axis; and its axes."""
    figure, axes = subplots(figsize=(8, 0.47 * len(rows) + 1))
    for number, (key, label) in enumerate(keys.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        axes.barh(places, [row[key] for row in rows], height=0.27, label=label)
    axes.set_yticks(range(len(rows)), [row[name] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(unit)
    axes.legend()
    return figure, axes


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> str:
    """Rows as a Markdown table; ``columns`` picks and renames them, key => heading."""
    columns = columns or {key: key for key in (rows[0] if rows else {})}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def require(good: bool, what: str) -> None:
    """Ends the benchmark with exit status 1 where a result is not what it has to be."""
    if not good:
        sys.exit(f"WRONG RESULT: {what}")


def command() -> str:
    """The command that this process was started with."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {Path(sys.argv[0]).name}"
    return " ".join([program, *sys.argv[1:]])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
