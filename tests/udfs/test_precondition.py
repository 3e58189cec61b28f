"""precondition(…) in SQL: against dense algebra, planned and unplanned, and what it says where it can't."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import metaql
from metaql.errors import QueryError
from metaql.storage.curvatures import unpack
from metaql.storage.store import Store
from metaql.udfs.costs import CONTRACT, EIGENBASIS, FULL, Constants
from metaql.udfs.definitions import Combination, Part
from metaql.udfs.eigenbasis import in_eigenbasis
from metaql.udfs.patterns import Space
from metaql.udfs.preconditioned import Preconditioned
from metaql.udfs.rows import Rows
from metaql.udfs.session import find
from metaql.udfs.vectors import VectorSource

SPLITS = {"train": slice(0, 16), "validation": slice(16, 25)}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 3)).double()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients at two checkpoints; EK-FAC's curvature at the first, the diagonal at both."""
    folder = tmp_path_factory.mktemp("curvature") / "store"
    model = network()
    inputs, targets = torch.randn(25, 1, 5, 5, dtype=torch.float64), torch.randint(3, (25,))
    with metaql.Recorder(model, folder, dtype="float64") as recorder:
        for methods in (("ekfac", "diagonal"), ("diagonal",)):
            recorder.checkpoint()
            for split, part in SPLITS.items():
                recorder.collect(TensorDataset(inputs[part], targets[part]), split)
            for method in methods:
                recorder.curvature(TensorDataset(inputs[:16], targets[:16]), method)
            with torch.no_grad():
                model[0].weight.mul_(1.5)
    return folder


@pytest.fixture
def db(path: Path) -> Iterator[metaql.connection.Connection]:
    with metaql.connect(path, model=network()) as opened:
        opened.sql("CREATE VIEW t AS FROM gradients WHERE split = 'train' AND checkpoint = 1")
        opened.sql("CREATE VIEW v AS FROM gradients WHERE split = 'validation' AND checkpoint = 1")
        yield opened


def dense(path: Path, method: str, damping: float | None = None, checkpoint: int = 1) -> np.ndarray:
    """(F + damping)⁻¹ written out, over all parameters."""
    store = Store.open(path)
    (saved,) = (one for one in store.manifest.curvatures if method in one.serves and one.checkpoint == checkpoint)
    fitted = unpack(store.layers, store.curvature(saved), method)
    blocks = [fitted[one.name].precondition(torch.eye(one.width, dtype=torch.float64), damping) for one in store.layers]
    return torch.block_diag(*blocks).numpy()


def gradients(db: metaql.connection.Connection, relation: str) -> np.ndarray:
    return np.array(
        [row for (row,) in db.sql(f"SELECT restore(gradient, '*') FROM {relation} ORDER BY sample_id").fetchall()]
    )


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize("damping", [None, 0.05])
def test_it_is_the_inverse_of_the_curvature(db, path, method, damping):
    given = "NULL" if damping is None else damping
    query = (
        f"SELECT restore(precondition(gradient, '{method}', {given}, checkpoint := 1), '*') FROM v ORDER BY sample_id"
    )
    got = np.array([row for (row,) in db.sql(query).fetchall()])
    inverse = dense(path, method, damping)
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-9 * np.abs(inverse).max())
    np.testing.assert_allclose(got, gradients(db, "v") @ inverse, rtol=1e-9, atol=1e-9)


