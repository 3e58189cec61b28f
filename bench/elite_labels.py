"""What do labels do for ELITE: how many, of which kinds of anomalies, and which rows to label next?

- the test ROC-AUC over the number of labelled rows, a half of which are anomalies
- labelled anomalies of few of the nine kinds that occur in the data: ELITE beside the same loss on the labels alone,
  over all test anomalies and over those of kinds without a label
- 20 more labels for 10: rows that ``candidates`` names, those with the highest scores, and random ones

Real data as in ``bench.elite``, at its small size; all methods are MetaQL's. One thread. Exits with 1 when a promise is
missed.

    python -m bench.elite_labels
    python -m bench.elite_labels --full          # images of 28x28, 5,000 samples, ten runs
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from bench.elite import FULL, SMALL, Sizes
from bench.elite_cases import Case, Rows, Source, drawn, images, tabular
from bench.elite_methods import ALONE, DEEP_SAD, ELITE, SVDD, trained
from bench.rankings import auc
from bench.report import Report, subplots, table
from metaql.methods.elite import Fitted, candidates

LABELS, KINDS, POLLUTION = (4, 10, 20, 50), (1, 2, 4), 0.3
FIRST, MORE = 10, 20
BY_CANDIDATES, BY_SCORE, AT_RANDOM, NONE = "candidates", "highest scores", "random", "none"
SPAM, DIGITS = "SpamBase", "mnist (ADBench)"


def source(name: str, sizes: Sizes, run: int) -> Source:
    """The data set of this name."""
    if name == SPAM:
        return tabular("35_SpamBase", run)
    if name == DIGITS:
        return replace(tabular("24_mnist", run), name=DIGITS)
    return images(name, sizes.classes[run % len(sizes.classes)], sizes.side, run)


def of_number(report: Report, sizes: Sizes) -> None:
    """A row for each data set, number of labels, run and method."""
    for name in ("Fashion-MNIST", DIGITS, SPAM):
        for run in range(sizes.runs):
            for labels in LABELS:
                case = drawn(source(name, sizes, run), POLLUTION, run, sizes.samples, labels)
                for method in (ELITE, ALONE, DEEP_SAD):
                    found = trained(method, case).score(case.test.features)
                    report.add(
                        section="number", data=name, labels=labels, run=run, method=method, auc=_auc(found, case.test)
                    )


def of_kinds(report: Report, sizes: Sizes) -> None:
    """The same for each number of kinds that labels show; ``unseen`` is the AUC with anomalies of other kinds."""
    for name in ("Fashion-MNIST", "MNIST"):
        for run in range(sizes.runs):
            for kinds in KINDS:
                case = drawn(source(name, sizes, run), POLLUTION, run, sizes.samples, kinds=kinds)
                seen = torch.isin(case.test.kind, case.labelled.kind[case.labelled.is_anomaly])
                for method in (ELITE, ALONE, DEEP_SAD, SVDD):
                    found = trained(method, case).score(case.test.features)
                    unseen = auc(found[~seen], case.test.is_anomaly[~seen])
                    every = _auc(found, case.test)
                    report.add(
                        section="kinds", data=name, kinds=kinds, run=run, method=method, auc=every, unseen=unseen
                    )


def of_candidates(report: Report, sizes: Sizes) -> None:
    """For each way to choose: the AUC of ELITE, trained again with the labels that the chosen rows have in truth."""
    for name in ("Fashion-MNIST", SPAM):
        for run in range(2 * sizes.runs):
            kinds = None if name == SPAM else 1
            case = drawn(source(name, sizes, run), POLLUTION, run, sizes.samples, FIRST, kinds)
            first = trained(ELITE, case)
            for way, places in chosen(first, case).items():
                again = first if way == NONE else trained(ELITE, with_labels(case, places))
                report.add(
                    section="candidates",
                    data=name,
                    way=way,
                    run=run,
                    auc=_auc(again.score(case.test.features), case.test),
                    anomalies=int(case.hidden[places].sum()),
                )


def chosen(fitted: Fitted, case: Case) -> dict[str, Tensor]:
    """Places of the training rows to label next, by each way."""
    named = candidates(
        fitted.embedding(case.train),
        fitted.anomaly_score,
        fitted.pseudo_label,
        fitted.meta_gradient,
        fitted.embedding(case.labelled.features),
        MORE,
    )
    order = torch.randperm(len(case.train), generator=torch.Generator().manual_seed(case.seed))
    return {
        NONE: named[:0],
        BY_CANDIDATES: named,
        BY_SCORE: fitted.anomaly_score.argsort(descending=True)[:MORE],
        AT_RANDOM: order[:MORE],
    }


def with_labels(case: Case, places: Tensor) -> Case:
    """The case with these training rows labelled as well. They stay training rows."""
    features = torch.cat([case.labelled.features, case.train[places]])
    kind = torch.cat([case.labelled.kind, case.hidden[places].long()])
    return replace(case, labelled=Rows(features, kind))


def _auc(scores: Tensor, rows: Rows) -> float:
    return auc(scores, rows.is_anomaly)


def means(report: Report, section: str, *keys: str, of: str = "auc") -> dict[tuple[Any, ...], tuple[float, float]]:
    """The mean and the standard deviation over the runs, by the values of ``keys``."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for each in report.rows:
        if each["section"] == section:
            found.setdefault(tuple(each[key] for key in keys), []).append(each[of])
    return {key: (statistics.mean(values), statistics.pstdev(values)) for key, values in found.items()}


