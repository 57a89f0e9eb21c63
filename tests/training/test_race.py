"""benchmarks/race.py: the textbook's training and malmen's, which it times, are the same training."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from malmen_cli.training.facts import encode_examples
from malmen_cli.training.settings import TrainingSettings

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NEVER = (2.0, 2.0)  # no score is as high


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("race")


@pytest.mark.slow  # two trainings, one of them the textbook's
def test_step_for_step_the_textbook_s_scores_are_malmen_s(race: ModuleType, town, tmp_path: Path) -> None:
    train, valid = (encode_examples(town.base.task, facts, end_of_text=True) for facts in (town.train, town.valid))
    sizes = {"facts_per_step": (8,), "meta_facts": 8, "valid_facts": 30, "preserved_prompts": 100}
    settings = TrainingSettings(steps=6, warmup=2, meta_lr=2e-3, scale_lr=0.05, locality_weight=1.0, **sizes)
    made = race.Race(town.base, train, valid, settings, 2, 4, tmp_path)
    book, mine = made.textbook(), made.ours("the same editor", race.paper(town.base), settings, NEVER)
    assert [point.step for point in mine.points] == [point.step for point in book.points] == [0, 2, 4, 6]
    assert [point.rank for point in mine.points] == [pytest.approx(point.rank, abs=0.02) for point in book.points]
    assert mine.points[-1].rank > mine.points[0].rank  # it did learn something
    seconds = [point.cpu for point in mine.points]
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3] == mine.cpu
    assert mine.first_at(NEVER) is None
    assert mine.first_at(book.points[0].rank) == mine.points[0]
