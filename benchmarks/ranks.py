"""What a second process gains: seconds of one rank and of several, each on cores (or a GPU) of its own.

    python benchmarks/ranks.py smollm2-135m
    python benchmarks/ranks.py ./model --ranks 8 --device cuda

apply: one pass over made-up facts by the paper's last blocks, untrained. step: of training the same editor, on facts
that were seen before. own step: of malmen's own settings (docs/editor-recipe.md), with three times as many facts, of
which a quarter are judged. Runs of one rank and of several take turns; a rank has as many threads alone as beside
others, so that what is seen is what sharing the work gains. Loading the base, calibration and the first step or edit
are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from madeup import made_up
from speed import WARM_STEPS, Speed

from malmen_cli.base import ranks
from malmen_cli.base.model import load_base
from malmen_cli.edit import make_shift
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.exceptions import MalmenError
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer

GOAL = 1.7  # times less with two ranks
STEPS = 4  # of training that count
OWN_FACTS, OWN_JUDGED = 3, 4  # facts of a step of malmen's own settings, to a plain step's; one in so many is judged


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One rank's share of everything: seconds of each kind of work, which all ranks begin and end together."""
    torch.set_num_threads(options.threads)
    several = int(os.environ["WORLD_SIZE"]) > 1
    with ranks.joined() if several else nullcontext():
        base = load_base(options.base, device=options.device)
        facts = list(made_up(options.count))
        with tempfile.TemporaryDirectory(prefix="malmen-ranks-") as folder:
            speed = Speed(base, facts, 1, options.batch_size, options.step_facts, 0, Path(folder))
            _, ready = next(iter(speed.editors()))
            edit = _timed(lambda: make_shift(base, ready, facts, batch_size=options.batch_size))
            step = _step(speed.trainer())
            speed.step_facts *= OWN_FACTS
            own = speed.trainer(MalmenSettings(), judged=max(1, speed.step_facts // OWN_JUDGED))
            return {"apply": edit, "step": step, "own step": _step(own)}


def _timed(work: Callable[[], object]) -> float:
    ranks.wait()
    started = time.perf_counter()
    work()
    ranks.wait()
    return time.perf_counter() - started


def _step(trainer: Trainer) -> float:
    """The median of a few steps behind those that capture and keep."""
    seconds: list[float] = []

    def after(progress: Progress) -> None:
        seconds.append(progress.seconds)
        if len(seconds) == WARM_STEPS + STEPS:
            raise _Enough

    with suppress(_Enough):
        trainer.run(after, lambda: None)
    return statistics.median(seconds[WARM_STEPS:])


class _Enough(Exception):
    """Steps enough were measured."""


def run(options: argparse.Namespace, count: int) -> dict[str, float]:
    """What the first of `count` ranks measured."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    own = [options.base, "--child", "--device", options.device, "--threads", str(options.threads)]
    own += ["--count", str(options.count), "--step-facts", str(options.step_facts)]
    own += ["--batch-size", str(options.batch_size)]
    told = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    child = subprocess.run([*launcher, __file__, *own], stdout=subprocess.PIPE, check=True, text=True, env=told)
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def table(found: dict[int, list[dict[str, float]]]) -> str:
    """Medians of one rank and of several, and how many times less the second is."""
    (few, alone), (many, shared) = sorted(found.items())
    lines = [f"| what | {few} rank, seconds | {many} ranks, seconds | times less |", "|---|---|---|---|"]
    for kind in alone[0]:
        one, several = (statistics.median(each[kind] for each in runs) for runs in (alone, shared))
        goal = f" (goal {GOAL})" if many == 2 * few else ""
        lines.append(f"| {kind} | {one:.2f} | {several:.2f} | {one / several:.2f}{goal} |")
    return "\n".join(lines)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="hub id, folder, .gguf file or alias")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of every rank")
    parser.add_argument("--count", type=int, default=1000, help="facts that apply edits")
    parser.add_argument("--step-facts", type=int, default=64, help="facts of a training step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--child", action="store_true", help="one rank of a measurement")
    options = parser.parse_args(arguments)
    if options.ranks < 2:
        parser.error("--ranks is at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    try:
        if options.child:
            found = measure(options)
            if os.environ["RANK"] == "0":
                print(json.dumps(found))
            return
    except MalmenError as error:
        sys.exit(str(error))
    runs: dict[int, list[dict[str, float]]] = {1: [], options.ranks: []}
    for _ in range(options.repeats):
        for count, measured in runs.items():
            measured.append(run(options, count))
            print(json.dumps({"ranks": count} | measured[-1]), file=sys.stderr, flush=True)
    print(table(runs))


if __name__ == "__main__":
    main()
