"""Models are kept whole or not at all, and stores leave them alone."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from metaql.errors import CorruptStoreError, QueryError, UnknownNameError, WriteError
from metaql.storage import saved_models
from metaql.storage.check import check
from metaql.storage.maintenance import vacuum
from metaql.storage.writer import Writer
from tests.conftest import record_small


def save(folder: Path, value: float = 1.0, kind: str = "elite") -> None:
    table = pa.table({"sample_id": ["a", "b"]})
    saved_models.save(folder, kind, {"w": torch.full((3,), value)}, {"digest": str(value)}, {"rows": table})


def value_of(folder: Path) -> float:
    return float(saved_models.read(folder).tensors()["w"][0])


def test_a_model_comes_back(tmp_path: Path) -> None:
    save(tmp_path / "deep" / "m")
    found = saved_models.read(tmp_path / "deep" / "m")
    assert found.tensors()["w"].tolist() == [1.0, 1.0, 1.0]
    assert (found.kind, found.description["digest"]) == ("elite", "1.0")
    assert pq.read_table(found.table("rows")).to_pydict() == {"sample_id": ["a", "b"]}
    assert found.stamp == saved_models.stamp(tmp_path / "deep" / "m")
    assert saved_models.is_there(found.folder, "1.0")
    assert not saved_models.is_there(found.folder, "2.0")


def test_the_version_before_stays_for_its_readers(tmp_path: Path) -> None:
    save(tmp_path / "m", 1.0)
    first = saved_models.read(tmp_path / "m")
    save(tmp_path / "m", 2.0)
    assert float(first.tensors()["w"][0]) == 1.0
    assert value_of(tmp_path / "m") == 2.0
    assert saved_models.stamp(tmp_path / "m") != first.stamp
    save(tmp_path / "m", 3.0)
    with pytest.raises(CorruptStoreError, match=r"rows\.parquet is missing"):
        first.table("rows")


@pytest.mark.parametrize("failing", range(5))
def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Wherever writing stops, the model is the one before, and the next one is saved as if nothing had happened."""
    save(tmp_path / "m", 1.0)
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    replace, count = saved_models.replace_file, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count > failing:
            path.with_name(path.name + ".tmp").write_bytes(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(saved_models, "replace_file", full)
        if failing < 4:
            with pytest.raises(WriteError, match=r"No space left on device. What was there before is as it was"):
                save(tmp_path / "m", 2.0)
            assert value_of(tmp_path / "m") == 1.0
            assert sorted(path.name for path in (tmp_path / "m").iterdir() if path.suffix != ".tmp") == before
        else:
            save(tmp_path / "m", 2.0)
    save(tmp_path / "m", 3.0)
    assert value_of(tmp_path / "m") == 3.0
    assert not [path for path in (tmp_path / "m").iterdir() if path.suffix == ".tmp" and path.name != "HEAD.tmp"]


def test_many_save_at_once_and_many_read(tmp_path: Path) -> None:
    save(tmp_path / "m", 0.0)

    def work(number: int) -> float:
        if number % 2:
            save(tmp_path / "m", float(number))
        return value_of(tmp_path / "m")

    with ThreadPoolExecutor(4) as threads:
        assert all(value >= 0 for value in threads.map(work, range(24)))
    assert int((tmp_path / "m" / "HEAD").read_text().split()[0]) == 13


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "ä", "a:b", "x" * 101, "."])
def test_names_that_can_t_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(QueryError, match=r"can't be the name of a model: use letters, digits"):
        saved_models.place_of((tmp_path,), name)


@pytest.mark.parametrize("name", ["../x", "a/../b", "/"])
def test_folders_that_can_t_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(QueryError, match=r"can't be a model's folder: write its path without '\.\.'"):
        saved_models.place_of((tmp_path,), name)


def test_where_models_are(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert saved_models.place_of((one, two), "m") == one / "models" / "m"
    assert saved_models.place_of((one,), "some/folder") == Path("some/folder")
    save(two / "models" / "m")
    assert saved_models.place_of((one, two), "m") == two / "models" / "m"
    assert saved_models.names(two) == ["m"]
    assert saved_models.names(one) == []
    save(one / "models" / "m")
    with pytest.raises(
        QueryError, match=r"several stores have a model 'm'\. Say which is meant by its folder: '.*one/"
    ):
        saved_models.place_of((one, two), "m")


def test_places_of_others(tmp_path: Path) -> None:
    save(tmp_path / "m", kind="lancet")
    with pytest.raises(QueryError, match=r"holds a model of another kind \(lancet\): choose another name"):
        save(tmp_path / "m")
    with pytest.raises(QueryError, match="a folder with other files in it"):
        save(tmp_path)
    with pytest.raises(QueryError, match="that is a file"):
        save(tmp_path / "m" / "HEAD")
    with pytest.raises(WriteError, match="is read-only"):
        save(tmp_path / "m" / "HEAD" / "m")
    with pytest.raises(UnknownNameError, match="there is no model in"):
        saved_models.read(tmp_path / "none")


def test_damage_is_found_and_can_be_written_over(tmp_path: Path) -> None:
    store = record_small(tmp_path / "store")
    folder = store / "models" / "m"
    save(folder)
    assert list(check(store)) == []
    for name in ("HEAD", "00000001.json", "00000001.safetensors", "00000001.rows.parquet"):
        data = (folder / name).read_bytes()
        for wrong in (data[:-2] + b"x" + data[-1:], None):
            if wrong is None and name == "HEAD":
                continue
            (folder / name).unlink() if wrong is None else (folder / name).write_bytes(wrong)
            assert [name in problem and "train the model again" in problem for problem in check(store)] == [True], name
        (folder / name).write_bytes(data)
    (folder / "HEAD").write_text("nonsense\n")
    with pytest.raises(CorruptStoreError, match="HEAD is not a version and its checksum"):
        saved_models.read(folder)
    save(folder, 2.0)
    assert value_of(folder) == 2.0
    assert list(check(store)) == []


def test_another_version_of_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(saved_models, "FORMAT_VERSION", 2)
        save(tmp_path / "m")
    with pytest.raises(Exception, match="is in version 2 of the format, and this MetaQL reads 1: update MetaQL"):
        saved_models.read(tmp_path / "m")


def test_stores_leave_models_alone(tmp_path: Path) -> None:
    store = record_small(tmp_path / "store")
    save(store / "models" / "m")
    files: list[Any] = sorted(os.listdir(store / "models" / "m"))
    vacuum(store)
    # The next writer looks for what a crash left.
    with Writer.open(store):
        pass
    assert sorted(os.listdir(store / "models" / "m")) == files
    assert json.loads((store / "models" / "m" / "00000001.json").read_text())["kind"] == "elite"


@pytest.mark.parametrize("file", ["00000001.safetensors", "00000001.rows.parquet"])
@pytest.mark.parametrize("damage", [lambda data: data[:0], lambda data: data[:-9], lambda data: data[:-1] + b"!"])
def test_no_answer_comes_from_a_changed_file(tmp_path: Path, file: str, damage: Callable[[bytes], bytes]) -> None:
    save(tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_bytes(damage(path.read_bytes()))
    found = saved_models.read(tmp_path / "m")
    with pytest.raises(CorruptStoreError, match=f"{file} is changed: restore it from a"):
        found.tensors() if "tensors" in file else found.table("rows")
    assert not saved_models.is_there(tmp_path / "m", "1.0")
