"""What ``docs/methods.md`` asks about single samples, against torch."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaql

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def query(word: str) -> str:
    """The page's query with this word in it."""
    (found,) = [each for each in re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL) if word in each]
    return str(found)


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, nn.Module, list[Tensor]]:
    """A store of four checkpoints, the model at the last, and which training samples it had right at each."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    train, validation = samples(9, 1), samples(3, 2)
    right = []
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for _ in range(4):
            with torch.no_grad():
                model.weight.normal_()
            recorder.checkpoint()
            recorder.collect([(torch.arange(9), train)], "train", logits=True)
            recorder.collect([(torch.arange(3), validation)], "validation")
            right.append(model(train[0]).argmax(1) == train[1])
    return tmp_path / "store", model, right


def own_gradients(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    rows = []
    for each, target in zip(*part, strict=True):
        loss = F.cross_entropy(model(each[None]), target[None])
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_el2n(trained: tuple[Path, nn.Module, list[Tensor]]) -> None:
    path, model, _ = trained
    inputs, targets = samples(9, 1)
    expected = (model(inputs).softmax(1) - F.one_hot(targets, 3)).norm(dim=1).tolist()
    with metaql.connect(path) as db:
        rows = db.sql(query("el2n")).fetchall()
    assert len(rows) == 4 * 9
    # Logits are kept in float32.
    newest = {sample: value for sample, checkpoint, value in rows if checkpoint == 4}
    assert newest == pytest.approx(dict(enumerate(expected)), rel=1e-6)


def test_forgetting(trained: tuple[Path, nn.Module, list[Tensor]]) -> None:
    path, _, right = trained
    expected = sum((before & ~after).long() for before, after in pairwise(right))
    assert isinstance(expected, Tensor)
    assert bool(expected.any())
    with metaql.connect(path) as db:
        assert dict(db.sql(query("forgotten")).fetchall()) == dict(enumerate(expected.tolist()))


def test_grand_and_relative_influence(trained: tuple[Path, nn.Module, list[Tensor]]) -> None:
    path, model, _ = trained
    train, validation = (own_gradients(model, samples(*which)) for which in ((9, 1), (3, 2)))
    relative = (train @ validation.mean(0) / train.norm(dim=1)).tolist()
    with metaql.connect(path) as db:
        rows = db.sql(query("grand").replace("LIMIT 10", "")).fetchall()
        assert {row[0]: row[2] for row in rows} == pytest.approx(dict(enumerate(train.norm(dim=1).tolist())))
        assert {row[0]: row[3] for row in rows} == pytest.approx(dict(enumerate(train.square().sum(1).tolist())))
        assert dict(db.sql(query("relative")).fetchall()) == pytest.approx(dict(enumerate(relative)))
