"""The one module that writes outputs: a folder appears whole or not at all.

A folder is built beside its place as `.malmen-<name>-<random>`, synced, read back and renamed into place. An old
folder is exchanged for the new one in a single step where the system can do that (`renameat2`), and is otherwise
moved aside as `.malmen-<name>-<random>.old` for the moment between two renames. Killed at any point, the output is
absent, old and whole, or new and whole; what is left over is cleaned, or put back, by the next run on that output.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from types import TracebackType

from malmen_cli.artifact import disk
from malmen_cli.artifact.placing import LOCK, beside, clean, clean_files, place, refuse_existing, refuse_existing_file
from malmen_cli.artifact.staged import StagedFile
from malmen_cli.exceptions import OutputError


class Staging:
    """Build the folder `out` file by file; leaving the `with` block without an exception puts it in place.

    force: a folder that malmen wrote earlier may be replaced. need: bytes about to be written, checked against the
    free disk before anything is. previous: where a folder that is replaced is kept, in place of what was kept there.
    share: whether bytes copied from other files may share blocks with them, where the file system can.
    `sha256` holds the digest of every file written so far.
    Raises OutputError, with nothing changed, for whatever keeps the folder from being written.
    """

    def __init__(
        self, out: Path, *, force: bool = False, need: int = 0, previous: Path | None = None, share: bool = False
    ) -> None:
        self.out = Path(os.path.abspath(out))
        if not self.out.name:
            raise OutputError(f"{out}: the root folder cannot be an output; name a folder in it")
        self.sha256: dict[str, str] = {}
        self._checked: set[str] = set()  # files that were read back when they were done
        self._force = force
        self._share = share
        self._need = need
        self._previous = previous
        self._lock = -1
        self._folder = beside(self.out)

    def __enter__(self) -> Staging:
        try:
            with self._errors():
                self.out.parent.mkdir(parents=True, exist_ok=True)
                with disk.exclusive(self.out.parent):
                    clean(self.out)
                    refuse_existing(self.out, force=self._force)
                    disk.check_free(self.out, self._need)
                    self._folder.mkdir()
                    self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
                    disk.hold(self._lock)
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
            descriptor = disk.create(path)
        staged = StagedFile(self, path, descriptor)
        try:
            yield staged
            with self._errors():
                disk.sync(descriptor)
            staged.close()
        finally:
            os.close(descriptor)
            staged.give_up()
        with self._errors():
            self.sha256[name] = staged.digest()
        if staged.read_back:
            self._checked.add(name)

    def write(self, name: str, data: bytes) -> None:
        """The file `name` holding `data`."""
        with self.file(name) as staged:
            staged.write(data)

    def copy(self, name: str, source: Path) -> None:
        """The file `name` with the bytes of `source`."""
        with self.file(name) as staged:
            staged.copy(source, 0, source.stat().st_size)

    def link(self, name: str, source: Path) -> bool:
        """Have the file `name` be the file `source` itself; False, with nothing done, where it has to be copied.

        OSError if it cannot be read.
        """
        path = self._path(name)
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not disk.link(source.resolve(), path):
                return False
        self.sha256[name] = disk.file_sha256(path)
        self._checked.add(name)  # it is what it was
        return True

    def write_some(self, descriptor: int, data: bytes | memoryview) -> None:
        with self._errors():
            disk.write(descriptor, data)

    def copy_some(self, descriptor: int, source: int, start: int, end: int) -> int:
        with self._errors():
            return disk.copy(descriptor, source, start, end, self._share)

    def begin_sync(self, descriptor: int) -> None:
        disk.begin_sync(descriptor)

    def refuse_damaged(self, name: str) -> None:
        raise OutputError(f"{self.out}: {name} reads back other than it was written; is the disk failing?")

    def _path(self, name: str) -> Path:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or parts == (LOCK,):
            raise OutputError(f"{self.out}: {name!r} is not a file name inside the output")
        return self._folder.joinpath(*parts)

    def _commit(self) -> None:
        """Read everything back, then swap the folder in while holding the parent's lock."""
        for name, digest in self.sha256.items():
            if name not in self._checked and disk.file_sha256(self._path(name)) != digest:
                self.refuse_damaged(name)
        for folder in {self._path(name).parent for name in self.sha256} | {self._folder}:
            disk.sync_at(folder)
        with disk.exclusive(self.out.parent):
            refuse_existing(self.out, force=self._force)
            (self._folder / LOCK).unlink()
            place(self._folder, self.out)
            disk.sync_at(self.out.parent)
            if self._previous is not None and self._folder.exists():
                shutil.rmtree(self._previous, ignore_errors=True)
                disk.rename(self._folder, self._previous)

    def _drop(self) -> None:
        """Remove what is left beside the output; after a placed folder that is the old one, if there was one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _errors(self) -> AbstractContextManager[None]:
        return disk.output_errors(self.out, self._need)


def write_file(path: Path, data: bytes, *, force: bool = True) -> None:
    """Put `data` at `path` in one step, replacing an old file; for single-file outputs.

    force: an old file may be replaced. Raises OutputError, with nothing changed.
    """
    path = Path(os.path.abspath(path))
    temporary = beside(path)
    try:
        with disk.output_errors(path, len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.exclusive(path.parent):
                clean_files(path)
                refuse_existing_file(path, force=force)
                descriptor = disk.create(temporary)
                disk.hold(descriptor)
            try:
                disk.write(descriptor, data)
                disk.sync(descriptor)
                with disk.exclusive(path.parent):
                    refuse_existing_file(path, force=force)
                    disk.rename(temporary, path)
            finally:
                os.close(descriptor)
            disk.sync_at(path.parent)
    finally:
        with contextlib.suppress(OSError):  # renamed, or never made: then what kept it from being made is said
            temporary.unlink()
