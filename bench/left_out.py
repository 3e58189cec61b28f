"""Does influence foretell what happens when samples are left out and the network is trained again?

Each of some hundred samples is left out in turn, then groups of 5 %: at random, of one class, and those that a method
ranks as most harmful and as most helpful. The network is really trained again each time, from the same weights with the
same batches in the same order, what is left out weighing nothing; so there is no noise, and what a forecast lacks is
the method's. Two kinds of training, all in float64:

- a small network, by SGD with momentum, for a short and a longer time: what HYDRA and in-run values approximate
- multinomial logistic regression at its optimum, by Newton's method: what influence functions approximate; conjugate
  gradients with the penalty as damping have to meet it, but for what is not linear in a sample's weight

Every method is SQL over one recorded store and, scaled as docs/methods.md says, foretells the change of the mean test
loss. The slope is the true change over the foretold one (a line through 0), 1 where the scale is right. HYDRA with the
Hessian stands beside them, which is no SQL (``bench/hessian_aware.py``). One thread. Exits with 1 when a result is
wrong or a promise is missed.

    python -m bench.left_out
    python -m bench.left_out --full              # twice as many samples
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from bench.left_out_cases import CG, EKFAC, EXACT, HYDRA, INNER, Case, at_optimum, trained
from bench.rankings import spearman
from bench.report import Report, subplots, table

SHARE, GROUPS = 0.05, 40
EPOCHS, PENALTIES = (4, 12, 40), (0.1, 0.01)
ONE = {
    "case": "training",
    "method": "method",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "slope": "slope",
    "each": "Spearman, each test sample (mean)",
    "seconds": "query, s",
}
OF_GROUPS = {
    "case": "training",
    "method": "method",
    "random": "random groups: Spearman",
    "random_slope": "slope",
    "of_class": "of one class: Spearman",
    "of_class_slope": "slope",
    "harmful": "without the most harmful: loss",
    "harmful_foretold": "foretold",
    "helpful": "without the most helpful: loss",
    "helpful_foretold": "foretold",
}
PANELS = (HYDRA, INNER, EKFAC, CG)
# What was foretold and what happened, of each case and method.
Points = dict[tuple[str, str], tuple[Tensor, Tensor]]


def groups(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sets of 5 % of the samples, bool [sets, samples]: at random, and of one class each."""
    generator = torch.Generator().manual_seed(0)
    size = round(SHARE * len(labels))
    orders = torch.stack([torch.randperm(len(labels), generator=generator) for _ in range(GROUPS)])
    # The first ones of each class, and all where there are fewer.
    of_class = labels == torch.arange(10)[:, None]
    return orders < size, of_class & (of_class.cumsum(1) <= size)


def extremes(influence: Tensor) -> Tensor:
    """The 5 % of the samples that are foretold to be most harmful, and most helpful, bool [2, samples]."""
    size, order = round(SHARE * len(influence)), influence.argsort()
    found = torch.zeros(2, len(influence), dtype=torch.bool)
    found[0, order[:size]] = found[1, order[-size:]] = True
    return found


def slope(foretold: Tensor, truth: Tensor) -> float:
    """The truth over what was foretold, by least squares through 0."""
    return float((foretold * truth).sum() / foretold.square().sum())


