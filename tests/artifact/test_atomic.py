"""Whole or not at all: whatever happens, the output is absent, old and whole, or new and whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.artifact import disk, staged
from malmen_cli.artifact.atomic import Staging, write_file
from malmen_cli.exceptions import OutputError

FILES = {"malmen.json": b"{}", "a.bin": b"a" * 30_000, "sub/b.bin": b""}
LOW_LEVEL = ("create", "write", "copy", "link", "sync", "rename", "exchange")


def write(out: Path, files: dict[str, bytes] = FILES, **options: Any) -> None:
    with Staging(out, **options) as staging:
        for name, data in files.items():
            staging.write(name, data)


def content(out: Path) -> dict[str, bytes] | None:
    if not out.exists():
        return None
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(".malmen-")]


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_writes_exactly_the_files_and_their_digests(out: Path) -> None:
    with Staging(out) as staging:
        for name, data in FILES.items():
            staging.write(name, data)
        assert not out.exists()
    assert content(out) == FILES
    assert leftovers(out) == []
    assert staging.sha256 == {name: disk.file_sha256(out / name) for name in FILES}


def test_parents_are_created_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "x" / "y" / "out"
    write(out)
    shutil.rmtree(out)
    out.mkdir()
    write(out)
    assert content(out) == FILES


def test_a_copied_file_has_the_same_bytes(out: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(os.urandom(2_500_000))
    with Staging(out) as staging:
        staging.copy("copy", tmp_path / "source")
    assert (out / "copy").read_bytes() == (tmp_path / "source").read_bytes()


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_what_malmen_wrote_and_leaves_nothing_of_it(
    out: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        without_exchange(monkeypatch)
    write(out, {"malmen.json": b"old", "stale": b"old"})
    write(out, force=True)
    assert content(out) == FILES
    assert leftovers(out) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".lock"])
def test_a_name_outside_the_folder_is_refused(out: Path, name: str) -> None:
    with pytest.raises(OutputError), Staging(out) as staging:
        staging.write(name, b"x")
    assert content(out) is None


def mixed(out: Path, source: Path) -> bytes:
    """A file of parts of another one between bytes of its own; what it holds."""
    with Staging(out) as staging, staging.file("mixed") as file:
        file.write(b"head")
        assert file.copy(source, 3, 2_000_003) == 2_000_000
        file.write(b"middle")
        assert file.copy(source, 2_000_003, 2_000_003) == 0
        file.write(b"more")
        assert file.copy(source, 2_400_000, 9_000_000) == 100_000
    assert staging.sha256["mixed"] == disk.file_sha256(out / "mixed")
    content = source.read_bytes()
    return b"head" + content[3:2_000_003] + b"middlemore" + content[2_400_000:]


def test_parts_of_other_files_stand_between_own_bytes(out: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(os.urandom(2_500_000))
    wanted = mixed(out, tmp_path / "source")
    assert (out / "mixed").read_bytes() == wanted


@pytest.mark.parametrize("damaged", ["write", "copy", "source"])
def test_a_mixed_file_that_reads_back_otherwise_is_refused(
    out: Path, tmp_path: Path, damaged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2_500_000).replace(b"?", b"!"))
    step = "write" if damaged == "write" else "copy"
    original = getattr(disk, step)

    def damage(descriptor: int, *given: object) -> object:
        found = original(descriptor, *given)
        if damaged == "source":  # changed before the copy was compared with it
            source.write_bytes(bytes(2_500_000))
        else:
            os.pwrite(descriptor, b"?", os.lseek(descriptor, 0, os.SEEK_CUR) - 1)
        return found

    monkeypatch.setattr(disk, step, damage)
    with pytest.raises(OutputError, match="mixed reads back other than it was written"):
        mixed(out, source)
    assert content(out) is None
    assert leftovers(out) == []


def test_a_long_copy_is_compared_piece_by_piece(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end anywhere, with own bytes between them; a byte of the last one is not the source's."""
    monkeypatch.setattr(staged, "PIECE", 999_983)
    source, original = tmp_path / "source", disk.copy
    source.write_bytes(os.urandom(2_500_000).replace(b"?", b"!"))
    wanted = mixed(out, source)
    assert (out / "mixed").read_bytes() == wanted
    shutil.rmtree(out)

    def damage(descriptor: int, given: int, start: int, end: int, share: bool) -> int:
        count = original(descriptor, given, start, end, share)
        if end == 2_000_003:
            os.pwrite(descriptor, b"?", os.lseek(descriptor, 0, os.SEEK_CUR) - 1)
        return count

    monkeypatch.setattr(disk, "copy", damage)
    with pytest.raises(OutputError, match="mixed reads back other than it was written"):
        mixed(out, source)
    assert leftovers(out) == []


