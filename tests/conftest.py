"""What several folders of tests share: a small store whose numbers can be checked by head, and its plain reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from metaql.storage.blocks import Block, Factored, Full, lay_out, whole
from metaql.storage.schema import FACTORED, FULL, TIED, Layer, Parameter, Unfold, parts
from metaql.storage.store import Store
from metaql.storage.writer import Writer

SPLITS = {"train": 8, "validation": 5, "held back": 2}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="write what came into files of what is expected")


def small_layers(dtype: str = "float32") -> tuple[Layer, ...]:
    """One layer of each kind and form: vector, sentence, image, table, scale; and one kept in full."""
    geometry = Unfold((1, 3, 3), (2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1))
    return (
        Layer("fc1", "linear", _two("fc1", (2, 3)), FACTORED, dtype, 1, 3, 2, 1),
        Layer("block.words", "linear", _two("block.words", (2, 2)), FACTORED, dtype, 1, 2, 2, None),
        Layer("block.image", "conv", _two("block.image", (2, 1, 2, 2)), FACTORED, dtype, 1, 4, 2, 4, geometry),
        Layer("block.grouped", "conv", _two("block.grouped", (4, 3, 1)), FACTORED, dtype, 2, 3, 4, 2),
        Layer("table", "embedding", _two("table", (5, 2))[:1], FACTORED, dtype, 1, 5, 2, None),
        Layer("head", "linear", _two("head", (2, 2)), FULL, dtype, 1, 2, 2, 9),
        Layer("scale", "norm", _two("scale", (3,))[:1], FULL, dtype),
    )


def tied_layer(dtype: str = "float32") -> Layer:
    """A weight that is a table of five rows as well as an output projection of two positions."""
    return Layer("shared", TIED, _two("shared", (5, 2))[:1], FACTORED, dtype, 1, 2, 5, 2, None, 2)


def _two(name: str, shape: tuple[int, ...]) -> tuple[Parameter, ...]:
    return Parameter(f"{name}.weight", shape), Parameter(f"{name}.bias", shape[:1])


def small_block(rng: np.random.Generator, layer: Layer, samples: int) -> Block:
    """Whole numbers from -2 to 2, so that sums of products are exact in every type and order."""

    def values(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(-2, 3, shape)).to(getattr(torch, layer.dtype))

    if layer.layout == FULL:
        return Full(values(samples, layer.width))
    if layer.kind == TIED:
        return whole([small_block(rng, part, samples) for part in parts(layer)])
    lengths = rng.integers(0, 4, samples) if layer.positions is None else np.full(samples, layer.positions)
    count, offsets = int(lengths.sum()), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    prefix = values(count, layer.output_width or 0)
    if layer.kind == "embedding":
        suffix = torch.from_numpy(rng.integers(0, layer.input_width or 0, count))
    elif layer.unfold:
        suffix = values(samples, 9)
    else:
        suffix = values(count, layer.groups * (layer.input_width or 0))
    return Factored(suffix, prefix, samples, offsets if layer.positions is None else None)


def record_small(path: Path, seed: int = 0, dtype: str = "float32", checkpoints: int = 2) -> Path:
    """Every split at every checkpoint; labels 0, 1, 2 with a NULL among them, losses in quarters."""
    rng = np.random.default_rng(seed)
    with Writer.open(path) as writer:
        writer.define("Net", small_layers(dtype), dtype)
        for step in range(checkpoints):
            settings = {"epoch": step, "learning_rate": 0.5 / (step + 1)}
            number = writer.add_checkpoint({"w": torch.ones(1)}, f"{step}", 10 * step, settings)
            for split, rows in SPLITS.items():
                record_split(writer, rng, split, number, rows)
    return path


def record_split(writer: Writer, rng: np.random.Generator, split: str, checkpoint: int | None, rows: int) -> None:
    """One collection; along a trajectory, without a checkpoint, at step 0."""
    collection = writer.collection(split, checkpoint)
    blocks = {layer.name: small_block(rng, layer, rows) for layer in writer.manifest.layers or small_layers()}
    ids = np.arange(rows, dtype=np.int64)
    losses = rng.integers(1, 9, rows) / 4
    step = 0 if checkpoint is None else None
    collection.append(ids, blocks, losses, rng.integers(0, 3, rows), losses.astype(np.float32) / 4, step)
    labels = pa.array([None if k == 3 else k % 3 for k in range(rows)], pa.int64())
    collection.finish(pa.table({"sample_id": ids, "label": labels}))


def laid_out(path: Path) -> np.ndarray:
    """Every row of a store as it would be restored: float64 [rows, width]."""
    store = Store.open(path)
    rows = np.arange(store.manifest.next_row)
    parts = [lay_out(layer, store.read(layer, rows)).double().numpy() for layer in store.layers]
    return np.concatenate(parts, axis=1)


@pytest.fixture
def record_small_store() -> Callable[..., Path]:
    """Records the small store at a path."""
    return record_small


@pytest.fixture
def record_one_split() -> Callable[..., None]:
    """Records one more collection of the small store."""
    return record_split


@pytest.fixture(scope="session", autouse=True)
def shipped_costs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Choices in tests depend on no machine: a file that names no cost leaves those that MetaQL is shipped with."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    path.write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAQL_COSTS", str(path))
        yield


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small store; don't write to it."""
    return record_small(tmp_path_factory.mktemp("small") / "store")


@pytest.fixture(scope="session")
def small_gradients(small_store: Path) -> np.ndarray:
    """The small store's gradients by row."""
    return laid_out(small_store)
