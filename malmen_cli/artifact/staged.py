"""One file of an output while it is written: its own bytes, and those that the kernel copies from other files.

A file with copies is read back as it grows, by a thread of its own that takes the hash of the whole and compares copies
with their source, while more is copied and the disk takes it in: on two cores it costs little more than its hash.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from malmen_cli.artifact.atomic import Staging

CHUNK = 1 << 20
PIECE = 1 << 24  # bytes that are copied before the reader behind hears of them


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file from `start` to `end`: our own, or those of `source` from `place` on."""

    start: int
    end: int
    source: Path | None = None
    place: int = 0


class StagedFile:
    """A file being written in a Staging."""

    def __init__(self, staging: Staging, path: Path, descriptor: int) -> None:
        self._staging = staging
        self._path = path
        self._descriptor = descriptor
        self._hash = hashlib.sha256()  # of what was written, copies left out
        self._size = 0
        self._reader: _Reader | None = None

    @property
    def read_back(self) -> bool:
        """Whether it is read back as it grows: one with copies is."""
        return self._reader is not None

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._staging.write_some(self._descriptor, data)
        self._grow(memoryview(data).nbytes)

    def copy(self, source: Path, start: int, end: int) -> int:
        """Bytes `start` to `end` of another file, by the kernel; how many there were. OSError if it cannot be read."""
        if self._reader is None:
            self._reader = _Reader(self._path, self._size)
        done = start
        with source.open("rb") as stream:
            while done < end:
                count = self._staging.copy_some(self._descriptor, stream.fileno(), done, min(end, done + PIECE))
                if not count:
                    break
                self._grow(count, source, done)
                done += count
        return done - start

    def close(self) -> None:
        """No more comes; what is there is read to its end."""
        if self._reader is not None:
            self._reader.stop()

    def give_up(self) -> None:
        """Read no further, unless that is done already."""
        if self._reader is not None:
            self._reader.abandoned = True
            self._reader.stop()

    def digest(self) -> str:
        """Of the whole file, once it is closed: as it was read back where it has copies, and otherwise of what was
        written. Refuses one of which a copy is not its source, or the rest not what was written."""
        if self._reader is None:
            return self._hash.hexdigest()
        whole, own = self._reader.digests()
        sizes = self._reader.done, self._path.stat().st_size
        if own != self._hash.hexdigest() or sizes != (self._size, self._size):
            self._staging.refuse_damaged(self._path.name)
        return whole

    def _grow(self, count: int, source: Path | None = None, place: int = 0) -> None:
        stretch = Stretch(self._size, self._size + count, source, place)
        self._size = stretch.end
        if self._reader is not None:
            self._staging.begin_sync(self._descriptor)
            self._reader.read(stretch)


class _Reader:
    """Reads a file, of which `size` bytes of our own are there, in a thread of its own, stretch by stretch."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._whole, self._own, self._same = hashlib.sha256(), hashlib.sha256(), True
        self.done = 0  # bytes read, of stretches read to their end
        self.abandoned = False
        self._failure: OSError | None = None
        self._asked: queue.SimpleQueue[Stretch | None] = queue.SimpleQueue()
        self.read(Stretch(0, size))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def read(self, stretch: Stretch) -> None:
        self._asked.put(stretch)

    def stop(self) -> None:
        """Read what was asked for, and be done."""
        self._asked.put(None)
        self._thread.join()

    def digests(self) -> tuple[str, str]:
        """Of the whole file and of its own bytes; none of the latter where a copy is not its source. Raises what
        reading raised."""
        if self._failure is not None:
            raise self._failure
        return self._whole.hexdigest(), self._own.hexdigest() if self._same else ""

    def _run(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as stream:
                while (stretch := self._asked.get()) is not None and not self.abandoned:
                    self._read(stream, stretch)
                    self.done = stretch.end
        except OSError as error:  # told to whoever asks for the digests
            self._failure = error

    def _read(self, stream: FileIO, stretch: Stretch) -> None:
        found = _chunks(stream, stretch.start, stretch.end)
        if stretch.source is None:
            for chunk in found:
                self._whole.update(chunk)
                self._own.update(chunk)
                if self.abandoned:
                    return
            return
        with stretch.source.open("rb", buffering=0) as original:
            there = _chunks(original, stretch.place, stretch.place + stretch.end - stretch.start)
            for chunk, wanted in zip(found, there, strict=False):
                self._same &= chunk == wanted
                self._whole.update(chunk)
                if self.abandoned:
                    return


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
