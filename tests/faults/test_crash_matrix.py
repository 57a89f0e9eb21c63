"""T24 through the commands themselves: an operation of the disk fails, and what was whole stays whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from malmen_cli.base import cache
from malmen_cli.cli.errors import main

WRITERS = ("merged", "linked", "delta", "adapter", "train-editor", "install", "convert", "stats", "eval")


def reference(writer: Any, faulty_disk: Any) -> tuple[list[Any], int]:
    """What an undisturbed run leaves, and how many operations of the disk it takes; the outputs are gone again."""
    with faulty_disk.failing(None):
        assert main([*writer.argv, "-q"]) == 0
    found, operations = writer.content(), len(faulty_disk.asked)
    writer.remove()
    return found, operations


@pytest.mark.parametrize("name", WRITERS)
def test_a_failing_disk_leaves_nothing_or_the_whole(
    name: str,
    fault: tuple[BaseException, int],
    make_writer: Callable[[str], Any],
    faulty_disk: Any,
    tried: Callable[[int, BaseException], list[int]],
    whole_parts: Callable[[Any, Any], bool],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ENOSPC, EIO or Ctrl-C at the k-th operation: one line, the code, every output absent or whole; then it works."""
    monkeypatch.setattr(cache, "remember", lambda *_: None)  # which never fails a run: see test_caches.py
    writer, (error, code) = make_writer(name), fault
    whole, operations = reference(writer, faulty_disk)
    assert operations >= 4
    ks = tried(operations, error)
    for k in ks:
        with faulty_disk.failing(k, error):
            assert main([*writer.argv, "-q"]) == code, k
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert all(found is None or whole_parts(found, new) for found, new in zip(writer.content(), whole, strict=True))
        assert writer.leftovers() == []
        assert main([*writer.argv, *writer.again, "-q"]) == 0
        assert writer.content() == whole
        assert writer.leftovers() == []
        writer.remove()
    print(f"{name}, {error!r}: {len(ks)} of {operations} operations fail")


@pytest.mark.parametrize("name", ["merged", "linked", "delta", "adapter", "train-editor", "convert", "eval"])
def test_a_failing_disk_leaves_the_old_output(
    name: str,
    fault: tuple[BaseException, int],
    make_writer: Callable[[str], Any],
    faulty_disk: Any,
    tried: Callable[[int, BaseException], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an older output in the way and --force, it is that one or the new one, and nothing in between."""
    monkeypatch.setattr(cache, "remember", lambda *_: None)
    writer, (error, code) = make_writer(name), fault
    whole, operations = reference(writer, faulty_disk)
    if name in ("convert", "eval"):
        for output in writer.outputs:
            output.write_text("old\n", encoding="utf-8")
    else:
        assert main([*writer.argv, "-q", "--seed", "1"]) == 0
    ks = tried(operations, error)
    print(f"{name}, {error!r}: {len(ks)} of {operations} operations fail")
    for k in ks:
        old = writer.content()
        with faulty_disk.failing(k, error):
            assert main([*writer.argv, "-q", "--force"]) == code, k
        assert all(found in pair for found, *pair in zip(writer.content(), old, whole, strict=True)), k
        assert writer.leftovers() == []
