"""Every sample once: the ids that a checkpoint has, and those of a collection that is being recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from metaql.errors import BatchError, SampleIdError
from metaql.storage.group import Group
from metaql.storage.manifest import Manifest
from metaql.storage.store import Store


def ids_at(split: str, checkpoint: int, path: Path, manifest: Manifest) -> set[int]:
    """The samples of the split that this checkpoint has already."""
    own = [each for each in manifest.collections if (each.split, each.checkpoint) == (split, checkpoint)]
    if not own:
        return set()
    with closing(Store.open(path)) as store:
        return {each for part in own for each in store.table(part.row_file).column("sample_id").to_pylist()}


def require_new(ids: np.ndarray, taken: set[int], split: str) -> None:
    """Raises if an id is among ``taken`` or comes twice; adds the ids to ``taken``."""
    before = len(taken)
    repeated = [each for each in ids.tolist() if each in taken] if taken else []
    taken.update(ids.tolist())
    if repeated or len(taken) - before < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        example = repeated[0] if repeated else int(values[counts > 1][0])
        raise SampleIdError(
            f"Sample {example} of split '{split}' comes twice at this checkpoint. Ids must be those of the samples "
            "themselves (a position within the batch is not one); leave out what was collected already."
        )


def require_own(ids: Sequence[np.ndarray], split: str, group: Group) -> int:
    """How many samples all ranks have; raises if there are none, or one came from two ranks."""
    parts = group.gather(np.concatenate(ids) if ids else np.empty(0, dtype=np.int64))
    everything = np.concatenate(parts)
    if not len(everything):
        raise BatchError(f"data for split '{split}' holds no samples.")
    values, counts = np.unique(everything, return_counts=True)
    if len(values) < len(everything):
        example = int(values[counts > 1][0])
        raise SampleIdError(
            f"Sample {example} of split '{split}' comes from ranks "
            f"{' and '.join(str(rank) for rank, own in enumerate(parts) if example in own)}. Give every rank samples "
            "of its own; a map-style Dataset is shared out by itself."
        )
    return len(everything)
