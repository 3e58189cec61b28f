"""What a recording would take, told from one batch: room on the disk, memory and time. Nothing is written.

Bytes are counted by the code that packs the store's files, so that only what differs from batch to batch is guessed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset

from metaql.errors import BatchError
from metaql.storage.arrow_arrays import primitive
from metaql.storage.blocks import Block, size, stored
from metaql.storage.bundle import bundled
from metaql.storage.group import Group
from metaql.storage.packing import Packed, Packer
from metaql.storage.recording.batches import identified, inputs_of, labels, move
from metaql.storage.recording.estimate_text import suggestions, table
from metaql.storage.recording.sample_gradients import BatchGradients, SampleGradients
from metaql.storage.row_writer import row_batch
from metaql.storage.schema import FULL, Layer, stored_parts
from metaql.storage.staging import BufferPool, Staged, Staging, release

# What packing, summing and writing reach together on a common SSD.
WRITTEN_PER_SECOND = 400e6
# What waits for the disk at most: the layers' buffers, and the queue behind them.
BUFFERED_BYTES = 768 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's part of a recording.

    ``positions`` are those of an average sample that are kept, None in the full layout. ``bytes`` is None where the
    number of samples is unknown; ``share`` is that of all bytes.
    """

    layer: str
    kind: str
    layout: str
    positions: float | None
    bytes_per_sample: float
    bytes: int | None
    share: float


@dataclass(frozen=True)
class Estimate:
    """What a recording would take; ``print`` it.

    ``samples`` is None where the data does not tell its length, and then so are ``bytes``, ``bfloat16_bytes`` (with
    dtype="bfloat16"), ``seconds`` and ``fits``. ``inputs_per_sample`` and ``rows_per_sample`` (ids, losses,
    predictions, labels) are bytes beside the layers'. ``seconds_per_batch`` was measured on a batch of ``batch_size``
    samples once it was warm; ``seconds`` add the check of the first batch, and writing at ``written_per_second`` bytes.
    ``memory`` is what a batch took beyond the model, on its device; ``buffers`` what waits for the disk at most.
    """

    layers: tuple[LayerEstimate, ...]
    samples: int | None
    dtype: str
    bytes_per_sample: float
    inputs_per_sample: float
    rows_per_sample: float
    bytes: int | None
    bfloat16_bytes_per_sample: float
    bfloat16_bytes: int | None
    batch_size: int
    seconds_per_batch: float
    seconds: float | None
    written_per_second: float
    memory: int
    buffers: int
    free: int
    fits: bool | None
    suggestions: tuple[str, ...]

    def __str__(self) -> str:
        return table(self)


@dataclass(frozen=True)
class FirstBatch:
    """The first batch of some data, how long it took to read, and how many samples all ranks have, if that is known."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    batch: Any
    seconds: float
    samples: int | None
    ranks: int


@dataclass(frozen=True)
class _Size:
    """Bytes of a file: for each sample, and for what stands around them."""

    per_sample: float
    around: float
    positions: float | None = None

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.per_sample + other.per_sample, self.around + other.around)

    def of(self, samples: int | None) -> int | None:
        return None if samples is None else round(self.around + self.per_sample * samples)


_NOTHING = _Size(0.0, 0.0)


def first_batch(data: Any, batch_size: int, group: Group) -> FirstBatch:
    """Reads it; BatchError where that would take it away from a later ``collect``."""
    if isinstance(data, Iterator):
        raise BatchError(
            f"data is a {type(data).__name__}, which can be gone through only once, and estimate would use up its "
            "first batch. Pass something that can be read again, or one batch of it: [(ids, batch)]."
        )
    begin = time.perf_counter()
    # A loader draws a random number when it starts; those of the training stay as they would be.
    with torch.random.fork_rng(devices=[]):
        batches, total = identified(data, batch_size, group)
        first = next(batches, None)
    if first is None:
        raise BatchError("data holds no samples, so there is nothing to estimate from.")
    seconds = time.perf_counter() - begin
    lengths = group.gather(_length(data)) if total is None else [total]
    samples = sum(each for each in lengths if each is not None)
    return FirstBatch(*first, seconds, None if None in lengths else samples, group.size)


def estimate(
    first: FirstBatch,
    gradients: SampleGradients,
    device: torch.device,
    inputs: bool,
    folder: Path,
    trainable: Iterable[str],
) -> Estimate:
    """What recording the data of this first batch into ``folder`` takes; ``trainable`` names the model's parameters."""
    batch, samples, count = move(first.batch, device), first.samples, len(first.ids)
    (_, examining), peak = _peak(device, lambda: _timed(device, lambda: gradients.of(batch, first.ids)))
    result, seconds = _timed(device, lambda: _staged(gradients, batch, first.ids))
    assert gradients.layers is not None
    sizes = _layer_sizes(gradients.layers, result.blocks)
    narrow = _layer_sizes([replace(one, dtype="bfloat16") for one in gradients.layers], result.blocks)
    rows = _rows_size(first, result)
    kept = _inputs_size(first) if inputs else _NOTHING
    whole, halved = sum(sizes, rows + kept), sum(narrow, rows + kept)
    free, total = shutil.disk_usage(folder).free, whole.of(samples)
    made = Estimate(
        layers=tuple(_row(layer, size, samples, whole) for layer, size in zip(gradients.layers, sizes, strict=True)),
        samples=samples,
        dtype=gradients.layers[0].dtype,
        bytes_per_sample=whole.per_sample,
        inputs_per_sample=kept.per_sample,
        rows_per_sample=rows.per_sample,
        bytes=total,
        bfloat16_bytes_per_sample=halved.per_sample,
        bfloat16_bytes=halved.of(samples),
        batch_size=count,
        seconds_per_batch=seconds + first.seconds,
        seconds=_seconds(samples, count * first.ranks, seconds + first.seconds, max(examining - seconds, 0), total),
        written_per_second=WRITTEN_PER_SECOND,
        memory=max(peak, sum(size(block) for block in result.blocks.values())),
        buffers=BUFFERED_BYTES if total is None else min(total, BUFFERED_BYTES),
        free=free,
        fits=None if total is None else total <= free,
        suggestions=(),
    )
    return replace(made, suggestions=suggestions(made, gradients.layers, trainable))


