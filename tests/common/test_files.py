"""Writing that a crash, a kill or a full disk cannot spoil."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import StorageError
from common.files import append_line, write_atomically, write_bytes, write_directory, write_json, write_text

OLD, NEW = "old\n", "new\n"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Runs code that knows `directory` in a process of its own, which it may kill or restrict."""
    prelude = (
        "import os, resource, signal, sys\nfrom pathlib import Path\nimport numpy\n"
        "from safetensors.numpy import save_file\nfrom common.errors import StorageError\nfrom common.files import *\n"
        "directory = Path(sys.argv[1])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code, str(directory)], capture_output=True, text=True, timeout=60, check=False
    )


# --- The ordinary case ---------------------------------------------------------------------------------------------


def test_files_are_written_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "file"
    for content in (OLD, NEW, "", "\u2028 é"):
        write_text(file, content)
        assert file.read_bytes() == content.encode()
    write_bytes(file, b"\xff\x00")
    assert file.read_bytes() == b"\xff\x00"
    write_atomically(file, lambda partial: save_file({"a": np.ones(3)}, partial))
    assert load_file(file)["a"].tolist() == [1, 1, 1]
    assert names(file.parent) == ["file"]


def test_who_reads_the_old_file_reads_it_to_the_end(tmp_path: Path) -> None:
    """The new one takes its place and is not written over it."""
    file = tmp_path / "file"
    write_text(file, OLD)
    with file.open() as reader:
        write_text(file, NEW)
        assert reader.read() == OLD
    assert file.read_text() == NEW


def test_json_is_indented_and_has_no_word_for_nan(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, {"a": [1, None]})
    assert json.loads(file.read_text()) == {"a": [1, None]}
    assert file.read_text().endswith("]\n}\n")
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            write_json(file, {"a": value})
    assert json.loads(file.read_text()) == {"a": [1, None]}
    assert names(tmp_path) == ["file.json"]


def test_directories_are_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "adapter"
    write_directory(directory, lambda partial: (partial / "a").write_text(OLD) and None)
    write_directory(directory, lambda partial: (partial / "b").write_text(NEW) and None)
    assert names(directory) == ["b"]
    assert (directory / "b").read_text() == NEW
    assert names(directory.parent) == ["adapter"]


def test_lines_are_appended_to_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "new" / "metrics.jsonl"
    for line in ("one", "zwei \u2028 é", ""):
        append_line(file, line)
    assert file.read_bytes() == "one\nzwei \u2028 é\n\n".encode()


def test_new_files_have_the_permissions_of_the_user(tmp_path: Path) -> None:
    write_text(tmp_path / "file", NEW)
    (tmp_path / "plain").write_text(NEW)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


# --- A writer that fails -------------------------------------------------------------------------------------------


def half(error: BaseException) -> Callable[[Path], None]:
    """A writer that fails when half is written, be it a file or a directory."""

    def write(partial: Path) -> None:
        ((partial / "a") if partial.is_dir() else partial).write_text("hal")
        raise error

    return write


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "file"
    write_text(file, OLD)
    with pytest.raises(type(error)):
        write_atomically(file, half(error))
    assert file.read_text() == OLD
    assert names(tmp_path) == ["file"]
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "other", half(error))
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_writer_that_raises_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    directory = tmp_path / "adapter"
    write_directory(directory, lambda partial: (partial / "a").write_text(OLD) and None)
    with pytest.raises(type(error)):
        write_directory(directory, half(error))
    assert (directory / "a").read_text() == OLD
    assert names(tmp_path) == ["adapter"]


def test_what_the_system_says_is_told_with_the_path_and_a_remedy(tmp_path: Path) -> None:
    for write in (write_atomically, write_directory):
        with pytest.raises(
            StorageError, match=r"cannot write .*target: No space left on device\. Free space or choose"
        ):
            write(tmp_path / "target", half(OSError(28, "No space left on device")))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("file/target", "File exists. A file stands where a directory is needed: choose another place"),
        ("file/deep/target", "Not a directory. A file stands where a directory is needed: choose another place"),
        ("file", "Is a directory. A directory stands where a file is needed: choose another name"),
        ("/dev/full", "No space left on device. Free space or choose a writable directory, and try again"),
    ],
)
def test_the_remedy_is_of_what_the_system_says_and_of_no_run(tmp_path: Path, place: str, remedy: str) -> None:
    (tmp_path / "file").mkdir() if place == "file" else (tmp_path / "file").write_text(OLD)
    with pytest.raises(StorageError) as caught:
        append_line(tmp_path / place, NEW)
    assert f"{place}: {remedy}" in str(caught.value)
    assert not {"round", "resume"} & set(re.findall(r"\w+", str(caught.value).partition(": ")[2]))


@pytest.mark.parametrize("place", ["file/target", "target"])
def test_a_path_that_cannot_be_is_a_storage_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text(OLD)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").write_text(OLD)
    for write in (write_text, append_line):
        with pytest.raises(StorageError, match="cannot write"):
            write(tmp_path / place, NEW)
    with pytest.raises(StorageError, match="cannot write"):
        write_directory(tmp_path / "file", lambda partial: None)
    assert names(tmp_path) == ["file", "target"]
    assert (tmp_path / "file").read_text() == (tmp_path / "target" / "kept").read_text() == OLD


