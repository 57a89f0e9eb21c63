"""One file of an output while it is written: its own bytes, and those that the kernel copies from other files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from malmen_cli.artifact.atomic import Staging

CHUNK = 1 << 20


class StagedFile:
    """A file being written in a Staging. `copies`: where the bytes of other files stand in it."""

    def __init__(self, staging: Staging, descriptor: int) -> None:
        self._staging = staging
        self._descriptor = descriptor
        self._hash = hashlib.sha256()  # of what was written, copies left out
        self._size = 0
        self.copies: list[tuple[int, int, Path, int]] = []  # from, to, source, from there

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._staging.write_some(self._descriptor, data)
        self._size += memoryview(data).nbytes

    def copy(self, source: Path, start: int, end: int) -> int:
        """Bytes `start` to `end` of another file, by the kernel; how many there were. OSError if it cannot be read."""
        with source.open("rb") as stream:
            count = self._staging.copy_some(self._descriptor, stream.fileno(), start, end)
        self.copies.append((self._size, self._size + count, source, start))
        self._size += count
        return count

    def read_back(self, path: Path) -> str:
        """The digest of a file with copies, read once: copies are compared with their source, the rest by its hash."""
        whole, written, position = hashlib.sha256(), hashlib.sha256(), 0
        with path.open("rb", buffering=0) as stream:
            for start, end, source, place in [*self.copies, (self._size, self._size, path, 0)]:
                for chunk in _chunks(stream, position, start):
                    whole.update(chunk)
                    written.update(chunk)
                with source.open("rb", buffering=0) as original:
                    for chunk, wanted in zip(
                        _chunks(stream, start, end), _chunks(original, place, place + end - start), strict=False
                    ):
                        if chunk != wanted:
                            self._staging.refuse_damaged(path.name)
                        whole.update(chunk)
                position = end
        if written.digest() != self._hash.digest() or path.stat().st_size != self._size:
            self._staging.refuse_damaged(path.name)
        return whole.hexdigest()

    def digest(self) -> str:
        return self._hash.hexdigest()


def _chunks(stream: FileIO, start: int, end: int) -> Iterator[bytearray]:
    """Bytes `start` to `end` of an open file in parts of one size, each in the same memory."""
    stream.seek(start)
    part = bytearray(CHUNK)
    while start < end:
        if end - start < len(part):
            part = bytearray(end - start)
        if stream.readinto(part) != len(part):
            part = bytearray()  # became shorter: equal to nothing
        yield part
        start += CHUNK