def test_a_file_that_cannot_be_read_back_is_an_error_and_leaves_no_thread(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, threads = tmp_path / "source", threading.active_count()
    source.write_bytes(os.urandom(100_000))

    def unreadable(stream: object, start: int, end: int) -> Iterator[bytearray]:
        raise OSError(errno.EIO, "input/output error")
        yield bytearray()

    monkeypatch.setattr(staged, "_chunks", unreadable)
    with pytest.raises(OutputError, match="input/output error"), Staging(out) as staging:
        staging.copy("a", source)
    assert (content(out), leftovers(out)) == (None, [])
    assert threading.active_count() == threads


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_a_failure_at_every_step(
    tmp_path: Path, failure: BaseException, force: bool, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The k-th low-level step fails, before or after it took effect, for every k."""
    if not exchange:
        without_exchange(monkeypatch)
    old = {"malmen.json": b"old", "a.bin": b"old"} if force else None
    steps = count_steps(tmp_path / "probe", old, monkeypatch)
    assert steps >= 8
    for k in range(steps):
        for after in (False, True):
            out = tmp_path / f"out-{k}-{after}"
            if old:
                write(out, old)
            with monkeypatch.context() as patch:
                inject(patch, k, failure, after=after)
                with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else OutputError):
                    write(out, force=force)
            assert content(out) in (old, FILES), (k, after)
            write(out, force=True)
            assert content(out) == FILES
            assert leftovers(out) == []


def count_steps(out: Path, old: dict[str, bytes] | None, monkeypatch: pytest.MonkeyPatch) -> int:
    if old:
        write(out, old)
    with monkeypatch.context() as patch:
        calls = inject(patch, -1, None, after=False)
        write(out, force=True)
    return len(calls)


def inject(patch: pytest.MonkeyPatch, k: int, failure: BaseException | None, *, after: bool) -> list[str]:
    calls: list[str] = []
    for name in LOW_LEVEL:
        patch.setattr(disk, name, failing(name, getattr(disk, name), calls, k, failure, after))
    return calls


def failing(
    name: str, original: Callable[..., object], calls: list[str], k: int, failure: BaseException | None, after: bool
) -> Callable[..., object]:
    def step(*arguments: object) -> object:
        calls.append(name)
        due = len(calls) - 1 == k
        if due and not after and failure is not None:
            raise failure
        result = original(*arguments)
        if due and after and failure is not None:
            raise failure
        return result

    return step


def test_a_full_disk_says_how_much_is_needed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, 0, OSError(errno.ENOSPC, "no space"), after=False)
    with pytest.raises(OutputError, match=r"disk is full; 1,234,567 bytes are needed"):
        write(out, need=1_234_567)


def test_free_disk_is_checked_before_the_work(out: Path) -> None:
    with pytest.raises(OutputError, match="are needed and"), Staging(out, need=1 << 60):
        pytest.fail("the work began")
    assert leftovers(out) == []


def test_bytes_that_read_back_otherwise_are_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "write", lambda descriptor, data: os.write(descriptor, bytes(len(data))))
    with pytest.raises(OutputError, match="reads back other than it was written"):
        write(out)
    assert content(out) is None


# Run in a process of its own, which forks a child for every step and lets the child kill itself there.
KILLER = """
import json, os, signal, sys
from pathlib import Path
from typing import Any
from malmen_cli.artifact import disk
from malmen_cli.artifact.atomic import Staging
from malmen_cli.exceptions import OutputError

root, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
NEW, OLD = {"malmen.json": "new", "a": "new", "b": "new"}, {"malmen.json": "old", "z": "old"}
STEPS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")
if not exchange:
    disk.exchange = lambda one, other: False

def write(out, files):
    with Staging(out, force=True) as staging:
        for name, text in files.items():
            staging.write(name, text.encode())

def content(out):
    return {p.name: p.read_text() for p in out.iterdir()} if out.exists() else None

def patch(k, after):
    count = [0]
    def wrap(original):
        def step(*arguments, **options):
            count[0] += 1
            if count[0] == k and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            mine = count[0] == k and after
            try:
                return original(*arguments, **options)
            finally:
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)
        return step
    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))
    disk.exchange = wrap(disk.exchange)

