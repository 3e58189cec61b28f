"""How well does summed influence foretell retraining? The linear datamodelling score (Park et al., TRAK, 2023).

A network is trained on random halves of the training set, several times each, and its losses on test samples are taken.
A method's influence of every training sample on every test sample's loss, of one network trained on all of them, is
added up over each half; the score is the rank correlation, over the halves, of these sums with the losses that came
out (which fall where influence is positive), its mean over the test samples. 1 is a perfect forecast, 0 none; the
noise of training sets a limit below 1, which is shown: the forecast of the losses by those of trainings with other
seeds. Several networks are asked, trained with seeds of their own, about the same retrained halves.

Two tasks, one of them trained for a short and for a longer time, since a gradient's inner product means less the nearer
the network is to a minimum. The methods here are SQL over one recorded run. Other libraries are asked about the same
weights, training and test samples, each in a process and an environment of its own: kronfluence's EK-FAC, dattri's
TracIn and TRAK. One thread. Exits with 1 when a promise is missed.

    python -m bench.lds
    python -m bench.lds --full                   # twice as many samples, test samples and trainings of each half
    python -m bench.lds --environments DIR       # where to make the environments; .peers by default
    python -m bench.lds --peers kronfluence      # some of the other libraries; '' for none
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from scipy.stats import t
from torch import Tensor

from bench.lds_scores import EKFAC, METHODS, PLAIN, TRACIN, Score, correlation, forecast, mean, of_peer, of_store
from bench.lds_tasks import Task, halves, record, retrained, tasks
from bench.peers.dattri import TRACIN as DATTRI_TRACIN
from bench.peers.kronfluence import OWN_DAMPING, SAME_DAMPING
from bench.peers.run import ROOT, WayError
from bench.peers.trained import METHODS as PEERS
from bench.peers.trained import Trained
from bench.peers.trak import FEW_PROJECTED
from bench.report import Report, require, subplots, table

RANDOM, LIMIT = "at random", "other seeds of the same halves"
COLUMNS = {
    "method": "method",
    "score": "score",
    "spread": "deviation over networks",
    "error": "standard error over halves",
    "seconds": "query, s",
}
# How far behind a score may be and still be called no worse, however much it varies.
MARGIN = 0.02


def measure(report: Report, task: Task, folder: Path, peers: dict[str, tuple[Path, float]]) -> None:
    """Adds the rows of one task; ``peers`` are packages with where their environments are, and a limit in seconds."""
    chosen = halves(task)
    losses = retrained(chosen, task)
    mean_losses = losses.mean(0)
    print(f"{task.name}: mean loss after retraining {float(losses.mean()):.3f}", flush=True)
    runs = [record(folder / f"{seed}", task, seed) for seed in range(task.asked)]
    trainings = [one for one, _ in runs]
    about = {"task": task.name, "accuracy": statistics.mean(reached for _, reached in runs)}
    answers = [of_store(folder / f"{seed}", one) for seed, one in enumerate(trainings)]
    for method in METHODS:
        scores = [forecast(chosen, each[method][0], mean_losses) for each in answers]
        seconds = statistics.median(each[method][1] for each in answers)
        report.add(**about, method=method, **_summary(scores), seconds=seconds)
    for package, (environments, limit) in peers.items():
        for row in _of_peer(package, trainings, environments, limit, chosen, mean_losses):
            report.add(**about, **row)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(task.samples, task.tests, generator=generator, dtype=torch.float64)
    random = forecast(chosen, noise, mean_losses)
    require(abs(random.value) <= 5 * random.error, f"random influence foretells retraining: {random.value:.3f}")
    report.add(**about, method=RANDOM, score=random.value, error=random.error)
    limit_of = correlation(losses[::2].mean(0), losses[1::2].mean(0))
    report.add(**about, method=LIMIT, score=limit_of.value, error=limit_of.error)


def _of_peer(
    package: str, trainings: list[Trained], environments: Path, limit: float, chosen: Tensor, losses: Tensor
) -> list[dict[str, Any]]:
    try:
        found = of_peer(package, trainings, environments, limit)
    except WayError as failure:
        return [{"method": package, "package": package, "failure": str(failure)}]
    return [
        {"method": method, "package": package, **_summary([forecast(chosen, each[method], losses) for each in found])}
        for method in found[0]
    ]


def _summary(scores: list[Score]) -> dict[str, Any]:
    """The mean over the networks, its jackknife error over the halves, and the deviation from network to network."""
    values, together = [one.value for one in scores], mean(scores)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"score": together.value, "error": together.error, "spread": spread, "scores": values}


def judge(report: Report, peers: list[str]) -> None:
    """The promises."""
    names = list(dict.fromkeys(row["task"] for row in report.rows))
    found = {(row["task"], row["method"]): row for row in report.rows}
    pairs = {name: (found[name, EKFAC]["score"], found[name, PLAIN]["score"]) for name in names}
    report.promise(
        "EK-FAC foretells retraining better than inner products at the same checkpoint",
        all(one > other for one, other in pairs.values()),
        "; ".join(f"{name}: {one:.3f} and {other:.3f}" for name, (one, other) in pairs.items()),
    )
    worst = min((row for row in report.rows if row["method"] in METHODS), key=lambda row: row["score"] / row["error"])
    report.promise(
        "every method here foretells better than chance, by three standard errors",
        worst["score"] > 3 * worst["error"],
        f"the least certain is {worst['method']}, {worst['task']}, {worst['score']:.3f} ± {worst['error']:.3f}",
    )
    for name in names:
        if "kronfluence" in peers:
            for other in (SAME_DAMPING, OWN_DAMPING):
                _no_worse(report, name, found[name, EKFAC], found.get((name, other)), other)
        if "dattri" in peers:
            _the_same(report, name, found[name, TRACIN], found.get((name, DATTRI_TRACIN)))


def _no_worse(report: Report, task: str, own: dict[str, Any], other: dict[str, Any] | None, method: str) -> None:
    text = (
        f"{task}: EK-FAC here no worse than {method}: the 95 % interval of the difference over the networks reaches 0, "
        f"and it is not behind by more than {MARGIN}"
    )
    if other is None:
        report.promise(text, False, "kronfluence gave no scores")
        return
    differences = [one - two for one, two in zip(own["scores"], other["scores"], strict=True)]
    difference = statistics.mean(differences)
    reach = interval(differences)
    report.promise(
        text,
        difference + reach >= 0 and difference >= -MARGIN,
        f"{own['score']:.4f} and {other['score']:.4f}, difference {difference:+.4f} ± {reach:.4f}",
    )


def interval(values: list[float]) -> float:
    """How far the 95 % interval of the mean reaches to both sides (Student's)."""
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def _the_same(report: Report, task: str, own: dict[str, Any], other: dict[str, Any] | None) -> None:
    text = f"{task}: TracIn here and dattri's, of the same checkpoints, have the same scores but for 0.001"
    if other is None:
        report.promise(text, False, "dattri gave no scores")
        return
    difference = max(abs(one - two) for one, two in zip(own["scores"], other["scores"], strict=True))
    report.promise(text, difference <= 1e-3, f"at most {difference:.1e} apart")


def page(report: Report) -> list[str]:
    """A table for each task, and what failed."""
    tables = []
    for name in dict.fromkeys(row["task"] for row in report.rows):
        rows = [row for row in report.rows if row["task"] == name and "failure" not in row]
        tables.append(f"**{name}**, test accuracy {rows[0]['accuracy']:.2f}\n\n{table(rows, COLUMNS)}")
    failed = [
        f"- {row['method']} failed on {row['task']}: `{row['failure']}`" for row in report.rows if "failure" in row
    ]
    return [*tables, *(["\n".join(failed)] if failed else [])]


def plot(report: Report) -> Any:
    """The mean scores as bars, each network's as a dot, by task."""
    names = list(dict.fromkeys(row["task"] for row in report.rows))
    figure, axes = subplots(1, len(names), figsize=(4.5 * len(names) + 2, 5), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = [row for row in report.rows if row["task"] == name and "failure" not in row]
        colours = ["C1" if "package" in row else "C0" if row["method"] in METHODS else "0.7" for row in rows]
        axis.barh([row["method"] for row in rows], [row["score"] for row in rows], color=colours, alpha=0.7)
        for row in rows:
            axis.plot(row.get("scores", []), [row["method"]] * len(row.get("scores", [])), "k.", markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("linear datamodelling score")
    axes[0][0].invert_yaxis()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    options = _options()
    torch.set_num_threads(1)
    peers = {name: (options.environments.resolve(), options.limit) for name in options.peers.split(",") if name}
    report = Report("lds", "How well does summed influence foretell retraining?")
    chosen = tasks(options.full)
    for task in chosen:
        with tempfile.TemporaryDirectory() as folder:
            measure(report, task, Path(folder), peers)
    judge(report, list(peers))
    for text in _remarks(chosen):
        report.remark(text)
    return report.write(page(report), plot(report))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one library and task")
    parser.add_argument("--peers", default=",".join(PEERS), help="other libraries, separated by commas")
    return parser.parse_args()


def _remarks(chosen: list[Task]) -> list[str]:
    sizes = "; ".join(
        f"{task.name}: {task.samples} samples, {task.tests} test samples, {task.halves} halves trained on "
        f"{task.times} times each, {task.asked} networks asked"
        for task in chosen
    )
    return [
        f"{sizes}. MNIST at 14x14 with a network of 196, 64 ReLU and 10. SGD with momentum 0.9, batches of 32, rate "
        f"{chosen[0].training.rate}; four checkpoints. Dampings are those of precondition by default",
        "kronfluence: the true Fisher matrix with labels drawn at random, as here, but other ones, so that scores "
        "differ by chance. Its own damping is 1e-8, the same one is a tenth of the mean eigenvalue",
        "dattri: TracIn in full, with the same checkpoints and learning rates",
        f"TRAK: the checkpoints that TracIn has, in place of the many networks of its paper; projected to "
        f"{FEW_PROJECTED} numbers. It foretells the margin, which is a monotone function of the loss",
        f'"{LIMIT}": the mean losses of half of the trainings beside those of the other half. A forecast of the mean '
        "of all can do better than that, for their mean is less noisy",
        "Dots and the deviation are of networks that were trained on all samples with other seeds; the standard error "
        "is that of other halves (jackknife). Test samples stay the same",
    ]


if __name__ == "__main__":
    sys.exit(main())
