"""benchmarks/speed.py runs on a tiny model and does the sums it prints; made-up facts are sound."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from malmen_cli.facts.files import read_facts, write_facts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow  # two child processes, each starting an interpreter, and a training's preparation
def test_every_ratio_is_measured(
    script: Callable, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "speed.jsonl"
    sizes = [
        "--count",
        "12",
        "--step-facts",
        "8",
        "--target-facts",
        "6",
        "--checked",
        "50",
        "--repeats",
        "1",
        "--batch-size",
        "4",
    ]
    script("speed").main([str(tiny_gpt2), *sizes, "-o", str(output), "--device", "cpu"])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    goals = {row["name"]: row["goal"] for row in rows}
    assert goals == {
        "apply, one pass": 1.5,
        "training step": 8.0,
        "targets, one by one": 10.0,
        "targets, one by one as published": 10.0,
        "merged output to cp -r": 1.3,
        "merged output to cp -r; sync": 1.3,
        "malmen --help": 0.3,
        "malmen facts check": 5.0,
    }
    for row in rows:
        assert len(row["ours"]["wall"]) == len(row["ours"]["cpu"]) == 1
        assert row["wall"] > 0
        assert row["versions"]["torch"]
    (step,) = (row for row in rows if row["name"] == "training step")
    assert float(step["note"].split()[-1]) < 1e-3  # the textbook's losses: the same work was timed
    for targets in (row for row in rows if row["name"].startswith("targets")):
        assert float(targets["note"].split()[-2]) < 1e-4  # the same targets
        assert targets["note"].startswith("6 facts")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + len(rows)  # what and where, the two lines of a head, and the rows


def test_figures_are_ratios_of_medians(script: Callable) -> None:
    speed = script("speed")
    mine, theirs = speed.Timed([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]), speed.Timed([8.0, 9.0, 1.0], [4.0, 5.0, 6.0])
    assert speed.Row("x", 1.5, mine, theirs).figure("wall") == 0.25
    assert speed.Row("x", 8.0, mine, theirs, faster=True).figure("cpu") == 5.0
    assert speed.Row("x", 0.3, mine).figure("wall") == 2.0
    assert "| 4.00x | 5.00x | >= 8x |" in speed.Row("x", 8.0, mine, theirs, faster=True).line()


def test_made_up_facts_are_distinct_and_sound(script: Callable, tmp_path: Path) -> None:
    write_facts(script("madeup").made_up(2000), tmp_path / "facts.jsonl")
    facts = read_facts(str(tmp_path / "facts.jsonl")).facts
    assert len({fact.prompt for fact in facts}) == len({fact.subject for fact in facts}) == 2000
    assert all(fact.subject in fact.prompt and fact.rephrases and fact.locality for fact in facts)
