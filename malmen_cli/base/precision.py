"""In which number type a CPU multiplies matrices faster: bfloat16 where it has instructions for it, else float32.

Measured once and kept, since no flag tells it: what a CPU lacks is emulated, at a few hundredths of float32's speed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path

import torch

from malmen_cli.base import ranks
from malmen_cli.base.cache import remember, remembered

HALVES = (torch.bfloat16, torch.float16)
WORTH_TWICE_THE_MEMORY = 1.25  # how much faster float32 must be than a half
LEFT_TO_WEIGHTS = 0.4  # of the host's memory
_ROWS, _WIDTH = 256, 1024  # of the products tried: tokens of a small batch, a small model's width
_TRIALS = 3  # the fastest counts: other work on the machine only ever adds time
_IS_AND_CAN = ("vendor_id", "cpu family", "model", "flags", "CPU ", "Features", "isa")  # lines of /proc/cpuinfo
_CONTAINER = Path("/sys/fs/cgroup/memory.max")  # the limit of a container, seen from inside
_LEAST, _MOST = 1e-6, 1e6  # what is believed


def faster_on_cpu(stored: torch.dtype, parameters: int) -> torch.dtype:
    """`stored`, or float32 where that is a half which this CPU multiplies more slowly, and the host has the room.

    parameters: how many the model has. A float32 checkpoint stays what it is: in halves it would be another model.
    """
    if stored not in HALVES:
        return stored
    fits = 4 * parameters <= LEFT_TO_WEIGHTS * _host_bytes()
    # Ranks on different machines compute in the same type, and each of them is asked.
    slow = ranks.all_say(fits and speedup_of_fp32(stored) >= WORTH_TWICE_THE_MEMORY)
    return torch.float32 if slow else stored


def speedup_of_fp32(half: torch.dtype) -> float:
    """The time of a product in `half` divided by float32's, on this CPU with these threads; kept in the cache."""
    key = _key(half)
    known = _number(remembered("processors", key))
    if known is None:
        known = _measure(half)
        remember("processors", key, repr(known))
    return known


def _number(text: str) -> float | None:
    """What a file of the cache says; None where it is nonsense."""
    try:
        known = float(text)
    except ValueError:
        return None
    return known if _LEAST <= known <= _MOST else None


@torch.no_grad()
def _measure(half: torch.dtype) -> float:
    fastest: dict[torch.dtype, float] = {}
    for dtype in (half, torch.float32) * (1 + _TRIALS):  # the first of each sets things up
        left, right = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
        started = time.perf_counter()
        torch.nn.functional.linear(left, right)
        fastest[dtype] = min(fastest.get(dtype, float("inf")), time.perf_counter() - started)
    speedup = fastest[half] / max(fastest[torch.float32], 1e-9)
    return min(max(speedup, _LEAST), _MOST)


def _key(half: torch.dtype) -> str:
    """One file a CPU, a number of threads, a torch and a type."""
    said = [_cpu(), platform.machine(), torch.__version__, str(torch.get_num_threads()), str(half)]
    return hashlib.sha256("\0".join(said).encode(errors="surrogateescape")).hexdigest()


def _cpu() -> str:
    """What the system says its first core is and can."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return "\n".join(line for line in lines if line.startswith(_IS_AND_CAN)) or platform.processor()


def _host_bytes() -> float:
    """Memory that this process may have, where the system tells: of several on one host, its share."""
    try:
        physical = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        physical = float("inf")
    return min(physical, _container_bytes()) / max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _container_bytes() -> float:
    try:
        return float(_CONTAINER.read_text(encoding="ascii"))
    except (OSError, ValueError):  # none, or "max"
        return float("inf")
