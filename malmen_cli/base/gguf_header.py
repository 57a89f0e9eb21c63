"""The header of a `.gguf` file, read with nothing believed, before the file is handed to anybody who believes it.

    magic | version | tensors | keys | a name and a typed value per key | name, shape, type and offset per tensor

Every count is compared with the bytes that are left before anything is done that often.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BufferedReader
from math import prod
from pathlib import Path

from malmen_cli.base.config import MAX_SIZE
from malmen_cli.base.header import MAX_DIMENSIONS, MAX_TENSORS, shown
from malmen_cli.exceptions import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 * 1024**2  # vocabularies and merges of the largest are about 15 MB
MAX_DEPTH = 4  # of arrays in arrays; llama.cpp writes none
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> width
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_TEXT, _ARRAY = 8, 9
_SIZES = ("_count", "_length", "_dimension", "_size", ".count")


def check_gguf(file: Path) -> int:
    """How many parameters the file says it has. Raises CheckpointError for a header that is not sound, and for sizes
    that no such file could fill."""
    try:
        with file.open("rb") as stream:
            numbers, tensors = _Header(file, stream).read()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    for key, value in numbers.items():
        most = len(tensors) if key.endswith(".block_count") else MAX_SIZE
        if key.endswith(_SIZES) and not key.startswith("general.") and not 0 <= value <= most:
            raise CheckpointError(f"{file}: {shown(key)} is {value}, above {most}; do not use this file")
    return sum(tensors)


class _Header:
    """A cursor that knows how many bytes the file still has."""

    def __init__(self, file: Path, stream: BufferedReader) -> None:
        self.file, self.stream = file, stream
        self.left = min(file.stat().st_size, MAX_HEADER_BYTES)

    def read(self) -> tuple[dict[str, int], list[int]]:
        """The whole numbers among the keys, and the number of parameters of each tensor."""
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{self.file}: not a GGUF file; fetch it again")
        version = self._number(4)
        if version not in VERSIONS:
            raise CheckpointError(f"{self.file}: GGUF version {version}, not 2 or 3; convert it anew")
        tensors, keys = self._number(8), self._number(8)
        self._refuse_many(tensors, 24, "tensors")
        if tensors > MAX_TENSORS:
            raise self._broken(f"it claims {tensors} tensors")
        self._refuse_many(keys, 13, "keys")
        found = dict(pair for _ in range(keys) for pair in self._key())
        return found, [self._tensor() for _ in range(tensors)]

    def _key(self) -> Iterator[tuple[str, int]]:
        name = self._text()
        kind = self._number(4)
        if kind in _WHOLE:
            yield name, struct.unpack(_WHOLE[kind], self._take(_BYTES[kind]))[0]
        else:
            self._value(kind, name, 0)

    def _value(self, kind: int, name: str, depth: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind == _ARRAY:
            inner, count = self._number(4), self._number(8)
            self._refuse_many(count, _BYTES.get(inner, 8), f"values of {shown(name)}")
            if depth >= MAX_DEPTH:
                raise self._broken(f"{shown(name)} holds lists in lists in lists")
            if inner in _BYTES:
                self._skip(count * _BYTES[inner])
            else:
                for _ in range(count):
                    self._value(inner, name, depth + 1)
        elif kind in _BYTES:
            self._skip(_BYTES[kind])
        else:
            raise self._broken(f"{shown(name)} has a value of type {kind}, which there is not")

    def _tensor(self) -> int:
        name, dimensions = self._text(), self._number(4)
        if dimensions > MAX_DIMENSIONS:
            raise self._broken(f"tensor {shown(name)} has {dimensions} dimensions")
        size = prod(self._number(8) for _ in range(dimensions))
        if size > 8 * self.file.stat().st_size:  # no encoding has less than a bit a number
            raise self._broken(f"tensor {shown(name)} is said to have {size} numbers, more than the file can hold")
        self._skip(4 + 8)  # type and offset
        return size

    def _refuse_many(self, count: int, least: int, what: str) -> None:
        """`count` things of at least so many bytes each must fit in what is left."""
        if count * least > self.left:
            raise self._broken(f"it claims {count} {what}, more than its {self.left} bytes can hold")

    def _text(self) -> str:
        length = self._number(8)
        self._refuse_many(length, 1, "characters")
        return self._take(length).decode("utf-8", "replace")

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _take(self, count: int) -> bytes:
        self._spend(count)
        data = self.stream.read(count)
        if len(data) != count:
            raise self._broken("it is cut short")
        return data

    def _skip(self, count: int) -> None:
        self._spend(count)
        self.stream.seek(count, 1)

    def _spend(self, count: int) -> None:
        if count > self.left:
            raise self._broken("it is cut short")
        self.left -= count

    def _broken(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: not a sound GGUF file: {why}; fetch it again")