def _length(data: Any) -> int | None:
    """How many samples an iterable of (ids, batch) holds, where that can be told without reading them."""
    if isinstance(data, (list, tuple)):
        return sum(len(ids) for ids, _ in identified(data, 0)[0])
    # Without a batch size the items of a loader are batches, of which each may have its own.
    if isinstance(data, DataLoader) and data.batch_size is not None and not isinstance(data.dataset, IterableDataset):
        return len(data.sampler)  # type: ignore[arg-type]
    return None


def _row(layer: Layer, size: _Size, samples: int | None, whole: _Size) -> LayerEstimate:
    share = size.per_sample / whole.per_sample
    return LayerEstimate(layer.name, layer.kind, layer.layout, size.positions, size.per_sample, size.of(samples), share)


def _seconds(samples: int | None, at_once: int, per_batch: float, once: float, total: int | None) -> float | None:
    if samples is None or total is None:
        return None
    return once + per_batch * samples / at_once + total / WRITTEN_PER_SECOND


def _staged(gradients: SampleGradients, batch: Any, ids: Any) -> BatchGradients:
    """A batch's gradients, copied as they would be for the store."""
    result = gradients.of(batch, ids)
    assert gradients.layers is not None
    pool = BufferPool()
    for _, staged in _bundles(gradients.layers, result.blocks, pool):
        release(staged, pool)
    return result


def _bundles(
    layers: Iterable[Layer], blocks: Mapping[str, Block], pool: BufferPool
) -> Iterator[tuple[list[Layer], Staged]]:
    """What is written together, staged."""
    given = [(part, one) for layer in layers for part, one in stored(layer, blocks[layer.name])]
    found = {part.name: one for part, one in given}
    for bundle in bundled([part for part, _ in given], found):
        staging = Staging(bundle, pool)
        staging.append([found[part.name] for part in bundle], scale=None)
        staged = staging.take()
        assert staged is not None
        yield bundle, staged


def _layer_sizes(layers: Sequence[Layer], blocks: Mapping[str, Block]) -> list[_Size]:
    """What each layer's files would hold, were there these blocks alone; the positions are those of its first part."""
    sizes = {
        part.name: _part_size(part, packed, staged.samples)
        for bundle, staged in _bundles(layers, blocks, BufferPool())
        for part, packed in zip(bundle, Packer(bundle).pack(staged), strict=True)
    }
    by_part = [[sizes[part.name] for part in stored_parts(layer)] for layer in layers]
    return [replace(sum(each[1:], each[0]), positions=each[0].positions) for each in by_part]


def _part_size(layer: Layer, packed: Packed, samples: int) -> _Size:
    positions = None if layer.layout == FULL else packed.statistics.positions / samples
    return replace(_file_size(packed.batch), positions=positions)


def _rows_size(first: FirstBatch, result: BatchGradients) -> _Size:
    """Ids, losses and predictions, and the labels that come from the batch."""
    losses = np.zeros(len(first.ids))
    known = None if result.logits is None else losses
    size = _file_size(row_batch(first.ids, None, losses, known, known))
    classes = labels(first.batch, len(first.ids))
    if classes is None:
        return size
    columns = {"sample_id": primitive(first.ids, pa.int64()), "label": primitive(classes.cpu().numpy(), pa.int64())}
    return size + _file_size(pa.record_batch(columns))


def _inputs_size(first: FirstBatch) -> _Size:
    inputs = inputs_of(first.batch, len(first.ids))
    values = primitive(inputs.contiguous().view(torch.uint8).reshape(-1).numpy(), pa.uint8())
    width = pa.list_(pa.field("item", pa.uint8(), nullable=False), inputs.nbytes // len(inputs))
    return _file_size(pa.record_batch({"input": pa.FixedSizeListArray.from_arrays(values, type=width)}))


def _file_size(batch: Any) -> _Size:
    """An Arrow file of this record batch, written to nowhere."""
    sink = pa.MockOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _Size(batch.nbytes / batch.num_rows, sink.size() - batch.nbytes)


def _timed(device: torch.device, work: Callable[[], Result]) -> tuple[Result, float]:
    _wait(device)
    begin = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device, work: Callable[[], Result]) -> tuple[Result, int]:
    """What the work returns, and how far the memory in use rose meanwhile; 0 where nobody counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) - before
    # Linux forgets a process's peak on request.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = work()
    return result, max(_resident("VmHWM") - before, 0)


def _resident(which: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(which)), 0)
