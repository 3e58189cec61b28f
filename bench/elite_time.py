"""What does ELITE take beside the same detector without labels, and what do settled rows save?

- the time of a training step with 20 labels over one of the unsupervised detector: the same network and rows, batches
  of 128 and 256, medians of epochs that take turns, CPU time; without batch norm, and with it in training mode
- the time of a whole training at the defaults, with all that comes before and after the steps
- the same with ``settled``, by which rows whose pseudo label has stayed the same skip the meta-gradient, and the AUC
- the validation loss and the test ROC-AUC over the epochs

Real data as in ``bench.elite``. One thread. Exits with 1 when a promise is missed.

    python -m bench.elite_time
    python -m bench.elite_time --full            # 5,000 samples, ten runs with settled rows
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from bench.elite import FULL, SMALL, Sizes
from bench.elite_cases import Case, Source, drawn, eeg, images, tabular
from bench.elite_methods import ALONE, DEEP_SAD, ELITE, SVDD, trained
from bench.rankings import auc
from bench.report import Report, subplots, table
from metaql.methods.elite import Progress, Settings, fit, register_network

POLLUTION = 0.3
BATCHES, ROUNDS = (128, 256), 15
# So many batches are an epoch here.
STEPS = 6
BATCH_NORM = "conv2d with batch norm"
GOAL, WITH_BATCH_NORM = 1.7, 2.3
SETTLED = (2, 5)
EPOCHS = (1, 2, 4, 8, 16, 32, 64)
WITHOUT = "without labels"
COLUMNS = {
    "network": "network",
    "rows": "rows",
    "batch": "batch",
    "plain": "unsupervised step, CPU ms",
    "elite": "ELITE's, CPU ms",
    "ratio": "ratio",
}


def batch_norm(shape: tuple[int, ...]) -> nn.Module:
    """Two convolutions for images [h, w], with batch norm as in the papers' networks."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, shape[0]))]
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (shape[0] // 4) * (shape[1] // 4), 32, bias=False))


def step_seconds(case: Case, labels: bool, network: str | None, batch: int) -> float:
    """The median CPU seconds from one batch to the next, within one epoch."""
    ends: list[float] = []

    def note(progress: Progress) -> None:
        ends.append(time.process_time())

    labelled, is_anomaly = (case.labelled.features, case.labelled.is_anomaly) if labels else (None, None)
    fit(case.train, labelled, is_anomaly, Settings(network=network, epochs=1, batch_size=batch), note)
    return statistics.median(after - before for before, after in pairwise(ends))


def of_steps(report: Report) -> None:
    """A row for each network and size of batch."""
    pictures, tables, series = images("Fashion-MNIST", 0, 28, 0), tabular("10_cover", 0), eeg(0)
    wide = tabular("24_mnist", 0)
    for network, source in (
        ("mlp", wide),
        ("mlp", tables),
        ("conv1d", series),
        ("conv2d", pictures),
        (BATCH_NORM, pictures),
    ):
        for batch in BATCHES:
            case = drawn(source, POLLUTION, 0, STEPS * batch)
            times: dict[bool, list[float]] = {False: [], True: []}
            for number in range(ROUNDS):
                for labels in (False, True) if number % 2 else (True, False):
                    times[labels].append(step_seconds(case, labels, network, batch))
            ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
            report.add(
                section="step",
                network=network,
                rows=f"{case.name} {list(case.train.shape[1:])}",
                batch=batch,
                plain=1e3 * statistics.median(times[False]),
                elite=1e3 * statistics.median(times[True]),
                ratio=statistics.median(ratios),
            )


def of_runs(report: Report, sizes: Sizes) -> None:
    """A row for each data set, run, and way to train: without labels, with them, and with settled rows."""
    ways: dict[str, tuple[str, dict[str, Any]]] = {WITHOUT: (SVDD, {}), ELITE: (ELITE, {})}
    ways |= {f"ELITE, settled for {epochs}": (ELITE, {"settled": epochs}) for epochs in SETTLED}
    for run in range(sizes.runs):
        for source in sources(sizes, run):
            case = drawn(source, POLLUTION, run, sizes.samples)
            plain = 0.0
            for way, (method, settings) in ways.items():
                begin = time.process_time()
                fitted = trained(method, case, **settings)
                taken = time.process_time() - begin
                plain = taken if way == WITHOUT else plain
                skipped = [each.settled for each in fitted.history if each.settled is not None]
                report.add(
                    section="run",
                    data=case.name,
                    way=way,
                    run=run,
                    seconds=taken,
                    ratio=taken / plain,
                    epochs=len(fitted.history),
                    auc=auc(fitted.score(case.test.features), case.test.is_anomaly),
                    settled=statistics.mean(skipped) if skipped else None,
                )


def sources(sizes: Sizes, run: int) -> tuple[Source, Source]:
    """Images and a table."""
    return images("Fashion-MNIST", sizes.classes[run % len(sizes.classes)], sizes.side, run), tabular("24_mnist", run)


def of_epochs(report: Report, sizes: Sizes) -> None:
    """A row for each data set, method and number of epochs, with the mean validation loss of the last one."""
    for source in sources(sizes, 0):
        case = drawn(source, POLLUTION, 0, sizes.samples)
        for method in (ELITE, ALONE, DEEP_SAD, SVDD):
            for epochs in EPOCHS:
                fitted = trained(method, case, epochs=epochs)
                report.add(
                    section="epochs",
                    data=case.name,
                    method=method,
                    epochs=epochs,
                    loss=fitted.history[-1].validation_loss,
                    auc=auc(fitted.score(case.test.features), case.test.is_anomaly),
                )


def rows_of(report: Report, section: str) -> list[dict[str, Any]]:
    """The rows of one part."""
    return [each for each in report.rows if each["section"] == section]


def judge(report: Report) -> None:
    """The promises."""
    steps = rows_of(report, "step")
    for goal, chosen, how in (
        (GOAL, [each for each in steps if each["network"] != BATCH_NORM], "without batch norm"),
        (
            WITH_BATCH_NORM,
            [each for each in steps if each["network"] == BATCH_NORM],
            "with batch norm in training mode",
        ),
    ):
        worst = max(chosen, key=lambda each: each["ratio"])
        report.promise(
            f"a step takes at most {goal} times the unsupervised detector's, {how}",
            worst["ratio"] <= goal,
            f"{min(each['ratio'] for each in chosen):.2f} to {worst['ratio']:.2f}, the most by {worst['network']} with "
            f"batches of {worst['batch']}",
        )


def by_way(report: Report) -> list[dict[str, Any]]:
    """Medians and means over the runs, for each data set and way to train."""
    rows = rows_of(report, "run")
    pairs = dict.fromkeys((each["data"], each["way"]) for each in rows)
    groups = {pair: [each for each in rows if (each["data"], each["way"]) == pair] for pair in pairs}
    return [
        {
            "data": data,
            "training": way,
            "CPU s": statistics.median(each["seconds"] for each in group),
            "epochs": statistics.median(each["epochs"] for each in group),
            "CPU ms an epoch": 1e3 * statistics.median(each["seconds"] / each["epochs"] for each in group),
            "over unsupervised": statistics.median(each["ratio"] for each in group),
            "AUC": f"{statistics.mean(each['auc'] for each in group):.3f}",
            "rows that skip, mean over epochs": _share([each["settled"] for each in group]),
        }
        for (data, way), group in groups.items()
    ]


def _share(shares: list[float | None]) -> str:
    known = [each for each in shares if each is not None]
    return f"{100 * statistics.mean(known):.0f} %" if known else ""


def tables(report: Report) -> list[str]:
    """Of steps, and of whole trainings."""
    steps = [{**each, "ratio": f"{each['ratio']:.2f}"} for each in rows_of(report, "step")]
    return [table(steps, COLUMNS), "Whole trainings:", table(by_way(report))]


def plot(report: Report) -> Any:
    """The ratios of steps; the loss and the AUC over the epochs, of each data set."""
    steps, epochs = rows_of(report, "step"), rows_of(report, "epochs")
    sets = list(dict.fromkeys(each["data"] for each in epochs))
    figure, axes = subplots(1, 1 + len(sets), figsize=(5.5 * (1 + len(sets)), 4))
    axes[0].barh(
        [f"{each['network']}, {each['rows']}, {each['batch']}" for each in steps], [each["ratio"] for each in steps]
    )
    for goal, style in ((GOAL, "--"), (WITH_BATCH_NORM, ":")):
        axes[0].axvline(goal, color="black", linewidth=0.8, linestyle=style)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("a step's CPU time over the unsupervised detector's")
    for axis, data in zip(axes[1:], sets, strict=True):
        losses = axis.twinx()
        for place, method in enumerate((ELITE, ALONE, DEEP_SAD, SVDD)):
            chosen = [each for each in epochs if (each["data"], each["method"]) == (data, method)]
            axis.plot(EPOCHS, [each["auc"] for each in chosen], marker="o", color=f"C{place}", label=method)
            if method in (ELITE, ALONE):
                losses.plot(EPOCHS, [each["loss"] for each in chosen], color=f"C{place}", linestyle=":")
        axis.set_title(data)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("epochs")
        axis.set_ylabel("test ROC-AUC")
        losses.set_ylabel("validation loss (dotted)")
        axis.legend()
    figure.tight_layout()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="5,000 samples, ten runs with settled rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_network(BATCH_NORM, batch_norm)
    sizes = replace(FULL, runs=10) if options.full else SMALL
    report = Report("elite_time", "What does ELITE take beside the same detector without labels?")
    of_steps(report)
    of_runs(report, sizes)
    of_epochs(report, sizes)
    judge(report)
    report.remark(
        f"20 labels, pollution {POLLUTION}. Steps: medians of {ROUNDS} rounds of {STEPS} batches in turns, with Adam's "
        "update. Whole trainings are of the default settings, with scaling before and all rows' scores and "
        f"meta-gradients after, of {sizes.runs} runs each"
    )
    report.remark(
        "With settled rows a training ends after fewer epochs, for only batches that are asked have a validation "
        "loss; what skipping saves by itself is in an epoch's time"
    )
    report.remark("Every point over the epochs is a training of its own; the same seed, so that all follow one path")
    return report.write(tables(report), plot(report))


if __name__ == "__main__":
    sys.exit(main())
