"""benchmarks/race.py as it is called; tests/training/test_race.py: that the trainings it times are the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from malmen_cli.facts.files import write_facts

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("race")


@pytest.mark.slow  # four trainings
def test_a_line_for_every_training(
    race: ModuleType,
    tiny_model_factory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    facts = list(importlib.import_module("madeup").made_up(20))
    write_facts(facts[:16], tmp_path / "train.jsonl")
    write_facts(facts[16:], tmp_path / "valid.jsonl")
    files = ["--facts", str(tmp_path / "train.jsonl"), "--valid", str(tmp_path / "valid.jsonl")]
    sizes = ["--steps", "2", "--every", "1", "--step-facts", "8", "--part", "4", "--valid-facts", "4"]
    base, output = str(tiny_model_factory("gpt2", layers=6)), tmp_path / "race.jsonl"
    race.main([base, *files, *sizes, "--batch-size", "4", "--device", "cpu", "-o", str(output)])
    names = [
        "textbook",
        "the same editor",
        "its meta-loss on 4 of the facts",
        "malmen's own settings",
        "the same, prepared on less",
    ]
    assert [json.loads(line)["name"] for line in output.read_text().splitlines()] == names
    printed = capsys.readouterr().out.splitlines()[3:]
    assert [line.split("|")[1].strip() for line in printed] == names
    # Called again after it was stopped: what is there is not run again.
    records = output.read_text().splitlines(keepends=True)
    output.write_text("".join(records[:3]))
    monkeypatch.setattr(race.Race, "textbook", lambda self: pytest.fail("run again"))
    race.main([base, *files, *sizes, "--batch-size", "4", "--device", "cpu", "-o", str(output)])
    assert output.read_text().splitlines(keepends=True)[:3] == records[:3]
    assert [json.loads(line)["name"] for line in output.read_text().splitlines()] == names
    again = capsys.readouterr().out.splitlines()[3:]
    assert again[:3] == printed[:3]
    assert len(again) == len(names)
    output.write_text(records[0].replace('"command": "', '"command": "nice '))
    with pytest.raises(SystemExit, match="another command's trainings"):
        race.main([base, *files, *sizes, "--batch-size", "4", "--device", "cpu", "-o", str(output)])
    output.write_text(records[0] + records[1][:40])
    with pytest.raises(SystemExit, match="not a file of whole records"):
        race.main([base, *files, *sizes, "--batch-size", "4", "--device", "cpu", "-o", str(output)])
