"""Recording by several processes at once, against the same by one, and against the loop over samples."""

from __future__ import annotations

import os
import re
import warnings

import numpy as np
import pytest
import torch

from metaql import errors
from metaql.storage import tables
from metaql.storage.check import check
from metaql.storage.curvatures import unpack
from metaql.storage.store import Store
from tests.recording import distributed_runs as runs
from tests.recording.ranks import run, values
from tests.recording.reference import assert_close, by_loop, gradients_of_rows


def contents(path):
    """(split, checkpoint, step, sample) => what is known of it and its gradient, from a sound store."""
    assert list(check(path)) == []
    store = Store.open(path)
    if not store.layers:
        return {}
    known = tables.outputs(store).to_pylist()
    gradients = gradients_of_rows(store, np.array([each["row"] for each in known]))
    whole = torch.cat([each for _, each in sorted(gradients.items())], dim=1)
    samples = {(each["split"], each["sample_id"]): each for each in tables.samples(store).to_pylist()}
    found = {}
    for each, gradient in zip(known, whole, strict=True):
        key = each["split"], each["checkpoint"], each["step"], each["sample_id"]
        assert key not in found
        outputs = torch.tensor([each["loss"] or 0, each["prediction"] or 0, each["confidence"] or 0])
        found[key] = samples.get((each["split"], each["sample_id"])), torch.cat([outputs.double(), gradient])
    return found


