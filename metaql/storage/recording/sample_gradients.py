"""Per-sample gradients of a model, batch by batch, in the layers and layouts that a store keeps.

For each batch: one forward pass that captures operations, one backward pass to their outputs (weights'
own gradients are never formed), and each layer's factors from the two. Parameters that this does not
give whole are run again sample by sample. What a batch's shape leaves open is settled, and compared with
plain autograd, the first time that shape is seen.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.errors import BatchError, ModelStateError, UnsupportedParameterError
from metaql.storage.blocks import Block
from metaql.storage.recording import losses, sample_blocks
from metaql.storage.recording.aligned import AlignedUse, mixtures
from metaql.storage.recording.alignment import LEAK, Alignment, align, candidates, owns, probes
from metaql.storage.recording.batches import has_sparse, take
from metaql.storage.recording.capture import Capture
from metaql.storage.recording.layer_outputs import LayerOutputs
from metaql.storage.recording.layering import form_layers
from metaql.storage.recording.losses import ModelLosses, require_one_per_sample
from metaql.storage.recording.replayed import Gradients, by_function, by_loop, within_batch
from metaql.storage.recording.sample_blocks import has_same_form, make_block, parameter_gradient, require_same_form
from metaql.storage.recording.self_check import coarsest, disagreeing, require_same_losses, shares
from metaql.storage.recording.wrappers import as_written
from metaql.storage.schema import Layer

# How a parameter's gradient is had: from captured operations, by torch.func, by a loop over samples that
# are cut out of the batch or (where that can't be done) differentiated within it; or no loss depends on it.
CAPTURED, FUNCTION, LOOP, WITHIN, UNUSED = "captured", "function", "loop", "within", "unused"

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class BatchGradients:
    """What one batch gave: losses [n], logits [n, classes] where known, and each layer's block by its name.

    ``embeddings`` are the outputs of the modules that were watched, [n, ...], float32 on the CPU.
    """

    losses: Tensor
    logits: Tensor | None
    blocks: Mapping[str, Block]
    embeddings: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Run:
    """A forward pass, and what the backward pass brought to each captured operation.

    ``unseen`` says of each parameter that no watched function was called with whether the losses depend on
    it all the same. ``hidden`` is set where operations ran out of sight.
    """

    batch: Any
    samples: int
    values: Tensor
    logits: Tensor | None
    capture: Capture
    dys: Sequence[Tensor | None]
    unseen: Mapping[str, bool]
    hidden: bool

    @property
    def signature(self) -> Signature:
        """All that alignments and routes depend on."""
        uses = tuple(
            (use.weight, use.bias, use.use.operation.kind, use.leading, use.use.geometry, dy is None)
            for use, dy in zip(self.capture.uses, self.dys, strict=True)
        )
        others = frozenset(self.capture.other), frozenset(self.unseen.items())
        return self.samples, self.hidden, uses, *others, self.capture.rows.path

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest type that gradients pass through."""
        return coarsest(self.values)


@dataclass(frozen=True)
class _Plan:
    """What was settled for all batches of one signature."""

    alignments: Sequence[Alignment | None]
    routes: Mapping[str, str]

    def by(self, *routes: str) -> set[str]:
        return {name for name, route in self.routes.items() if route in routes}


@dataclass(frozen=True)
class _Mixture:
    """Σ_k weights_k · loss_k, and its gradients; a parameter that no loss depends on has none.

    Right gradients of wrong samples, or of only some samples, do not add up to these.
    """

    weights: Tensor
    gradients: Mapping[str, Tensor]

    def disagreeing(self, replayed: Gradients, precision: torch.dtype) -> set[str]:
        """The names whose gradients [n, *shape], computed once more, add up to something else."""
        got = {name: torch.tensordot(self.weights.to(each), each, 1)[None].cpu() for name, each in replayed.items()}
        return self._differing(got, precision, slack=30)

    def disagreeing_uses(self, uses: Sequence[AlignedUse], names: set[str], precision: torch.dtype) -> set[str]:
        """The names whose captured uses add up to something else."""
        return self._differing(mixtures(uses, names, self.weights), precision, slack=1)

    def _differing(self, got: Mapping[str, Tensor], precision: torch.dtype, slack: float) -> set[str]:
        # What is not finite here is found, with the sample's id, in the blocks.
        expected = {name: each[None].cpu() for name, each in self.gradients.items() if bool(each.isfinite().all())}
        known = {name: each for name, each in got.items() if name in expected}
        return disagreeing(known, expected, precision, slack=slack)


