"""Atomic writes: whole files or none."""

import os
from pathlib import Path

import pytest

from decodiff_anomalib.atomic_write import atomic_write


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "table.csv"
    with atomic_write(target) as staged:
        staged.write_text("a")
        assert staged.parent == target.parent
        assert staged.suffix == target.suffix
        assert not target.exists()
    assert target.read_text() == "a"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("before")

    def fail() -> None:
        with atomic_write(target) as staged:
            staged.write_text("half")
            raise OSError(28, "disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_two_processes_do_not_share_a_staged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_write(tmp_path / "a") as first:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with atomic_write(tmp_path / "a") as second:
            assert first != second
            second.write_text("second")
        first.write_text("first")
    assert (tmp_path / "a").read_text() == "first"
