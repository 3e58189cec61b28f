"""Language models that go from left to right, of transformers."""

import warnings

import pytest
import transformers

from tests.models.batches import CLASSES, WORDS, named, of_classes, of_next_words
from tests.models.loop import assert_collected, assert_stepped

LLAMA = {
    "vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2, "max_position_embeddings": 32, "num_labels": CLASSES, "pad_token_id": 0,
}  # fmt: skip


def gpt2(model=transformers.GPT2LMHeadModel):
    configuration = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return model(configuration).double()


def llama(model=transformers.LlamaForCausalLM, configuration=transformers.LlamaConfig, **settings):
    return model(configuration(**LLAMA, **settings)).double()


WRITERS = {
    "GPT-2, tied": gpt2,
    "Llama": llama,
    "Qwen 3, tied": lambda: llama(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, tie_word_embeddings=True),
    "Mixtral, with experts": lambda: llama(
        transformers.MixtralForCausalLM, transformers.MixtralConfig, num_local_experts=3, experts_implementation="eager"
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_next_words(name, tmp_path):
    if name.startswith("Mixtral"):
        # Which words go to an expert depends on the data.
        warnings.filterwarnings("ignore", "Recorded by running samples one by one")
    # These normalise in float32 whatever the model's type, so that rounding may differ from batch to batch.
    tolerance = 1e-9 if name.startswith("GPT") else 1e-6
    assert_collected(WRITERS[name](), named("words"), tmp_path / "store", of_next_words, tolerance=tolerance)


@pytest.mark.parametrize("left", [False, True])
def test_classes_by_the_last_word(left, tmp_path):
    model = gpt2(transformers.GPT2ForSequenceClassification)
    assert_collected(model, named(left=left), tmp_path / "store", of_classes)


def test_classes_by_llama(tmp_path):
    model = llama(transformers.LlamaForSequenceClassification)
    assert_collected(model, named(), tmp_path / "store", of_classes, tolerance=1e-6)


@pytest.mark.parametrize("name", ["GPT-2, tied", "Llama"])
def test_steps(name, tmp_path):
    tolerance = 1e-9 if name.startswith("GPT") else 1e-6
    assert_stepped(WRITERS[name](), named("words"), tmp_path / "store", of_next_words, tolerance, train=False)
