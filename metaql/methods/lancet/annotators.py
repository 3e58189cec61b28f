"""Several annotators' opinions on the same samples, as one label each and how sure it is (Dawid and Skene 1979).

Expectation maximisation: given how likely each label of each sample is, count how often each annotator says b where it
is a; given that, and how common each label is, say how likely each label of each sample is. It starts from the votes.

An annotator's counts start with ``STAY`` opinions that are right and ``STRAY`` that are wrong. Without them one with
two opinions would be infallible or worthless.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.errors import QueryError

ROUNDS, CHANGE = 100, 1e-6
STAY, STRAY = 2.0, 0.2
# An opinion more pays where the label is less sure than this.
UNSURE = 0.8


@dataclass(frozen=True)
class Opinions:
    """What annotators say taken together, for each sample that somebody has an opinion on, in order.

    ``sample`` int64 [m], ``label`` int64 [m], and ``confidence`` float32 [m], how likely that label is. ``annotator``
    int64 [k] with ``reliability`` float32 [k]: how often each is expected to be right. ``ask_again`` int64: samples on
    which another opinion pays most, the least sure first.
    """

    sample: Tensor
    label: Tensor
    confidence: Tensor
    annotator: Tensor
    reliability: Tensor
    ask_again: Tensor


def opinions(sample: Tensor, annotator: Tensor, label: Tensor) -> Opinions:
    """Puts opinions together: int64 [o] each, one entry an opinion: ids of samples and annotators, labels from 0.

    Of several opinions of an annotator on a sample each counts. QueryError for no opinions, lengths that differ and
    labels below 0.
    """
    _require_opinions(sample, annotator, label)
    samples, of_sample = sample.unique(return_inverse=True)
    annotators, of_annotator = annotator.unique(return_inverse=True)
    labels, of_label = label.unique(return_inverse=True)
    chances = _votes(of_sample, of_label, len(samples), len(labels))
    for _ in range(ROUNDS):
        confusion = _confusion(chances, of_sample, of_annotator, of_label, len(annotators))
        before, chances = chances, _chances(chances.mean(0), confusion, of_sample, of_annotator, of_label)
        if float((chances - before).abs().max()) < CHANGE:
            break
    confidence, place = chances.max(1)
    reliability = (confusion.diagonal(dim1=1, dim2=2) * chances.mean(0)).sum(1)
    order = confidence.argsort(stable=True)
    again = order[confidence[order] < UNSURE]
    return Opinions(samples, labels[place], confidence.float(), annotators, reliability.float(), samples[again])


def _votes(of_sample: Tensor, of_label: Tensor, samples: int, labels: int) -> Tensor:
    votes = torch.zeros(samples, labels, dtype=torch.float64)
    votes.index_put_((of_sample, of_label), torch.ones(1, dtype=torch.float64), accumulate=True)
    return votes / votes.sum(1, keepdim=True)


def _confusion(chances: Tensor, of_sample: Tensor, of_annotator: Tensor, of_label: Tensor, annotators: int) -> Tensor:
    """[annotators, true label, said label], rows that sum to 1."""
    labels = chances.shape[1]
    start = torch.full((labels, labels), STRAY / max(1, labels - 1), dtype=torch.float64).fill_diagonal_(STAY)
    counts = start.repeat(annotators, 1)
    # By said label first, since the chances of all true labels are added at once.
    counts.index_add_(0, of_annotator * labels + of_label, chances[of_sample])
    by_truth = counts.reshape(annotators, labels, labels).transpose(1, 2)
    return by_truth / by_truth.sum(2, keepdim=True)


def _chances(common: Tensor, confusion: Tensor, of_sample: Tensor, of_annotator: Tensor, of_label: Tensor) -> Tensor:
    """[samples, labels]: how likely each label is, by what was said."""
    samples = int(of_sample.max()) + 1
    logarithms = common.clamp(min=torch.finfo(torch.float64).tiny).log().expand(samples, -1).clone()
    logarithms.index_add_(0, of_sample, confusion[of_annotator, :, of_label].log())
    return logarithms.softmax(1)


def _require_opinions(sample: Tensor, annotator: Tensor, label: Tensor) -> None:
    if sample.ndim != 1 or sample.shape != annotator.shape or sample.shape != label.shape:
        raise QueryError("sample, annotator and label must have one value each for every opinion")
    if len(sample) == 0:
        raise QueryError("there are no opinions: give one at least")
    if any(each.is_floating_point() or each.dtype == torch.bool for each in (sample, annotator, label)):
        raise QueryError("sample, annotator and label must be whole numbers")
    if (label < 0).any():
        raise QueryError(f"labels must be whole numbers from 0 on, not {int(label.min())}: leave out unknown ones")
