"""How well are anomalies found when the training data is polluted, with 20 labelled rows?

The protocol of the ELITE dissertation's Part I, at a size for a CPU: in each run one class of Fashion-MNIST or MNIST is
normal and the others are anomalies; sets of ADBench; windows of the EEG Eye State series (eyes closed are anomalies).
From pollution 0.1 to 0.5: that share of the unlabelled training rows are anomalies. 10 normal rows and 10 anomalies are
labelled, and are not among the training rows. The test ROC-AUC of every method at its own defaults, on other rows.

Beside ELITE stand what it is made of: the same detector without labels, DeepSAD, and the same loss on the labels alone,
all of MetaQL's; and detectors of scikit-learn, PyOD and DeepOD, the last two in environments of their own, as in
``bench.peers``. One thread. Exits with 1 when a promise is missed.

    python -m bench.elite
    python -m bench.elite --full                 # images of 28x28, 5,000 samples, all classes, five pollutions
    python -m bench.elite --runs 6               # of each data set; 3, and 30 with --full
    python -m bench.elite --environments DIR     # where to make the environments; .peers by default
    python -m bench.elite --no-peers             # without PyOD and DeepOD
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from bench.elite_cases import ADBENCH, EEG, IMAGES, WINDOW, Case, Source, drawn, eeg, images, tabular
from bench.elite_methods import AE, ALONE, DEEP_SAD, ELITE, ELITE_AE, FOREST, OWN, SVDD, peer_rows, row, scores
from bench.elite_peers import PEERS
from bench.peers.run import ROOT
from bench.report import Report, subplots, table

FALL, AHEAD, BEHIND = 0.03, 0.10, 0.02
METHODS = (*OWN, FOREST, *PEERS)
TABLES = tuple(name.split("_", 1)[1] for name in ADBENCH)
FAMILIES = {"images": tuple(IMAGES), "tables": TABLES, "EEG": (EEG,)}
# Auto-encoders take several times as long: in the small size they are of tables alone.
LONG = (AE, ELITE_AE)
DRAWN = (ELITE, ALONE, DEEP_SAD, SVDD, FOREST, "RoSAS (DeepOD)")


@dataclass(frozen=True)
class Sizes:
    """``runs`` of each set, with the normal class that has its turn in ``classes``."""

    samples: int
    side: int
    runs: int
    classes: tuple[int, ...]
    pollutions: tuple[float, ...]
    long: bool = False

    def sources(self, run: int) -> Iterator[Source]:
        """Every data set, as it is in this run."""
        for name in IMAGES:
            yield images(name, self.classes[run % len(self.classes)], self.side, run)
        for name in ADBENCH:
            yield tabular(name, run)
        yield eeg(run)

    def cases(self) -> list[Case]:
        """All of them."""
        return [
            drawn(source, pollution, run, self.samples)
            for run in range(self.runs)
            for source in self.sources(run)
            for pollution in self.pollutions
        ]


SMALL = Sizes(samples=600, side=10, runs=3, classes=(0, 7, 4), pollutions=(0.1, 0.5))
FULL = Sizes(samples=5000, side=28, runs=30, classes=tuple(range(10)), pollutions=(0.1, 0.2, 0.3, 0.4, 0.5), long=True)


def measure(report: Report, cases: list[Case], long: bool, environments: Path | None) -> None:
    """A row for each case and method; with ``long`` auto-encoders of all cases, else of tables."""
    for case in cases:
        for method in (*OWN, FOREST):
            if long or method not in LONG or case.name in TABLES:
                report.add(**row(method, case, *scores(method, case)))
    if environments is not None:
        for each in peer_rows(cases, environments):
            report.add(**each)


def means(report: Report) -> dict[tuple[str, str, float], tuple[float, float]]:
    """(data, method, pollution) => the mean and the standard deviation of the AUC over the runs."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for each in report.rows:
        if "auc" in each:
            found.setdefault((each["data"], each["method"], each["pollution"]), []).append(each["auc"])
    return {key: (statistics.mean(aucs), statistics.pstdev(aucs)) for key, aucs in found.items()}


def over_sets(report: Report, chosen: Sequence[str] | None = None) -> dict[tuple[str, float], float]:
    """(method, pollution) => the mean over data sets (all, or those chosen) of their means, if it has them all."""
    found = means(report)
    sets = {data for data, _, _ in found if chosen is None or data in chosen}
    pairs = {(method, pollution) for _, method, pollution in found}
    return {
        (method, pollution): statistics.mean(found[data, method, pollution][0] for data in sets)
        for method, pollution in pairs
        if sets and all((data, method, pollution) in found for data in sets)
    }