# --- A kill --------------------------------------------------------------------------------------------------------


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    write_text(tmp_path / "file", OLD)
    killed = run(
        "def write(partial):\n"
        "    partial.write_text('hal')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(directory / 'file', write)\n",
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == OLD
    assert len(names(tmp_path)) == 2  # the kill came in the middle
    write_text(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_text() == NEW
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("moment", "call"),
    [("write", 1), ("os.fsync", 1), ("os.fsync", 3), ("Path.rename", 1), ("Path.rename", 2), ("os.fsync", 4)]
    + [("shutil.rmtree", call) for call in (1, 3, 4)],
)
def test_a_kill_at_any_step_of_replacing_a_directory_leaves_one_whole(tmp_path: Path, moment: str, call: int) -> None:
    """Old or new stands there, or, between two renames, comes back with the next write."""
    directory = tmp_path / "adapter"
    write_directory(directory, lambda partial: [(partial / name).write_text(OLD) for name in "ab"] and None)
    killed = run(
        f"""
import shutil
calls = 0
def dying(step):
    def instead(*arguments, **named):
        global calls
        calls += 1
        if calls == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments, **named)
    return instead
def write(partial):
    for name in "ab":
        (partial / name).write_text("new\\n")
        dying(int)() if "{moment}" == "write" else None
if "{moment}" != "write":
    owner, _, name = "{moment}".rpartition(".")
    setattr(eval(owner), name, dying(getattr(eval(owner), name)))
write_directory(directory / "adapter", write)
""",
        tmp_path,
    )
    assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    if directory.exists():
        contents = {(directory / name).read_text() for name in "ab"}
        assert contents in ({OLD}, {NEW})
        assert killed.returncode == -signal.SIGKILL or contents == {NEW}
    else:
        assert (moment, call) == ("Path.rename", 2)
    with pytest.raises(RuntimeError):
        write_directory(directory, half(RuntimeError("a bug")))
    contents = {(directory / name).read_text() for name in "ab"}
    assert contents in ({OLD}, {NEW})
    assert names(tmp_path) == ["adapter"]


# --- A full or read-only disk --------------------------------------------------------------------------------------

FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"  # no file grows beyond one block
TOLD = "try:\n    {write}\nexcept StorageError as error:\n    print(error)\n"


@pytest.mark.parametrize(
    "write",
    [
        "write_text(directory / 'target', 'x' * 100_000)",
        "write_bytes(directory / 'target', b'x' * 100_000)",
        "write_json(directory / 'target', ['x' * 100_000])",
        "write_atomically(directory / 'target', lambda p: save_file({'a': numpy.zeros(100_000)}, p))",
        "append_line(directory / 'target', 'x' * 100_000)",
    ],
    ids=["text", "bytes", "json", "safetensors", "line"],
)
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, write: str) -> None:
    write_text(tmp_path / "target", OLD)
    done = run(FULL + TOLD.format(write=write), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path / 'target'}: ")
    assert "File too large" in done.stdout
    assert (tmp_path / "target").read_text() == OLD
    assert names(tmp_path) == ["target"]


def test_a_full_disk_keeps_the_old_directory(tmp_path: Path) -> None:
    write_directory(tmp_path / "target", lambda partial: (partial / "a").write_text(OLD) and None)
    write = "write_directory(directory / 'target', lambda p: save_file({'a': numpy.zeros(100_000)}, p / 'a'))"
    done = run(FULL + TOLD.format(write=write), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert (tmp_path / "target" / "a").read_text() == OLD
    assert names(tmp_path) == ["target"]


def test_a_line_that_does_not_fit_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left on device"):
        append_line(Path("/dev/full"), "line")


@pytest.mark.parametrize(
    "write",
    [
        "write_text(directory / 'target', 'new')",
        "write_text(directory / 'other' / 'target', 'new')",
        "write_atomically(directory / 'target', lambda p: save_file({'a': numpy.zeros(3)}, p))",
        "append_line(directory / 'target', 'new')",
        "write_directory(directory / 'folder', lambda p: (p / 'a').write_text('new'))",
    ],
    ids=["file", "new folder", "safetensors", "line", "directory"],
)
def test_a_read_only_directory_keeps_what_it_holds(write: str) -> None:
    # Not below tmp_path, which nobody but its owner may enter.
    with TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        directory = Path(base) / "read-only"
        write_text(directory / "target", OLD)
        write_directory(directory / "folder", lambda partial: (partial / "a").write_text(OLD) and None)
        (directory / "target").chmod(0o444)
        directory.chmod(0o555)
        try:
            # Permissions do not bind root, so a root that runs the tests becomes nobody first.
            done = run("if os.getuid() == 0: os.setuid(65534)\n" + TOLD.format(write=write), directory)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"cannot write {directory}")
            assert "Permission denied" in done.stdout
            assert (directory / "target").read_text() == (directory / "folder" / "a").read_text() == OLD
            assert names(directory) == ["folder", "target"]
        finally:
            directory.chmod(0o755)
