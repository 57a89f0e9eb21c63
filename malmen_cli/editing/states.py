"""What is kept of prompts between runs of a model: in memory up to a bound, then on disk up to another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from malmen_cli.base.spill import Spill

# What is kept of a prompt: the input of the first block that runs, and what an encoder in front of it gave.
Kept = tuple[Tensor, ...]
Key = tuple[tuple[int, ...], tuple[int, ...]]  # Encoded.key


class States:
    """Kept states by prompt: at most `memory` bytes of them, and of those least recently used `disk` bytes more."""

    def __init__(self, memory: int, disk: int, device: torch.device) -> None:
        self._room, self._device = (memory, disk), device
        self._held: OrderedDict[Key, Kept] = OrderedDict()
        self.clear()

    def clear(self) -> None:
        self._held.clear()
        self._free, disk = self._room
        self._spill = Spill(disk)
        self._parts = 0  # of every prompt's

    def get(self, key: Key) -> Kept | None:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        # What was spilled stays on disk: in a pass over all facts each is asked for once.
        found = [self._spill.get((key, place), self._device) for place in range(self._parts)]
        states = tuple(state for state in found if state is not None)
        return states if states and len(states) == self._parts else None

    def keep(self, states: Mapping[Key, Kept]) -> None:
        for key, state in states.items():
            self._free -= _bytes(state) - (_bytes(self._held[key]) if key in self._held else 0)
            self._held[key] = state
            self._parts = len(state)
        gone: dict[tuple[Key, int], Tensor] = {}
        while self._free < 0 and len(self._held) > 1:
            key, kept = self._held.popitem(last=False)
            gone |= {(key, place): state for place, state in enumerate(kept)}
            self._free += _bytes(kept)
        self._spill.add(gone)


def _bytes(kept: Kept) -> int:
    return sum(state.nbytes for state in kept)