def pearson(one: Tensor, other: Tensor) -> float:
    """The linear correlation."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def measure(report: Report, case: Case) -> Points:
    """Adds two rows for each method: of single samples, and of groups."""
    every = case.changes(torch.eye(len(case.labels), dtype=torch.bool))
    sets = dict(zip(("random", "of_class"), groups(case.labels), strict=True))
    true_of = {name: case.changes(each).mean(1) for name, each in sets.items()}
    points, truth = {}, every.mean(1)
    for method, (forecast, seconds) in case.forecasts.items():
        foretold = forecast.mean(1)
        points[case.name, method] = foretold, truth
        report.add(
            section="one",
            case=case.name,
            method=method,
            spearman=float(spearman(foretold, truth)),
            pearson=pearson(foretold, truth),
            slope=slope(foretold, truth),
            each=float(spearman(forecast.T, every.T).mean()) if forecast.shape == every.shape else None,
            seconds=seconds,
        )
        found: dict[str, float] = {}
        for name, chosen in sets.items():
            sums = chosen.double() @ foretold
            found |= {name: float(spearman(sums, true_of[name])), f"{name}_slope": slope(sums, true_of[name])}
        ranked = extremes(foretold)
        real, sums = case.changes(ranked).mean(1), ranked.double() @ foretold
        for place, name in enumerate(("harmful", "helpful")):
            found |= {name: float(real[place]), f"{name}_foretold": float(sums[place])}
        report.add(section="groups", case=case.name, method=method, **found)
    return points


def of(report: Report, section: str) -> list[dict[str, Any]]:
    """The rows of a part."""
    return [row for row in report.rows if row["section"] == section]


def judge(report: Report) -> None:
    """The promises."""
    found = {(row["case"], row["method"]): row for row in of(report, "one")}
    cases = list(dict.fromkeys(case for case, _ in found))
    at_end = [found[case, CG] for case in cases if (case, HYDRA) not in found]
    report.promise(
        "at an optimum, conjugate gradients foretell leaving one sample out with a Spearman of at least 0.99 and a "
        "slope within 5 % of 1",
        all(row["spearman"] >= 0.99 and abs(row["slope"] - 1) <= 0.05 for row in at_end),
        ", ".join(f"{row['case']} {row['spearman']:.4f} and {row['slope']:.3f}" for row in at_end),
    )
    shortest = found[cases[0], HYDRA]
    report.promise(
        "after a short training HYDRA does so with a Spearman of at least 0.95 and a slope within 10 % of 1",
        shortest["spearman"] >= 0.95 and abs(shortest["slope"] - 1) <= 0.1,
        f"{cases[0]} {shortest['spearman']:.3f} and {shortest['slope']:.3f}",
    )
    report.promise(
        "EK-FAC with the training's own damping does so better than inner products at the same checkpoint",
        all(found[case, EKFAC]["spearman"] > found[case, INNER]["spearman"] for case in cases),
        ", ".join(
            f"{case} {found[case, EKFAC]['spearman']:.3f} and {found[case, INNER]['spearman']:.3f}" for case in cases
        ),
    )
    worst = min(found.values(), key=lambda row: row["spearman"])
    report.promise(
        "every method is on the right side of chance, with a Spearman of at least 0.5",
        worst["spearman"] >= 0.5,
        f"the worst is {worst['method']}, {worst['case']}, {worst['spearman']:.3f}",
    )
    rows = of(report, "groups")
    wrong = [row for row in rows if row["harmful"] >= 0 or row["helpful"] <= 0]
    names = ", ".join(f"{row['method']} ({row['case']})" for row in wrong)
    report.promise(
        "without the 5 % that a method ranks as most harmful the test loss is lower, without the most helpful higher",
        not wrong,
        f"{len(rows) - len(wrong)} of {len(rows)}" + (f"; not by {names}" if wrong else ""),
    )


def plot(points: Points) -> Any:
    """What happened over what was foretold, of single samples."""
    cases = list(dict.fromkeys(case for case, _ in points))
    figure, axes = subplots(len(cases), len(PANELS), figsize=(4 * len(PANELS), 3.2 * len(cases)), squeeze=False)
    for case, row in zip(cases, axes, strict=True):
        for method, axis in zip(PANELS, row, strict=True):
            if (case, method) not in points:
                axis.axis("off")
                continue
            foretold, truth = (1000 * each for each in points[case, method])
            axis.scatter(foretold, truth, s=6, alpha=0.6)
            axis.axline((0, 0), slope=1, color="black", linewidth=0.8)
            axis.set_title(f"{method}, {case}", fontsize=9)
            axis.set(xlabel="foretold, 1/1000", ylabel="change of the test loss, 1/1000")
    figure.tight_layout()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="twice as many samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, tests = (600, 100) if options.full else (300, 50)
    report = Report("left_out", "Does influence foretell what happens when samples are left out?")
    points: Points = {}
    with tempfile.TemporaryDirectory() as folder:
        for epochs in EPOCHS:
            points |= measure(report, trained(Path(folder) / f"{epochs}", samples, tests, epochs))
        for penalty in PENALTIES:
            points |= measure(report, at_optimum(Path(folder) / f"{penalty}", samples, tests, penalty))
    judge(report)
    remarks(report, samples, tests)
    return report.write([table(of(report, "one"), ONE), table(of(report, "groups"), OF_GROUPS)], plot(points))


def remarks(report: Report, samples: int, tests: int) -> None:
    """What a reader of the figures has to know."""
    report.remark(
        f"{samples} samples of Fashion-MNIST at 7x7, the mean loss of {tests} test samples. Epochs: a network of 49, "
        "16 tanh and 10, batches of 30, SGD with momentum 0.9 at 0.01. Optimum: logistic regression, whose Hessian is "
        "positive. Losses are changes, those of groups beside the sum that was foretold"
    )
    report.remark(
        "A foretold change is HYDRA's influence as it is; in-run's over 1 - momentum, which it leaves out; TracIn's "
        "and the inner product times how far a constant gradient would have moved the weights, momentum included; that "
        "of influence functions over the number of samples. At an optimum the inner product is over penalty and "
        "samples, as if nothing had curvature but the penalty"
    )
    report.remark(
        "The damping is the penalty at an optimum, elsewhere one over learning rate times updates over 1 - momentum, "
        "as an end of training at that update is like such a penalty; 0.4 for the solvers there, which outweighs the "
        "Hessian's negative eigenvalues and makes all that they foretell smaller. Arnoldi's method keeps 100 directions"
    )
    report.remark(
        f'"{EXACT}" is the derivative itself: what it lacks is not linear in a sample\'s weight. So it is with '
        "conjugate gradients at an optimum, which agree with the derivative to 0.1 % of each sample's (checked); "
        "leaving out a whole sample takes away its own part of the curvature as well, the more the smaller the penalty "
        "is. LiSSA was asked about the mean only"
    )


if __name__ == "__main__":
    sys.exit(main())
