"""What is kept of prompts between runs of a model: in memory up to a bound, then on disk up to another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.spill import Spill

# What is kept of a prompt: of its key, the input of the first block that runs and what an encoder in front of it gave;
# of an edit, its rows on the base (see training.rows).
Kept = tuple[Tensor, ...]
Key = tuple[tuple[int, ...], tuple[int, ...]]  # Encoded.key


CACHE_BYTES = 2 << 30  # in memory, beyond which the least recently used are spilled, or dropped and recomputed
EDIT_CACHE_BYTES = 64 << 20  # of an edit on the CPU: each pass asks for a state once, which disk gives soon enough
SPILL_BYTES = 64 << 30  # on disk, where spilling is asked for


def edit_cache(device: torch.device) -> int:
    """Bytes of block inputs that an edit keeps in memory unless told otherwise."""
    return EDIT_CACHE_BYTES if device.type == "cpu" else CACHE_BYTES


class States:
    """Kept tensors by prompt: at most `memory` bytes of them, and of those least recently used `disk` bytes more."""

    def __init__(self, memory: int, disk: int, device: torch.device) -> None:
        self._room, self._device = (memory, disk), device
        self._held: OrderedDict[Hashable, Kept] = OrderedDict()
        self.clear()

    def clear(self) -> None:
        self._held.clear()
        self._free, disk = self._room
        self._spill = Spill(disk)

    def get(self, key: Hashable) -> Kept | None:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        # What was spilled stays on disk: in a pass over all facts each is asked for once.
        found: list[Tensor] = []  # parts, which are in one file
        for part in count():
            if (state := self._spill.get((key, part), self._device)) is None:
                break
            found.append(state)
        # Where the file went away in between, the parts that were read are gone from it too.
        return tuple(found) if (key, 0) in self._spill else None

    def keep(self, states: Mapping[Any, Kept]) -> None:
        for key, state in states.items():
            self._free -= _bytes(state) - (_bytes(self._held[key]) if key in self._held else 0)
            self._held[key] = state
        gone: dict[tuple[Hashable, int], Tensor] = {}
        while self._free < 0 and len(self._held) > 1:
            key, kept = self._held.popitem(last=False)
            gone |= {(key, place): state for place, state in enumerate(kept)}
            self._free += _bytes(kept)
        self._spill.add(gone)


def _bytes(kept: Kept) -> int:
    return sum(state.nbytes for state in kept)
