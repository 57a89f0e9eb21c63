"""benchmarks/ranks.py: one rank and several in turn, and the table's sums."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("ranks")


def test_medians_are_compared(bench: ModuleType) -> None:
    found = {
        2: [{"apply": 6.0, "step": 3.0}, {"apply": 5.0, "step": 2.0}, {"apply": 1.0, "step": 1.0}],
        1: [{"apply": 10.0, "step": 3.0}, {"apply": 9.0, "step": 3.0}, {"apply": 90.0, "step": 3.0}],
    }
    first, second = bench.table(found).splitlines()[2:]
    assert first.startswith("| apply | 10.00 | 5.00 | 2.00 ")
    assert second.startswith("| step | 3.00 | 2.00 | 1.50 ")


def test_one_rank_is_no_comparison(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["base", "--ranks", "1"])
    assert "--ranks is at least 2" in capsys.readouterr().err


@pytest.mark.slow  # three processes, each importing torch and transformers
def test_one_rank_and_two_are_measured(
    bench: ModuleType, tiny_gpt2: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    bench.main([str(tiny_gpt2), "--count", "5", "--step-facts", "4", "--repeats", "1", "--device", "cpu"])
    printed = capfd.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("| what | 1 rank, seconds | 2 ranks, seconds |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["apply", "step", "own step"]
    assert [line for line in printed.err.splitlines() if line.startswith('{"ranks": ')]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line.split("|")[2:4])
