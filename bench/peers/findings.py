"""What the figures say: promises, tables and a plot."""

from __future__ import annotations

from typing import Any

from bench.peers.metaql import NEW, RECORDED
from bench.peers.run import is_exact_over_all
from bench.peers.ways import WAYS
from bench.report import Report, subplots, table

COLUMNS = {
    "way": "",
    "version": "version",
    "covers": "parameters",
    "cold": "cold s",
    "importing": "of which importing",
    "cold_cpu": "cold CPU s",
    "second": "second s",
    "second_cpu": "second CPU s",
    "memory_mb": "memory MB",
    "disk_mb": "disk MB",
    "spearman": "Spearman",
    "difference": "error",
    "likeness": "Spearman with the other of its kind",
}


def promises(report: Report) -> None:
    """For each network, against whatever ran."""
    for network, rows in _by_network(report).items():
        ours = {name: row for name, row in rows.items() if WAYS[name].package == "metaql"}
        others = {name: row for name, row in rows.items() if name not in ours}
        exact = {name: row for name, row in others.items() if is_exact_over_all(WAYS[name])}
        recomputing = {name: row for name, row in exact.items() if WAYS[name].recomputes}
        if not exact or not recomputing or NEW not in ours:
            continue
        _second(report, network, ours, recomputing)
        name, fastest = min(exact.items(), key=lambda item: item[1]["cold"])
        own = ours[NEW]["cold"]
        report.promise(
            f"{network}: the first question costs no more than with the fastest exact library",
            own <= fastest["cold"],
            f"{own:.2f} s, {name} {fastest['cold']:.2f} s",
        )
        best = max(row["spearman"] for row in others.values())
        worst = max(row["difference"] for name, row in ours.items() if is_exact_over_all(WAYS[name]))
        report.promise(
            f"{network}: nothing less exact: Spearman no smaller than any other's, errors of at most 1e-4",
            ours[NEW]["spearman"] >= best - 1e-6 and worst <= 1e-4,
            f"Spearman {ours[NEW]['spearman']:.7f}, others' best {best:.7f}; error {worst:.1e}",
        )


def _second(report: Report, network: str, ours: dict[str, Any], recomputing: dict[str, Any]) -> None:
    """Against the fastest of those that run the training samples again."""
    name, fastest = min(recomputing.items(), key=lambda item: item[1]["second"])
    for own in (NEW, RECORDED):
        times = fastest["second"] / ours[own]["second"]
        report.promise(
            f"{network}: {own}: a second question at least 100 times as fast as with any way that computes the exact "
            "training gradients of all parameters again",
            times >= 100,
            f"{times:.3g} times: {ours[own]['second'] * 1e3:.0f} ms, {name} {fastest['second']:.2f} s",
        )


def page(report: Report) -> list[str]:
    """A table for each network, what was set, and what failed."""
    tables = []
    for network in dict.fromkeys(row["network"] for row in report.rows):
        ran = [row for row in report.rows if row["network"] == network and "error" not in row]
        tables.append(f"**{network}**\n\n{table(ran, COLUMNS)}")
    used = dict.fromkeys(row["way"] for row in report.rows)
    settings = [
        {
            "": name,
            "set": WAYS[name].settings,
            "meant to be exact": "yes" if WAYS[name].exact else "no",
            "second question runs the training samples again": "yes" if WAYS[name].recomputes else "no",
        }
        for name in used
    ]
    failed = [f"- {row['way']} failed on {row['network']}: `{row['error']}`" for row in report.rows if "error" in row]
    return [*tables, table(settings), *(["\n".join(failed)] if failed else [])]


def plot(report: Report) -> Any:
    """Bars of the first and the second question, side by side for each network."""
    networks = _by_network(report)
    figure, axes = subplots(1, len(networks), figsize=(7 * len(networks), 5.5), squeeze=False, layout="constrained")
    for axis, (network, rows) in zip(axes[0], networks.items(), strict=True):
        names = list(rows)[::-1]
        for shift, key, label in ((0.2, "cold", "first question"), (-0.2, "second", "second question")):
            places = [place + shift for place in range(len(names))]
            bars = axis.barh(places, [rows[name][key] for name in names], 0.38, label=label)
            axis.bar_label(bars, fmt=lambda seconds: f" {seconds:.{0 if seconds >= 10 else 2}f}", fontsize=8)
        axis.set_yticks(range(len(names)), names)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        axis.set_xlabel("seconds")
        axis.set_title(network)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _by_network(report: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """network => way => row, of what ran."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report.rows:
        if "error" not in row:
            found.setdefault(row["network"], {})[row["way"]] = row
    return found
