"""Settles how the gradients of a new kind of batches are had, by comparing with plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from metaql.errors import BatchError, ModelStateError, UnsupportedParameterError
from metaql.storage.recording.aligned import AlignedUse
from metaql.storage.recording.alignment import Alignment, align, probes
from metaql.storage.recording.batch_run import BatchRun, backward
from metaql.storage.recording.batches import take
from metaql.storage.recording.mixture import Mixture, mixture_of
from metaql.storage.recording.ownership import require_unmixed
from metaql.storage.recording.plan import CAPTURED, FUNCTION, LOOP, UNUSED, WITHIN, Plan, aligned
from metaql.storage.recording.replayed import Gradients, by_function, by_loop, within_batch
from metaql.storage.recording.sample_blocks import has_same_form, parameter_gradient, require_same_form
from metaql.storage.recording.self_check import disagreeing, require_same_losses
from metaql.storage.schema import Layer


@dataclass(frozen=True)
class Examination:
    """What came of it: the plan, and what it replays for the batch that was examined.

    ``reference`` has the gradients of a few samples by plain autograd.
    """

    plan: Plan
    replayed: Gradients
    reference: Gradients


def examine(run: BatchRun, layers: Sequence[Layer]) -> Examination:
    """Finds the samples in each operation and a route for each parameter; ``layers`` are those formed already."""
    alignments = _align(run)
    uses = aligned(run, alignments)
    reference, can_cut = _reference(run)
    mixture = mixture_of(run)
    unused = set() if run.hidden else set(run.parameters) - set(mixture.gradients)
    captured = _confirmed(run, alignments, uses, reference, mixture) - unused
    unlike = _unlike(layers, uses, captured | unused)
    captured, unused = captured - unlike, unused - unlike
    rest = set(run.parameters) - captured - unused
    routes = {**dict.fromkeys(captured, CAPTURED), **dict.fromkeys(unused, UNUSED)}
    routes.update(_replay_routes(run, rest, reference) if can_cut else dict.fromkeys(rest, WITHIN))
    plan, replayed = _confirm_replayed(run, Plan(alignments, routes), mixture)
    return Examination(plan, replayed, reference)


def _align(run: BatchRun) -> list[Alignment | None]:
    uses = run.capture.uses
    if run.hidden:
        return [None] * len(uses)
    edges = run.edges
    return align(
        [use.leading for use in uses],
        run.samples,
        lambda sample: [use.lead(dy) for use, dy in zip(uses, backward(run.values[sample], edges), strict=True)],
        probes(run.samples),
    )


def _reference(run: BatchRun) -> tuple[Gradients, bool]:
    """The gradients of a few samples by plain autograd, and whether samples can be cut out of the batch."""
    chosen = probes(run.samples)
    try:
        gradients, alone = by_loop(run.function, run.parameters, run.batch, run.samples, chosen)
    except (BatchError, RuntimeError, IndexError, KeyError, TypeError, ValueError) as cutting:
        require_unmixed(run)
        again = run.function(run.batch).detach()
        require_same_losses(again, run.values.detach(), run.precision, "computed again")
        try:
            return within_batch(run.values, run.parameters, chosen), False
        except RuntimeError:
            raise UnsupportedParameterError(
                "No sample can be cut out of this batch, and the model can't be differentiated sample by sample "
                f"within it. Pass batches whose tensors have the samples in their first dimension. ({cutting})"
            ) from cutting
    require_same_losses(alone, run.values.detach()[chosen], run.precision)
    return gradients, True


def _confirmed(
    run: BatchRun,
    alignments: Sequence[Alignment | None],
    uses: Sequence[AlignedUse],
    reference: Gradients,
    mixture: Mixture,
) -> set[str]:
    """The parameters whose captured uses add up to what autograd finds for a few samples, and for all mixed."""
    if run.hidden:
        return set()
    lost = {
        name
        for use, alignment, dy in zip(run.capture.uses, alignments, run.dys, strict=True)
        if alignment is None and dy is not None
        for name in (use.weight, use.bias)
    }
    names = {name for use in uses for name in (use.captured.weight, use.captured.bias) if name is not None}
    chosen = probes(run.samples)
    got = {
        name: parameter_gradient(name, tuple(run.parameters[name].shape), uses, chosen)
        for name in names - lost - set(run.capture.other)
    }
    doubtful = disagreeing(got, reference, run.precision)
    if doubtful:
        # Alone, a sample may fall on the other side of a kink by rounding; within its batch it can't.
        within = within_batch(run.values, run.parameters, chosen)
        doubtful = disagreeing({name: got[name] for name in doubtful}, within, run.precision)
    sound = set(got) - doubtful
    return sound - mixture.disagreeing_uses(uses, sound, run.precision)


def _unlike(layers: Sequence[Layer], uses: Sequence[AlignedUse], given: set[str]) -> set[str]:
    """The parameters of layers whose factors do not express what this batch does with them; they are replayed."""
    unlike: set[str] = set()
    for layer in layers:
        if layer.unfold is not None:
            # It is kept as the convolution's inputs, which whole gradients have none of.
            require_same_form(layer, uses, given)
        elif not has_same_form(layer, uses, given):
            unlike |= {each.name for each in layer.parameters}
    return unlike


def _replay_routes(run: BatchRun, names: set[str], reference: Gradients) -> dict[str, str]:
    """By torch.func where that works and agrees, else one by one."""
    if not names:
        return {}
    chosen = probes(run.samples)
    try:
        got = by_function(run.function, run.some(names), take(run.batch, run.samples, chosen), len(chosen))
    except Exception:
        # Whatever torch.func stumbles over, plain autograd is asked instead.
        return dict.fromkeys(names, LOOP)
    wrong = disagreeing(got, reference, run.precision, most=True)
    return {name: LOOP if name in wrong else FUNCTION for name in names}


def _confirm_replayed(run: BatchRun, plan: Plan, mixture: Mixture) -> tuple[Plan, Gradients]:
    """The plan and what it replays, after the whole batch's were compared with the mixture's."""
    replayed = plan.replay(run)
    wrong = mixture.disagreeing(replayed, run.precision)
    if by_loop_instead := wrong & plan.by(FUNCTION):
        plan = Plan(plan.alignments, {**plan.routes, **dict.fromkeys(by_loop_instead, LOOP)})
        replayed = plan.replay(run)
        wrong = mixture.disagreeing(replayed, run.precision)
    if wrong:
        raise ModelStateError(
            f"The gradients of {', '.join(map(repr, sorted(wrong)))} for samples alone do not add up to those "
            "within the batch: a sample's loss depends on other samples (a contrastive loss, statistics over the "
            "batch), so it has no gradient of its own. Give losses= that look at one sample each."
        )
    return plan, replayed
