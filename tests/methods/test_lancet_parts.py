"""LANCET's parts, each beside a plain second implementation: matching, weights, selection, annotators."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaql.errors import QueryError
from metaql.methods.lancet import opinions, select, weights
from metaql.methods.lancet.annotators import STAY, STRAY
from metaql.methods.lancet.conditional_matching import conditional_feature_matching
from metaql.methods.lancet.matching_network import Networks, matched, replaced, step
from metaql.methods.lancet.networks import dropped
from metaql.methods.lancet.objectives import real_or_made_up
from metaql.methods.lancet.stopping import stop_by


def test_conditional_feature_matching_class_by_class():
    torch.manual_seed(0)
    labelled, unlabelled = torch.randn(7, 3), torch.randn(20, 3)
    labels, predicted = torch.tensor([0, 0, 1, 3, 3, 3, 1]), torch.randint(0, 4, (20,))
    sure = torch.rand(7)
    sure[3:6] = 0
    differences = []
    for each in range(5):
        one, other = (labels == each).nonzero().flatten().tolist(), unlabelled[predicted == each]
        total = sum(float(sure[place]) for place in one)
        if total > 0 and len(other) > 0:
            centre = sum(float(sure[place]) * labelled[place] for place in one) / total
            differences.append((centre - other.mean(0)).abs().mean())
    found = conditional_feature_matching(labelled, labels, sure, unlabelled, predicted, 5)
    torch.testing.assert_close(found, torch.stack(differences).mean())


def test_no_class_on_both_sides_is_no_loss():
    labels, predicted = torch.tensor([0, 0]), torch.tensor([1, 1])
    found = conditional_feature_matching(torch.randn(2, 3), labels, torch.ones(2), torch.randn(2, 3), predicted, 2)
    assert found == 0


def test_real_or_made_up_by_a_class_more():
    torch.manual_seed(0)
    real, made_up = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def last(logits):
        return F.pad(logits, (0, 1)).softmax(1)[:, -1]

    expected = -0.5 * ((1 - last(real)).log().mean() + last(made_up).log().mean())
    torch.testing.assert_close(real_or_made_up(real, made_up), expected)


class OneNetwork(nn.Module):
    """One of ``Networks``' by itself, with a plain loop over the rows."""

    def __init__(self, networks, place):
        super().__init__()
        self.parts = nn.ParameterDict(
            {name: each[place].detach().clone() for name, each in networks.named_parameters()}
        )

    def forward(self, points):
        p = self.parts
        return torch.stack(
            [
                (torch.tanh(x @ p["hidden"] + p["hidden_bias"][0]) @ p["output"])[0]
                + x @ p["linear"][:, 0]
                + p["bias"][0, 0]
                for x in points
            ]
        )


def test_a_step_of_the_matching_network_and_the_weights_that_replace_those_before():
    torch.manual_seed(0)
    networks = Networks(4).double().eval()
    for parameter in networks.parameters():
        nn.init.normal_(parameter, std=0.5)
    count = len(networks.bias)
    unlabelled = torch.randn(count, 6, 4, dtype=torch.float64)
    labelled = torch.randn(count, 6, 4, dtype=torch.float64) + 1
    current = torch.rand(count, 6, dtype=torch.float64)
    singles = [OneNetwork(networks, place) for place in range(count)]
    step(networks, torch.optim.SGD(networks.parameters(), 0.1), unlabelled, labelled, current)
    after = replaced(networks, unlabelled)
    for place, single in enumerate(singles):
        sgd = torch.optim.SGD(single.parameters(), 0.1)
        chance, known = single(unlabelled[place]).sigmoid(), single(labelled[place]).sigmoid()
        loss = (current[place] * -(1 - chance).log()).mean() - known.log().mean()
        loss.backward()
        sgd.step()
        entropy = [max(0.0, -math.log(1 - float(each))) for each in single(unlabelled[place]).sigmoid().detach()]
        mean = sum(entropy) / len(entropy)
        expected = torch.tensor([each / mean for each in entropy], dtype=torch.float64)
        torch.testing.assert_close(after[place], expected)