seen, wrong, k, alive = {"old": 0, "new": 0, "absent": 0}, [], 0, False
while not alive:
    k += 1
    alive = True
    for after in (False, True):
        for had in (True, False):
            out = root / f"out-{k}-{after}-{had}"
            if had:
                write(out, OLD)
            child = os.fork()
            if child == 0:
                patch(k, after)
                write(out, NEW)
                os._exit(0)
            alive = os.waitpid(child, 0)[1] == 0 and alive
            found = content(out)
            known = (("old", OLD), ("new", NEW), ("absent", None))
            name = next((name for name, files in known if files == found), None)
            if name is None or (name == "old" and not had) or (name == "absent" and had and exchange):
                wrong.append([k, after, had, found])
            else:
                seen[name] += 1
            # refused, the next run has put back or cleaned what the killed one left
            try:
                with Staging(out):
                    raise RuntimeError
            except (RuntimeError, OutputError):
                pass
            if had and content(out) not in (OLD, NEW):
                wrong.append([k, after, had, "not put back", content(out)])
            if [p.name for p in root.iterdir() if p.name.startswith(".malmen-")]:
                wrong.append([k, after, had, "left over"])
print(json.dumps({"steps": k - 1, "seen": seen, "wrong": wrong}))
"""


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_killed_at_every_system_call(tmp_path: Path, exchange: bool) -> None:
    """SIGKILL before and after every open, write, sync, rename, mkdir and removal; the next run cleans up."""
    command = [sys.executable, "-c", KILLER, str(tmp_path), str(exchange)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(disk.__file__).parents[2], check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["wrong"] == []
    assert report["steps"] >= 20
    assert min(report["seen"].values()) > 0


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_two_writers_at_once(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several writers of one output every finished one wrote the whole of it, and the others were told."""
    if not exchange:
        without_exchange(monkeypatch)
    out = tmp_path / "out"
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def run(who: str) -> None:
        barrier.wait()
        try:
            write(out, {"malmen.json": who.encode(), "a": who.encode() * 100_000})
            outcomes.append(who)
        except OutputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run, args=(who,)) for who in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [outcome for outcome in outcomes if outcome in "1234"]
    assert len(winners) == 1
    assert content(out) == {"malmen.json": winners[0].encode(), "a": winners[0].encode() * 100_000}
    assert leftovers(out) == []


def test_a_second_writer_is_refused_while_the_first_one_lives(out: Path) -> None:
    with Staging(out) as staging:
        with pytest.raises(OutputError, match="another malmen process is writing"):
            write(out)
        staging.write("malmen.json", b"first")
    assert content(out) == {"malmen.json": b"first"}


def test_an_output_that_appeared_meanwhile_is_not_overwritten(out: Path) -> None:
    def lose() -> None:
        with Staging(out) as staging:
            staging.write("malmen.json", b"mine")
            out.mkdir()
            (out / "precious").write_bytes(b"theirs")

    with pytest.raises(OutputError, match="not empty and not written by malmen"):
        lose()
    assert content(out) == {"precious": b"theirs"}


def test_leftovers_of_other_outputs_are_left_alone(tmp_path: Path) -> None:
    others = [".malmen-other-01234567", ".malmen-out-more-01234567", ".malmen-out-0123456", ".malmen-x.old"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".malmen-out-01234567").mkdir()
    write(tmp_path / "out")
    assert sorted(leftovers(tmp_path / "out")) == sorted(others)


