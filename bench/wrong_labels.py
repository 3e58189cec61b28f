"""Which method finds wrong labels best? Influence, in its kinds, beside average loss, cleanlab and chance.

LeNet-5 on Fashion-MNIST, of which 1, 10, 50 and 80 % of the labels were moved to another class, and on CIFAR-10 with
the labels that people gave (CIFAR-10N: the majority of three people, and the worst of three). One recorded training for
each; all rankings but cleanlab's are SQL over that one store (``bench/label_rankings.py``):

- by what a sample's gradient does to clean query samples: HYDRA, in-run values, TracIn over all epochs, and at the
  end influence, influence with EK-FAC, and cosine similarity; of all query samples or of those of its label's class;
- by its own gradient or outputs: self-influence (GraNd), EL2N, forgetting events, loss;
- cleanlab's label quality and ``find_label_issues``, from the probabilities of the same network, and, as its
  documentation recommends, from those of five networks that were trained without the sample.

AUC is the share of pairs of a wrong and a right label in which the wrong one comes first. Precision is of as many
samples as there are wrong labels, and of the first 1 %. One thread. Exits with 1 when a promise is missed. cleanlab
gets an environment of its own (a minute, once).

    python -m bench.wrong_labels
    python -m bench.wrong_labels --full                  # five times as many samples: an hour
    python -m bench.wrong_labels --environments DIR      # where to make the environment; .peers by default
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from bench import data
from bench.label_rankings import AVERAGE_LOSS, BY_GRADIENT, HYDRA, RANDOM, RANKINGS, record, suspicions
from bench.mislabelled import flipped
from bench.models import LeNet5
from bench.out_of_sample import cleanlab, cross_validated, probabilities
from bench.peers.run import ROOT
from bench.rankings import auc, precision
from bench.recorded_training import Training, accuracy, lenet
from bench.report import Report, require, subplots, table

QUERIES, TESTS = 500, 3000
SAME, APART = "probabilities of the same network", "of networks trained without it"
QUALITY, ISSUES = "cleanlab, label quality", "cleanlab, find_label_issues"
FLIPPED = (0.01, 0.1, 0.5, 0.8)


@dataclass(frozen=True)
class Case:
    """Training samples with labels as given and as they should be, and clean samples to ask about and to test with."""

    name: str
    network: Callable[[], nn.Module]
    inputs: Tensor
    given: Tensor
    clean: Tensor
    test: tuple[Tensor, Tensor]
    training: Training

    @property
    def wrong(self) -> Tensor:
        """Bool [samples]."""
        return self.given != self.clean


def colour_lenet() -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    return LeNet5(channels=3, size=32)


def cases(times: int) -> Iterator[Case]:
    """The six of them, of ``times`` as many samples."""
    training, samples = Training(12, rate=0.05), 3000 * times
    inputs, clean = (each[:samples] for each in data.fashion_mnist("train"))
    for share in FLIPPED:
        torch.manual_seed(0)
        given = flipped(clean, share)
        yield Case(f"{share:.0%} flipped", lenet, inputs, given, clean, data.fashion_mnist("test"), training)
    samples = 4000 * times
    inputs, clean = (each[:samples] for each in data.cifar10("train"))
    for kind in ("aggre", "worse"):
        given = data.cifar10n(f"{kind}_label")[:samples]
        share = float((given != clean).float().mean())
        name = f"people, {kind} ({share:.0%})"
        yield Case(name, colour_lenet, inputs, given, clean, data.cifar10("test"), training)


def measure(report: Report, case: Case, environments: Path) -> None:
    """Adds a row for each ranking."""
    model = case.network()
    images, labels = case.test
    queries = images[:QUERIES], labels[:QUERIES]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        splits = {"train": (case.inputs, case.given), "validation": queries}
        record(path, model, splits, case.training, in_run=True)
        found = suspicions(path, RANKINGS, len(case.given))
    held_back = slice(QUERIES, QUERIES + TESTS)
    reached = accuracy(model, images[held_back], labels[held_back])
    named = {}
    for where, predicted in (
        (SAME, probabilities(model, case.inputs)),
        (APART, cross_validated(case.network, case.inputs, case.given, case.training)),
    ):
        doubt, issue = cleanlab(case.given, predicted, environments)
        named[where] = issue
        found |= {f"{QUALITY}, {where}": doubt, f"{ISSUES}, {where}": issue + doubt / 2}
    for ranking, scores in found.items():
        add(report, case, ranking, scores, reached)
    for where, issue in named.items():
        right = int((issue & case.wrong).sum())
        report.add(
            section="named",
            case=case.name,
            probabilities=where,
            wrong=int(case.wrong.sum()),
            named=int(issue.sum()),
            precision=right / max(1, int(issue.sum())),
            recall=right / int(case.wrong.sum()),
        )


def add(report: Report, case: Case, ranking: str, scores: Tensor, reached: float) -> None:
    """A row of one ranking."""
    share, error = float(case.wrong.double().mean()), (1 / 12 / int(case.wrong.sum())) ** 0.5
    found = auc(scores, case.wrong)
    require(ranking != RANDOM or abs(found - 0.5) <= 6 * error, f"chance finds wrong labels: AUC {found:.3f}")
    report.add(
        section="rankings",
        case=case.name,
        accuracy=reached,
        share=share,
        ranking=ranking,
        auc=found,
        precision=precision(scores, case.wrong),
        first=precision(scores, case.wrong, len(scores) // 100),
    )


def of(report: Report, section: str) -> list[dict[str, Any]]:
    """The rows of a part."""
    return [row for row in report.rows if row["section"] == section]


def judge(report: Report) -> None:
    """The promises."""
    rows = of(report, "rankings")
    by_case: dict[str, dict[str, float]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["ranking"]] = row["auc"]
    report.promise(
        "HYDRA finds wrong labels with an AUC of at least 0.8, whatever their share",
        all(found[HYDRA] >= 0.8 for found in by_case.values()),
        ", ".join(f"{case} {found[HYDRA]:.3f}" for case, found in by_case.items()),
    )
    best = {case: max(BY_GRADIENT, key=lambda name: found[name]) for case, found in by_case.items()}
    report.promise(
        "the best ranking by gradients is no worse than average loss",
        all(found[best[case]] >= found[AVERAGE_LOSS] for case, found in by_case.items()),
        ", ".join(
            f"{case} {found[best[case]]:.3f} ({best[case]}) and {found[AVERAGE_LOSS]:.3f}"
            for case, found in by_case.items()
        ),
    )
    quality = f"{QUALITY}, {APART}"
    report.promise(
        "the best ranking by gradients is no worse than cleanlab with networks trained without the sample",
        all(found[best[case]] >= found[quality] for case, found in by_case.items()),
        ", ".join(f"{case} {found[best[case]]:.3f} and {found[quality]:.3f}" for case, found in by_case.items()),
    )


def pivoted(rows: list[dict[str, Any]], key: str) -> str:
    """A table with a row for each ranking and a column for each case."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        lines.setdefault(row["ranking"], {"ranking": row["ranking"]})[row["case"]] = row[key]
    names = list(dict.fromkeys(row["case"] for row in rows))
    heading = {"auc": "AUC", "precision": "precision, of as many as are wrong", "first": "precision, of the first 1 %"}
    return table(list(lines.values()), {"ranking": heading[key], **{name: name for name in names}})


