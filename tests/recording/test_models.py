"""Kinds of model that other libraries record wrongly or not at all: each exact, whatever way that takes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

SAMPLES, CLASSES, WORDS = 7, 3, 11


def classes():
    return torch.randint(0, CLASSES, (SAMPLES,))


def vectors():
    return torch.randn(SAMPLES, 6, dtype=torch.float64), classes()


def sentences(length=4):
    return torch.randint(0, WORDS, (SAMPLES, length)), classes()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.inner(torch.relu(self.inner(x)))))


class Functional(nn.Module):
    """A weight borrowed without its bias, a raw matrix, a raw vector."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.head(torch.relu(F.linear(x @ self.matrix + self.shift, self.inner.weight)) + self.inner(x))


class SharedWeight(nn.Module):
    """One weight under two modules, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(WORDS, 5), nn.Linear(5, WORDS, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        return self.out(torch.tanh(self.words(x))).mean(1)


class Attention(nn.Module):
    def __init__(self, batch_first, **options):
        super().__init__()
        self.batch_first = batch_first
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

    def forward(self, x):
        h = self.words(x) if self.batch_first else self.words(x).transpose(0, 1)
        return self.head(self.attention(h, h, h)[0].mean(1 if self.batch_first else 0))


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)

    def forward(self, x):
        h = self.words(x)
        return self.head(self.attention(h[:, :2], h[..., :4], h[..., 4:])[0].mean(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8, padding_idx=0), nn.Linear(8, CLASSES)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        padded = x == 0
        padded[:, 0] = False
        return self.head(self.layers(self.words(x), src_key_padding_mask=padded)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(6, 5, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))

    def forward(self, x):
        return self.head(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


class Experts(nn.Module):
    """Each sample goes to one of several experts, so that rows lose their places."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, CLASSES) for _ in range(4))

    def forward(self, x):
        weights = self.gate(x).softmax(-1)
        chosen, out = weights.argmax(-1), x.new_zeros(len(x), CLASSES)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero()[:, 0]
            if len(own):
                out = out.index_add(0, own, expert(x[own]) * weights[own, number : number + 1])
        return out


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        return dy @ weight.t(), x.t() @ dy


class OutOfSight(nn.Module):
    """A weight that no torch function is called with."""

    def __init__(self):
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(6, 5)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(OwnFunction.apply(x, self.weight))


class PartlyOutOfSight(nn.Module):
    """A weight used by a layer and, unseen, by a function of the user's."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)) + OwnFunction.apply(x, self.inner.weight))


class Frames(nn.Module):
    """Pictures of several frames, folded into the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, CLASSES)

    def forward(self, x):
        return self.head(self.conv(x.flatten(0, 1)).flatten(1)).view(len(x), 2, CLASSES).mean(1)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.spare, self.scale = nn.Linear(6, CLASSES), nn.Linear(4, 4), nn.LayerNorm(6)

    def forward(self, x):
        self.scale(x)
        return self.head(x)


class Grown(nn.Module):
    """A frozen layer below, a bias alone above."""

    def __init__(self):
        super().__init__()
        self.frozen, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, CLASSES)
        self.head.weight.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu_(self.frozen(x)))


EXACT = {
    "a module used twice": (Twice, vectors),
    "functional calls and raw parameters": (Functional, vectors),
    "a weight under two modules": (SharedWeight, vectors),
    "tied embedding and output": (TiedEmbedding, lambda: (sentences()[0], torch.randint(0, WORDS, (SAMPLES,)))),
    "attention": (lambda: Attention(True), sentences),
    "attention, time first": (lambda: Attention(False), sentences),
    "attention, as long as the batch": (lambda: Attention(True), lambda: sentences(SAMPLES)),
    "attention, time first, as long as the batch": (lambda: Attention(False), lambda: sentences(SAMPLES)),
    "attention with key and value biases": (lambda: Attention(True, add_bias_kv=True), sentences),
    "cross attention": (CrossAttention, sentences),
    "a transformer encoder with padding": (Encoder, sentences),
    "LSTM": (lambda: Recurrent(nn.LSTM), lambda: (torch.randn(SAMPLES, 4, 6, dtype=torch.float64), classes())),
    "GRU": (lambda: Recurrent(nn.GRU), lambda: (torch.randn(SAMPLES, 4, 6, dtype=torch.float64), classes())),
    "activation checkpointing": (lambda: Checkpointed(False), vectors),
    "frames folded into the batch": (
        Frames,
        lambda: (torch.randn(SAMPLES, 2, 2, 6, 6, dtype=torch.float64), classes()),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.Flatten(), nn.Linear(15, CLASSES)),
        lambda: (torch.randn(SAMPLES, 2, 3, dtype=torch.float64), classes()),
    ),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, CLASSES)),
        vectors,
    ),
    "bilinear and PReLU": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, CLASSES)),
        vectors,
    ),
    "a bag of embeddings": (lambda: nn.Sequential(nn.EmbeddingBag(WORDS, 5), nn.Linear(5, CLASSES)), sentences),
    "unused parameters": (Unused, vectors),
    "frozen parameters": (Grown, vectors),
}

