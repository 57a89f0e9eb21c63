"""Memory that runs out in the middle of a batch, where the same work is done in halves, and memory held for nothing."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch

from malmen_cli.exceptions import MemoryLimitError

Item = TypeVar("Item")
Result = TypeVar("Result")
_HOST_ALLOCATOR = "can't allocate memory"  # torch's CPU allocator says so in a plain RuntimeError


def halving(items: Sequence[Item], run: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
    """`run(items)`, in halves where memory runs out. Raises MemoryLimitError when a single item is too much."""
    try:
        result = run(items)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(items) == 1:
            reason = next(iter(str(error).splitlines()), "")
            raise MemoryLimitError(
                f"out of memory on a single prompt ({reason}); try --device cpu or a smaller --dtype"
            ) from error
    else:
        yield result
        return
    torch.cuda.empty_cache()
    trim_heap()
    middle = len(items) // 2
    yield from halving(items[:middle], run)
    yield from halving(items[middle:], run)


def chunked(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`items` in parts of `size`, the last one with what is left."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def trim_heap() -> None:
    """Return to the system what the C library holds of the heap without using it (glibc; elsewhere nothing is done).

    Tensors of a thousand batches, no two of one size, leave it in pieces: it comes to hundreds of MB, and grows.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another system's
        return None


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a device or in the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _HOST_ALLOCATOR in str(error)
