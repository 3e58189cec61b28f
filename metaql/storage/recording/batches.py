"""Batches as training loops have them: tuples, dicts and nests of both, with samples in the first dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.errors import BatchError, SampleIdError
from metaql.storage.group import ALONE, Group

TWO_WAYS_OUT = (
    "Pass a map-style Dataset of (input, target), whose indices become the ids, or an iterable of "
    "(ids, batch), where ids holds one integer for each sample, such as "
    "((ids, (inputs, targets)) for ids, inputs, targets in loader)."
)


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """The batch with the function applied to each tensor in it; mappings become plain dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def tensors(batch: Any) -> list[Tensor]:
    """All tensors in the batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def move(batch: Any, device: torch.device) -> Any:
    """The batch on the device. BatchError for tensors without values, or out of which samples can't be cut."""
    for tensor in tensors(batch):
        if tensor.is_nested:
            raise BatchError(
                "The batch holds a nested (jagged) tensor, out of which samples can't be cut. Pad it with "
                "torch.nested.to_padded_tensor, and let the model or losses= leave the padding out."
            )
        if tensor.layout in (torch.sparse_bsr, torch.sparse_bsc):
            raise BatchError(
                f"The batch holds a sparse tensor in blocks ({tensor.layout}), out of which samples can't be cut. Pass "
                "it as tensor.to_dense(), or as tensor.to_sparse_coo() if the model needs it sparse."
            )
        if tensor.is_meta:
            raise BatchError(
                "The batch holds a tensor on the meta device, where it has no values. Load the data onto the CPU or "
                "the model's device."
            )
    return map_tensors(lambda tensor: tensor.to(device), batch)


def has_sparse(batch: Any) -> bool:
    """Whether a tensor of the batch is sparse."""
    return any(tensor.layout != torch.strided for tensor in tensors(batch))


def take(batch: Any, samples: int, chosen: Sequence[int]) -> Any:
    """The batch of the chosen samples alone: every tensor with ``samples`` in its first dimension is cut."""
    rows = list(chosen)
    return map_tensors(lambda tensor: tensor[rows] if _has(samples, tensor) else tensor, batch)