# Titles, and what stands between SELECT and FROM t, v.
SAMPLES = "t.sample_id, avg(inner_product({}, {})) AS s FROM t, v GROUP BY ALL"
T, V = "t.gradient", "v.gradient"
PT, PV = f"precondition({T}, 'ekfac')", f"precondition({V}, 'ekfac')"
QUESTIONS = {
    "averaged": SAMPLES.format(T, PV),
    "of the other side": SAMPLES.format(PT, V),
    "with damping": SAMPLES.format(T, f"precondition({V}, 'kfac', damping := 0.1)"),
    "over layers": SAMPLES.format(f"layers({T}, '4')", PV),
    "of a part of a layer": SAMPLES.format(f"precondition(layers({T}, '4.bias'), 'ekfac')", f"layers({V}, '*.weight')"),
    "of both": SAMPLES.format(f"precondition({T}, 'diagonal', checkpoint := 1)", PV),
    "twice": SAMPLES.format(T, f"precondition({PV}, 'kfac')"),
    "times numbers": SAMPLES.format(PT, V).replace("avg(", "sum(v.sample_id / 2 * "),
    "cosine": SAMPLES.format(PT, V).replace("inner_product", "cosine_similarity"),
    "all": f"1 AS one, avg(inner_product({PT}, {V})) AS s FROM t, v",
    "pairs": f"t.sample_id, v.sample_id AS o, inner_product({T}, {PV}) AS s FROM t, v",
    "its own": f"t.sample_id, inner_product({T}, {PT}) AS s FROM t",
    "by kind": f"v.sample_id % 2 AS kind, avg(inner_product({PT}, {V})) AS s FROM t, v GROUP BY ALL",
    "methods as a column": f"m, sum(inner_product({T}, precondition({V}, m))) AS s"
    " FROM t, v, (VALUES ('ekfac'), ('kfac'), (NULL)) AS methods(m) GROUP BY ALL",
}


@pytest.mark.parametrize("title", QUESTIONS)
def test_planned_and_unplanned_agree(db, path, title):
    plain = duckdb.connect()
    metaql.load(plain, path, schema="s")
    for name, split in (("t", "train"), ("v", "validation")):
        plain.execute(f"CREATE VIEW {name} AS FROM s.gradients WHERE split = '{split}' AND checkpoint = 1")
    unplanned = QUESTIONS[title].replace("precondition(", "s.precondition(")
    expected = sorted(plain.sql(f"SELECT {unplanned}").fetchall(), key=str)
    got = sorted(db.sql(f"SELECT {QUESTIONS[title]}").fetchall(), key=str)
    assert [row[:-1] for row in got] == [row[:-1] for row in expected]
    assert len(got) > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert ours[-1] == (None if theirs[-1] is None else pytest.approx(theirs[-1], rel=1e-9, abs=1e-12))


PAIRS = "t.sample_id, v.sample_id AS o, inner_product({}, {}) AS s FROM t, v"


@pytest.mark.parametrize("measured", ["inner_product", "cosine_similarity"])
@pytest.mark.parametrize("pattern", ["*", "4", "4.bias", "0 & *.weight", "3"])
@pytest.mark.parametrize("way", [EIGENBASIS, CONTRACT, FULL])
def test_pairs_by_every_way(db, path, measured, pattern, way):
    session = find(db._session)
    session.measure = lambda: Constants(forced=frozenset({way}))
    query = PAIRS.format(f"layers({T}, '{pattern}')", PV).replace("inner_product", measured)
    got = [row[-1] for row in sorted(db.sql(f"SELECT {query}").fetchall())]
    layers = Store.open(path).layers
    chosen = {(one.layer.name, place) for one in Space(layers).select(pattern) for place in one.places}
    parameters = [(layer.name, place, one) for layer in layers for place, one in enumerate(layer.parameters)]
    mask = np.concatenate([np.full(one.width, float((name, place) in chosen)) for name, place, one in parameters])
    ours, theirs = gradients(db, "t") * mask, gradients(db, "v") @ dense(path, "ekfac")
    expected = ours @ theirs.T
    if measured == "cosine_similarity":
        expected /= np.outer(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1))
    np.testing.assert_allclose(got, expected.flatten(), rtol=1e-8, atol=1e-10)
    in_basis = way == EIGENBASIS and pattern in ("*", "4", "4.bias")
    assert (session.vectors._together.used > 0) == in_basis