def assert_same(one, other):
    one, other = contents(one), contents(other)
    assert set(one) == set(other)
    for key, (known, numbers) in one.items():
        assert known == other[key][0]
        torch.testing.assert_close(numbers, other[key][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_collect_what_one_process_does(size, tmp_path):
    alone = runs.collect(0, tmp_path / "alone", wrap=False)
    outcomes = run(runs.collect, size, tmp_path / "run", tmp_path / "store")
    assert values(outcomes) == [alone] * size == [(1, runs.SAMPLES, 10)] * size
    assert_same(tmp_path / "store", tmp_path / "alone")
    store = Store.open(tmp_path / "store")
    assert len(store.manifest.collections) == 2 * size
    assert not list((tmp_path / "store" / "recording").iterdir())


def test_ranks_estimate_and_keep_outputs(tmp_path):
    first, second = values(run(runs.keep_outputs, 2, tmp_path / "run", tmp_path / "store"))
    assert [samples for samples, _ in first] == [samples for samples, _ in second] == [runs.SAMPLES] * 2
    store, rows = Store.open(tmp_path / "store"), np.arange(runs.SAMPLES)
    assert list(check(tmp_path / "store")) == []
    assert len(store.manifest.collections) == 2
    network, (words, _) = runs.network(), runs.data()
    expected = network(words).detach().float()
    ids = tables.outputs(store).column("sample_id").to_numpy()
    torch.testing.assert_close(torch.tensor(store.logits(rows).to_pylist()), expected[ids])
    torch.testing.assert_close(torch.tensor(store.embeddings("", rows).to_pylist()), expected[ids])
    hidden = network.hidden(network.words(words).mean(1)).detach().float()
    torch.testing.assert_close(torch.tensor(store.embeddings("hidden", rows).to_pylist()), hidden[ids])


def test_ranks_gather_the_curvature_that_one_process_does(tmp_path):
    assert runs.gather_curvature(0, tmp_path / "alone", wrap=False) == runs.SAMPLES
    assert values(run(runs.gather_curvature, 2, tmp_path / "run", tmp_path / "store")) == [runs.SAMPLES] * 2
    fitted = []
    for name in ("alone", "store"):
        store = Store.open(tmp_path / name)
        assert list(check(store.path)) == []
        fitted.append(unpack(store.layers, store.curvature(*store.manifest.curvatures), "ekfac"))
    for layer, alone in fitted[0].items():
        vector = torch.randn(alone.eigenvalues.numel(), dtype=torch.float64)
        torch.testing.assert_close(fitted[1][layer].precondition(vector), alone.precondition(vector))


@pytest.mark.parametrize(
    "find_unused, static_graph, accumulate", [(False, False, 1), (True, False, 1), (False, True, 1), (False, False, 2)]
)
def test_a_step_has_the_gradients_of_each_ranks_own_loss(find_unused, static_graph, accumulate, tmp_path):
    path, options = tmp_path / "store", (find_unused, static_graph, accumulate)
    ranks = values(run(runs.train, 2, tmp_path / "run", path, *options))
    plain = values(run(runs.train, 2, tmp_path / "plain", path, *options, False))
    for (_, weights), (_, undisturbed) in zip(ranks, plain, strict=True):
        assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)
    expected = {key: row for own, _ in ranks for key, row in own.items()}
    store = Store.open(path)
    known = [each for each in tables.gradients(store).to_pylist() if each["step"]]
    found = gradients_of_rows(store, np.array([each["row"] for each in known]))
    assert len(known) == len({key[1:] for key in expected})
    for name, gradients in found.items():
        for each, gradient in zip(known, gradients, strict=True):
            torch.testing.assert_close(gradient, expected[name, each["step"], each["sample_id"]], rtol=1e-9, atol=1e-12)
    steps = tables.steps(store).to_pylist()
    assert [each["step"] for each in steps] == list(range(1, 5 * accumulate + 1))
    assert [each["batch_size"] for each in steps] == [4] * 4 * accumulate + [5] * accumulate
    reductions = ["mean"] * 4 + ["weights"] if accumulate == 1 else ["weights"] * 10
    assert [each["reduction"] for each in steps] == reductions


def test_ranks_without_samples_wait_for_the_others(tmp_path):
    runs.collect_few(0, tmp_path / "alone", wrap=False)
    assert values(run(runs.collect_few, 3, tmp_path / "run", tmp_path / "store")) == [2, 2, 2]
    assert_same(tmp_path / "store", tmp_path / "alone")
    for outcome in run(runs.collect_nothing, 2, tmp_path / "nothing", tmp_path / "empty"):
        assert "holds no samples" in str(outcome.error)


@pytest.mark.parametrize(
    "failing, failure, kind, text",
    [
        (0, runs.killed, errors.RecordingError, "Another rank has ended"),
        (
            2,
            runs.broken,
            errors.RecordingError,
            "Rank 2 could not go on, .* FloatingPointError: the third word",
        ),
        (2, runs.interrupted, errors.RecordingError, "Rank 2 could not go on, .* KeyboardInterrupt"),
        (2, runs.killed, errors.RecordingError, "Another rank has ended, .* What was not committed"),
        (2, runs.empty, errors.BatchError, "Rank 2 could not go on, .* A batch is empty"),
        (2, runs.anothers, errors.SampleIdError, "Sample 0 of split 'train' comes from ranks 0 and 2"),
    ],
)
def test_a_collection_is_of_all_ranks_or_of_none(failing, failure, kind, text, tmp_path):
    outcomes = run(runs.fail, 3, tmp_path / "run", tmp_path / "store", failing, failure)
    failed = outcomes.pop(failing)
    for outcome in outcomes:
        assert type(outcome.error) is kind
        assert re.search(text, str(outcome.error))
    assert failed.exit == (-9 if failure is runs.killed else 0)
    assert {each.split for each in Store.open(tmp_path / "store").manifest.collections} == {"validation"}
    assert len(contents(tmp_path / "store")) == runs.SAMPLES
    assert not list((tmp_path / "store" / "recording").iterdir()) or failure is runs.killed
    # And somebody else goes on.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The last recording", UserWarning)
        runs.collect(0, tmp_path / "store", wrap=False)
    assert not list((tmp_path / "store" / "recording").iterdir())


@pytest.mark.parametrize(
    "what, text",
    [
        ("another folder", "is not the store that rank 0 writes to at .*store. Give every rank the same path"),
        ("another method", "call the same methods .* there called rank 0 collect, rank 1 checkpoint"),
        ("different data", "The ranks have different data"),
        ("another split", "different splits at once: 'train' by rank 0, 'test' by rank 1"),
        ("metadata of two types", "metadata do not go together: .*source"),
    ],
)
def test_ranks_that_differ_are_told_so(what, text, tmp_path):
    for outcome in run(runs.refused, 2, tmp_path / "run", tmp_path / "store", what):
        assert re.search(text, str(outcome.error))
    assert contents(tmp_path / "store") == {}


@pytest.mark.parametrize("where", ["before", "gradient"])
def test_a_step_is_of_all_ranks_or_of_none(where, tmp_path):
    first, second = run(runs.failing_step, 2, tmp_path / "run", tmp_path / "store", where)
    if where == "before":
        # Rank 0 is in its own backward pass, where nobody can reach it: that ends as it does without a recorder.
        assert type(second.error) is ValueError
        assert isinstance(first.error, RuntimeError)
        assert all("up to step 3, are not in the store" in outcome.warnings[0] for outcome in (first, second))
        assert contents(tmp_path / "store") == {}
    else:
        assert type(first.error) is type(second.error) is errors.NotFiniteError
        assert str(first.error).endswith(str(second.error))
        assert {step for _, _, step, _ in contents(tmp_path / "store")} == {1, 2, 3}


@pytest.mark.parametrize("whole_module", [True, False])
def test_shards_are_refused(whole_module, tmp_path):
    for outcome in run(runs.sharded, 2, tmp_path / "run", tmp_path / "store", whole_module):
        assert type(outcome.error) is errors.UnsupportedParameterError
        assert "spread over the processes" in str(outcome.error)


def test_statistics_are_those_of_rank_0(tmp_path):
    (first, weights), (second, others) = values(run(runs.normalised, 2, tmp_path / "run", tmp_path / "store"))
    assert not torch.equal(first, second)
    store = Store.open(tmp_path / "store")
    for name, saved in store.weights(1).items():
        assert torch.equal(saved, weights[name])
        assert torch.equal(saved, others[name])
    model = runs.network()
    model.load_state_dict(weights)
    expected = by_loop(model, runs.data(), runs.SAMPLES)
    known = tables.gradients(store).to_pylist()
    rows = np.array([each["row"] for each in sorted(known, key=lambda each: each["sample_id"])])
    found = gradients_of_rows(store, rows)
    assert_close(found, {name: expected[name] for name in found}, 1e-9)


def test_a_store_that_is_taken_is_refused_on_every_rank(tmp_path):
    with runs.recorder(runs.network(), tmp_path / "store"):
        for outcome in run(runs.collect, 2, tmp_path / "run", tmp_path / "store"):
            assert type(outcome.error) is errors.StoreLockedError
            assert re.search(f"Process {os.getpid()} .* is writing to", str(outcome.error))
