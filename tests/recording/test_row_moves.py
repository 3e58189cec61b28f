"""Models that put samples elsewhere on the way, in other places for each batch; and that seem to."""

import collections
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from metaql import errors
from metaql.storage.recording import sample_gradients
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.sample_gradients import SampleGradients
from tests.recording.reference import assert_close, by_loop, split_by_parameter

SAMPLES, CLASSES = 6, 3


class Moved(nn.Module):
    """Runs its samples in the order that ``order(inputs)`` gives, and puts the results back."""

    def __init__(self, order):
        super().__init__()
        # Whole gradients of so small a layer take less than its factors, so any batch can be kept.
        self.inner, self.head = nn.Linear(1, 3), nn.Linear(12, CLASSES)
        self.order = order

    def forward(self, x):
        there, back = self.order(x)
        return self.head(back(torch.tanh(self.inner(there(x).unsqueeze(-1))).flatten(1)))


def indexed(order):
    """Moves by an index, a tensor or what Python takes for one."""

    def both(x):
        index = order(x)
        inverse = np.argsort(index) if not isinstance(index, torch.Tensor) else torch.argsort(index)
        inverse = inverse.tolist() if isinstance(index, list) else inverse
        return lambda rows: rows[index], lambda rows: rows[inverse]

    return both


def sorted_by_python(x):
    keys = x[:, 0].tolist()
    return sorted(range(len(keys)), key=keys.__getitem__)


def one_by_one(x):
    order = sorted_by_python(x)

    def there(rows):
        pieces = rows.unbind(0)
        return torch.stack([pieces[each] for each in order])

    def back(rows):
        pieces = list(rows)
        return torch.stack([pieces[order.index(each)] for each in range(len(order))])

    return there, back


class OutOfSight(torch.autograd.Function):
    """Takes rows apart where no function of torch is seen."""

    @staticmethod
    def forward(context, rows):
        return tuple(torch.from_numpy(row.copy()) for row in rows.detach().numpy())

    @staticmethod
    def backward(context, *gradients):
        return torch.stack(gradients)


def taken_apart_out_of_sight(x):
    order = sorted_by_python(x)
    inverse = [order.index(each) for each in range(len(order))]

    def moved(places):
        def both(rows):
            pieces = OutOfSight.apply(rows) if rows.requires_grad else rows
            return torch.stack([pieces[each] for each in places])

        return both

    return moved(order), moved(inverse)


def put_into_place(x):
    order = sorted_by_python(x)

    def back(rows):
        pieces, whole = list(rows), torch.zeros_like(rows)
        for place in range(len(order)):
            whole[place] = pieces[order.index(place)]
        return whole

    return (lambda rows: rows[order]), back


def turned_round(x):
    """Python looks at a value, and turns the batch round if it is large."""
    turn = bool(x[0, 0] > x[-1, 0])
    return (lambda rows: rows.flip(0) if turn else rows,) * 2


def swapped_halves(x):
    middle = len(x) // 2 if x[0, 0].item() > x[-1, 0].item() else 0
    return (lambda rows: torch.cat([rows[middle:], rows[:middle]]),) * 2


ORDERS = {
    "sorted": indexed(lambda x: x[:, 0].argsort()),
    "sorted by Python": indexed(sorted_by_python),
    "sorted by numpy": indexed(lambda x: np.argsort(x[:, 0].numpy())),
    "one by one": one_by_one,
    "taken apart out of sight": taken_apart_out_of_sight,
    "put into place": put_into_place,
    "turned round": turned_round,
    "swapped halves": swapped_halves,
    "at random": indexed(lambda x: torch.randperm(len(x))),
}