class SampleGradients:
    """Turns batches into blocks of per-sample gradients of the given parameters.

    ``layers`` are those of an existing store, which then must fit; None forms them from the first batch, and
    ``settle`` may put others in their place.
    """

    def __init__(
        self,
        function: ModelLosses,
        parameters: Mapping[str, torch.nn.Parameter],
        dtype: str,
        layers: tuple[Layer, ...] | None = None,
        settle: Callable[[tuple[Layer, ...]], tuple[Layer, ...]] = lambda formed: formed,
    ) -> None:
        self.layers = layers
        self._settle = settle
        self._losses = function
        self._parameters = parameters
        self._dtype = dtype
        self._plans: dict[Signature, _Plan] = {}
        self._warned: set[str] = set()
        self._batches: Counter[Signature] = Counter()

    def of(self, batch: Any, ids: np.ndarray, watched: LayerOutputs | None = None) -> BatchGradients:
        """The gradients of the batch of these samples, which is on the model's device already."""
        samples = len(ids)
        with torch.enable_grad(), as_written():
            run = self._run(batch, samples, watched)
            losses.require_finite(run.values.detach(), ids)
            embeddings = {} if watched is None else self._embeddings(run, watched)
            plan, replayed = self._known(run) or self._examine(run)
        uses = [use for use in _aligned(run, plan.alignments) if not _replaces(replayed, use)]
        assert self.layers is not None
        blocks = {layer.name: make_block(layer, uses, replayed, samples) for layer in self.layers}
        sample_blocks.require_finite(blocks, ids, self._dtype)
        return BatchGradients(run.values.detach(), run.logits, blocks, embeddings)

    def _embeddings(self, run: _Run, watched: LayerOutputs) -> dict[str, Tensor]:
        return watched.of_samples(
            self._losses,
            run.batch,
            run.samples,
            lambda sample, edges: _backward(run.values[sample], edges),
            run.precision,
            run.capture.rows,
        )

    def _run(self, batch: Any, samples: int, watched: LayerOutputs | None) -> _Run:
        constants = [*self._losses.parameters(), *self._losses.buffers()]
        capture = Capture(self._parameters, samples, constants, follow_all=watched is not None)
        with capture, nullcontext() if watched is None else watched.watching():
            result = self._losses.evaluate(batch)
        require_one_per_sample(result.values, samples)
        logits = None if result.logits is None else result.logits.detach()
        seen = {name for use in capture.uses for name in (use.weight, use.bias)} | set(capture.other)
        unseen = [name for name in self._parameters if name not in seen]
        targets = [*(use.edge for use in capture.uses), *(self._parameters[name] for name in unseen)]
        try:
            gradients = _backward(result.values.sum(), targets)
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            # Reentrant activation checkpointing runs its operations out of sight, and refuses this call.
            nothing = [None] * len(capture.uses)
            return _Run(batch, samples, result.values, logits, capture, nothing, dict.fromkeys(unseen, True), True)
        for use in capture.uses:
            use.require_unchanged()
        dys = gradients[: len(capture.uses)]
        found = {name: each is not None for name, each in zip(unseen, gradients[len(dys) :], strict=True)}
        return _Run(batch, samples, result.values, logits, capture, dys, found, False)

    def _known(self, run: _Run) -> tuple[_Plan, Gradients] | None:
        """The plan for batches like this one, if there is one that holds for this one, and what it replays."""
        plan = self._plans.get(run.signature)
        self._batches[run.signature] += 1
        # Losses may compare samples only where the data have something to compare. That is looked for now and then, in
        # the 2nd, 4th, 8th, … batch of a kind, which costs next to nothing.
        is_due = self._batches[run.signature].bit_count() == 1
        if plan is None or ((run.capture.rows.by_data or is_due) and not _owned(run, plan)):
            return None
        try:
            return plan, self._replay(run, plan)
        except RuntimeError:
            # What torch.func does may depend on the data, and so may what it can't do.
            return None

    def _examine(self, run: _Run) -> tuple[_Plan, Gradients]:
        """Settles alignments and routes for batches like this one, and forms the layers or checks them.

        With the plan come the gradients of the parameters that have to be replayed.
        """
        alignments = _align(run)
        uses = _aligned(run, alignments)
        reference, can_cut = self._reference(run)
        mixture = self._mixture(run)
        unused = set() if run.hidden else set(self._parameters) - set(mixture.gradients)
        captured = self._confirmed(run, alignments, uses, reference, mixture) - unused
        unlike = self._unlike(uses, captured | unused)
        captured, unused = captured - unlike, unused - unlike
        rest = set(self._parameters) - captured - unused
        routes = {**dict.fromkeys(captured, CAPTURED), **dict.fromkeys(unused, UNUSED)}
        routes.update(self._replay_routes(run, rest, reference) if can_cut else dict.fromkeys(rest, WITHIN))
        routes, replayed = self._confirm_replayed(run, _Plan(alignments, routes), mixture)
        self._warn_of_slow(run.batch, routes, reference)
        if self.layers is None:
            self.layers = self._settle(form_layers(self._parameters, uses, captured, unused, self._dtype))
        plan = self._plans[run.signature] = _Plan(alignments, routes)
        return plan, replayed

    def _unlike(self, uses: Sequence[AlignedUse], given: set[str]) -> set[str]:
        """The parameters of layers whose factors do not express what this batch does with them; they are replayed."""
        unlike: set[str] = set()
        for layer in self.layers or ():
            if layer.unfold is not None:
                # It is kept as the convolution's inputs, which whole gradients have none of.
                require_same_form(layer, uses, given)
            elif not has_same_form(layer, uses, given):
                unlike |= {each.name for each in layer.parameters}
        return unlike

    def _mixture(self, run: _Run) -> _Mixture:
        """A random mixture of all the samples' losses, differentiated by plain autograd."""
        weights = _random_weights(run.samples)
        if run.hidden:
            return _Mixture(weights, {})
        loss = (run.values * weights.to(run.values)).sum()
        gradients = zip(self._parameters, _backward(loss, list(self._parameters.values())), strict=True)
        return _Mixture(weights, {name: each.to_dense() for name, each in gradients if each is not None})

    def _confirm_replayed(self, run: _Run, plan: _Plan, mixture: _Mixture) -> tuple[dict[str, str], Gradients]:
        """Replayed gradients and their routes, after the whole batch's were compared with the mixture's."""
        routes = dict(plan.routes)
        replayed = self._replay(run, plan)
        wrong = mixture.disagreeing(replayed, run.precision)
        if by_loop_instead := {name for name in wrong if routes[name] == FUNCTION}:
            routes.update(dict.fromkeys(by_loop_instead, LOOP))
            replayed = self._replay(run, _Plan(plan.alignments, routes))
            wrong = mixture.disagreeing(replayed, run.precision)
        if wrong:
            raise ModelStateError(
                f"The gradients of {', '.join(map(repr, sorted(wrong)))} for samples alone do not add up to those "
                "within the batch: a sample's loss depends on other samples (a contrastive loss, statistics over the "
                "batch), so it has no gradient of its own. Give losses= that look at one sample each."
            )
        return routes, replayed

    def _reference(self, run: _Run) -> tuple[Gradients, bool]:
        """The gradients of a few samples by plain autograd, and whether samples can be cut out of the batch."""
        chosen = probes(run.samples)
        try:
            gradients, alone = by_loop(self._losses, self._parameters, run.batch, run.samples, chosen)
        except (BatchError, RuntimeError, IndexError, KeyError, TypeError, ValueError) as cutting:
            _require_unmixed(run)
            again = self._losses(run.batch).detach()
            require_same_losses(again, run.values.detach(), run.precision, "computed again")
            try:
                return within_batch(run.values, self._parameters, chosen), False
            except RuntimeError:
                raise UnsupportedParameterError(
                    "No sample can be cut out of this batch, and the model can't be differentiated sample by sample "
                    f"within it. Pass batches whose tensors have the samples in their first dimension. ({cutting})"
                ) from cutting
        require_same_losses(alone, run.values.detach()[chosen], run.precision)
        return gradients, True

    def _confirmed(
        self,
        run: _Run,
        alignments: Sequence[Alignment | None],
        uses: Sequence[AlignedUse],
        reference: Gradients,
        mixture: _Mixture,
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
            name: parameter_gradient(name, tuple(self._parameters[name].shape), uses, chosen)
            for name in names - lost - set(run.capture.other)
        }
        doubtful = disagreeing(got, reference, run.precision)
        if doubtful:
            # Alone, a sample may fall on the other side of a kink by rounding; within its batch it can't.
            within = within_batch(run.values, self._parameters, chosen)
            doubtful = disagreeing({name: got[name] for name in doubtful}, within, run.precision)
        sound = set(got) - doubtful
        return sound - mixture.disagreeing_uses(uses, sound, run.precision)

    def _replay_routes(self, run: _Run, names: set[str], reference: Gradients) -> dict[str, str]:
        """By torch.func where that works and agrees, else one by one."""
        if not names:
            return {}
        chosen = probes(run.samples)
        parameters = {name: self._parameters[name] for name in names}
        try:
            got = by_function(self._losses, parameters, take(run.batch, run.samples, chosen), len(chosen))
        except Exception:
            # Whatever torch.func stumbles over, plain autograd is asked instead.
            return dict.fromkeys(names, LOOP)
        wrong = disagreeing(got, reference, run.precision, most=True)
        return {name: LOOP if name in wrong else FUNCTION for name in names}

    def _replay(self, run: _Run, plan: _Plan) -> Gradients:
        replayed: Gradients = {}
        if names := plan.by(FUNCTION):
            replayed |= by_function(self._losses, self._some(names), run.batch, run.samples)
        if names := plan.by(LOOP):
            replayed |= by_loop(self._losses, self._some(names), run.batch, run.samples)[0]
        if names := plan.by(WITHIN):
            replayed |= within_batch(run.values, self._some(names), range(run.samples))
        return replayed

    def _some(self, names: set[str]) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self._parameters.items() if name in names}

    def _warn_of_slow(self, batch: Any, routes: Mapping[str, str], reference: Gradients) -> None:
        slow = {name for name, route in routes.items() if route in (LOOP, WITHIN)} - self._warned
        if slow:
            self._warned |= slow
            share = shares(reference)
            listed = ", ".join(f"{name} ({share[name]:.0%} of the squared gradient)" for name in sorted(slow))
            warnings.warn(
                f"Recorded by running samples one by one, which is exact but slow: {listed}. To go faster, leave them "
                f"out with layers={', or pass dense inputs' if has_sparse(batch) else ''}.",
                stacklevel=2,
            )