def per_sample(batch: Any, samples: int) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors that hold one entry a sample, and a function that puts others in their places."""
    own = [tensor for tensor in tensors(batch) if _has(samples, tensor)]

    def rebuild(replacements: Sequence[Tensor]) -> Any:
        remaining = iter(replacements)
        return map_tensors(lambda tensor: next(remaining) if _has(samples, tensor) else tensor, batch)

    return own, rebuild


def _has(samples: int, tensor: Tensor) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == samples


def labels(batch: Any, samples: int) -> Tensor | None:
    """Class numbers, int64 [n], where the batch carries them: (inputs, targets), or a dict with ``labels``."""
    target = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        target = batch[-1]
    if not isinstance(target, Tensor) or target.shape != (samples,) or target.dtype == torch.bool:
        return None
    return None if target.is_floating_point() or target.is_complex() else target.long()


def identified(data: Any, batch_size: int, group: Group = ALONE) -> tuple[Iterator[tuple[np.ndarray, Any]], int | None]:
    """(ids, batch) pairs from what the user passed as data, and how many samples all ranks have if that is known.

    ids are int64 [n]. A map-style Dataset is read in order, its indices being the ids; each rank has its share.
    """
    if isinstance(data, Mapping) or hasattr(data, "columns"):
        raise BatchError(f"data is a {type(data).__name__}, a table of columns, not of samples. {TWO_WAYS_OUT}")
    total = None
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (list, tuple)):
        total = len(data)
    elif not isinstance(data, Iterable):
        raise BatchError(f"data is a {type(data).__name__}, which can't be iterated over. {TWO_WAYS_OUT}")
    if len(set(group.gather(total))) > 1:
        raise BatchError(
            "The ranks have different data. Give every rank the same map-style Dataset, whose samples are then shared "
            "out; or every rank an iterable of (ids, batch) of its own."
        )
    return (_from_pairs(data) if total is None else _from_dataset(data, batch_size, group.share(total))), total


def _from_dataset(data: Any, batch_size: int, share: range) -> Iterator[tuple[np.ndarray, Any]]:
    own = data if len(share) == len(data) else torch.utils.data.Subset(data, share)
    begin = share.start
    for batch in torch.utils.data.DataLoader(own, batch_size=batch_size, shuffle=False, collate_fn=_collate):
        ids = np.arange(begin, min(begin + batch_size, share.stop), dtype=np.int64)
        begin += batch_size
        yield ids, batch


def _collate(items: list[Any]) -> Any:
    try:
        return torch.utils.data.default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise BatchError(
            f"The samples of data don't go into one batch: {error}. Pad samples of different sizes and turn what they "
            "hold into tensors: pass an iterable of (ids, batch), such as "
            "((ids, collate([dataset[i] for i in ids])) for ids in torch.arange(len(dataset)).split(32))."
        ) from error


def _from_pairs(data: Iterable[Any]) -> Iterator[tuple[np.ndarray, Any]]:
    for item in data:
        if isinstance(item, Mapping):
            raise SampleIdError(
                "data yields dicts where pairs (ids, batch) are needed. Pass a map-style Dataset, whose indices become "
                "the ids, or give each sample an integer id and take it out of the batch: "
                "((batch.pop('id'), batch) for batch in loader)."
            )
        if not isinstance(item, (list, tuple)) or len(item) != 2:
            raise SampleIdError(
                f"data yields a {type(item).__name__} where a pair (ids, batch) is needed. {TWO_WAYS_OUT}"
            )
        ids, batch = item
        yield integer_ids(ids), batch


def integer_ids(ids: Any) -> np.ndarray:
    """ids as int64 [n], from a tensor, an array or a list."""
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy() if ids.dtype != torch.bfloat16 else ids.float().cpu().numpy()
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "iu":
        shape = "x".join(map(str, array.shape)) or "scalar"
        raise SampleIdError(
            f"Sample ids must be integers, one for each sample; these are {array.dtype} of shape {shape}. "
            f"{TWO_WAYS_OUT}"
        )
    if len(array) == 0:
        raise BatchError("A batch is empty. Leave out batches without samples.")
    if array.dtype == np.uint64 and array.max() > np.iinfo(np.int64).max:
        raise SampleIdError("A sample id is larger than a 64-bit signed integer can hold.")
    return array.astype(np.int64)


def input_form(batch: Any, samples: int) -> tuple[tuple[int, ...], str] | None:
    """The shape and dtype of one input; None where inputs are not one tensor."""
    inputs = _inputs(batch, samples)
    return None if inputs is None else (tuple(inputs.shape[1:]), str(inputs.dtype).removeprefix("torch."))


def inputs_of(batch: Any, samples: int) -> Tensor:
    """The batch's one tensor of inputs, on the CPU: the first of (inputs, targets), or the only one of a dict."""
    inputs = _inputs(batch, samples)
    if inputs is None:
        raise BatchError(
            "inputs=True keeps the inputs of batches like (inputs, targets), where inputs is one tensor with the "
            "samples in its first dimension; this batch has none such. Record with inputs=False."
        )
    if inputs.layout != torch.strided:
        raise BatchError(
            "inputs=True keeps dense inputs, and these are sparse. Pass batches of inputs.to_dense(), or record with "
            "inputs=False."
        )
    return inputs.detach().cpu().clone()


def _inputs(batch: Any, samples: int) -> Tensor | None:
    if isinstance(batch, Mapping):
        others = [value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)]
        inputs = others[0] if len(others) == 1 else None
    else:
        inputs = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    return inputs if isinstance(inputs, Tensor) and _has(samples, inputs) else None
