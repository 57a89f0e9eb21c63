"""What malmen asks of the file system while it writes: the one place where a full or failing disk is met.

Outputs are written through these functions and no others, so that a test can let any of them fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from malmen_cli.exceptions import OutputError

PASSED = 1 << 20  # bytes that pass through us at once where the kernel does not copy
COPIED = 1 << 26  # bytes that the kernel is asked to copy at once, between which an interrupt is heard
BLOCK = 4096  # bytes that file systems share or do not
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_NOT_TOGETHER = (*_UNSUPPORTED, errno.EXDEV, errno.EMLINK, errno.EACCES)  # two places that cannot share a file


def create(path: Path) -> int:
    """A descriptor of the new file `path`, for writing; FileExistsError where there is one."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`: every byte of an output goes through here."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def copy(descriptor: int, source: int, start: int, end: int, share: bool = False) -> int:
    """Bytes of one file to the end of another without passing through us; as many as there are up to `end`.

    By sendfile, or with `share` by copy_file_range, which may share blocks between the two files; where the system has
    neither for these, or the file system cannot, the bytes do pass through us.
    """
    done = start
    while done < end:
        try:
            # Whole blocks can be shared; the two files have the same offsets, so that one start decides for both.
            most = BLOCK - done % BLOCK if share and done % BLOCK else COPIED
            count = _by_kernel(descriptor, source, done, min(most, end - done), share)
        except OSError as error:
            if error.errno not in (*_UNSUPPORTED, errno.ENOTSOCK, errno.EXDEV):
                raise
            data = os.pread(source, min(PASSED, end - done), done)
            write(descriptor, data)
            count = len(data)
        if not count:
            break
        done += count
    return done - start


def _by_kernel(descriptor: int, source: int, start: int, count: int, share: bool) -> int:
    if share and hasattr(os, "copy_file_range"):
        return os.copy_file_range(source, descriptor, count, start)
    return os.sendfile(descriptor, source, start, count)


def link(source: Path, path: Path) -> bool:
    """Have the new file `path` be the file `source`, by a hard link; False where the two places cannot share one."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in _NOT_TOGETHER:
            raise
        return False
    return True


def sync(descriptor: int) -> None:
    """What was written survives a power cut."""
    os.fsync(descriptor)


def begin_sync(descriptor: int) -> None:
    """Have the kernel begin to put on the disk what was written; nothing is certain before `sync`."""
    start_range = _sync_file_range()
    if start_range is not None:
        start_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)


@functools.cache
def _sync_file_range() -> Any:
    try:
        return ctypes.CDLL(None).sync_file_range
    except (OSError, TypeError, AttributeError):  # another system's
        return None


def sync_at(path: Path) -> None:
    """What is at `path` survives a power cut: the bytes of a file, the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """`source` becomes `target`, in a single step."""
    os.rename(source, target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in a single step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def hold(descriptor: int) -> None:
    """Lock an open file for as long as its descriptor, or this process, lives."""
    with contextlib.suppress(OSError):  # a file system without locks: nothing to hold
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_held(path: Path) -> bool:
    """Whether a living process holds the file `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One malmen process at a time looks at, or renames in, `folder`; held for moments only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_free(out: Path, need: int) -> None:
    """Raise OutputError when the disk that will hold `out` has fewer than `need` bytes free."""
    free = shutil.disk_usage(existing_ancestor(out)).free
    if free < need:
        raise OutputError(
            f"{out}: {need:,} bytes are needed and {free:,} are free on that disk; make room, or name another disk"
        )


def existing_ancestor(path: Path) -> Path:
    """The nearest of `path` and its parents that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


@contextlib.contextmanager
def output_errors(out: Path, need: int) -> Iterator[None]:
    """An operating system error on the way to `out`, of `need` bytes, becomes an OutputError in words."""
    try:
        yield
    except OSError as error:
        raise OutputError(_in_words(out, error, need)) from error


def _in_words(out: Path, error: OSError, need: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        amount = f"{need:,} bytes are needed" if need else "more room is needed"
        return f"{out}: the disk is full; {amount}; nothing was changed"
    return f"{out}: cannot be written: {error.strerror or error}"
