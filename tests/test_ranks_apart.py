"""Ranks that do not find the same files, or not at the same time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from several import on_ranks

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
