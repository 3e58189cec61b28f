"""Encoders of text as transformers has them."""

import pytest
import torch
import transformers

from tests.models.batches import CLASSES, WORDS, named, of_classes, of_tokens
from tests.models.loop import assert_collected, assert_stepped

SIZES = {
    "vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 20, "num_labels": CLASSES, "pad_token_id": 0,
}  # fmt: skip


def bert(model=transformers.BertForSequenceClassification, configuration=transformers.BertConfig, **settings):
    return model(configuration(**SIZES, **settings)).double()


def distilbert():
    configuration = transformers.DistilBertConfig(
        vocab_size=WORDS, dim=8, hidden_dim=12, n_layers=2, n_heads=2, num_labels=CLASSES, max_position_embeddings=20
    )
    return transformers.DistilBertForSequenceClassification(configuration).double()


CLASSIFIERS = {
    "BERT": bert,
    "BERT, plain attention": lambda: bert(attn_implementation="eager"),
    "RoBERTa": lambda: bert(transformers.RobertaForSequenceClassification, transformers.RobertaConfig),
    "DistilBERT": distilbert,
    "ALBERT, one layer for all": lambda: bert(
        transformers.AlbertForSequenceClassification, transformers.AlbertConfig, embedding_size=4
    ),
    "DeBERTa": lambda: bert(
        transformers.DebertaV2ForSequenceClassification,
        transformers.DebertaV2Config,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes(name, tmp_path):
    assert_collected(CLASSIFIERS[name](), named(), tmp_path / "store", of_classes)


@pytest.mark.parametrize(
    "model, labels",
    [(transformers.BertForTokenClassification, "tokens"), (transformers.BertForMaskedLM, "words")],
)
def test_tokens(model, labels, tmp_path):
    """Of masked words the weights of the output are those of the embedding."""
    assert_collected(bert(model), named(labels), tmp_path / "store", of_tokens)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
def test_losses_that_run_the_model_once_for_each_sample(tmp_path):
    """The model's own loss is a mean, so that people ask it for one sample at a time."""

    def alone(model, batch):
        rows = [{key: value[place, None] for key, value in batch.items()} for place in range(len(batch["labels"]))]
        return torch.stack([model(**row).loss for row in rows])

    assert_collected(bert(), named(sizes=((4, 5), (4, 5), (1, 5))), tmp_path / "store", alone)


def test_a_frozen_body(tmp_path):
    model = bert()
    model.bert.requires_grad_(False)
    assert_collected(model, named(), tmp_path / "store", of_classes)
    assert_stepped(model, named(), tmp_path / "steps", of_classes, train=False)


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ALBERT, one layer for all"])
def test_steps(name, tmp_path):
    assert_stepped(CLASSIFIERS[name](), named(), tmp_path / "store", of_classes, train=False)


def test_steps_of_masked_words(tmp_path):
    model = bert(transformers.BertForMaskedLM)
    assert_stepped(model, named("words"), tmp_path / "store", of_tokens, train=False)
