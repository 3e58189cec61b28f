"""Models that read one sequence and write another."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from metaql import errors
from tests.models.batches import WORDS, named
from tests.models.loop import assert_collected, assert_stepped


def t5():
    configuration = transformers.T5Config(
        vocab_size=WORDS, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=6,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(configuration).double()


def translations(sizes=((5, 6, 4), (5, 6, 4), (4, 4, 4), (1, 3, 2))):
    read = named("words", [(size, length) for size, length, _ in sizes])
    written = named("words", [(size, length) for size, _, length in sizes])
    return [
        (size, {**batch, "labels": other["labels"]}) for (size, batch), (_, other) in zip(read, written, strict=True)
    ]


def of_words(model, batch):
    each = F.cross_entropy(model(**batch).logits.transpose(1, 2), batch["labels"], reduction="none")
    return each.sum(1) / (batch["labels"] != -100).sum(1)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
def test_t5(tmp_path):
    assert_collected(t5(), translations(), tmp_path / "store", of_words)


def test_t5_in_steps(tmp_path):
    """All but the biases of distances, which are the same for all samples."""
    model = t5().eval()
    with pytest.raises(errors.UnsupportedParameterError, match=r"relative_attention_bias.*Leave it out with layers="):
        assert_stepped(model, translations(), tmp_path / "whole", of_words, train=False)
    names = [name for name, _ in model.named_parameters() if "relative_attention_bias" not in name]
    # It normalises in float32 whatever its type.
    assert_stepped(model, translations(), tmp_path / "most", of_words, 1e-6, names, train=False)


class Translator(nn.Module):
    """nn.Transformer with one table of words for both languages."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)
        self.body = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=torch.float64)
        padded = source == 0
        return self.out(self.body(self.words(source), self.words(target), tgt_mask=mask, src_key_padding_mask=padded))


def test_a_transformer_of_torch(tmp_path):
    def losses(model, batch):
        source, target = batch["input_ids"], batch["labels"].clamp(min=0)
        each = F.cross_entropy(model(source, target[:, :-1]).transpose(1, 2), target[:, 1:], reduction="none")
        return each.mean(1)

    batches = translations(((5, 6, 5), (5, 6, 5), (4, 4, 5), (1, 3, 3)))
    assert_collected(Translator().double(), batches, tmp_path / "store", losses)
