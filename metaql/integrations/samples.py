"""What a data loader reads, in the dataset's own order: its indices are the sample ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from metaql.errors import RecordingError
from metaql.integrations.undisturbed import begin_random_numbers, keeps_generators, renewed


@dataclass(frozen=True)
class Samples:
    """A data loader's dataset, to be read in batches that its collator makes: of ``size`` parts the one of ``rank``.

    ``prepare`` is applied to each batch. Whatever draws random numbers on the way (masks, augmentations) draws the
    same ones whenever the samples are read, and none that the training would have drawn.
    """

    loader: DataLoader[Any]
    batch_size: int
    prepare: Callable[[Any], Any] = lambda batch: batch
    rank: int = 0
    size: int = 1

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
        """(ids int64 [n], batch) pairs."""
        begin_random_numbers()
        source: Any = self.loader.dataset
        begin, end = (len(source) * number // self.size for number in (self.rank, self.rank + 1))
        loader: DataLoader[Any] = DataLoader(
            renewed(source) if keeps_generators(source) else source,
            batch_size=self.batch_size,
            sampler=range(begin, end),
            collate_fn=renewed(self.loader.collate_fn),
            num_workers=self.loader.num_workers,
            worker_init_fn=self.loader.worker_init_fn,
            multiprocessing_context=self.loader.multiprocessing_context,
        )
        for first, batch in zip(range(begin, end, self.batch_size), loader, strict=True):
            yield np.arange(first, min(first + self.batch_size, end)), self.prepare(batch)


def loader_of_samples(loader: Any, name: str) -> DataLoader[Any]:
    """The loader called ``name``, if its dataset has indices; raises RecordingError otherwise."""
    if not isinstance(loader, DataLoader):
        raise RecordingError(
            f"{name} is a {type(loader).__name__}; the callback records what one torch DataLoader reads. Record by "
            "hand with metaql.Recorder."
        )
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise RecordingError(
            f"{name} reads a {type(dataset).__name__}, a stream without length or indices, so its samples have no ids "
            "that could be known again. Use a map-style dataset, or record by hand with metaql.Recorder and your own "
            "(ids, batch) pairs."
        )
    if loader.batch_sampler is None:
        raise RecordingError(
            f"{name} has batch_size=None: its dataset makes whole batches, whose samples have no ids. Use a dataset "
            "of samples, or record by hand with metaql.Recorder and your own (ids, batch) pairs."
        )
    return loader
