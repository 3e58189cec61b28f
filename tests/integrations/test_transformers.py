"""The callback for transformers: every gradient is that sample's own, and the training never notices."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import metaql
from metaql import errors
from metaql.integrations.transformers import RecorderCallback
from tests.integrations.stores import assert_gradients, assert_same_weights, checkpoints, recorded

# Which of a model's parameters are recorded slowly is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Recorded by running samples one by one:UserWarning")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16, "bos_token_id": 0}


class Sentences(Dataset):
    """Sentences of 3 to 8 tokens, each with what ``label`` makes of it and a column that no model takes."""

    def __init__(self, count, label, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
        self.rows = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
        self.label = label

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.label(self.rows[index]), "note": f"n{index}"}


def one_class(row):
    return sum(row) % 3


def next_tokens(row):
    return [-100, *row[1:-1], -100] if len(row) > 4 else row


def tags(row):
    return [-100 if token % 4 == 0 else token % 3 for token in row]


def score(row):
    return sum(row) / 100


def several(row):
    return [float(sum(row) % 2), float(len(row) % 2), float(row[0] % 2)]


def padded(features):
    """To the longest of the batch."""
    longest = max(len(each["input_ids"]) for each in features)

    def fill(row, value):
        return list(row) + [value] * (longest - len(row))

    tokens = [each["input_ids"] for each in features]
    labels = [each["labels"] for each in features]
    if isinstance(labels[0], list) and isinstance(labels[0][0], int):
        labels = [fill(each, -100) for each in labels]
    return {
        "input_ids": torch.tensor([fill(each, 0) for each in tokens]),
        "attention_mask": torch.tensor([fill([1] * len(each), 0) for each in tokens]),
        "labels": torch.tensor(labels),
    }


def classifier(**config):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL, **{"num_labels": 3, **config}))


def language_model(**config):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT, eos_token_id=1, **config))


def encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.fixture
def arguments(tmp_path):
    """Makes arguments for two epochs of three steps on the CPU, which report to nobody."""

    def make(**others):
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        usual = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "no", "learning_rate": 0.01}
        return TrainingArguments(str(tmp_path / "out"), **{**quiet, **usual, **others})

    return make


def trained(model, args, callback=None, train=None, collator=padded, **others):
    """A trainer after its training on 12 sentences."""
    train = Sentences(12, one_class) if train is None else train
    callbacks = [] if callback is None else [callback]
    trainer = Trainer(model, args, data_collator=collator, train_dataset=train, callbacks=callbacks, **others)
    trainer.train()
    return trainer


def own_loss(dataset, collator=padded):
    """The model's own .loss for one sample alone."""

    def loss(model, sample):
        item = {key: value for key, value in dataset[sample].items() if key != "note"}
        return model(**collator([item])).loss

    return loss


@pytest.mark.parametrize(
    "model, label",
    [
        (classifier, one_class),
        (lambda: classifier(num_labels=1), score),
        (lambda: classifier(problem_type="multi_label_classification"), several),
        (lambda: BertForTokenClassification(BertConfig(**SMALL, num_labels=3)), tags),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), next_tokens),
        (language_model, next_tokens),
        (encoder_decoder, next_tokens),
    ],
    ids=["classes", "regression", "multi-label", "token classes", "masked", "causal", "encoder-decoder"],
)
def test_each_sample_has_the_gradient_of_the_models_own_loss(model, label, arguments, tmp_path):
    train, valid = Sentences(12, label), Sentences(5, label, seed=1)
    trainer = trained(model(), arguments(), RecorderCallback(tmp_path / "store"), train, eval_dataset=valid)
    got = recorded(tmp_path / "store")
    assert set(got) == {("train", 1), ("validation", 1)}
    assert_gradients(got["train", 1], own_loss(train), trainer.model, 12)
    assert_gradients(got["validation", 1], own_loss(valid), trainer.model, 5)


@pytest.mark.parametrize(
    "others",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_accumulation_steps": 2},
        {"remove_unused_columns": False},
        {"dataloader_num_workers": 1},
        {"use_cache": True},
    ],
    ids=lambda others: next(iter(others)),
)
def test_ids_and_gradients_hold_whatever_the_trainer_does(others, arguments, tmp_path):
    train = Sentences(12, one_class)
    trainer = trained(classifier(), arguments(**others), RecorderCallback(tmp_path / "store"), train)
    assert_gradients(recorded(tmp_path / "store")["train", 1], own_loss(train), trainer.model, 12)
    assert trainer.model.config.use_cache == others.get("use_cache", False)


@pytest.mark.parametrize("model, label", [(classifier, one_class), (language_model, next_tokens)])
def test_label_smoothing_is_in_the_losses(model, label, arguments, tmp_path):
    train = Sentences(12, label)
    args = arguments(label_smoothing_factor=0.2)
    trainer = trained(model(), args, RecorderCallback(tmp_path / "store"), train)

    def smoothed(model, sample):
        return trainer.compute_loss(model, padded([train[sample]]))

    assert_gradients(recorded(tmp_path / "store")["train", 1], smoothed, trainer.model, 12)


