"""One pass over the samples of a split at a checkpoint, from batches to a collection of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metaql.errors import BatchError
from metaql.storage.collection_writer import CollectionWriter
from metaql.storage.group import Group
from metaql.storage.recording.batches import identified, input_form, inputs_of, labels, move
from metaql.storage.recording.layer_outputs import LayerOutputs
from metaql.storage.recording.metadata import for_samples, require_agreeing, require_same_types
from metaql.storage.recording.sample_gradients import BatchGradients, SampleGradients
from metaql.storage.recording.sample_ids import ids_at, require_new, require_own
from metaql.storage.schema import Layer
from metaql.storage.store import Store
from metaql.storage.writer import Writer


@dataclass(eq=False)
class Collecting:
    """A pass of this rank, beside those of the others.

    ``begin`` opens the collection, once layers are known; ``require_still`` raises if the pass has changed the model.
    ``inputs``, ``logits`` and ``watched`` say what is kept beside the gradients.
    """

    gradients: SampleGradients
    writer: Writer
    group: Group
    split: str
    checkpoint: int
    begin: Callable[[], CollectionWriter]
    require_still: Callable[[], None]
    device: torch.device
    inputs: bool
    logits: bool
    watched: LayerOutputs | None
    _collection: CollectionWriter | None = None
    _ids: list[np.ndarray] = field(default_factory=list)
    _classes: list[Tensor | None] = field(default_factory=list)
    _forms: set[Any] = field(default_factory=set)

    def record(self, data: Any, batch_size: int, metadata: Any) -> int:
        """Records all of the data, or nothing; returns how many samples all ranks have."""
        batches, total = identified(data, batch_size, self.group)
        taken = ids_at(self.split, self.checkpoint, self.writer.path, self.writer.manifest)
        quiet = None if self.group.leads else True
        progress = tqdm(total=total, desc=f"record {self.split}", unit="sample", disable=quiet)
        try:
            for ids, batch in self._in_rounds(batches, progress):
                require_new(ids, taken, self.split)
                self._append(ids, move(batch, self.device))
            rows = require_own(self._ids, self.split, self.group)
            self._finish(metadata)
            return rows
        except BaseException:
            if self._collection is not None:
                self._collection.abort()
            raise
        finally:
            progress.close()

    def _in_rounds(self, batches: Iterator[tuple[np.ndarray, Any]], progress: Any) -> Iterator[tuple[np.ndarray, Any]]:
        """The batches of this rank, until those of all ranks are through; after each, they wait for one another."""
        more = True
        while more:
            item = next(batches, None)
            if item is not None:
                yield item
            elif self.gradients.layers is None:
                self.gradients.layers = of_first_rank(self.group, None) or None
            with self.group.together("collect") as turn:
                turn.own = (0 if item is None else len(item[0]), int(item is not None), 0)
            progress.update(sum(count for count, _, _ in turn.all))
            more = any(more for _, more, _ in turn.all)

    def _append(self, ids: np.ndarray, batch: Any) -> None:
        result = self.gradients.of(batch, ids, self.watched)
        if self._collection is None:
            self._collection = self.begin()
        self._collection.append(
            ids,
            result.blocks,
            *_outputs(result),
            inputs=inputs_of(batch, len(ids)) if self.inputs else None,
            logits=_logits_of(result) if self.logits else None,
            embeddings=result.embeddings,
        )
        self._ids.append(ids)
        self._classes.append(labels(batch, len(ids)))
        self._forms.add(input_form(batch, len(ids)))

    def _finish(self, metadata: Any) -> None:
        if self._collection is None:
            self._collection = self.begin()
        table = for_samples(metadata, np.concatenate(self._ids), _joined(self._classes)) if self._ids else None
        self._require_types(table)
        self.require_still()
        self._collection.finish(table, input_form=self._forms.pop() if len(self._forms) == 1 else None)

    def _require_types(self, table: Any) -> None:
        require_agreeing(table, self.group)
        if table is not None and self.writer.manifest.collections:
            with closing(Store.open(self.writer.path)) as store:
                require_same_types(table, store)


def of_first_rank(group: Group, formed: tuple[Layer, ...] | None) -> tuple[Layer, ...]:
    """The layers for all ranks: those that the first rank with any samples has formed."""
    return next((each for each in group.gather(formed) if each is not None), ())


def _outputs(result: BatchGradients) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """loss, prediction (the class of the largest logit) and confidence (its probability), each [n]."""
    loss = result.losses.double().cpu().numpy()
    if result.logits is None:
        return loss, None, None
    confidence, prediction = result.logits.float().softmax(dim=1).max(dim=1)
    return loss, prediction.cpu().numpy(), confidence.cpu().numpy()


def _logits_of(result: BatchGradients) -> Tensor:
    """The logits [n, classes], float32 on the CPU, as a copy."""
    if result.logits is None:
        raise BatchError(
            "logits=True keeps the logits of samples with one class each, [n, classes]; this model returns more "
            "dimensions. Keep its whole output: embeddings=['']."
        )
    return result.logits.to("cpu", torch.float32, copy=True)


def _joined(classes: list[Tensor | None]) -> np.ndarray | None:
    known = [each for each in classes if each is not None]
    return torch.cat(known).cpu().numpy() if known and len(known) == len(classes) else None
