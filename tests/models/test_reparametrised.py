"""Weights that are made of other parameters, adapters beside frozen weights, and parameters used in unusual ways."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.models.batches import CLASSES, named, of_classes, of_next_words, pictures
from tests.models.loop import assert_collected, assert_stepped
from tests.models.test_bert import bert
from tests.models.test_decoders import gpt2


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


def symmetric():
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


class Spectrum(nn.Module):
    """A filter in the frequencies, kept as its real and imaginary parts."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.real, self.imaginary = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        spectrum = torch.fft.rfft(self.first(x)) * torch.complex(self.real, self.imaginary)
        return self.head(torch.fft.irfft(spectrum, n=8))


class Products(nn.Module):
    """einsum, bilinear forms, a raw matrix, one slope and a temperature."""

    def __init__(self):
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(2, 3, 4))
        self.bilinear, self.slope, self.temperature = nn.Bilinear(4, 4, 3), nn.PReLU(), nn.Parameter(torch.zeros(()))
        self.head = nn.Parameter(torch.randn(4, CLASSES))

    def forward(self, x):
        hidden = torch.einsum("ni,ij->nj", x, self.matrix)
        hidden = self.slope(self.bilinear(hidden, hidden))
        hidden = torch.einsum("ni,aij->naj", hidden, self.stack).sum(1)
        return hidden.mm(self.head) * self.temperature.exp()


class Experts(nn.Module):
    """Each sample goes to two of three experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(8, 3), nn.Linear(8, CLASSES)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(3))

    def forward(self, x):
        shares, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, places = (chosen == number).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * shares[rows, places, None])
        return self.head(out)


MODELS = {
    "weight norm": lambda: weight_norm(nn.Linear(8, 8)),
    "spectral norm": lambda: spectral_norm(nn.Linear(8, 8)),
    "orthogonal": lambda: orthogonal(nn.Linear(8, 8)),
    "symmetric": symmetric,
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_made_of_others(name, tmp_path):
    model = nn.Sequential(MODELS[name](), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    assert_collected(model, pictures((8,)), tmp_path / "store")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_as_it_was(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.utils.weight_norm(nn.Linear(8, 6)), nn.utils.weight_norm(nn.Conv1d(1, 2, 3))
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.second(torch.tanh(self.first(x)).unsqueeze(1)).flatten(1))

    model = Network().double()
    assert_collected(model, pictures((8,)), tmp_path / "store")
    # What the recorder made of the weights is not left behind.
    assert not torch._C._functorch.is_gradtrackingtensor(model.first.weight)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
@pytest.mark.parametrize("model", [Spectrum, Products, Experts])
def test_unusual_uses(model, tmp_path):
    assert_collected(model().double(), pictures((8,), (6, 6, 2, 1)), tmp_path / "store")


def adapted(model, task, targets, **settings):
    configuration = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, task_type=task, init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, configuration).double()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_bert(tmp_path):
    """Only the adapters and the new head train, and only they are recorded."""
    model = adapted(bert(), "SEQ_CLS", ["query", "value"])
    layers = assert_collected(model, named(), tmp_path / "store", of_classes)
    assert all("lora" in name or "classifier" in name for name in layers)
    model.eval()
    assert_stepped(model, named(), tmp_path / "steps", of_classes, train=False)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_of_gpt2(tmp_path):
    model = adapted(gpt2(), "CAUSAL_LM", ["c_attn"], fan_in_fan_out=True)
    assert_collected(model, named("words"), tmp_path / "store", of_next_words)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
def test_adapters_with_a_magnitude(tmp_path):
    model = adapted(bert(), "SEQ_CLS", ["query"], use_dora=True)
    assert_collected(model, named(), tmp_path / "store", of_classes)
