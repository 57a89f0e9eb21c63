"""A disk that is really full, and one that is really read-only: small tmpfs file systems, where they may be mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.artifact import disk
from malmen_cli.cli.errors import main

SIZE = 160_000  # bytes: less than the tiny base's weights


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