def judge(report: Report) -> None:
    """The promises."""
    of = means(report, "kinds", "method")
    unseen = means(report, "kinds", "method", of="unseen")
    report.promise(
        "ahead of the labels alone where they show only some of the kinds of anomalies, on average",
        of[ELITE,][0] > of[ALONE,][0],
        f"{of[ELITE,][0]:.3f} and {of[ALONE,][0]:.3f}; of kinds without a label {unseen[ELITE,][0]:.3f} and "
        f"{unseen[ALONE,][0]:.3f}",
    )
    found = means(report, "number", "method", "labels")
    behind = {labels: found[ALONE, labels][0] - found[ELITE, labels][0] for labels in LABELS}
    worst = max(behind, key=behind.__getitem__)
    report.promise(
        "never behind the labels alone by more than 0.02, whatever their number, on average over the data sets",
        behind[worst] <= 0.02,
        f"the worst is {worst} labels, {found[ELITE, worst][0]:.3f} and {found[ALONE, worst][0]:.3f}",
    )
    ways = means(report, "candidates", "data", "way")
    sets = {data for data, _ in ways}
    report.promise(
        "rows that candidates names help more than random ones and those with the highest scores, on both data sets",
        all(ways[data, BY_CANDIDATES][0] > max(ways[data, each][0] for each in (BY_SCORE, AT_RANDOM)) for data in sets),
        "; ".join(
            f"{data} {', '.join(f'{way} {ways[data, way][0]:.3f}' for way in (BY_CANDIDATES, AT_RANDOM, BY_SCORE))}"
            for data in sorted(sets)
        ),
    )


def tables(report: Report) -> list[str]:
    """One for each question."""
    number, sets = means(report, "number", "data", "method", "labels"), ("Fashion-MNIST", DIGITS, SPAM)
    kinds, unseen = (means(report, "kinds", "data", "kinds", "method", of=of) for of in ("auc", "unseen"))
    ways = means(report, "candidates", "data", "way")
    marked = means(report, "candidates", "data", "way", of="anomalies")
    return [
        "By the number of labels:",
        table(
            [
                {"data": data, "method": method}
                | {f"{labels} labels": _shown(number[data, method, labels]) for labels in LABELS}
                for data in sets
                for method in (ELITE, ALONE, DEEP_SAD)
            ]
        ),
        "With 20 labels, by the number of kinds (of 9) that they show, and where the test has other kinds alone:",
        table(
            [
                {"data": data, "method": method}
                | {f"{count} kinds, all": _shown(kinds[data, count, method]) for count in KINDS}
                | {f"{count} kinds, others": _shown(unseen[data, count, method]) for count in KINDS}
                for data in dict.fromkeys(key[0] for key in kinds)
                for method in (ELITE, ALONE, DEEP_SAD, SVDD)
            ]
        ),
        f"With {FIRST} labels, and with {MORE} more of rows that were chosen:",
        table(
            [
                {"data": data, "chosen by": way, "AUC": _shown(found), "anomalies among them": marked[data, way][0]}
                for (data, way), found in ways.items()
            ]
        ),
    ]


def _shown(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def plot(report: Report) -> Any:
    """AUC over the number of labels and of kinds, and by how the rows to label were chosen."""
    number, kinds = means(report, "number", "method", "labels"), means(report, "kinds", "method", "kinds")
    ways = means(report, "candidates", "data", "way")
    figure, axes = subplots(1, 3, figsize=(13, 3.6))
    for method in (ELITE, ALONE, DEEP_SAD):
        axes[0].plot(LABELS, [number[method, each][0] for each in LABELS], marker="o", label=method)
        axes[1].plot(KINDS, [kinds[method, each][0] for each in KINDS], marker="o", label=method)
    axes[0].set_xlabel("labelled rows")
    axes[1].set_xlabel("kinds of anomalies that labels show")
    axes[1].set_xticks(KINDS)
    for axis in axes[:2]:
        axis.set_ylabel("test ROC-AUC, mean of the data sets")
        axis.legend()
    for place, data in enumerate(dict.fromkeys(data for data, _ in ways)):
        names = [way for name, way in ways if name == data]
        values = [ways[data, way] for way in names]
        axes[2].errorbar(
            [spot + 0.1 * place for spot in range(len(names))],
            *zip(*values, strict=True),
            marker="o",
            ls="",
            label=data,
        )
        axes[2].set_xticks(range(len(names)), names)
    axes[2].set_ylabel("test ROC-AUC")
    axes[2].legend(loc="lower center")
    figure.tight_layout()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="images of 28x28, 5,000 samples, ten runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = replace(FULL, runs=10) if options.full else SMALL
    report = Report("elite_labels", "What do labels do for ELITE: how many, of which kinds, and which next?")
    of_number(report, sizes)
    of_kinds(report, sizes)
    of_candidates(report, sizes)
    judge(report)
    report.remark(
        f"Pollution {POLLUTION}, {sizes.runs} runs, at most {sizes.samples:,} training rows, images {sizes.side}x"
        f"{sizes.side}; mean and standard deviation over the runs of the test ROC-AUC"
    )
    report.remark(
        f"Candidates: {2 * sizes.runs} runs; the first labels of Fashion-MNIST show one kind of anomalies. Rows that "
        "were labelled stay among the training rows"
    )
    return report.write(tables(report), plot(report))


if __name__ == "__main__":
    sys.exit(main())
