"""Models whose rows do not lie as samples do: graphs joined to one, experts that see some of the samples."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metaql
from metaql import errors
from tests.models.batches import CLASSES
from tests.models.loop import assert_collected
from tests.recording.using import numbers

pytestmark = pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")


class GraphNetwork(nn.Module):
    """Messages along edges, and the sum over each graph's nodes, whose graph ``owner`` names."""

    def __init__(self):
        super().__init__()
        self.nodes, self.messages, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.own = nn.Parameter(torch.tensor(0.1))

    def forward(self, nodes, edges, owner):
        x = torch.relu(self.nodes(nodes))
        x = (1 + self.own) * x + torch.zeros_like(x).index_add(0, edges[1], self.messages(x)[edges[0]])
        return self.head(torch.tanh(x).new_zeros(int(owner.max()) + 1, 6).index_add(0, owner, torch.tanh(x)))


def graph(nodes):
    return numbers(nodes, 4), torch.randint(0, nodes, (2, 2 * nodes))


def joined(graphs):
    """The graphs as one, as libraries batch them, and a class for each."""
    sizes = torch.tensor([len(nodes) for nodes, _ in graphs])
    begin = sizes.cumsum(0) - sizes
    edges = torch.cat([edges + first for (_, edges), first in zip(graphs, begin, strict=True)], dim=1)
    nodes = torch.cat([nodes for nodes, _ in graphs])
    return (nodes, edges, torch.arange(len(graphs)).repeat_interleave(sizes)), torch.arange(len(graphs)) % CLASSES


def classified(model, batch):
    return F.cross_entropy(model(*batch[0]), batch[1], reduction="none")


# As many nodes as three graphs could share evenly; not so; and one graph alone.
@pytest.mark.parametrize("sizes", [(2, 3, 4), (2, 3, 5, 1), (4,)])
def test_graphs(sizes, tmp_path):
    model = GraphNetwork().double()
    graphs = [graph(size) for size in sizes]
    with metaql.Recorder(model, tmp_path / "store", losses=classified, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(range(len(graphs)), joined(graphs))], "train")
    with metaql.connect(tmp_path / "store") as db:
        got = db.sql("SELECT restore(gradient, '*') FROM train ORDER BY sample_id").fetchall()
    for place, each in enumerate(graphs):
        model.zero_grad()
        batch, _ = joined([each])
        classified(model, (batch, torch.tensor([place % CLASSES]))).sum().backward()
        assert got[place][0] == pytest.approx(torch.cat([p.grad.flatten() for p in model.parameters()]).tolist())


def compared(model, batch):
    """The logits of each graph against those of all."""
    logits = model(*batch[0])
    return (logits @ logits.T).logsumexp(1)


def drawn(model, batch):
    return classified(model, batch) * torch.rand(len(batch[1]), dtype=torch.float64)


@pytest.mark.parametrize(
    "losses, message", [(compared, "depends on other samples"), (drawn, "computed again is not its loss")]
)
def test_graphs_without_losses_of_their_own(losses, message, tmp_path):
    data = [(range(3), joined([graph(2), graph(3), graph(4)]))]
    with metaql.Recorder(GraphNetwork().double(), tmp_path / "store", losses=losses) as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match=message):
            recorder.collect(data, "train")


class Experts(nn.Module):
    """Each sample goes to the expert that its gate picks, so an expert may see all of the samples, some, or none."""

    def __init__(self, experts):
        super().__init__()
        self.gate, self.head = nn.Linear(4, len(experts)), nn.Linear(5, CLASSES)
        self.experts = nn.ModuleList(experts)

    def forward(self, x):
        weight, choice = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 5)
        for number, expert in enumerate(self.experts):
            own = (choice == number).nonzero().squeeze(1)
            out = out.index_add(0, own, expert(x[own]) * weight[own, None])
        return self.head(torch.tanh(out))


@pytest.mark.parametrize("bias", [True, False])
def test_experts(bias, tmp_path):
    """The first batch goes to the first expert as a whole, whose layer is kept in factors, and the others do not."""
    model = Experts([nn.Linear(4, 5, bias=bias) for _ in range(3)]).double()
    with torch.no_grad():
        model.gate.weight.copy_(torch.eye(3, 4))
        model.gate.bias.zero_()
    inputs = [numbers(samples, 4) for samples in (4, 4, 5, 1)]
    inputs[0][:, 0] = 9.0
    batches = [(len(x), (x, torch.arange(len(x)) % CLASSES)) for x in inputs]
    layers = assert_collected(model, batches, tmp_path / "store")
    assert layers["experts.0"].layout == "factored"


class Tables(nn.Module):
    """Words looked up in a table all at once, or of those of some samples alone."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 4), nn.Linear(4, CLASSES)

    def forward(self, words):
        chosen = words[:, 0] > 0
        rows = self.table(words[chosen])
        return self.head(torch.tanh(rows.new_zeros(*words.shape, 4).index_put((chosen,), rows)).mean(1))


def test_a_table_of_some_samples(tmp_path):
    words = [torch.randint(1, 30, (samples, 3)) for samples in (4, 4, 5)]
    words[1][2, 0] = 0
    batches = [(len(each), (each, torch.arange(len(each)) % CLASSES)) for each in words]
    assert assert_collected(Tables().double(), batches, tmp_path / "store")["table"].layout == "factored"
