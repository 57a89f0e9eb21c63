"""Runs `malmen` again and again, kills it at random moments, and says what it left; a process of its own.

    python kill_at_random.py '[{"argv": [...], "again": [...], "old": null, "outputs": [...], "trials": 3}, ...]'

Everything is imported once and every run is a fork, so that a run costs what its work costs. Prints one JSON list, for
each order `whole` (what an undisturbed run leaves), `old` (what the command `old` leaves), and a record a trial.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf  # noqa: F401  # imported once, here, and not in every fork
import matplotlib.figure  # noqa: F401
import torch
import transformers

from malmen_cli.artifact import disk
from malmen_cli.cli.errors import main

IMPORTED = (transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
TOOK = Path("took.json")  # seconds of the last undisturbed run, and those of them behind its first new file


def content(path: Path) -> Any:
    """Nothing, a file's digest, or those of a folder's files; what is being built there is counted by `leftovers`."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and "/.malmen-" not in str(file)]
        return {file.relative_to(path).as_posix(): content(file) for file in files}
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def leftovers(outputs: list[Path]) -> list[Path]:
    folders = {output.parent for output in outputs if output.parent.is_dir()}
    return [path for folder in folders for path in folder.rglob(".malmen-*") if path.suffix != ".lock"]


def remove(outputs: list[Path]) -> None:
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True) if output.is_dir() else output.unlink(missing_ok=True)
        shutil.rmtree(output.with_name(output.name + ".training"), ignore_errors=True)
        shutil.rmtree(output.with_name(output.name + ".training.before"), ignore_errors=True)


def start(argv: list[str], alarm: float | None = None) -> int:
    """A fork that runs `malmen *argv`. alarm: seconds behind its first new file, at which it dies without a word."""
    child = os.fork()
    if child == 0:
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        began, created = time.monotonic(), []

        def watched(create: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                created.append(time.monotonic())
                if alarm is not None and len(created) == 1:
                    # Nobody handles SIGALRM: the kernel ends the process there and then, as it does for SIGKILL.
                    signal.setitimer(signal.ITIMER_REAL, max(alarm, 1e-6))
                return create(*arguments, **options)

            return step

        disk.create, tempfile.mkdtemp = watched(disk.create), watched(tempfile.mkdtemp)
        code = main([*argv, "-q"])
        ended = time.monotonic()
        TOOK.write_text(json.dumps([ended - began, ended - min(created, default=ended)]))
        os._exit(code)
    return child


def run(argv: list[str]) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(start(argv), 0)[1])


def killed(argv: list[str], near: bool, chance: random.Random) -> bool:
    """Whether the run was still alive when it was killed. near: while it writes, which is where it may hurt."""
    seconds, writing = json.loads(TOOK.read_text())
    if near:
        child = start(argv, chance.uniform(0, writing))
    else:
        child = start(argv)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def trial(order: dict[str, Any], outputs: list[Path], number: int) -> dict[str, Any]:
    chance = random.Random(f"{order['argv'][0]}:{number}")
    replacing = number % 2 == 0 and order["old"]
    if replacing:
        assert run(order["old"]) == 0
    force = ["--force"] if replacing else []
    alive = killed([*order["argv"], *force], number % 3 < 2, chance)
    found = [content(output) for output in outputs]
    dead = len(leftovers(outputs))
    code = run([*order["argv"], *(force or order["again"])])
    after = [content(output) for output in outputs]
    left = [path.name for path in leftovers(outputs)]
    remove(outputs)
    return {"alive": alive, "replacing": bool(replacing), "found": found, "dead": dead, "code": code,
            "after": after, "left": left}  # fmt: skip


def report(order: dict[str, Any]) -> dict[str, Any]:
    outputs = [Path(output) for output in order["outputs"]]
    known = []
    for argv in (order["old"] or order["argv"], order["argv"]):  # the second one is warm, and its time counts
        if run(argv) != 0:
            raise SystemExit(Path("log.txt").read_text())
        known.append([content(output) for output in outputs])
        remove(outputs)
    trials = [trial(order, outputs, number) for number in range(order["trials"])]
    return {"old": known[0], "whole": known[1], "trials": trials}


def warm_up(apply: list[str]) -> None:
    """What libraries import when they are first used, so that no fork has to; no backward pass, whose threads do not
    survive a fork."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    assert main(["eval", apply[1], apply[2], "--limit", "1", "--no-greedy", "-q"]) == 0


if __name__ == "__main__":
    orders = json.loads(sys.argv[1])
    warm_up(orders[0]["argv"])
    print(json.dumps([report(order) for order in orders]))
