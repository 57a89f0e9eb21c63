"""The one module that writes outputs: a folder appears whole or not at all.

A folder is built beside its place as `.malmen-<name>-<random>`, synced, read back and renamed into place. An old
folder is exchanged for the new one in a single step where the system can do that (`renameat2`), and is otherwise
moved aside as `.malmen-<name>-<random>.old` for the moment between two renames. Killed at any point, the output is
absent, old and whole, or new and whole; what is left over is cleaned, or put back, by the next run on that output.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType

from malmen_cli.exceptions import OutputError

LOCK = ".lock"  # inside the temporary folder, held with flock for as long as its process lives
# A folder with one of these was written by us and may be replaced.
MARKS = ("malmen.json", "editor.json", "statistics.json")
CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


class Staging:
    """Build the folder `out` file by file; leaving the `with` block without an exception puts it in place.

    force: a folder that malmen wrote earlier may be replaced. need: bytes about to be written, checked against the
    free disk before anything is. `sha256` holds the digest of every file written so far.
    Raises OutputError, with nothing changed, for whatever keeps the folder from being written.
    """

    def __init__(self, out: Path, *, force: bool = False, need: int = 0) -> None:
        self.out = Path(os.path.abspath(out))
        if not self.out.name:
            raise OutputError(f"{out}: the root folder cannot be an output; name a folder in it")
        self.sha256: dict[str, str] = {}
        self._force = force
        self._need = need
        self._lock = -1
        self._folder = self.out.with_name(f".malmen-{self.out.name}-{secrets.token_hex(4)}")

    def __enter__(self) -> Staging:
        try:
            with self._errors():
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with _exclusive(self.out.parent):
                    _clean(self.out)
                    refuse_existing(self.out, force=self._force)
                    check_free(self.out, self._need)
                    self._folder.mkdir()
                    self._lock = _take_lock(self._folder)
        except BaseException:
            self._drop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._errors():
                    self._commit()
        finally:
            self._drop()

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[StagedFile]:
        """A new file in the folder, hashed as it is written and synced when the block ends."""
        path = self._path(name)
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            staged = StagedFile(self, descriptor)
            yield staged
            with self._errors():
                _sync(descriptor)
        finally:
            os.close(descriptor)
        self.sha256[name] = staged.digest()

    def write(self, name: str, data: bytes) -> None:
        """The file `name` holding `data`."""
        with self.file(name) as staged:
            staged.write(data)

    def copy(self, name: str, source: Path) -> None:
        """The file `name` with the bytes of `source`."""
        with source.open("rb") as stream, self.file(name) as staged:
            while chunk := stream.read(CHUNK):
                staged.write(chunk)

    def write_some(self, descriptor: int, data: bytes | memoryview) -> None:
        with self._errors():
            _write(descriptor, data)

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or parts == (LOCK,):
            raise OutputError(f"{self.out}: {name!r} is not a file name inside the output")
        return self._folder.joinpath(*parts)

    def _commit(self) -> None:
        """Read everything back, then swap the folder in while holding the parent's lock."""
        for name, digest in self.sha256.items():
            if file_sha256(self._path(name)) != digest:
                raise OutputError(f"{self.out}: {name} reads back other than it was written; is the disk failing?")
        for folder in {self._path(name).parent for name in self.sha256} | {self._folder}:
            _sync_folder(folder)
        with _exclusive(self.out.parent):
            refuse_existing(self.out, force=self._force)
            (self._folder / LOCK).unlink()
            _place(self._folder, self.out)
            _sync_folder(self.out.parent)

    def _drop(self) -> None:
        """Remove what is left beside the output; after a placed folder that is the old one, if there was one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise as_output_error(self.out, error, self._need) from error


class StagedFile:
    """A file being written in a Staging."""

    def __init__(self, staging: Staging, descriptor: int) -> None:
        self._staging = staging
        self._descriptor = descriptor
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._staging.write_some(self._descriptor, data)

    def digest(self) -> str:
        return self._hash.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, replacing an old file; for single-file outputs. Raises OutputError."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".malmen-{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _write(descriptor, data)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        _rename(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise as_output_error(path, error, len(data)) from error
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError unless `out` is absent, an empty folder, or (with force) a folder malmen wrote."""
    if out.is_symlink():
        raise OutputError(f"{out}: a symbolic link; name the folder it points to, or another one")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: a file is in the way; name a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return
    if not any((out / mark).is_file() for mark in MARKS):
        raise OutputError(f"{out}: not empty and not written by malmen; name another folder, or delete it yourself")
    if not force:
        raise OutputError(f"{out}: already there; use --force to replace it, or name another folder")


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


def as_output_error(out: Path, error: OSError, need: int) -> OutputError:
    """An operating system error on the way to `out`, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        amount = f"{need:,} bytes are needed" if need else "more room is needed"
        return OutputError(f"{out}: the disk is full; {amount}; nothing was changed")
    return OutputError(f"{out}: cannot be written: {error.strerror or error}")


def _write(descriptor: int, data: bytes | memoryview) -> None:
    """Every byte malmen writes goes through here."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def _rename(source: Path, target: Path) -> None:
    os.rename(source, target)


def _exchange(one: Path, other: Path) -> bool:
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


def _place(folder: Path, out: Path) -> None:
    """Put `folder` at `out`; an old `out` ends up at `folder`'s name, to be removed."""
    if not out.exists() or not any(out.iterdir()):
        _rename(folder, out)
    elif not _exchange(folder, out):
        _rename_twice(folder, out)


def _rename_twice(folder: Path, out: Path) -> None:
    """Without an exchange the output is absent for a moment; `_clean` puts it back if we are killed in it."""
    aside = folder.with_name(folder.name + ".old")
    try:
        _rename(out, aside)
        _rename(folder, out)
    except BaseException:
        if aside.exists() and not out.exists():  # an interrupt may arrive just after either rename was done
            _rename(aside, out)
        raise
    _rename(aside, folder)


def _clean(out: Path) -> None:
    """Put back an old output that a killed run had moved aside, then remove what killed runs left.

    Raises OutputError when another living process is writing the same output.
    """
    pattern = re.compile(rf"\.malmen-{re.escape(out.name)}-[0-9a-f]{{8}}(\.old)?")
    left = sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink())
    if any(_alive(path) for path in left):
        raise OutputError(f"{out}: another malmen process is writing it; wait for it, or name another folder")
    for path in left:
        if path.name.endswith(".old") and not out.exists():
            _rename(path, out)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _take_lock(folder: Path) -> int:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(OSError):  # a file system without locks: nothing to hold
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _alive(folder: Path) -> bool:
    """Whether a living process holds the folder's lock."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
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
def _exclusive(folder: Path) -> Iterator[None]:
    """One malmen process at a time looks at, or renames in, `folder`; held for moments only."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
