"""Logs of other processes, kept small while these write."""

from __future__ import annotations

import stat
from pathlib import Path

from common.log_files import keep_small


def test_a_log_that_grew_moves_aside_and_is_written_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"old\n" * 10)
        assert not keep_small(log, 40)
        assert not (tmp_path / "log.1").exists()
        writer.write(b"x")
        assert keep_small(log, 40)
        assert (tmp_path / "log.1").read_bytes() == b"old\n" * 10 + b"x"
        assert log.read_bytes() == b""
        writer.write(b"new\n")
        assert log.read_bytes() == b"new\n"  # no hole of zeros before it
        writer.write(b"y" * 50)
        assert keep_small(log, 40)
    assert (tmp_path / "log.1").read_bytes() == b"new\n" + b"y" * 50
    assert stat.S_IMODE((tmp_path / "log.1").stat().st_mode) == 0o600


def test_without_room_for_a_copy_it_is_cut_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 50)
    (tmp_path / "log.1").mkdir()
    assert keep_small(log, 40)
    assert log.read_bytes() == b""


def test_a_log_that_is_not_there_is_small(tmp_path: Path) -> None:
    assert not keep_small(tmp_path / "log")
