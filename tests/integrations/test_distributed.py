"""Several processes that train together record one store: every sample once, under its own id."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tests.integrations.stores import assert_gradients, recorded
from tests.recording.ranks import preload, run

# Each takes seconds to import.
preload("transformers.trainer", "metaql.integrations.transformers", "metaql.integrations.lightning")


class Rows(Dataset):
    def __init__(self, count):
        self.rows = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"row": self.rows[index], "labels": int(self.rows[index].argmax())}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, row, labels=None):
        logits = self.layer(row)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def join(rank):
    """What a launcher tells a process about itself."""
    others = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in others.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def with_transformers(rank, folder):
    # Here, so that only the ranks need it.
    from transformers import Trainer, TrainingArguments

    from metaql.integrations.transformers import RecorderCallback

    join(rank)
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ddp_backend": "gloo"}
    quiet["ddp_find_unused_parameters"] = False
    args = TrainingArguments(f"{folder}/out", per_device_train_batch_size=2, num_train_epochs=1, **quiet)
    callback = RecorderCallback(folder / "store")
    trainer = Trainer(Model(), args, train_dataset=Rows(11), eval_dataset=Rows(1), callbacks=[callback])
    trainer.train()
    return trainer.args.world_size, {name: value.clone() for name, value in trainer.model.state_dict().items()}


def with_lightning(rank, folder):
    import lightning.pytorch as L

    from metaql.integrations.lightning import RecorderCallback

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def forward(self, row):
            return self.model(row)["logits"]

        def training_step(self, batch, number):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    join(rank)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        enable_model_summary=False,
        callbacks=[RecorderCallback(folder / "store")],
        **quiet,
    )
    module = Module()
    trainer.fit(module, DataLoader(Rows(11), batch_size=2, shuffle=True))
    return trainer.world_size, {name: value.clone() for name, value in module.model.state_dict().items()}


def loss_on(rows):
    def loss(model, sample):
        item = rows[sample]
        return model(item["row"][None], torch.tensor([item["labels"]]))["loss"]

    return loss


@pytest.mark.parametrize("function, evaluated", [(with_transformers, True), (with_lightning, False)])
def test_every_sample_is_recorded_once_under_its_own_id(function, evaluated, tmp_path):
    outcomes = run(function, 2, tmp_path / "ranks", tmp_path)
    for each in outcomes:
        if each.error is not None:
            raise each.error
    (size, weights), (_, others) = (each.value for each in outcomes)
    assert size == 2
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    model = Model()
    model.load_state_dict(weights)
    got = {
        split: (ids, {name.removeprefix("model."): each for name, each in gradients.items()})
        for (split, _), (ids, gradients) in recorded(tmp_path / "store").items()
    }
    assert set(got) == ({"train", "validation"} if evaluated else {"train"})
    assert_gradients(got["train"], loss_on(Rows(11)), model, 11)
    if evaluated:
        assert_gradients(got["validation"], loss_on(Rows(1)), model, 1)