def _backward(loss: Tensor, targets: Sequence[Any]) -> Sequence[Tensor | None]:
    if not targets:
        return ()
    return torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)


def _align(run: _Run) -> list[Alignment | None]:
    uses = run.capture.uses
    if run.hidden:
        return [None] * len(uses)
    edges = [use.edge for use in uses]
    return align(
        [use.leading for use in uses],
        run.samples,
        lambda sample: [use.lead(dy) for use, dy in zip(uses, _backward(run.values[sample], edges), strict=True)],
        probes(run.samples),
    )


def _aligned(run: _Run, alignments: Sequence[Alignment | None]) -> list[AlignedUse]:
    return [
        AlignedUse(use, alignment, run.samples, dy)
        for use, alignment, dy in zip(run.capture.uses, alignments, run.dys, strict=True)
        if alignment is not None and dy is not None
    ]


def _require_unmixed(run: _Run) -> None:
    """Raises if several samples' losses reach the same of what surely are samples' rows."""
    if run.hidden:
        return
    edges = [use.edge for use in run.capture.uses]
    # Rows need not lie as the samples do, such as the nodes of graphs; but they are one sample's each.
    reached: dict[int, Tensor] = {}
    strangers: set[int] = set()
    for sample in range(run.samples):
        for place, (use, dy) in enumerate(zip(run.capture.uses, _backward(run.values[sample], edges), strict=True)):
            ways = candidates(use.leading, run.samples)
            if dy is None or not ways:
                continue
            rows = use.use.lead(dy).reshape(*use.leading, -1).abs().sum(-1)
            reached[place] = (rows > LEAK * rows.sum()) + reached.get(place, torch.zeros_like(rows, dtype=torch.int64))
            if not any(owns(way, use.use.lead(dy), use.leading, run.samples, sample) for way in ways):
                strangers.add(place)
    if any(int(reached[place].max()) > 1 for place in strangers):
        raise ModelStateError(
            "A sample can't be run alone, and within its batch its loss depends on other samples, so it has no "
            "gradient of its own. Statistics over the batch and losses that compare samples do this. If each sample "
            "does have its own, pass batches whose tensors have the samples in their first dimension, or batches of "
            "one sample."
        )


def _random_weights(samples: int) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _owned(run: _Run, plan: _Plan) -> bool:
    """Whether what comes to each row grows with the loss of the sample that the plan gives it to, and with no other."""
    uses = _aligned(run, plan.alignments)
    if not uses:
        return True
    weights = _random_weights(run.samples)
    mixed = _backward((run.values * weights.to(run.values)).sum(), [use.captured.edge for use in uses])
    got, expected = {}, {}
    for number, (use, dy) in enumerate(zip(uses, mixed, strict=True)):
        if dy is None:
            return False
        got[str(number)] = replace(use, dy=dy).prefix
        expected[str(number)] = use.prefix * weights.to(use.prefix)[:, None, None]
    return not disagreeing(got, expected, run.precision)


def _replaces(replayed: Mapping[str, Tensor], use: AlignedUse) -> bool:
    return {use.captured.weight, use.captured.bias} - {None} <= set(replayed)
