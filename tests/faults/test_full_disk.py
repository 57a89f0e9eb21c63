"""A disk that is really full, and one that is really read-only: small tmpfs file systems, where they may be mounted.

Where they may not, a process whose files may not grow meets an error of the same kind at the same places.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.artifact import disk
from malmen_cli.cli.errors import main

SIZE = 160_000  # bytes: less than the tiny base's weights
LONGEST = 500  # bytes: less than any output's longest file


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of SIZE bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    given = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if mount is None or subprocess.run([mount, *given], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs takes rights that this run does not have")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def no_file_grows() -> Iterator[None]:
    """No file of this process becomes longer than LONGEST bytes, until the limit is lifted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def apply(writer: Any, out: Path, *options: str) -> int:
    argv = [str(out) if word == str(writer.outputs[0]) else word for word in writer.argv]
    return main([*argv, "-q", *options])


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_too_small_a_disk_is_told_before_the_work(
    small_disk: Path, make_writer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(make_writer("merged"), small_disk / "out") == 6
    assert "bytes are needed and" in capsys.readouterr().err
    assert listing(small_disk) == {}


def test_a_disk_that_fills_meanwhile_leaves_what_was_there(
    small_disk: Path,
    make_writer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody else takes the room behind the check: here, there is no check."""
    monkeypatch.setattr(disk, "check_free", lambda out, need: None)
    assert apply(make_writer("delta", out="d"), small_disk / "out") == 0
    before = listing(small_disk)
    assert apply(make_writer("merged", out="m"), small_disk / "out", "--force") == 6
    assert "the disk is full" in capsys.readouterr().err
    assert listing(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == ["out"]


def test_a_read_only_disk_is_exit_6(
    small_disk: Path, make_writer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Permissions do not stop root, a read-only file system does."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("delta", "train-editor"):
        assert apply(make_writer(name, out=name), small_disk / "out") == 6
        (line,) = capsys.readouterr().err.splitlines()
        assert str(small_disk) in line
    assert main(["facts", "convert", make_writer("convert", out="c").argv[2], "-o", str(small_disk / "f"), "-q"]) == 6
    assert "Read-only file system" in capsys.readouterr().err


def test_a_conversion_that_finds_no_room_leaves_none(
    small_disk: Path,
    make_writer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told before the work; and where the room goes meanwhile, by what transformers writes with."""
    writer = make_writer("gguf")
    monkeypatch.setenv("MALMEN_HOME", str(small_disk))
    (small_disk / "others").write_bytes(bytes(SIZE - 40_000))
    assert main([*writer.argv, "-q"]) == 4
    said = capsys.readouterr().err
    assert "bytes are needed and" in said
    assert "MALMEN_HOME" in said
    monkeypatch.setattr(disk, "check_free", lambda out, need: None)
    assert main([*writer.argv, "-q"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left" in line
    assert [path.name for path in (small_disk / "bases").iterdir() if not path.name.endswith(".lock")] == []
    (small_disk / "others").unlink()
    assert main([*writer.argv, "-q"]) == 0


@pytest.mark.parametrize(
    ("name", "code"),
    [("merged", 6), ("adapter", 6), ("install", 6), ("convert", 6), ("stats", 6), ("eval", 6), ("gguf", 4)],
)
def test_a_file_that_may_not_grow_leaves_nothing(
    name: str,
    code: int,
    make_writer: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    writer = make_writer(name)
    request.getfixturevalue("no_file_grows")
    assert main([*writer.argv, "-q"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert "File too large" in line
    files = [file for output in writer.outputs for file in output.rglob("*") if file.is_file()]
    assert [file for file in files if file.suffix != ".lock"] == []
    assert writer.leftovers() == []
