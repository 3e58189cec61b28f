"""What has to be true of a watched step before its samples' gradients are taken from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from math import gcd

import torch

from metaql.errors import ModelStateError, NotFiniteError, SampleIdError, UnsupportedParameterError
from metaql.storage.recording.aligned import AlignedUse, mixtures
from metaql.storage.recording.alignment import Alignment, candidates
from metaql.storage.recording.capture import CapturedUse
from metaql.storage.recording.self_check import disagreeing, exceeds_rounding, shares
from metaql.storage.recording.watched_step import WatchedStep, several_passes

NO_FACTORS = "Leave {} out with layers=, or record at checkpoints with collect, which has a way for every parameter."


def require_captured(watched: WatchedStep) -> None:
    """Raises unless one backward pass ran, through operations that all have factors."""
    _require_both_passes(watched)
    for use in watched.uses:
        use.require_unchanged()
    if _had_passes_of_their_own(watched):
        raise several_passes(watched.passes)
    seen = {name for use, dy in zip(watched.uses, watched.dys, strict=True) if dy is not None for name in _names(use)}
    lost = [name for name in watched.gradients if name in watched.other or name not in seen]
    if lost:
        share = shares(watched.gradients)
        listed = ", ".join(
            f"'{name}' ({share[name]:.0%} of the squared gradient, in {watched.other.get(name, 'unseen code')})"
            for name in lost
        )
        outside = (
            "" if _ran_forward(watched) else " If the forward pass ran outside of recorder.step(...), put it in too."
        )
        raise UnsupportedParameterError(
            f"Along the trajectory these parameters have no factors: {listed}. {NO_FACTORS.format('them')}{outside}"
        )


def _require_both_passes(watched: WatchedStep) -> None:
    if watched.gradients or any(dy is not None for dy in watched.dys):
        return
    if watched.passes:
        raise ModelStateError(
            "The backward pass inside recorder.step(...) came to none of the recorded parameters. Call it on a loss of "
            "the model that this recorder was made with, of parameters that layers= does not leave out."
        )
    if _ran_forward(watched):
        raise ModelStateError(
            "The model ran inside recorder.step(...), but no backward pass did. Call loss.backward() before it ends."
        )
    raise ModelStateError(
        "No backward pass ran inside recorder.step(...), nor did the recorded model, with gradients. Put the forward "
        "pass and loss.backward() into it."
    )


def _ran_forward(watched: WatchedStep) -> bool:
    return bool(watched.uses or watched.other)


def _had_passes_of_their_own(watched: WatchedStep) -> bool:
    """Whether different backward passes came to different uses of the same parameter."""
    found: dict[str, set[frozenset[int]]] = defaultdict(set)
    for use, passes in zip(watched.uses, watched.passes_of_uses, strict=True):
        if passes:
            for name in _names(use):
                found[name].add(frozenset(passes))
    return any(one.isdisjoint(other) for each in found.values() for one, other in combinations(each, 2))


def _names(use: CapturedUse) -> set[str]:
    return {name for name in (use.weight, use.bias) if name is not None}


def require_finite_pass(watched: WatchedStep) -> None:
    """Raises if NaN or infinity came back to a use: then nothing can be said of where the samples are."""
    for use, dy in zip(watched.uses, watched.dys, strict=True):
        if dy is not None and not bool(dy.isfinite().all()):
            raise NotFiniteError(
                f"The backward pass of this step brings NaN or infinity to what uses '{use.weight or use.bias}'. Look "
                "at the losses, inputs and targets of its samples, at the learning rate, or for an overflow in half "
                "precision."
            )


def aligned_uses(watched: WatchedStep, alignments: Sequence[Alignment | None] | None) -> list[AlignedUse]:
    """What the backward pass came to, samples first; an error where they can't be found."""
    if alignments is None:
        raise ModelStateError(
            "The backward pass could not be watched: call loss.backward() on the loss itself inside recorder.step(...)."
        )
    found = [
        (use, alignment, dy)
        for use, alignment, dy in zip(watched.uses, alignments, watched.dys, strict=True)
        if dy is not None
    ]
    if any(alignment is None or alignment.axis for _, alignment, _ in found):
        _require_one_run([use for use, _, _ in found], watched.samples)
    uses = []
    for use, alignment, dy in found:
        if alignment is None:
            raise _not_found(use, watched.samples, shared=any(alignments))
        uses.append(AlignedUse(use, alignment, watched.samples, dy))
    return uses


def _require_one_run(uses: Sequence[CapturedUse], samples: int) -> None:
    """Raises if the model ran on one part of the batch after the other."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for use in uses:
        if use.leading and use.leading[0] != use.use.inputs.shape[0]:
            return
        for name in _names(use):
            sizes[name].append(use.leading[0] if use.leading else 1)
    runs = gcd(*map(len, sizes.values()))
    first, shape = uses[0].weight or uses[0].bias, list(uses[0].use.inputs.shape)
    if runs > 1 and all(sum(each) % samples == 0 and samples not in each for each in sizes.values()):
        raise SampleIdError(
            f"ids holds {samples} samples, but the model ran {runs} times inside recorder.step(...), "
            f"'{first}' first on an input of shape {shape}: on a part of the batch each time, it seems. Run the whole "
            "batch at once; or put each part's forward and backward pass into a recorder.step(...) of its own, with "
            "its ids, and let reduction= say what factor its samples have. Gradients add up until the optimizer's step "
            "as before."
        )


def _not_found(use: CapturedUse, samples: int, shared: bool) -> Exception:
    name, shape = use.weight or use.bias, list(use.use.inputs.shape)
    if shared and not candidates(use.leading, samples):
        return UnsupportedParameterError(
            f"Along the trajectory '{name}' has no factors: it is used on an input of shape {shape} that all samples "
            f"share. {NO_FACTORS.format('it')}"
        )
    return SampleIdError(
        f"ids holds {samples} samples, but the operation that uses '{name}' saw an input of shape {shape}, in which "
        "they can't be told apart. Give one id for each sample of the batch, in its order; a model that mixes its "
        "samples has to be recorded with collect."
    )


def require_sums(uses: Sequence[AlignedUse], watched: WatchedStep) -> None:
    """Raises unless the captured uses add up to what the backward pass brought to each parameter."""
    coarsest = max((use.dy.dtype for use in uses), key=lambda dtype: torch.finfo(dtype).eps)
    got = mixtures(uses, watched.gradients.keys())
    expected = {name: each[None].cpu() for name, each in watched.gradients.items()}
    wrong = disagreeing(got, expected, coarsest)
    # Batch norm takes a bias out again: terms cancel, and what is left of them is rounding.
    sizes = mixtures(uses, wrong, magnitudes=True)
    wrong = {name for name in wrong if exceeds_rounding(got[name] - expected[name].flatten(1), sizes[name], coarsest)}
    if wrong:
        raise UnsupportedParameterError(
            f"The samples' gradients of {', '.join(map(repr, sorted(wrong)))} do not add up to what the backward pass "
            "brought: it is changed by a hook, or used where it can't be watched. Leave it out with layers=, or record "
            "with collect."
        )
