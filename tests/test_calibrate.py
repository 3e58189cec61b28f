"""Costs come from the user's file, the cache or a measurement; nothing that is wrong with those stops a query."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metaql import calibrate
from metaql.cli import main
from metaql.udfs.costs import SHIPPED

MEASURED = calibrate.replace(SHIPPED, flop=1e-3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a measurement that takes no time."""
    monkeypatch.delenv(calibrate.OVERRIDE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "measure", lambda device: MEASURED)
    calibrate._remembered.cache_clear()
    return tmp_path / "metaql"


def test_a_measurement_is_kept_and_read_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.constants() == MEASURED
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["flop"] == MEASURED.flop
    calibrate._remembered.cache_clear()
    monkeypatch.setattr(calibrate, "measure", lambda device: pytest.fail("measured again"))
    assert calibrate.constants() == MEASURED


@pytest.mark.parametrize("text", ["", "[1]", '{"flop": 0}', '{"flop": true}', '{"flop": "1e-11"}', '{"flops": 1e-11}'])
def test_a_broken_cache_is_measured_again(text: str, cache: Path) -> None:
    calibrate.constants()
    (file,) = cache.iterdir()
    file.write_text(text)
    calibrate._remembered.cache_clear()
    assert calibrate.constants() == MEASURED
    assert json.loads(file.read_text())["flop"] == MEASURED.flop


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert calibrate.constants() == MEASURED
    assert "can't be written" in calibrate.report()


def test_a_device_that_fails_is_no_error_yet(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: str) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(calibrate, "measure", fail)
    assert calibrate.constants() == SHIPPED


def test_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.json"
    monkeypatch.setenv(calibrate.OVERRIDE, str(file))
    file.write_text('{"gather": 0.25}')
    assert calibrate.constants() == calibrate.replace(SHIPPED, gather=0.25)
    for text in ("{", '{"gather": -1}', '{"speed": 1}', "NaN"):
        file.write_text(text)
        with pytest.warns(UserWarning, match=r"mine\.json.*gather"):
            assert calibrate.constants() == SHIPPED
    file.unlink()
    with pytest.warns(UserWarning, match="No such file"):
        assert calibrate.constants() == SHIPPED


def test_the_command(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in calibrate.NAMES)
    assert "torch" in printed
    assert main(["calibrate", "--device", "nonsense"]) == 1
    assert "device 'nonsense'" in capsys.readouterr().err


def test_a_real_measurement_is_of_the_right_order() -> None:
    found = calibrate.measure()
    assert all(0 < getattr(found, name) < 1 for name in calibrate.NAMES)
