"""Ranks that do not find the same files, or not at the same time; and what each of them says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from several import on_ranks, run_all

from malmen_cli import guard
from malmen_cli.artifact.editors import save_editor
from malmen_cli.base import ranks
from malmen_cli.base.model import load_base
from malmen_cli.exceptions import EditorError
from malmen_cli.key_statistics import Text, gather_statistics
from malmen_cli.training import session

NAME = "transformer.h.0.mlp.c_proj"


@pytest.mark.parametrize("lacks", [0, 1])
def test_statistics_that_one_rank_lacks_are_gathered_by_all(tiny_gpt2: Path, tmp_path: Path, lacks: int) -> None:
    """Machines may have a cache each; otherwise one rank would wait for rows that nobody sends."""
    base = load_base(str(tiny_gpt2), device="cpu")
    (written := tmp_path / "text.txt").write_text("The capital of Peru is Lima. " * 8, encoding="utf-8")
    alone, _ = gather_statistics(base, [NAME], Text(base, str(written), 60), batch_size=4)
    own = tmp_path / "own"

    def work() -> tuple[list[str], bool]:
        if ranks.first() == (lacks == 0):
            os.environ["MALMEN_HOME"] = str(own)
        found, built = gather_statistics(base, [NAME], Text(base, str(written), 60), batch_size=4)
        return built, torch.allclose(found.moments[NAME], alone.moments[NAME], rtol=1e-5, atol=1e-6)

    assert on_ranks(work) == [([NAME], True)] * 2
    assert (own / "statistics").exists() == (lacks == 0)


def test_every_rank_goes_on_with_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it notices that the last one is damaged."""
    kept, before = session.state_folder(tmp_path / "out"), session.state_before(tmp_path / "out")
    save_editor(before, {"w": torch.ones(1)}, {"step": 1}, force=False)
    kept.mkdir()
    load = session.load_editor

    def late(folder: Path) -> Any:
        if folder == kept and not ranks.first():
            time.sleep(1)
            raise EditorError("damaged")
        return load(folder)

    monkeypatch.setattr(session, "load_editor", late)
    found = on_ranks(lambda: session._last_whole(tmp_path / "out", lambda text: None)[1]["step"])
    assert found == [1, 1]
    assert not before.exists()


def test_no_rank_says_done_of_what_it_has_not_looked_at(tiny_gpt2: Path, facts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": 3}', encoding="utf-8")
    assert run_all(["facts", "check", str(tmp_path / "broken.jsonl")], tmp_path) == [3, 3]
    given = ["eval", str(tiny_gpt2), str(facts_file), "--min-es", "1", "--device", "cpu"]
    assert run_all(given, tmp_path) == [1, 1]
    assert "gate not met" in (tmp_path / "stderr.0").read_text()
    assert (tmp_path / "stderr.1").read_text() == ""


def test_what_is_written_is_the_first_rank_s(facts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "converted.jsonl"
    assert run_all(["facts", "convert", str(facts_file), "-o", str(out)], tmp_path) == [
        0,
        0,
    ]  # the second would find it
    assert len(out.read_text().splitlines()) == 4


def test_a_destructive_edit_is_refused_by_every_rank(
    tiny_gpt2: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_RELATIVE_NORM", 0.0)
    (tmp_path / "tuning.yaml").write_text("method: finetune\nsettings: {epochs: 1}\n", encoding="utf-8")
    given = ["apply", str(tiny_gpt2), str(facts_file), "--spec", str(tmp_path / "tuning.yaml"), "--device", "cpu"]
    assert run_all([*given, "-o", str(tmp_path / "out"), "--score", "0", "-q"], tmp_path) == [5, 5]
    for rank in range(2):
        (line,) = (tmp_path / f"stderr.{rank}").read_text().splitlines()
        assert line.startswith(("malmen: error: ", "rank 1: malmen: error: ")[rank])
        assert "destroys the model" in line
    assert not (tmp_path / "out").exists()
