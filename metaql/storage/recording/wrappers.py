"""What may stand around the user's model, or inside it, to run it elsewhere: the model itself is what is recorded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from metaql.errors import RecordingError, UnsupportedParameterError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def distributed(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around the model, if there is one."""
    outer: nn.Module | None = model
    while outer is not None and not isinstance(outer, DistributedDataParallel):
        outer = _inner(outer)
    return outer


def ranks_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that train the model together."""
    outer = distributed(model)
    return None if outer is None else outer.process_group


def runs_copies(model: nn.Module) -> bool:
    """Whether DataParallel runs copies of the parameters on several devices."""
    outer: nn.Module | None = model
    while outer is not None:
        if isinstance(outer, DataParallel) and len(outer.device_ids) > 1:
            return True
        outer = _inner(outer)
    return False


def require_whole(model: nn.Module) -> None:
    """Raises if the parameters are spread over processes, so that none has a whole gradient."""
    sharded = "torch.distributed.fsdp" in sys.modules and any(
        isinstance(each, sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel) for each in model.modules()
    )
    spread = "torch.distributed.tensor" in sys.modules and any(
        isinstance(each, sys.modules["torch.distributed.tensor"].DTensor) for each in model.parameters()
    )
    if sharded or spread:
        raise UnsupportedParameterError(
            "The parameters are spread over the processes (FSDP, fully_shard, DTensor), and a gradient is recorded "
            "whole. Train with DistributedDataParallel, or load the weights into the plain model and collect there."
        )


def as_written() -> AbstractContextManager[object]:
    """Within it, what torch.compile has compiled runs as it was written, so that each operation can be seen."""
    refusal = RecordingError("Recording itself can't be compiled: call the recorder outside of compiled functions.")
    if torch.compiler.is_compiling():
        raise refusal
    # Whoever compiled something has loaded this, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    try:
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:
        raise refusal from error
    return stance


@contextmanager
def unaveraged(model: nn.Module) -> Iterator[None]:
    """Within it, a backward pass of ours is not taken for the first of a static graph, which ends in an average."""
    ddp = distributed(model)
    static = ddp is not None and ddp.static_graph
    if ddp is not None:
        ddp.static_graph = False
    try:
        yield
    finally:
        if ddp is not None:
            ddp.static_graph = static


def _inner(model: nn.Module) -> nn.Module | None:
    inner = None
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        inner = model.module
    elif "torch._dynamo" in sys.modules and isinstance(model, sys.modules["torch._dynamo"].OptimizedModule):
        inner = model._orig_mod
    assert inner is None or isinstance(inner, nn.Module)
    return inner