def test_file_system_without_locks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(disk.fcntl, "flock", no_locks)
    (out.parent / ".malmen-out-01234567").mkdir()
    (out.parent / ".malmen-out-01234567" / ".lock").touch()
    write(out)
    assert content(out) == FILES
    assert leftovers(out) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_file_system_without_exchange(out: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_RENAME_EXCHANGE", 0xFF)  # flags the kernel does not know
    write(out, {"malmen.json": b"old"})
    monkeypatch.setattr(disk.ctypes, "get_errno", lambda: code)
    write(out, force=True)
    assert content(out) == FILES


def test_an_exchange_that_fails_for_another_reason_is_an_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, {"malmen.json": b"old"})
    monkeypatch.setattr(disk, "_RENAME_EXCHANGE", 0xFF)
    monkeypatch.setattr(disk.ctypes, "get_errno", lambda: errno.EBUSY)
    with pytest.raises(OutputError, match="cannot be written"):
        write(out, force=True)
    assert content(out) == {"malmen.json": b"old"}


def test_no_c_library(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out, {"malmen.json": b"old"})
    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: object())
    write(out, force=True)
    assert content(out) == FILES


class TestWriteFile:
    def test_replaces_and_creates_parents(self, tmp_path: Path) -> None:
        file = tmp_path / "new" / "file"
        write_file(file, b"one")
        write_file(file, b"two")
        assert file.read_bytes() == b"two"
        assert leftovers(file) == []

    @pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_an_old_file_survives_failures(
        self, tmp_path: Path, k: int, failure: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "file"
        file.write_bytes(b"old")
        inject(monkeypatch, k, failure, after=False)
        with pytest.raises((OutputError, KeyboardInterrupt)):
            write_file(file, b"new")
        assert file.read_bytes() == b"old"
        assert leftovers(file) == []

    def test_what_a_killed_run_left_is_removed_and_a_living_one_s_is_not(self, tmp_path: Path) -> None:
        file, dead, living = (tmp_path / name for name in ("file", ".malmen-file-01234567", ".malmen-file-89abcdef"))
        dead.write_bytes(b"half")
        descriptor = disk.create(living)
        disk.hold(descriptor)
        write_file(file, b"new")
        os.close(descriptor)
        assert leftovers(file) == [living.name]
        write_file(file, b"newer")
        assert leftovers(file) == []

    def test_a_file_that_appeared_meanwhile_is_not_overwritten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, sync = tmp_path / "file", disk.sync
        monkeypatch.setattr(disk, "sync", lambda descriptor: (file.write_bytes(b"theirs"), sync(descriptor)))
        with pytest.raises(OutputError, match="already there"):
            write_file(file, b"mine", force=False)
        assert content(tmp_path) == {"file": b"theirs"}

    def test_a_pipe_or_device_is_no_file_to_replace(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OutputError, match="not an ordinary file"):
            write_file(tmp_path / "pipe", b"x")
        assert (tmp_path / "pipe").is_fifo()


class TestPrevious:
    """What a folder replaced can be kept for, in case the new one is damaged later."""

    def test_is_the_folder_replaced_last(self, out: Path, tmp_path: Path) -> None:
        for text in (b"1", b"2", b"3"):
            write(out, {"malmen.json": text}, force=True, previous=tmp_path / "before")
        assert (content(out), content(tmp_path / "before")) == ({"malmen.json": b"3"}, {"malmen.json": b"2"})
        assert leftovers(out) == []

    def test_a_failure_at_every_step_leaves_a_whole_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for k in range(12):
            out, before = tmp_path / f"out-{k}", tmp_path / f"before-{k}"
            for text in (b"1", b"2"):
                write(out, {"malmen.json": text}, force=True, previous=before)
            with monkeypatch.context() as patch:
                inject(patch, k, OSError(errno.EIO, "I/O error"), after=False)
                with contextlib.suppress(OutputError):
                    write(out, {"malmen.json": b"3"}, force=True, previous=before)
            assert content(out) in ({"malmen.json": b"2"}, {"malmen.json": b"3"})
            assert content(before) in (None, {"malmen.json": b"1"}, {"malmen.json": b"2"})


def test_bytes_are_copied_where_the_kernel_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has sendfile for sockets alone; some mounted file systems have none."""

    def refused(*_: object) -> int:
        raise OSError(errno.ENOTSOCK, "Socket operation on non-socket")

    monkeypatch.setattr(disk.os, "sendfile", refused)
    monkeypatch.setattr(disk, "PASSED", 7)
    data = bytes(range(256)) * 3
    (tmp_path / "source").write_bytes(data)
    with Staging(tmp_path / "out") as staging:
        staging.copy("copied", tmp_path / "source")
    assert (tmp_path / "out" / "copied").read_bytes() == data


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux has copy_file_range")
def test_a_copy_shares_blocks_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    true = os.copy_file_range

    def watched(source: int, target: int, count: int, start: int) -> int:
        asked.append(count)
        return true(source, target, count, start)

    monkeypatch.setattr(disk.os, "copy_file_range", watched)
    data = os.urandom(100_000)
    (tmp_path / "source").write_bytes(data)
    for share, calls in ((False, []), (True, [len(data)])):
        with Staging(tmp_path / f"{share}", share=share) as staging:
            staging.copy("copied", tmp_path / "source")
        assert (tmp_path / f"{share}" / "copied").read_bytes() == data
        assert asked == calls


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux has copy_file_range")
def test_from_the_next_block_on_whole_blocks_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system shares whole blocks alone, and an edited tensor ends anywhere."""
    asked: list[tuple[int, int]] = []
    true = os.copy_file_range

    def watched(source: int, target: int, count: int, start: int) -> int:
        asked.append((start, count))
        return true(source, target, count, start)

    monkeypatch.setattr(disk.os, "copy_file_range", watched)
    monkeypatch.setattr(disk, "COPIED", 8192)
    data = os.urandom(20_000)
    (tmp_path / "source").write_bytes(data)
    with Staging(tmp_path / "out", share=True) as staging, staging.file("mixed") as file:
        file.write(b"edited")
        file.copy(tmp_path / "source", 6, len(data))
    assert (tmp_path / "out" / "mixed").read_bytes() == b"edited" + data[6:]
    assert asked == [(6, 4090), (4096, 8192), (12288, 7712)]


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="only Linux has copy_file_range")
def test_where_blocks_cannot_be_shared_bytes_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(disk.os, "copy_file_range", refused)
    (tmp_path / "source").write_bytes(b"abc" * 1000)
    with Staging(tmp_path / "out", share=True) as staging:
        staging.copy("copied", tmp_path / "source")
    assert (tmp_path / "out" / "copied").read_bytes() == b"abc" * 1000


def test_a_linked_file_is_the_file_itself_and_not_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"weights")
    (tmp_path / "model").symlink_to(tmp_path / "blob")
    with Staging(tmp_path / "out") as staging:
        assert staging.link("sub/model", tmp_path / "model")
        assert staging.sha256["sub/model"] == hashlib.sha256(b"weights").hexdigest()
    placed = tmp_path / "out" / "sub" / "model"
    assert not placed.is_symlink()
    assert placed.samefile(tmp_path / "blob")
    shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "blob").read_bytes() == b"weights"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_what_cannot_be_linked_is_left_to_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(disk.os, "link", refused)
    (tmp_path / "source").write_bytes(b"abc")
    with Staging(tmp_path / "out") as staging:
        assert not staging.link("a", tmp_path / "source")
        assert staging.sha256 == {}
        staging.copy("a", tmp_path / "source")
    assert (tmp_path / "out" / "a").read_bytes() == b"abc"


def test_a_disk_that_fails_to_link_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "link", full)
    (tmp_path / "source").write_bytes(b"abc")
    with pytest.raises(OutputError, match="the disk is full"), Staging(tmp_path / "out") as staging:
        staging.link("a", tmp_path / "source")
    assert not (tmp_path / "out").exists()
