"""Files that are missing, cut off, changed or not ours: an error that names the file and the cure."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest

from metaql.errors import (
    CorruptStoreError,
    MetaQLError,
    NotAStoreError,
    ReferenceError,
    StoreError,
    StoreVersionError,
)
from metaql.storage import collection_writer, segments, tables
from metaql.storage.check import check
from metaql.storage.store import Store
from metaql.storage.writer import Writer

FILES = [
    "collections/00000001/0-0.arrow",
    "collections/00000001/2-0.arrow",
    "collections/00000003/6-0.arrow",
    "collections/00000001/rows.arrow",
    "collections/00000002/metadata.arrow",
    "collections/00000004/inputs.arrow",
    "checkpoints/00000002.pt",
]
POINTERS = ["HEAD", "manifests/00000007.json"]


def read_everything(path):
    """Touches every byte that a query could."""
    store = Store.open(path)
    for relation in (tables.samples, tables.checkpoints, tables.steps, tables.layers, tables.outputs, tables.gradients):
        relation(store)
    for layer in store.layers:
        store.read(layer, np.arange(160))
    store.inputs(np.arange(160))
    for checkpoint in store.manifest.checkpoints:
        store.weights(checkpoint.number)


def assert_reported(path, file, kind=CorruptStoreError):
    with pytest.raises(kind) as caught:
        read_everything(path)
    problems = list(check(path))
    for message in (str(caught.value), *problems):
        assert file.split("/")[-1] in message
        assert "restore it from a backup" in message
    assert problems


def test_a_sound_store_has_no_problems(store_path):
    read_everything(store_path)
    assert list(check(store_path)) == []


@pytest.mark.parametrize("file", FILES + POINTERS)
def test_missing(store_path, file):
    (store_path / file).unlink()
    assert_reported(store_path, file)


@pytest.mark.parametrize("file", FILES + POINTERS)
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_cut_off(store_path, file, left):
    size = (store_path / file).stat().st_size
    os.truncate(store_path / file, int(size * left) if isinstance(left, float) else left % size)
    assert_reported(store_path, file)


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(store_path, file):
    chance = random.Random(file)
    sound = (store_path / file).read_bytes()
    places = [0, len(sound) - 1, *(chance.randrange(len(sound)) for _ in range(10))]
    for place in places:
        changed = bytearray(sound)
        changed[place] ^= 1 << chance.randrange(8)
        (store_path / file).write_bytes(changed)
        assert_reported(store_path, file)


def opened(path):
    """The manifest, or "refused" when the error names a pointer."""
    try:
        return Store.open(path).manifest
    except (CorruptStoreError, StoreVersionError) as error:
        return "refused" if any(file in str(error) for file in POINTERS) else error


@pytest.mark.parametrize("file", POINTERS)
def test_a_flipped_bit_in_a_pointer_never_shows_another_version(store_path, file):
    sound = (store_path / file).read_bytes()
    expected = Store.open(store_path).manifest
    chance = random.Random(file)
    for place in range(min(len(sound), 120)):
        for bit in chance.sample(range(8), 3):
            changed = bytearray(sound)
            changed[place] ^= 1 << bit
            (store_path / file).write_bytes(changed)
            assert opened(store_path) in (expected, "refused")


def test_the_error_names_the_checkpoint_to_drop(store_path):
    (store_path / FILES[0]).unlink()
    with pytest.raises(CorruptStoreError, match=r"metaql drop-checkpoint .* 1`"):
        read_everything(store_path)


def test_the_cure_for_a_pointer_works(store_path):
    (store_path / "manifests/00000007.json").write_bytes(b"rubbish")
    with pytest.raises(CorruptStoreError) as caught:
        Store.open(store_path)
    line = str(caught.value).split("'")[1]
    (store_path / "HEAD").write_text(line + "\n")
    assert Store.open(store_path).version == 6


def test_another_format_version(store_path):
    path = store_path / "manifests/00000007.json"
    header, body = path.read_bytes().split(b"\n", 1)
    changed = json.dumps({**json.loads(header), "format_version": 4}).encode() + b"\n" + body
    path.write_bytes(changed)
    (store_path / "HEAD").write_text(f"7 {zlib.crc32(changed):08x}\n")
    with pytest.raises(StoreVersionError, match=r"00000007.json is in version 4 .* reads versions 1, 2, 3: use"):
        Store.open(store_path)
    with pytest.raises(StoreVersionError):
        Writer.open(store_path)


def test_the_first_format_version_is_read(store_path):
    path = store_path / "manifests/00000007.json"
    before = Store.open(store_path).manifest
    body = json.loads(path.read_bytes().splitlines()[1])
    for layer in body["layers"]:
        del layer["looked_up"]
    line = json.dumps(body).encode()
    header = {"format": "metaql", "format_version": 1, "bytes": len(line), "crc32": zlib.crc32(line)}
    changed = json.dumps(header).encode() + b"\n" + line + b"\n"
    path.write_bytes(changed)
    (store_path / "HEAD").write_text(f"7 {zlib.crc32(changed):08x}\n")
    assert Store.open(store_path).manifest == before


@pytest.mark.parametrize("opens", [Store.open, Writer.open, lambda path: list(check(path))])
def test_not_a_store(tmp_path, opens):
    (tmp_path / "file").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("hello")
    with pytest.raises(NotAStoreError, match=r"is a file"):
        opens(tmp_path / "file")
    with pytest.raises(NotAStoreError, match=r"is not a store"):
        opens(tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["thesis.tex"]


def test_nothing_there(tmp_path):
    with pytest.raises(NotAStoreError, match=r"no such folder"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(NotAStoreError, match=r"empty"):
        Store.open(tmp_path)


def test_overwriting_spares_what_is_not_a_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("hello")
    with pytest.raises(NotAStoreError):
        Writer.open(tmp_path, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_damaged_store_can_be_overwritten(store_path):
    (store_path / "HEAD").write_text("rubbish")
    with pytest.raises(CorruptStoreError):
        Writer.open(store_path)
    Writer.open(store_path, overwrite=True).close()
    assert Store.open(store_path).manifest.collections == ()
    assert list(check(store_path)) == []


def test_a_file_cut_off_while_it_is_open(tmp_path, record, monkeypatch):
    monkeypatch.setattr(collection_writer, "_FLUSH_BYTES", 1)
    path = record(tmp_path / "store")
    store = Store.open(path)
    layer = store.layer("vector")
    store.read(layer, np.arange(3))
    os.truncate(path / FILES[0], 100)
    with pytest.raises(CorruptStoreError, match=r"has 100 bytes instead of"):
        store.read(layer, np.arange(3))
    with pytest.raises(CorruptStoreError, match=r"has 100 bytes instead of"):
        store.read(layer, np.array([8, 3]))
    store.read(layer, np.arange(120, 130))


def test_a_program_outlives_a_file_cut_off_before_first_touch(store_path):
    code = (
        "import os, sys\nimport numpy as np\nfrom metaql.storage.store import Store\nfrom metaql.errors import *\n"
        f"store = Store.open({str(store_path)!r})\n"
        "layer = store.layer('sequence')\n"
        f"os.truncate({str(store_path / 'collections/00000001/1-0.arrow')!r}, 4096)\n"
        "try: store.read(layer, np.arange(40))\n"
        "except CorruptStoreError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1-0.arrow has 4,096 bytes" in done.stdout


def test_a_version_that_was_vacuumed_asks_to_connect_again(store_path):
    old = Store.open(store_path, 4)
    assert len(old.manifest.collections) == 2
    for version in range(1, 7):
        (store_path / f"manifests/{version:08d}.json").unlink()
    shutil.rmtree(store_path / "collections/00000001")
    with pytest.raises(ReferenceError, match=r"connect again"):
        old.read(old.layer("vector"), np.arange(3))
    with pytest.raises(StoreError, match=r"has no version 4"):
        Store.open(store_path, 4)


def test_more_files_than_may_be_open(store_path, monkeypatch):
    monkeypatch.setattr(segments, "_SHARE_OF_DESCRIPTORS", 1 << 62)
    read_everything(store_path)
    store = Store.open(store_path)
    for _ in range(2):
        for layer in store.layers:
            assert store.read(layer, np.arange(160)).samples == 160


def test_every_error_is_one_of_ours(store_path):
    chance = random.Random(1)
    for _ in range(40):
        damaged = store_path.with_name("damaged")
        shutil.copytree(store_path, damaged)
        files = [path for path in damaged.rglob("*") if path.is_file() and path.name != "writer.lock"]
        for path in chance.sample(files, 3):
            data = bytearray(path.read_bytes())
            data[chance.randrange(len(data))] = chance.randrange(256)
            path.write_bytes(data[: chance.randrange(1, len(data) + 1)])
        try:
            read_everything(damaged)
        except MetaQLError:
            assert list(check(damaged))
        shutil.rmtree(damaged)