def weighted(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 5.0, 2.0]), reduction="sum")


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.loss + outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_activation_checkpointing(arguments, tmp_path):
    model, train = language_model(), Sentences(12, next_tokens)
    model.activation_checkpointing_enable()
    trainer = trained(model, arguments(), RecorderCallback(tmp_path / "store"), train)
    assert model.transformer.gradient_checkpointing
    assert_gradients(recorded(tmp_path / "store")["train", 1], own_loss(train), trainer.model, 12)


def test_a_loss_of_the_users_own_is_refused_before_training(arguments, tmp_path):
    callback = RecorderCallback(tmp_path / "store")
    with pytest.raises(errors.RecordingError, match="Pass losses="):
        trained(classifier(), arguments(), callback, compute_loss_func=weighted)
    trainer = OwnLoss(classifier(), arguments(), padded, Sentences(12, one_class), callbacks=[callback])
    with pytest.raises(errors.RecordingError, match=r"BertForSequenceClassification is trained with.*Pass losses="):
        trainer.train()
    assert trainer.state.global_step == 0


def test_losses_of_the_users_own(arguments, tmp_path):
    def losses(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        weights = torch.tensor([1.0, 5.0, 2.0])
        return nn.functional.cross_entropy(logits, batch["labels"], weight=weights, reduction="none")

    train = Sentences(12, one_class)
    callback = RecorderCallback(tmp_path / "store", losses=losses, layers="classifier", dtype="float64")
    trainer = trained(classifier(), arguments(), callback, train, compute_loss_func=weighted)
    trainer.model.bert.requires_grad_(False)
    got = recorded(tmp_path / "store")["train", 1]
    assert_gradients(got, lambda model, sample: losses(model, padded([train[sample]])).sum(), trainer.model, 12)


@pytest.mark.parametrize(
    "when, others",
    [
        ("end", {}),
        ("save", {"gradient_accumulation_steps": 3}),
        ("epoch", {"train_sampling_strategy": "group_by_length"}),
        ("epoch", {"bf16": True}),
    ],
)
def test_the_training_does_not_notice(when, others, arguments, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2} if when == "save" else {}
    draws, models = [], []
    for callback in (None, RecorderCallback(tmp_path / "store", layers="classifier", when=when)):
        models.append(trained(classifier(), arguments(**others, **saving), callback).model)
        draws.append((torch.rand(1), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert_same_weights(*models)
    assert {module.training for module in models[1].modules()} == {True}


class Masking:
    """A collator that masks tokens by random numbers, its own or torch's."""

    def __init__(self, own):
        self.generator = torch.Generator().manual_seed(1) if own else None

    def __call__(self, features):
        batch = padded(features)
        batch["labels"] = batch["input_ids"].clone()
        chosen = torch.rand(batch["labels"].shape, generator=self.generator) < 0.4
        batch["labels"][~chosen] = -100
        batch["input_ids"][chosen] = 2
        return batch


@pytest.mark.parametrize("own", [False, True])
def test_random_masks_are_the_same_each_time_and_none_of_the_trainings(own, arguments, tmp_path):
    def train(callback=None, **others):
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(**SMALL))
        return trained(model, arguments(**others), callback, Sentences(12, next_tokens), Masking(own)).model

    assert_same_weights(train(), train(RecorderCallback(tmp_path / "moved", layers="cls", when="epoch")))
    # At this rate the weights do not move, so that the masks alone could make a difference.
    train(RecorderCallback(tmp_path / "still", when="epoch"), learning_rate=0.0)
    got = recorded(tmp_path / "still")
    first, second = got["train", 1], got["train", 2]
    assert first[0] == list(range(12))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_several_epochs_and_evaluation_sets(arguments, tmp_path):
    train = Sentences(12, one_class)
    near, far = Sentences(4, one_class, seed=1), Sentences(3, one_class, seed=2)
    kept = []

    class Keeping(RecorderCallback):
        def on_epoch_end(self, args, state, control, model, **others):
            kept.append(copy.deepcopy(model))
            super().on_epoch_end(args, state, control, model=model, **others)

    callback = Keeping(tmp_path / "store", when="epoch")
    trained(classifier(), arguments(), callback, train, eval_dataset={"near": near, "far": far})
    got = recorded(tmp_path / "store")
    assert set(got) == {(split, number) for split in ("train", "near", "far") for number in (1, 2)}
    for number in (1, 2):
        for split, data in (("train", train), ("near", near), ("far", far)):
            assert_gradients(got[split, number], own_loss(data), kept[number - 1], len(data))
    rows = checkpoints(tmp_path / "store")
    assert [(row["checkpoint"], row["step"], row["epoch"]) for row in rows] == [(1, 3, 1.0), (2, 6, 2.0)]
    # Of the last update: after it a linear schedule is at 0.
    assert rows[-1]["learning_rate"] == pytest.approx(0.01 / 6)


def test_saves_are_recorded_and_the_best_model_has_its_step(arguments, tmp_path):
    train, valid = Sentences(12, one_class), Sentences(5, one_class, seed=1)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(
        classifier(), arguments(**saving), RecorderCallback(tmp_path / "saves", layers="classifier", when="save"), train
    )
    assert [row["step"] for row in checkpoints(tmp_path / "saves")] == [2, 4, 6]
    best = {**saving, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    args = arguments(**best, learning_rate=0.3)
    trainer = trained(classifier(), args, RecorderCallback(tmp_path / "best"), train, eval_dataset=valid)
    assert [row["step"] for row in checkpoints(tmp_path / "best")] == [trainer.state.best_global_step]
    assert_gradients(recorded(tmp_path / "best")["train", 1], own_loss(train), trainer.model, 12)


def test_a_resumed_training_continues_the_store(arguments, tmp_path):
    def callback(**others):
        return RecorderCallback(tmp_path / "store", layers="classifier", **others)

    args = arguments(save_strategy="epoch", num_train_epochs=1)
    trained(classifier(), args, callback())
    again = dataclasses.replace(args, num_train_epochs=2)
    trainer = Trainer(classifier(), again, padded, Sentences(12, one_class), callbacks=[callback()])
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in checkpoints(tmp_path / "store")] == [3, 6]
    trained(classifier(), args, callback(overwrite=True))
    assert [row["step"] for row in checkpoints(tmp_path / "store")] == [3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Sentences(12, one_class))


def packed(features):
    return {key: torch.cat([torch.tensor(each[key]) for each in features])[None] for key in ("input_ids", "labels")}


def test_what_cannot_be_recorded_is_refused_before_training(arguments, tmp_path):
    callback = RecorderCallback(tmp_path / "store")
    with pytest.raises(errors.RecordingError, match="a Stream, a stream without length"):
        trained(classifier(), arguments(max_steps=2), callback, Stream())
    with pytest.raises(errors.RecordingError, match="evaluation set 'odd' reads a Stream"):
        trained(classifier(), arguments(), callback, eval_dataset={"odd": Stream()})
    with pytest.raises(errors.RecordingError, match="can't be called 'train'"):
        trained(classifier(), arguments(), callback, eval_dataset={"train": Sentences(3, one_class)})
    with pytest.raises(errors.BatchError, match="Use a collator that pads"):
        trained(language_model(), arguments(), callback, Sentences(12, next_tokens), packed)
    with pytest.raises(errors.RecordingError, match="save_strategy is 'no'"):
        trained(classifier(), arguments(), RecorderCallback(tmp_path / "store", when="save"))
    with pytest.raises(errors.RecordingError, match="when can be 'end', 'epoch', 'save'"):
        RecorderCallback(tmp_path / "store", when="step")


@pytest.mark.parametrize("plugin", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_parameters_in_parts_are_refused_before_training(plugin, arguments, tmp_path):
    """The trainer says so itself; to have it so for real takes several processes, or DeepSpeed."""

    class Sharding(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            setattr(trainer, plugin, True)

    model = classifier()
    before = copy.deepcopy(model)
    callbacks = [Sharding(), RecorderCallback(tmp_path / "store")]
    trainer = Trainer(
        model, arguments(), data_collator=padded, train_dataset=Sentences(12, one_class), callbacks=callbacks
    )
    with pytest.raises(errors.RecordingError, match=r"FSDP and DeepSpeed keep a part .* metaql.Recorder"):
        trainer.train()
    assert_same_weights(model, before)
    assert not (tmp_path / "store").exists()


def test_sql_finds_what_the_callback_recorded(arguments, tmp_path):
    train, valid = Sentences(12, one_class), Sentences(5, one_class, seed=1)
    trained(classifier(), arguments(), RecorderCallback(tmp_path / "store"), train, eval_dataset=valid)
    with metaql.connect(tmp_path / "store") as db:
        rows = db.sql("""
            SELECT t.sample_id, t.label, t.prediction, avg(inner_product(t.gradient, v.gradient)) AS influence
            FROM train t, validation v GROUP BY ALL ORDER BY ALL
        """).fetchall()
    got = recorded(tmp_path / "store")
    flat = {split: torch.cat(list(got[split, 1][1].values()), 1).double() for split in ("train", "validation")}
    expected = flat["train"] @ flat["validation"].mean(0)
    assert [row[:2] for row in rows] == [(index, train[index]["labels"]) for index in range(12)]
    assert all(row[2] in (0, 1, 2) for row in rows)
    torch.testing.assert_close(torch.tensor([row[3] for row in rows]).double(), expected, rtol=1e-4, atol=1e-6)