def test_few_rows_are_not_worth_turning(db):
    session = find(db._session)
    (source,) = session._named.values()
    rows = {
        one.split: np.arange(one.first_row, one.first_row + one.rows)
        for one in source.store.manifest.collections
        if one.checkpoint == 1
    }
    (term,) = source.space.shared("4", source.space, "")
    fitted = session.curvatures.get(source.store, "ekfac", 1)

    def made(row, damping=None):
        gradient = Combination((Part(source.store.id, "", np.array([row]), np.ones(1)),), source.space)
        return session.vectors.add(Preconditioned(gradient, fitted, damping))

    def vectors(*numbers):
        return Rows(VectorSource(session.vectors, source.space), np.array(numbers))

    several = [made(row) for row in rows["validation"]]
    many, few = (Rows(source, np.tile(rows["train"], times)) for times in (1000, 1))
    assert in_eigenbasis(session, term, many, vectors(*several)) is not None
    assert in_eigenbasis(session, term, few, vectors(several[0])) is None
    assert in_eigenbasis(session, term, many, many) is None
    assert in_eigenbasis(session, term, vectors(*several), vectors(*several)) is None
    assert in_eigenbasis(session, term, many, vectors(several[0], made(rows["validation"][0], damping=0.3))) is None


def test_pairs_asked_again_are_kept(db):
    session, query = find(db._session), f"SELECT {PAIRS.format(T, PV)}"
    first = sorted(db.sql(query).fetchall())
    before = session.counters.now()
    assert before.scored >= 16 * 9
    assert sorted(db.sql(query).fetchall()) == first
    assert (session.counters.now() - before).scored == 0


# What is asked, and how many gradients have to be preconditioned for it; there are 16 t and 9 v.
DT, DV = f"precondition({T}, 'diagonal')", f"precondition({V}, 'diagonal')"
OF_SAMPLES = "t.sample_id, avg(inner_product({}, {})) AS s FROM train t, validation v GROUP BY ALL"
MEAN = "(SELECT avg(gradient) FROM validation)"
WORK = {
    OF_SAMPLES.format(T, DV): 1,
    OF_SAMPLES.format(DT, V): 1,
    OF_SAMPLES.format(T, f"precondition({V} - 2 * {V}, 'diagonal')").replace("avg", "-avg"): 1,
    f"t.sample_id, inner_product({T}, precondition({MEAN}, 'diagonal')) FROM train t": 1,
    f"t.sample_id, inner_product({DT}, {MEAN}) FROM train t": 1,
    f"t.sample_id, inner_product({T}, (SELECT avg({DV}) FROM validation v)) FROM train t": 1,
    f"t.sample_id, inner_product({T}, p.g) FROM train t, (SELECT precondition({MEAN}, 'diagonal') AS g) p": 1,
    f"t.sample_id, inner_product({DT}, {V}) FROM train t, validation v WHERE v.sample_id = 4": 1,
    f"t.sample_id, v.sample_id, inner_product({DT}, {V}) FROM train t, validation v": 9,
    f"t.sample_id, v.sample_id, inner_product({DV}, {T}) FROM train t, validation v": 9,
}


@pytest.mark.parametrize("query", WORK)
def test_no_more_is_preconditioned_than_needed(db, path, query):
    session = find(db._session)
    before = len(session.vectors._definitions)
    got = sorted(db.sql(f"SELECT {query}").fetchall())
    made = session.vectors._definitions[before:]
    assert sum(isinstance(one, Preconditioned) for one in made) <= WORK[query]
    ours, theirs = gradients(db, "train") @ dense(path, "diagonal", checkpoint=2), gradients(db, "validation")
    if "v.sample_id, " in query:
        expected = (ours @ theirs.T).flatten()
    else:
        expected = ours @ (theirs[4] if "= 4" in query else theirs.mean(0))
    np.testing.assert_allclose([row[-1] for row in got], expected, rtol=1e-8, atol=1e-10)


def test_an_average_is_preconditioned_once(db):
    for title in ("averaged", "of the other side"):
        (text,) = (row for (row,) in db.sql(f"EXPLAIN SELECT {QUESTIONS[title]}").fetchall() if "Score" in row)
        assert re.search(r"⟨[^(]*, precondition\(avg\([^()]*\), 'ekfac'\)⟩", text)