def judge(report: Report) -> None:
    """The promises, of ELITE with Deep SVDD's score."""
    found, mean = means(report), over_sets(report)
    sets = list(dict.fromkeys(data for data, _, _ in found))
    low, high = (pick(pollution for _, _, pollution in found) for pick in (min, max))
    falls = {data: found[data, ELITE, low][0] - found[data, ELITE, high][0] for data in sets}
    worst = max(falls, key=falls.__getitem__)
    report.promise(
        f"ELITE's AUC falls by at most {FALL} from pollution {low} to {high}, on every data set",
        falls[worst] <= FALL,
        f"{mean[ELITE, low]:.3f} and {mean[ELITE, high]:.3f} on average; the worst is {worst} with a fall of "
        f"{falls[worst]:.3f}",
    )
    report.promise(
        f"ahead of DeepSAD by {AHEAD} or more at pollution {high}, on average",
        mean[ELITE, high] - mean[DEEP_SAD, high] >= AHEAD,
        f"{mean[ELITE, high]:.3f} and {mean[DEEP_SAD, high]:.3f}",
    )
    behind = {
        (data, pollution): found[data, ALONE, pollution][0] - found[data, ELITE, pollution][0]
        for data, method, pollution in found
        if method == ELITE
    }
    data, pollution = max(behind, key=behind.__getitem__)
    worse, total = sum(each > 0 for each in behind.values()), len(behind)
    report.promise(
        f"never behind the labels alone by more than {BEHIND}",
        behind[data, pollution] <= BEHIND,
        f"the worst is {data} at pollution {pollution}, {found[data, ELITE, pollution][0]:.3f} and "
        f"{found[data, ALONE, pollution][0]:.3f}; behind in {worse} of {total} cells",
    )


def tables(report: Report) -> list[str]:
    """By method, on average and over all sets; then by set."""
    found = means(report)
    sets = list(dict.fromkeys(data for data, _, _ in found))
    pollutions = sorted({pollution for _, _, pollution in found})
    methods = [each for each in METHODS if any(each == method for _, method, _ in found)]
    seconds = {
        method: statistics.mean(each["seconds"] for each in report.rows if each["method"] == method and "auc" in each)
        for method in methods
    }
    families = {name: over_sets(report, chosen) for name, chosen in FAMILIES.items()} | {"all": over_sets(report)}
    average = [
        {"method": method}
        | {
            f"{name}, {each}": _number(mean.get((method, each)))
            for name, mean in families.items()
            for each in pollutions
        }
        | {"training, CPU s": f"{seconds[method]:.2g}"}
        for method in methods
    ]
    by_set = [
        {"data": data, "pollution": str(pollution)}
        | {method: _with_spread(found.get((data, method, pollution))) for method in methods}
        for data in sets
        for pollution in pollutions
    ]
    return [
        "Test ROC-AUC at each pollution, means over the data sets of a kind and over all:",
        table(average),
        "Of each data set, mean and standard deviation over the runs:",
        table(by_set),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with_spread(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.3f} ± {pair[1]:.3f}"


def plot(report: Report) -> Any:
    """AUC over pollution, of each data set."""
    found = means(report)
    sets = list(dict.fromkeys(data for data, _, _ in found))
    columns = 3
    lines = -(-len(sets) // columns)
    figure, axes = subplots(lines, columns, figsize=(4 * columns, 2.8 * lines), squeeze=False, sharex=True)
    for place, axis in enumerate(axes.flat):
        axis.set_visible(place < len(sets))
        if place >= len(sets):
            continue
        for method in DRAWN:
            points = sorted(
                (each, *found[key]) for key in found if key[:2] == (sets[place], method) for each in key[2:]
            )
            if points:
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(
                    x, y, spread, label=method, marker="o", capsize=2, linewidth=2.5 if method == ELITE else 1
                )
        axis.set_title(sets[place])
        axis.set_ylabel("test ROC-AUC")
        axis.set_xlabel("pollution")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def main() -> int:
    """Prints the table; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="images of 28x28, 5,000 samples, all classes, 30 runs")
    parser.add_argument("--runs", type=int, help="of each data set")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers")
    parser.add_argument("--no-peers", action="store_true", help="without the other libraries' detectors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = FULL if options.full else SMALL
    if options.runs:
        sizes = replace(sizes, runs=options.runs)
    report = Report("elite", "How well are anomalies found in polluted data, with 20 labels?")
    measure(report, sizes.cases(), sizes.long, None if options.no_peers else options.environments.resolve())
    judge(report)
    remarks(report, sizes)
    return report.write(tables(report), plot(report))


def remarks(report: Report, sizes: Sizes) -> None:
    """What was compared."""
    report.remark(
        f"{sizes.runs} runs of each data set, each with rows, labels and a seed of its own, and for the images another "
        f"normal class ({', '.join(map(str, sizes.classes))} in turn). Images are {sizes.side}x{sizes.side}; at most "
        f"{sizes.samples:,} training rows, as many at each pollution: fewer where a set has fewer anomalies"
        + ("" if sizes.long else ". Auto-encoders take long, and were tried on tables alone")
    )
    report.remark(
        f'"{ALONE}", "{DEEP_SAD}", "{SVDD}", "{AE}" and "{ELITE_AE}" are MetaQL\'s own with the same networks: conv2d '
        "for images, conv1d for series, mlp for tables. The other libraries' are given the rows flattened and "
        "standardised, at their own defaults: of the labels, DeepOD's see the anomalies, for normal rows have no label "
        "there"
    )
    report.remark(
        f"{EEG}: windows of {WINDOW} samples, from stretches of a second that are training or test data as a whole"
    )
    errors = {each["method"]: each["error"] for each in report.rows if "error" in each}
    for method, error in errors.items():
        report.remark(f"{method} failed: {error}")


if __name__ == "__main__":
    sys.exit(main())
