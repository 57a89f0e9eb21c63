"""Which process of several this is, by the environment alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from typer import BadParameter

from malmen_cli.cli import processes

TOLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def tell(monkeypatch: pytest.MonkeyPatch, without: str = "") -> None:
    for name, value in TOLD.items():
        monkeypatch.delenv(name, raising=False)
        if name != without:
            monkeypatch.setenv(name, value)


def test_a_rank_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch)
    assert processes.rank() == 1
    assert processes.idle(["facts", "convert", "f.jsonl", "-o", "g.jsonl"])
    assert processes.idle(["stats", "base"])
    for judging in (["facts", "check", "f.jsonl"], ["diff", "a", "b"], ["apply", "base", "f.jsonl"], []):
        assert not processes.idle(judging)


@pytest.mark.parametrize("without", TOLD)
def test_told_in_part_a_process_is_alone(monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """A container that exports WORLD_SIZE and nothing else has started one process."""
    tell(monkeypatch, without)
    assert processes.rank() == 0
    assert not processes.idle(["facts", "convert", "f.jsonl"])
    assert isinstance(processes.together(["eval", "base", "-"]), nullcontext)


def test_standard_input_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch)
    with pytest.raises(BadParameter, match="standard input cannot be shared by several processes"):
        processes.together(["apply", "base", "-", "-o", "out"])
