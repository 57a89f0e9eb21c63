"""Kept tensors that memory has no room for, on disk: safetensors in a folder of its own, gone with its process.

A cache: a disk that is full, or a file that somebody removed, costs time and never a result.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from malmen_cli.base.cache import cache_home

LEFT_FREE = 1 << 30  # bytes of the disk that are not ours to fill
_FOLDER = re.compile(r"\.malmen-(\d+)-.*")


class Spill:
    """Tensors by key, at most `limit` bytes of them; those least recently read go first, a file's together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # made when it is needed
        self._files: OrderedDict[Path, tuple[int, dict[Hashable, str]]] = OrderedDict()  # bytes, names by key
        self._made = 0
        self._places: dict[Hashable, Path] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def add(self, tensors: Mapping[Any, Tensor]) -> None:
        """Keep tensors that are not kept yet, in one file. Nothing is raised where they cannot be."""
        fresh = {key: tensor for key, tensor in tensors.items() if key not in self._places}
        size = sum(tensor.nbytes for tensor in fresh.values())
        if not fresh or size > self._limit:
            return
        while self._bytes + size > self._limit:
            self._forget(next(iter(self._files)))
        names = {key: str(place) for place, key in enumerate(fresh)}
        try:
            file = self._new_file()
            if shutil.disk_usage(file.parent).free < size + LEFT_FREE:
                return
            save_file({names[key]: tensor.detach().cpu().contiguous() for key, tensor in fresh.items()}, file)
        except (OSError, SafetensorError):  # half a file is never read, and goes with its folder
            return
        self._files[file] = size, names
        self._places |= dict.fromkeys(fresh, file)
        self._bytes += size

    def get(self, key: Hashable, device: torch.device) -> Tensor | None:
        """The tensor with this key, a copy of its own, or None."""
        file = self._places.get(key)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(self._files[file][1][key])
                copy = tensor.to(device, copy=True)
        except (OSError, SafetensorError):
            self._forget(file)
            return None
        self._files.move_to_end(file)
        return copy

    def _new_file(self) -> Path:
        if self._folder is None:
            place = cache_home() / "spill"
            place.mkdir(parents=True, exist_ok=True)
            _clean(place)
            self._folder = tempfile.TemporaryDirectory(prefix=f".malmen-{os.getpid()}-", dir=place)
        self._made += 1
        return Path(self._folder.name) / f"{self._made}.safetensors"

    def _forget(self, file: Path) -> None:
        size, names = self._files.pop(file)
        self._bytes -= size
        for key in names:
            del self._places[key]
        file.unlink(missing_ok=True)


def _clean(place: Path) -> None:
    """Remove what killed processes left. One alive elsewhere (another container) would lose time only."""
    for folder in place.iterdir():
        owner = _FOLDER.fullmatch(folder.name)
        if owner and not _alive(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