SLOW = {
    "reentrant checkpointing": (lambda: Checkpointed(True), vectors),
    "experts": (Experts, vectors),
    "a function of the user's": (OutOfSight, vectors),
    "a weight partly out of sight": (PartlyOutOfSight, vectors),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact(case, assert_exact):
    model, batch = EXACT[case]
    assert_exact(model().double(), batch(), SAMPLES)


@pytest.mark.parametrize("case", SLOW)
def test_exact_with_a_warning_that_it_is_slow(case, assert_exact):
    model, batch = SLOW[case]
    with pytest.warns(UserWarning, match="one by one, which is exact but slow"):
        assert_exact(model().double(), batch(), SAMPLES)


def test_a_batch_may_be_a_dict(assert_exact):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, CLASSES)

        def forward(self, tokens, mask):
            return {"logits": self.head((self.words(tokens) * mask.unsqueeze(-1)).mean(1))}

    tokens, labels = sentences()
    batch = {"tokens": tokens, "mask": (tokens > 2).double(), "labels": labels}
    assert_exact(Named().double(), batch, SAMPLES)


def test_losses_of_the_users_own(assert_exact):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    batch = (vectors()[0], torch.randn(SAMPLES, dtype=torch.float64))
    assert_exact(model, batch, SAMPLES, losses=lambda model, batch: (model(batch[0]).squeeze(1) - batch[1]).square())


def test_layers_take_their_layout_by_bytes(assert_exact):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 32, 3), nn.Flatten(), nn.Linear(512, CLASSES)
    ).double()  # fmt: skip
    layers = assert_exact(model, (torch.randn(SAMPLES, 1, 6, 6, dtype=torch.float64), classes()), SAMPLES)
    assert [layer.layout for layer in layers.values()] == ["full", "factored", "factored"]
    assert layers["1"].unfold is not None
    assert layers["3"].unfold is None


def test_autocast_is_followed_to_its_own_rounding(assert_exact):
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(model, (torch.randn(SAMPLES, 6), classes()), SAMPLES, tolerance=3e-2)


class SortedByLength(nn.Module):
    """Runs its samples in another order, which the data decides, and puts the results back."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        order = torch.argsort(x[:, 0])
        return self.head(torch.tanh(self.inner(x[order])))[torch.argsort(order)]


class Scaled(nn.Module):
    """A temperature that is a single number."""

    def __init__(self):
        super().__init__()
        self.head, self.scale = nn.Linear(6, CLASSES), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.head(x) * self.scale


class Alias(nn.Module):
    """A parameter that is also reached through a list, where functional calls do not replace it."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, CLASSES))
        self.hidden = [self.matrix]

    def forward(self, x):
        return x @ self.matrix + (x[:, :1] > 1.0) * (x @ self.hidden[0])


def test_rows_that_the_model_reorders(assert_exact):
    """The order differs from batch to batch, and may leave any few samples in their places."""
    model = SortedByLength().double()
    for batch in (vectors() for _ in range(3)):
        ordered = batch[0][torch.argsort(batch[0][:, 0])]
        for inputs in (ordered, batch[0]):
            assert_exact(model, (inputs, batch[1]), SAMPLES)


def test_a_parameter_that_is_one_number(assert_exact):
    assert_exact(Scaled().double(), vectors(), SAMPLES)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
def test_a_parameter_with_a_second_name_out_of_sight(assert_exact):
    assert_exact(Alias().double(), vectors(), SAMPLES)