def test_vectors_of_the_session_are_preconditioned(db, path):
    inverse = dense(path, "ekfac")
    mean = gradients(db, "v").mean(0)
    for text in ("precondition(avg(gradient), 'ekfac')", "avg(precondition(gradient, 'ekfac'))"):
        ((got,),) = db.sql(f"SELECT restore({text}, '*') FROM v").fetchall()
        np.testing.assert_allclose(got, mean @ inverse, rtol=1e-9, atol=1e-9)
    query = "SELECT t.sample_id, inner_product(t.gradient, precondition((SELECT avg(gradient) FROM v), 'ekfac')) FROM t"
    scores = [score for _, score in sorted(db.sql(query).fetchall())]
    np.testing.assert_allclose(scores, gradients(db, "t") @ inverse @ mean, rtol=1e-9)
    # Samples are run with the newest checkpoint's weights.
    zeros = [0.0] * 25
    query = "SELECT norm(precondition(gradient(?, 1), 'diagonal')), norm(gradient(?, 1))"
    ((size, before),) = db.sql(query, [zeros, zeros]).fetchall()
    assert size > 0
    assert size != before


def test_nulls(db):
    assert db.sql("SELECT precondition(NULL, 'ekfac'), precondition(gradient, NULL) FROM v LIMIT 1").fetchall() == [
        (None, None)
    ]
    mixed = "CASE WHEN sample_id % 2 = 0 THEN gradient END"
    query = f"SELECT sample_id, norm(precondition({mixed}, 'ekfac')) IS NULL FROM v ORDER BY sample_id"
    assert [null for _, null in db.sql(query).fetchall()] == [place % 2 == 1 for place in range(9)]


def test_the_curvature_is_that_of_the_gradient_s_checkpoint(db):
    with pytest.raises(
        duckdb.Error, match=r"gradient of checkpoint 2, and the newest curvature for 'ekfac' is that of"
    ):
        db.sql("SELECT norm(precondition(gradient, 'ekfac')) FROM train").fetchall()
    with pytest.raises(duckdb.Error, match=r"gradient of checkpoint 1, and .*that of checkpoint 2.* checkpoint := 2"):
        db.sql("SELECT norm(precondition((SELECT avg(gradient) FROM v), 'diagonal'))").fetchall()
    assert db.sql("SELECT norm(precondition(gradient, 'ekfac', checkpoint := 1)) FROM train").fetchall()
    with pytest.raises(
        duckdb.Error, match=r"not gathered at checkpoint 2 .*there is 'ekfac' at checkpoint 1, 'diagonal'"
    ):
        db.sql("SELECT norm(precondition(gradient, 'kfac', checkpoint := 2)) FROM train").fetchall()


def test_mistakes(db):
    with pytest.raises(
        QueryError,
        match=r"there is no method 'newton'. There are 'ekfac', 'kfac', 'diagonal', 'cg', 'lissa', 'arnoldi'",
    ):
        db.sql("SELECT norm(precondition(gradient, 'newton')) FROM v")
    with pytest.raises(duckdb.Error, match=r"there is no method 'newton'"):
        db.sql("SELECT norm(precondition(gradient, ?)) FROM v", ["newton"]).fetchall()
    with pytest.raises(duckdb.Error, match=r"damping := 0.0 is not a positive number"):
        db.sql("SELECT norm(precondition(gradient, 'ekfac', damping := 0)) FROM v").fetchall()


def test_nothing_gathered(small_store):
    with (
        metaql.connect(small_store) as db,
        pytest.raises(duckdb.Error, match=r"not gathered in .* \(there is none\): with a"),
    ):
        db.sql("SELECT norm(precondition(gradient, 'ekfac')) FROM train").fetchall()


def linear() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(4, 3).double()


