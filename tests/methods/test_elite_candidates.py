"""Which rows are picked to be labelled."""

import pytest
import torch

from metaql.errors import QueryError
from metaql.methods.elite import candidates
from metaql.methods.elite.candidates import POOL


def some_groups():
    """Four groups of ten points, far from each other, and a point that is a little apart from the first group."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(4, 10, 2)).reshape(40, 2)
    return torch.cat([points, torch.tensor([[-1.0, -1.0]])])


def test_every_group_is_spoken_for_before_any_is_twice():
    places = torch.arange(41)
    chosen = candidates(some_groups(), torch.zeros(41), (places >= 20) & (places < 40), torch.ones(41), budget=4)
    assert sorted((chosen // 10).tolist()) == [0, 1, 2, 3]


def test_what_a_label_speaks_for_comes_last():
    points = some_groups()
    chosen = candidates(points, torch.arange(41.0), labelled=points[[3, 13]], budget=2)
    assert sorted((chosen // 10).tolist()) == [2, 3]


def test_rows_in_doubt_count_for_more():
    points, scores = some_groups(), torch.zeros(41)
    pseudo_label = torch.zeros(41, dtype=torch.bool)
    meta_gradient = torch.full((41,), 1.0)
    meta_gradient[20:30] = 1e-6
    assert int(candidates(points, scores, pseudo_label, meta_gradient, points[:1], 1)) // 10 == 2


def test_both_classes_take_turns():
    pseudo_label = torch.arange(41) < 5
    chosen = candidates(some_groups(), torch.zeros(41), pseudo_label, torch.ones(41), budget=12)
    assert int(pseudo_label[chosen].sum()) == 5
    assert pseudo_label[chosen[:10:2]].all()
    assert chosen.unique().numel() == 12


def test_more_than_there_are():
    assert candidates(torch.randn(3, 2), torch.zeros(3), budget=10).sort().values.tolist() == [0, 1, 2]


def test_of_many_rows_some_stand_for_all():
    torch.manual_seed(0)
    points = torch.randn(POOL + 50, 2)
    one, two = (candidates(points, points[:, 0], budget=3) for _ in range(2))
    assert torch.equal(one, two)
    assert len(one) == 3


@pytest.mark.parametrize("budget", [0, -1, 2.5, True])
def test_budgets_that_are_refused(budget):
    with pytest.raises(QueryError, match="budget must be a whole number"):
        candidates(torch.randn(3, 2), torch.zeros(3), budget=budget)


def test_more_than_can_be_compared_is_refused():
    with pytest.raises(QueryError, match=r"budget must be 3,000 at most"):
        candidates(torch.zeros(3001, 1), torch.zeros(3001), budget=3001)
