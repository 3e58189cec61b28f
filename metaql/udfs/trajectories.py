"""The sides of short forms that follow a training run: recorded steps, and gradients at every checkpoint."""

from __future__ import annotations

from metaql.errors import QueryError
from metaql.storage.manifest import Collection
from metaql.udfs.hydra_weights import group_patterns
from metaql.udfs.operators import relation, side_of
from metaql.udfs.quoting import literal, quoted
from metaql.udfs.table_functions import Asked


def schema(asked: Asked) -> str:
    """Where the store's relations are."""
    return f"{quoted(asked.source.name)}.main"


def steps_of(asked: Asked, side: str) -> str:
    """The recorded steps of the split that an argument names: ``sample_id``, ``step``, ``gradient``."""
    split = _split(asked, side, [each for each in _collections(asked) if each.checkpoint is None], "steps")
    return (
        f"(SELECT sample_id, step, gradient FROM {schema(asked)}.gradients"
        f" WHERE split = {literal(split)} AND step IS NOT NULL)"
    )


def checkpoints_of(asked: Asked, side: str) -> str:
    """The split's gradients at all checkpoints or the one asked for: ``sample_id``, ``checkpoint``, ``gradient``."""
    recorded = [each for each in _collections(asked) if each.checkpoint is not None]
    split = _split(asked, side, recorded, "gradients at checkpoints")
    only = "" if asked.call.checkpoint is None else f" AND checkpoint = {asked.call.checkpoint}"
    return (
        f"(SELECT sample_id, checkpoint, gradient FROM {schema(asked)}.gradients"
        f" WHERE split = {literal(split)} AND checkpoint IS NOT NULL{only})"
    )


def query_side(asked: Asked) -> tuple[str, int]:
    """What stands for ``query`` in FROM, and the checkpoint whose gradients it has.

    Of a SELECT that is only known where there is one checkpoint, or where the call says it.
    """
    collected = [(each.split.lower(), each.checkpoint) for each in _collections(asked) if each.checkpoint is not None]
    if not collected:
        raise QueryError(
            f"{asked.name}(…): no gradients were collected at a checkpoint. Call recorder.checkpoint(optimizer) after "
            "the steps, and recorder.collect(…, 'validation') there"
        )
    text, given = asked.call.query, asked.call.checkpoint
    own = [number for split, number in collected if text is not None and split == text.lower()]
    if own:
        return side_of(asked, "query"), max(own) if given is None else given
    among = {number for _, number in collected} if given is None else {given}
    if len(among) > 1:
        raise QueryError(
            f"{asked.where('query')}: there are gradients at the checkpoints {', '.join(map(str, sorted(among)))}. Say "
            "at which those of the query are, with checkpoint := …"
        )
    return relation(asked, "query"), among.pop()


def query_in_group(asked: Asked, gradient: str, parameters: str) -> str:
    """The query side of a term, as SQL: of one parameter group, where that is not all that is recorded."""
    return gradient if group_patterns(asked.source.store) == ["*"] else f"layers({gradient}, {parameters})"


def _collections(asked: Asked) -> tuple[Collection, ...]:
    return asked.source.store.manifest.collections


def _split(asked: Asked, side: str, recorded: list[Collection], what: str) -> str:
    """The split's name as the store has it."""
    text = getattr(asked.call, side)
    names = dict.fromkeys(each.split for each in recorded)
    for name in names:
        if text is not None and name.lower() == text.lower():
            return name
    there = f"recorded are those of {', '.join(names)}" if names else "none were recorded"
    how = "recorder.step(…, split=…) records steps" if what == "steps" else "recorder.collect records them"
    raise QueryError(f"{asked.where(side)}: give the name of a split with {what}; {there}. {how}")