def ranks(values):
    order = values.argsort().argsort().double()
    return (order - order.mean()) / order.std(correction=0)


@pytest.mark.parametrize(
    "dimensions, labelled, shift, scale",
    [(2, 50, 1.5, 1.0), (8, 50, 1.0, 0.8), (32, 200, 2.0, 1.0), (32, 50, 0.0, 0.6)],
)
def test_weights_rank_points_of_gaussians_as_the_density_ratio_does(dimensions, labelled, shift, scale):
    generator = torch.Generator().manual_seed(dimensions)
    unlabelled = torch.randn(2000, dimensions, generator=generator)
    direction = F.normalize(torch.randn(dimensions, generator=generator), dim=0)
    known = torch.randn(labelled, dimensions, generator=generator) * scale + shift * direction
    truth = unlabelled.square().sum(1) / 2 - ((unlabelled - shift * direction) / scale).square().sum(1) / 2
    found = weights(unlabelled, known)
    assert found.mean() == pytest.approx(1, abs=1e-5)
    assert float((ranks(found) * ranks(truth)).mean()) >= 0.8


def test_weights_repeat_and_leave_random_numbers_alone():
    torch.manual_seed(1)
    unlabelled, labelled = torch.randn(50, 3), torch.randn(9, 3)
    before = torch.random.get_rng_state()
    assert torch.equal(weights(unlabelled, labelled, 2), weights(unlabelled, labelled, 2))
    assert not torch.equal(weights(unlabelled, labelled, 2), weights(unlabelled, labelled, 3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("unlabelled, labelled", [((1, 2), (1, 2)), ((3, 1), (1, 1)), ((1, 5), (40, 5))])
def test_weights_of_hardly_any_points(unlabelled, labelled):
    assert weights(torch.randn(unlabelled), torch.randn(labelled)).isfinite().all()


def test_weights_of_points_that_are_all_the_same():
    assert weights(torch.ones(5, 2), torch.ones(3, 2)).isfinite().all()


@pytest.mark.parametrize(
    "unlabelled, labelled, message",
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), "unlabelled_embedding must be points"),
        (torch.zeros(2, 3), torch.zeros(3), "labelled_embedding must be points"),
        (torch.zeros(2, 3), torch.zeros(2, 4), "3 dimensions, and labelled ones 4"),
        (torch.tensor([[math.nan]]), torch.zeros(2, 1), "1 of 1 rows of unlabelled_embedding contain NaN"),
    ],
)
def test_points_that_are_refused(unlabelled, labelled, message):
    with pytest.raises(QueryError, match=message):
        weights(unlabelled, labelled)


def test_the_loss_nears_two_ln_two_as_labelled_rows_become_like_the_others():
    generator = torch.Generator().manual_seed(0)
    unlabelled = torch.randn(800, 2, generator=generator)
    alike = matched(unlabelled, torch.randn(100, 2, generator=generator))
    apart = matched(unlabelled, torch.randn(100, 2, generator=generator) * 0.2 + 1)
    assert stop_by(alike.loss, 0.5, 100, 2).now
    assert not stop_by(alike.loss, 0.01, 100, 2).now
    assert not stop_by(alike.loss, 0.5, 49, 2).now
    assert not stop_by(apart.loss, 0.5, 100, 2).now


def test_selection_takes_what_shortens_needed_distances_most():
    torch.manual_seed(0)
    points, known, weight = (
        torch.randn(30, 2, dtype=torch.float64),
        torch.randn(3, 2, dtype=torch.float64),
        torch.rand(30),
    )
    expected = []
    while len(expected) < 6:
        totals = {}
        for each in set(range(30)) - set(expected):
            centres = [*known, *(points[place] for place in expected), points[each]]
            nearest = [min(float((row - centre).norm()) for centre in centres) for row in points]
            totals[each] = sum(d / (1 + float(w) / 0.5) for d, w in zip(nearest, weight, strict=True))
        expected.append(min(totals, key=totals.get))
    assert select(points, weight, 6, known).tolist() == expected


