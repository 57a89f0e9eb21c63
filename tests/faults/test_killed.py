"""T24 and T11: SIGKILL at random moments of every command that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.artifact import disk

SCRIPT = Path(__file__).with_name("kill_at_random.py")
WRITERS = ("merged", "linked", "delta", "adapter", "train-editor", "convert", "stats", "eval", "gguf")
TRIALS = 30 if os.environ.get("MALMEN_FAULTS") == "full" else 1  # 240 kills, or 8


@pytest.mark.slow  # imports torch in a process of its own, which then runs every command four times
def test_killed_at_a_random_moment(
    make_writer: Callable[..., Any], tmp_path: Path, whole_parts: Callable[[Any, Any], bool]
) -> None:
    """Every output is absent, old and whole, or new and whole; the next run cleans up and ends in the same bytes.

    For train-editor the next run goes on with --resume: bit for bit the editor of a training that nobody stopped.
    """
    reports = killed(make_writer, tmp_path)
    assert "Traceback" not in (tmp_path / "log.txt").read_text(encoding="utf-8")
    for name, report in reports.items():
        for number, trial in enumerate(report["trials"]):
            for found, new, before in zip(trial["found"], report["whole"], report["old"], strict=True):
                may_be = [new, before] if trial["replacing"] else [new, None]
                assert found in may_be or whole_parts(found, new), (name, number, trial)
            assert (trial["code"], trial["after"], trial["left"]) == (0, report["whole"], []), (name, number, trial)
    trials = [trial for report in reports.values() for trial in report["trials"]]
    alive, writing = sum(trial["alive"] for trial in trials), sum(trial["dead"] > 0 for trial in trials)
    print(f"{len(trials)} kills, {alive} of living runs, {writing} of them left something half-built behind")
    assert alive >= len(trials) / 2
    assert writing > 0


def killed(make_writer: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """What `kill_at_random.py` reports of every writer."""
    orders = []
    for name in WRITERS:
        writer = make_writer(name, out=name)
        old = [*writer.argv, "--seed", "1"] if name in ("merged", "linked", "delta", "adapter") else None
        outputs = list(map(str, writer.outputs))
        orders.append({"argv": writer.argv, "again": writer.again, "old": old, "outputs": outputs, "trials": TRIALS})
    environment = os.environ | {"PYTHONPATH": str(Path(disk.__file__).parents[2])}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(orders)],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return dict(zip(WRITERS, json.loads(process.stdout), strict=True))


def test_parts_are_compared_folder_by_folder(whole_parts: Callable[[Any, Any], bool]) -> None:
    whole = {"a/x": "1", "a/y": "2", "b/x": "3"}
    assert whole_parts({"a/x": "1", "a/y": "2"}, whole)
    assert whole_parts({}, whole)
    assert not whole_parts({"a/x": "1"}, whole)
    assert not whole_parts({"a/x": "1", "a/y": "3"}, whole)
    assert not whole_parts({"x": "1"}, {"x": "1", "y": "2"})
    assert not whole_parts("1", "2")