@pytest.fixture(scope="module")
def convex(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Logistic regression with its inputs kept, and the Hessian of its training loss written out."""
    folder, model = tmp_path_factory.mktemp("convex") / "store", linear()
    inputs, targets = torch.randn(25, 4, dtype=torch.float64), torch.randint(3, (25,))
    with metaql.Recorder(model, folder, dtype="float64", inputs=True) as recorder:
        recorder.checkpoint()
        for split, part in SPLITS.items():
            recorder.collect(TensorDataset(inputs[part], targets[part]), split)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        logits = inputs[:16] @ flat[:12].reshape(3, 4).T + flat[12:]
        return nn.functional.cross_entropy(logits, targets[:16])

    flat = torch.cat([each.detach().flatten() for each in model.parameters()])
    return folder, torch.autograd.functional.hessian(loss, flat)


@pytest.mark.parametrize("method", ["cg", "lissa", "arnoldi"])
def test_solvers_invert_the_hessian(convex, method):
    path, hessian = convex
    inverse = torch.linalg.inv(hessian + 0.1 * torch.eye(15, dtype=torch.float64)).numpy()
    if method == "arnoldi":
        # It has nothing to say of directions without curvature.
        inverse = inverse @ (hessian @ torch.linalg.pinv(hessian, rtol=1e-9)).numpy()
    with metaql.connect(path, model=linear()) as db:
        query = f"SELECT restore(precondition(gradient, '{method}', 0.1), '*') FROM validation ORDER BY sample_id"
        got = np.array([row for (row,) in db.sql(query).fetchall()])
        np.testing.assert_allclose(got, gradients(db, "validation") @ inverse, rtol=1e-4, atol=1e-4)
        query = f"precondition(v.gradient, '{method}', damping := 0.1)"
        query = f"SELECT t.sample_id, avg(inner_product(t.gradient, {query})) FROM train t, validation v GROUP BY ALL"
        scores = [score for _, score in sorted(db.sql(query).fetchall())]
        mean = gradients(db, "validation").mean(0)
        np.testing.assert_allclose(scores, gradients(db, "train") @ inverse @ mean, rtol=1e-3, atol=1e-4)


def test_solvers_stop(convex):
    with metaql.connect(convex[0], model=linear()) as db:
        session = find(db._session)
        model, vector = session.model(), torch.ones(15, dtype=torch.float64)
        with session.work.stopped(), pytest.raises(InterruptedError):
            model.solve("cg", vector, 0.1, session.work.go_on)
        assert bool(model.solve("cg", vector, 0.1, session.work.go_on).isfinite().all())


def test_solvers_say_what_they_need(convex, db, path):
    solved = "SELECT norm(precondition(gradient, 'cg', damping := 0.1)) FROM validation"
    with metaql.connect(convex[0]) as without, pytest.raises(duckdb.Error, match=r"there is none: pass it as model="):
        without.sql(solved).fetchall()
    with pytest.raises(
        duckdb.Error, match=r"did not keep them: record with Recorder\(..., inputs=True\), or use 'ekfac'"
    ):
        db.sql(solved).fetchall()
    with pytest.raises(duckdb.Error, match=r"'cg' needs a damping, such as"):
        db.sql("SELECT norm(precondition(gradient, 'cg')) FROM validation").fetchall()
    with pytest.raises(duckdb.Error, match=r"a gradient of checkpoint 1, and the newest curvature for 'cg' is that of"):
        db.sql("SELECT norm(precondition(gradient, 'cg', damping := 1)) FROM v").fetchall()
    with pytest.raises(duckdb.Error, match=r"'cg' runs the model at its checkpoint, 2, and not at 1"):
        db.sql("SELECT norm(precondition(gradient, 'cg', 1, checkpoint := 1)) FROM v").fetchall()


def test_explain_knows_that_it_is_laid_out(db):
    for own in ("precondition(v.gradient, 'ekfac')", "(SELECT precondition(avg(gradient), 'ekfac') FROM v)"):
        lines = [line for (line,) in db.sql(f"EXPLAIN SELECT inner_product(t.gradient, {own}) FROM t, v").fetchall()]
        assert any("contract" in line or "full" in line for line in lines)
        assert not any("gram" in line for line in lines)
