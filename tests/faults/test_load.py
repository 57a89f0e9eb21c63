"""Many facts and many processes at once. `MALMEN_FAULTS=full` (make faults) runs the sizes that are promised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.cli.errors import main

FULL = os.environ.get("MALMEN_FAULTS") == "full"
FACTS = 100_000 if FULL else 300
PROCESSES = 20 if FULL else 2


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many made-up facts, each of another subject."""
    path = tmp_path_factory.mktemp("many") / "facts.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for i in range(FACTS):
            record = {"prompt": f"The capital of land {i} is", "target": "Rome", "subject": f"land {i}"}
            stream.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize(
    ("command", "counted"),
    [(["facts", "check", "FACTS"], "count"), (["apply", "BASE", "FACTS", "-o", "OUT", "--dry-run"], "facts"),
     (["eval", "BASE", "FACTS", "--no-greedy"], "facts")],
    ids=["check", "dry-run", "eval"],
)  # fmt: skip
def test_as_many_facts_as_are_promised(
    command: list[str], counted: str, many: Path, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"BASE": str(tiny_gpt2), "FACTS": str(many), "OUT": str(tmp_path / "out")}
    started = time.monotonic()
    assert main([*(known.get(word, word) for word in command), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)[counted] == FACTS
    print(f"{command[0]}: {FACTS} facts in {time.monotonic() - started:.0f} s")


@pytest.mark.slow  # each process imports torch
def test_processes_on_one_base_and_one_cache_do_not_meet(make_writer: Callable[..., Any], tmp_path: Path) -> None:
    """Memit, whose key statistics all of them want to build and keep; every output is that of a process alone."""
    writer = make_writer("stats")
    base, spec = writer.argv[1], writer.argv[3]
    given = ["apply", base, str(tmp_path / "in" / "facts.jsonl"), "--spec", spec, "--score", "0", "-q", "-o"]
    started = time.monotonic()
    command = [sys.executable, "-m", "malmen_cli", *given]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    running = [
        subprocess.Popen([*command, str(tmp_path / f"out-{i}")], env=environment, stderr=subprocess.PIPE)
        for i in range(PROCESSES)
    ]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES, said
    print(f"{PROCESSES} processes in {time.monotonic() - started:.0f} s")
    outputs = [{file.name: file.read_bytes() for file in (tmp_path / f"out-{i}").iterdir()} for i in range(PROCESSES)]
    assert all(output == outputs[0] for output in outputs)
    assert len(outputs[0]) >= 6
    home = Path(os.environ["MALMEN_HOME"])
    assert [path for path in home.rglob(".malmen-*") if path.is_dir()] == []