def test_selection_of_more_than_there_is():
    assert sorted(select(torch.randn(4, 2), None, 10).tolist()) == [0, 1, 2, 3]
    assert len(select(torch.zeros(0, 2), None, 10)) == 0
    with pytest.raises(QueryError, match="budget must be a whole number"):
        select(torch.randn(4, 2), None, 0)


def test_dropping_keeps_the_mean_and_the_share():
    torch.manual_seed(0)
    values = dropped(torch.ones(100, 1001), 0.25, True)
    assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(values.mean()) == pytest.approx(1, abs=0.01)
    assert dropped(values, 0.25, False) is values


def some_opinions():
    """120 samples of 3 labels, by two good annotators, a poor one, and one who always says 0; and the truth."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (120,), generator=generator)
    said = []
    for right in (0.9, 0.85, 0.5):
        wrong = (truth + torch.randint(1, 3, (120,), generator=generator)) % 3
        said.append(torch.where(torch.rand(120, generator=generator) < right, truth, wrong))
    said.append(torch.zeros_like(truth))
    return torch.arange(120).repeat(4) * 10, torch.arange(4).repeat_interleave(120) + 7, torch.cat(said), truth


def test_opinions_by_loops_over_samples_and_annotators():
    sample, annotator, label, _ = some_opinions()
    said = list(zip((sample // 10).tolist(), (annotator - 7).tolist(), label.tolist(), strict=True))
    chances = [[sum(s == i and b == a for s, _, b in said) / 4 for a in range(3)] for i in range(120)]
    for _ in range(100):
        common = [sum(row[a] for row in chances) / 120 for a in range(3)]
        confusion = [[[STAY if a == b else STRAY / 2 for b in range(3)] for a in range(3)] for _ in range(4)]
        for s, who, b in said:
            for a in range(3):
                confusion[who][a][b] += chances[s][a]
        confusion = [[[value / sum(row) for value in row] for row in one] for one in confusion]
        products = [list(common) for _ in range(120)]
        for s, who, b in said:
            products[s] = [value * confusion[who][a][b] for a, value in enumerate(products[s])]
        chances = [[value / sum(row) for value in row] for row in products]
    found = opinions(sample, annotator, label)
    assert found.label.tolist() == [max(range(3), key=row.__getitem__) for row in chances]
    torch.testing.assert_close(found.confidence, torch.tensor([max(row) for row in chances]), rtol=1e-3, atol=1e-3)


def test_opinions_know_whom_to_trust_and_where_to_ask_again():
    sample, annotator, label, truth = some_opinions()
    found = opinions(sample, annotator, label)
    votes = torch.stack([label.reshape(4, -1).eq(each).sum(0) for each in range(3)]).argmax(0)
    assert (found.label == truth).sum() > (votes == truth).sum()
    assert found.annotator.tolist() == [7, 8, 9, 10]
    assert found.reliability[:2].min() > found.reliability[2:].max()
    confidence = dict(zip(found.sample.tolist(), found.confidence.tolist(), strict=True))
    asked = [confidence[each] for each in found.ask_again.tolist()]
    assert asked == sorted(asked)
    assert 0 < len(asked) < 60


def test_one_opinion_is_the_label_and_not_certain():
    found = opinions(torch.tensor([5, 5]), torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert found.confidence.item() == pytest.approx(0.5, abs=0.01)
    assert found.ask_again.tolist() == [5]


@pytest.mark.parametrize(
    "sample, annotator, label, message",
    [
        ([], [], [], "no opinions"),
        ([1], [1, 2], [1], "one value each"),
        ([1], [1], [-1], "from 0 on, not -1"),
        ([1], [1], [1.5], "must be whole numbers"),
    ],
)
def test_opinions_that_are_refused(sample, annotator, label, message):
    with pytest.raises(QueryError, match=message):
        opinions(*(torch.tensor(each) for each in (sample, annotator, label)))