def plot(report: Report) -> Any:
    """AUC and precision, each ranking in each case."""
    rows = of(report, "rankings")
    names, rankings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("case", "ranking"))
    figure, axes = subplots(1, 2, figsize=(16, 0.33 * len(rankings) + 1.5), sharey=True)
    for axis, key, title in zip(axes, ("auc", "precision"), ("AUC", "precision, of as many as are wrong"), strict=True):
        values = torch.tensor([row[key] for row in rows]).reshape(len(names), len(rankings)).T
        axis.imshow(values.numpy(), cmap="RdYlGn", vmin=0 if key == "precision" else 0.4, vmax=1, aspect="auto")
        for place, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                axis.text(column, place, f"{value:.2f}", ha="center", va="center", fontsize=9)
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axis.set_title(title)
    axes[0].set_yticks(range(len(rankings)), rankings)
    figure.tight_layout()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="five times as many samples")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="where environments are made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("wrong_labels", "Which method finds wrong labels best?")
    for case in cases(5 if options.full else 1):
        measure(report, case, options.environments)
    judge(report)
    remarks(report)
    rankings = of(report, "rankings")
    named = table([{key: value for key, value in row.items() if key != "section"} for row in of(report, "named")])
    return report.write([*(pivoted(rankings, key) for key in ("auc", "precision", "first")), named], plot(report))


def remarks(report: Report) -> None:
    """What a reader of the figures has to know."""
    reached = {row["case"]: row["accuracy"] for row in of(report, "rankings")}
    report.remark(
        "LeNet-5, 12 epochs, batches of 64, SGD with momentum 0.9 at 0.05. Test accuracy: "
        + ", ".join(f"{case} {each:.2f}" for case, each in reached.items())
    )
    report.remark(
        f"Rankings by influence and by similarity are told {QUERIES} clean samples, which the others do not have. "
        "Those of cleanlab from networks trained without the sample train five more"
    )
    report.remark(
        "Label quality is 1 less the probability of the given label, and so the order of the loss: of the same network "
        "it repeats the line of the loss, of the other networks it is the loss out of sample"
    )
    report.remark("One run each. With few wrong labels a single one moves the precision by as much as one of them is")


if __name__ == "__main__":
    sys.exit(main())
