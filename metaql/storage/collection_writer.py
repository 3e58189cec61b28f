"""One pass of recording: blocks are buffered and written beside the training, and committed at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from metaql.errors import BatchError, InternalError, RecordingError
from metaql.storage.arrow_writer import write_table
from metaql.storage.background import Background
from metaql.storage.blocks import Block, Factored, Full, stored
from metaql.storage.bundle import Bundle, bundled
from metaql.storage.durable import writing
from metaql.storage.forms import prefix_width, suffix_width
from metaql.storage.input_writer import InputWriter
from metaql.storage.layer_writer import LayerWriter
from metaql.storage.manifest import Collection, DataFile, Inputs, Segment
from metaql.storage.row_writer import RowWriter, row_batch
from metaql.storage.schema import FULL, Layer, stored_parts
from metaql.storage.staging import BufferPool, Staged, release
from metaql.storage.vector_writer import VectorFiles

# A layer's buffer goes to the writing thread at this size, which makes a record batch. The first ones are
# smaller, each as large as all before it, so that a short collection too is written beside the computing.
_FLUSH_BYTES = 16 << 20
_FIRST_FLUSH_BYTES = 1 << 20
# With many layers the largest buffer goes earlier, so that they don't hold more than this together.
_BUFFERED_BYTES = 256 << 20
# What waits for the writing thread; beyond it, ``append`` waits.
_QUEUED_BYTES = 256 << 20
_FLUSH_ROWS = 1 << 16
_ROW_BYTES = 40
_SYNCING_THREADS = 8

Array = np.ndarray[Any, np.dtype[Any]]
Commit = Callable[[Path, Collection], None]


class CollectionWriter:
    """Appends to a collection that exists for nobody else until ``finish``."""

    def __init__(
        self,
        folder: Path,
        layers: tuple[Layer, ...],
        split: str,
        checkpoint: int | None,
        commit: Commit,
        discard: Callable[[Path], None],
        pool: BufferPool,
    ) -> None:
        self.rows = 0
        self.bytes = 0
        self._folder = folder
        self._recorded = layers
        # A tied layer's parts are written as layers of their own.
        layers = tuple(part for layer in layers for part in stored_parts(layer))
        self._layers = {layer.name: layer for layer in layers}
        self._split = split
        self._checkpoint = checkpoint
        self._commit = commit
        self._discard = discard
        self._pool = pool
        self._bundles: list[Bundle] = []
        self._row_batches: list[Any] = []
        self._row_count = 0
        self._inputs: list[Tensor] = []
        self._input_size = 0
        with writing(folder):
            self._row_writer = RowWriter(folder)
        self._layer_writers = {layer.name: LayerWriter(folder, number, layer) for number, layer in enumerate(layers)}
        self._input_writer: InputWriter | None = None
        self._vectors = VectorFiles(folder)
        self._background = Background(_QUEUED_BYTES)
        self.closed = False
        self._torn = False

    def append(
        self,
        ids: Array,
        blocks: Mapping[str, Block],
        loss: Any,
        prediction: Any = None,
        confidence: Any = None,
        step: int | None = None,
        inputs: Tensor | None = None,
        logits: Tensor | None = None,
        embeddings: Mapping[str, Tensor] | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Appends samples: their ids, a block for each layer, and what goes into ``outputs`` and ``embeddings``.

        The blocks may be of any float type, on any device: they are copied as the layer's, each sample's times its
        ``scale`` [n], and a suffix that several layers have once. Logits and embeddings are [n, ...] in float32, on the
        CPU, and nobody changes them any more. WriteError from the writing thread comes out here or at ``finish``.
        """
        self._require_usable()
        if not len(ids):
            return
        blocks = self._parts(blocks)
        for name, layer in self._layers.items():
            _require_block(layer, blocks.get(name), len(ids))
        rows = row_batch(ids, step, loss, prediction, confidence)
        self._require_inputs(inputs, len(ids))
        with writing(self._folder):
            self._vectors.require(logits, embeddings or {}, len(ids), is_first=not self.rows)
        # An interrupt (Ctrl-C) in here leaves layers of unequal length: such a collection is never committed.
        self._torn = True
        self._buffer_rows(rows)
        self._bundle(blocks)
        for bundle in self._bundles:
            self._buffer(bundle, blocks, scale)
        if inputs is not None:
            self._buffer_inputs(inputs)
        self.bytes += self._vectors.append(logits, embeddings or {})
        if self._vectors.waiting >= _FLUSH_BYTES:
            self._flush_vectors()
        self._relieve()
        self.rows += len(ids)
        self._torn = False

    def finish(
        self, metadata: Any = None, steps: Any = None, input_form: tuple[tuple[int, ...], str] | None = None
    ) -> int:
        """Writes what is left and commits; returns the rows. ``metadata`` and ``steps`` are Arrow tables.

        ``input_form`` is the shape and torch dtype that all inputs have in common, for when they are not kept.
        """
        self._require_usable()
        try:
            self._flush_all()
            closed: list[Collection] = []
            # By the writing thread, which is never interrupted: a pool of threads may not survive that.
            self._submit(lambda: closed.append(self._close_files(metadata, steps, input_form)), 0)
            self._background.drain()
            self._background.stop()
            self._commit(self._folder, closed[0])
        except BaseException:
            self.abort()
            raise
        self.closed = True
        return self.rows

    def abort(self) -> None:
        """Removes all of it; harmless when finished or aborted before."""
        if self.closed:
            return
        self.closed = True
        self._background.stop()
        for writer in (self._row_writer, *self._layer_writers.values(), self._input_writer, self._vectors):
            if writer is not None:
                writer.abandon()
        self._discard(self._folder)

    def _parts(self, blocks: Mapping[str, Block]) -> dict[str, Factored | Full]:
        """The blocks that are given, by the names of what they are written as."""
        given = ((layer, blocks[layer.name]) for layer in self._recorded if layer.name in blocks)
        return {part.name: one for layer, block in given for part, one in stored(layer, block)}

    def _require_usable(self) -> None:
        if self.closed:
            raise RecordingError("This collection is closed: start another to record more.")
        if self._torn:
            raise RecordingError(
                "An append to this collection was interrupted and left it torn, so it is not committed: "
                "abort it and record it again."
            )
        self._background.check()

    def _require_inputs(self, inputs: Tensor | None, count: int) -> None:
        if (inputs is None) != (self._input_writer is None) and self.rows:
            raise BatchError("Some batches of this collection have inputs and some have none: give all or none.")
        if inputs is None:
            return
        if len(inputs) != count:
            raise BatchError(f"There are {len(inputs)} inputs for {count} samples.")
        if self._input_writer is None:
            with writing(self._folder):
                self._input_writer = InputWriter(self._folder, tuple(inputs.shape[1:]), inputs.dtype)
        self._input_writer.require_like(inputs)

    def _buffer_rows(self, batch: Any) -> None:
        self._row_batches.append(batch)
        self._row_count += batch.num_rows
        if self._row_count >= _FLUSH_ROWS:
            self._flush_rows()

    def _bundle(self, blocks: Mapping[str, Factored | Full]) -> None:
        """Puts layers with the same suffixes together; who once had another goes on alone."""
        if not self.rows:
            self._bundles = [
                Bundle(each, self._layer_writers, self._pool) for each in bundled(self._layers.values(), blocks)
            ]
        bundles, self._bundles = self._bundles, []
        for bundle in bundles:
            parts = bundled(bundle.layers, blocks)
            if len(parts) > 1:
                self._flush(bundle)
            self._bundles += [bundle] if len(parts) == 1 else [bundle.part(each) for each in parts]

    def _buffer(self, bundle: Bundle, blocks: Mapping[str, Factored | Full], scale: Tensor | None) -> None:
        self.bytes += bundle.append(blocks, scale)
        if bundle.staging.most >= min(max(_FIRST_FLUSH_BYTES, bundle.flushed), _FLUSH_BYTES):
            self._flush(bundle)

    def _buffer_inputs(self, inputs: Tensor) -> None:
        self._inputs.append(inputs.detach().cpu().contiguous())
        self._input_size += inputs.nbytes
        self.bytes += inputs.nbytes
        if self._input_size >= _FLUSH_BYTES:
            self._flush_inputs()

    def _relieve(self) -> None:
        while sum(bundle.staging.bytes for bundle in self._bundles) > _BUFFERED_BYTES:
            self._flush(max(self._bundles, key=lambda bundle: bundle.staging.bytes))

    def _flush_all(self) -> None:
        self._flush_rows()
        self._flush_inputs()
        self._flush_vectors()
        for bundle in self._bundles:
            self._flush(bundle)

    def _flush_rows(self) -> None:
        batches, self._row_batches, self._row_count = self._row_batches, [], 0
        if batches:
            self._submit(lambda: self._row_writer.write(batches), len(batches) * _ROW_BYTES)

    def _flush(self, bundle: Bundle) -> None:
        size, most = bundle.staging.bytes, bundle.staging.most
        bundle.flushed += most
        if (staged := bundle.staging.take()) is not None:
            self._submit(lambda: self._write(bundle, staged), size)

    def _write(self, bundle: Bundle, staged: Staged) -> None:
        bundle.write(staged)
        release(staged, self._pool)

    def _flush_inputs(self) -> None:
        pieces, self._inputs = self._inputs, []
        size, self._input_size = self._input_size, 0
        writer = self._input_writer
        if pieces and writer is not None:
            self._submit(lambda: writer.write(pieces), size)

    def _flush_vectors(self) -> None:
        for job, size in self._vectors.take():
            self._submit(job, size)

    def _submit(self, job: Callable[[], None], size: int) -> None:
        def write() -> None:
            with writing(self._folder):
                job()

        self._background.submit(write, size)

    def _close_files(self, metadata: Any, steps: Any, input_form: tuple[tuple[int, ...], str] | None) -> Collection:
        """The collection as its folder holds it: its rows and paths count from its own beginning."""
        logits, embeddings = self._vectors.close()
        return Collection(
            number=0,
            split=self._split,
            checkpoint=self._checkpoint,
            first_row=0,
            rows=self.rows,
            row_file=self._row_writer.close(),
            metadata=None if metadata is None else self._write_metadata(metadata),
            steps=None if steps is None else write_table(self._folder / "steps.arrow", steps),
            inputs=self._input_writer.close() if self._input_writer else input_form and Inputs(None, *input_form),
            segments=self._close_layers(),
            logits=logits,
            embeddings=embeddings,
        )

    def _write_metadata(self, table: Any) -> DataFile:
        # What pandas notes in a schema is of no use here, and may be anything.
        return write_table(self._folder / "metadata.arrow", table.replace_schema_metadata(None))

    def _close_layers(self) -> tuple[Segment, ...]:
        # The disk takes many files that are synced at once in about the time of one.
        with ThreadPoolExecutor(_SYNCING_THREADS) as pool:
            closed = pool.map(LayerWriter.close, self._layer_writers.values())
            return tuple(segment for segments in closed for segment in segments)


def _require_block(layer: Layer, block: Factored | Full | None, samples: int) -> None:
    """InternalError unless the block is of this layer's layout and widths: nothing wrong gets stored."""
    if block is None:
        raise InternalError(f"A batch has no gradients of layer '{layer.name}'.")
    if isinstance(block, Full):
        good = layer.layout == FULL and block.gradient.shape == (samples, layer.width)
    else:
        good = layer.layout != FULL and block.samples == samples and _fits(layer, block)
    if not good:
        raise InternalError(f"A batch of {samples} samples has gradients of another form than layer '{layer.name}'.")


def _fits(layer: Layer, block: Factored) -> bool:
    positions = block.prefix.shape[0]
    if block.prefix.shape[1:] != (prefix_width(layer),):
        return False
    if block.offsets is None:
        even = positions % block.samples == 0
    else:
        even = len(block.offsets) == block.samples + 1 and int(block.offsets[-1]) == positions
    if layer.unfold is not None:
        return even and block.suffix.shape[0] == block.samples
    shape = (positions,) if layer.kind == "embedding" else (positions, suffix_width(layer))
    return even and block.suffix.shape == shape
