"""Seconds of repeated, interleaved runs and their medians, the row that sets them beside a goal, and where it was."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import transformers

from malmen_cli import __version__
from malmen_cli.base.model import Base


@dataclass
class Timed:
    """Seconds of the runs of one thing: of the clock, and of all processors together."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, work: Callable[[], object]) -> None:
        clock, spent = time.perf_counter(), processor_seconds()
        work()
        self.add(time.perf_counter() - clock, processor_seconds() - spent)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)

    def median(self, kind: str) -> float:
        return statistics.median(getattr(self, kind))


@dataclass
class Row:
    """One line of the table: ours, the yardstick (None where seconds are the figure), and the goal."""

    name: str
    goal: float
    ours: Timed
    yardstick: Timed | None = None
    faster: bool = False  # whether the goal is how many times less time than the yardstick, not how many times more
    note: str = ""

    def figure(self, kind: str) -> float:
        if self.yardstick is None:
            return self.ours.median(kind)
        ratio = self.ours.median(kind) / self.yardstick.median(kind)
        return 1 / ratio if self.faster else ratio

    def line(self) -> str:
        unit, sign = ("s", "<=") if self.yardstick is None else ("x", ">=" if self.faster else "<=")
        both = [f"{side.median('wall'):.3f} ({side.median('cpu'):.3f})" for side in (self.ours, self.yardstick) if side]
        cells = [self.name, f"{self.figure('wall'):.2f}{unit}", f"{self.figure('cpu'):.2f}{unit}"]
        return "| " + " | ".join([*cells, f"{sign} {self.goal:g}{unit}", *[*both, "-"][:2], self.note]) + " |"

    def record(self) -> dict[str, object]:
        return asdict(self) | {"wall": self.figure("wall"), "cpu": self.figure("cpu")}


HEAD = "| what | wall | processor | goal | ours, seconds (processor) | yardstick | |\n" + "|---" * 7 + "|"


def processor_seconds() -> float:
    """Of this process and the children it has waited for, all threads together."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def interleaved(ours: Callable[[], object], yardstick: Callable[[], object], repeats: int) -> tuple[Timed, Timed]:
    """Both in turn, each once before it counts."""
    mine, theirs = Timed(), Timed()
    ours()
    yardstick()
    for _ in range(repeats):
        mine.run(ours)
        theirs.run(yardstick)
    return mine, theirs


def about(base: Base) -> dict[str, object]:
    """Where and with what it was measured."""
    versions = {"malmen": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "base": base.name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions | {"python": platform.python_version()},
        "command": shlex.join(["python", *sys.argv]),
    }
