"""Memory that is held for nothing goes back to the system."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from malmen_cli.base import memory as memory_module
from malmen_cli.base.memory import trim_heap

MB = 1 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is trimmed")
def test_a_heap_in_pieces_is_given_back() -> None:
    """Every second one of 4,000 tensors of 64 KB, too small to be mapped by itself, is freed: 125 MB in pieces."""
    held = [torch.ones(16 * 1024) for _ in range(4000)]
    held = held[::2]
    before = resident()
    trim_heap()
    assert resident() < before - 90 * MB
    assert all(float(tensor[-1]) == 1 for tensor in held)


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_on_another_system_nothing_is_done(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", none)
    memory_module._malloc_trim.cache_clear()
    try:
        trim_heap()
    finally:
        memory_module._malloc_trim.cache_clear()