class Packed(nn.Module):
    """Sequences of several lengths as rows of one tensor, in an order that depends on the lengths."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(1, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        lengths = (x > -1).sum(1).clamp(min=1)
        packed = pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=torch.tanh(self.inner(packed.data)))
        return self.head(pad_packed_sequence(packed, batch_first=True)[0].sum(1))


class Constant(nn.Module):
    """Indices that no data goes into, a decision that is the same for all batches, and a table looked up by data."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.register_buffer("table", torch.linspace(0, 1, 7, dtype=torch.float64))

    def forward(self, x):
        if (x.abs() < 100).all():
            x = x[:, torch.arange(4).flip(0)].gather(1, torch.tril_indices(4, 4)[:1, :4].expand(len(x), -1))
        x = x + self.table[(x > 0).sum(1)][:, None]
        first, second = self.inner(x).split([2, 3], dim=-1)
        return self.head(torch.tanh(torch.cat([second, first], -1)))


def batches():
    """The first in order, so that nothing moves there."""
    for number in range(4):
        inputs = torch.randn(SAMPLES, 4, dtype=torch.float64)
        yield inputs[inputs[:, 0].argsort()] if number == 0 else inputs, torch.arange(SAMPLES) % CLASSES


def assert_exact_in_all_batches(model):
    model = model.double().eval()
    source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
    for batch in batches():
        blocks = source.of(batch, np.arange(SAMPLES)).blocks
        assert_close(split_by_parameter(source.layers, blocks), by_loop(model, batch, SAMPLES), 1e-9)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_another_order_for_each_batch(order):
    assert_exact_in_all_batches(Moved(ORDERS[order]))


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
def test_rows_packed_by_length():
    assert_exact_in_all_batches(Packed())


def test_what_holds_for_all_batches_is_examined_once(monkeypatch):
    examined = []
    examine = SampleGradients._examine
    monkeypatch.setattr(SampleGradients, "_examine", lambda self, run: examined.append(run) or examine(self, run))
    looked = []
    owned = sample_gradients.is_owned
    monkeypatch.setattr(sample_gradients, "is_owned", lambda *given: looked.append(given) or owned(*given))
    assert_exact_in_all_batches(Constant())
    assert len(examined) == 1
    assert len(looked) == math.floor(math.log2(len(list(batches()))))


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_losses_that_compare_samples_in_later_batches_only(batch):
    """As contrastive losses do where classes come twice; refused in one of the next batches that are looked at."""
    data = [(torch.randn(4, 4, dtype=torch.float64), torch.arange(4)) for _ in range(8)]
    for _, classes in data[batch - 1 :]:
        classes.zero_()

    def losses(model, batch):
        points = torch.tanh(model(batch[0]))
        alike = (batch[1][:, None] == batch[1]) & ~torch.eye(len(points), dtype=torch.bool)
        return points.square().sum(1) - (points @ points.T * alike).sum(1)

    model = nn.Linear(4, 3).double()
    source = SampleGradients(ModelLosses(model, losses), dict(model.named_parameters()), "float64")
    with pytest.raises(errors.ModelStateError, match="not its loss within the batch"):
        collections.deque(source.of(each, np.arange(4)) for each in data)


def test_a_few_samples_that_trade_places_are_examined_again(monkeypatch):
    """Where an index from the data may move rows, each row is compared with its sample's share of the loss."""
    examined = []
    examine = SampleGradients._examine
    monkeypatch.setattr(SampleGradients, "_examine", lambda self, run: examined.append(run) or examine(self, run))
    model = Moved(ORDERS["sorted"]).double()
    source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
    inputs = torch.randn(64, 4, dtype=torch.float64)
    inputs = inputs[inputs[:, 0].argsort()]
    targets = torch.arange(64) % CLASSES
    source.of((inputs, targets), np.arange(64))
    source.of((inputs.clone(), targets), np.arange(64))
    assert len(examined) == 1
    inputs[[20, 21]] = inputs[[21, 20]]
    blocks = source.of((inputs, targets), np.arange(64)).blocks
    assert len(examined) == 2
    assert_close(split_by_parameter(source.layers, blocks), by_loop(model, (inputs, targets), 64), 1e-9)
