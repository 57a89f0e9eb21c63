"""benchmarks/scale.py: a process a size, memory beyond the facts, and the table's sums."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale")


@pytest.mark.slow  # a process a size, each importing torch and transformers
def test_every_size_is_measured(
    scale: ModuleType, tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, picture = tmp_path / "scale.jsonl", tmp_path / "scale.png"
    options = ["--sizes", "12,3", "--device", "cpu", "--max-memory", "1000", "-o", str(output), "--plot", str(picture)]
    scale.main([str(tiny_gpt2), *options])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["facts"] for row in rows] == [3, 12]
    for row in rows:
        memory = row["memory"]
        assert 0 < memory["bare"] <= memory["with_facts"] <= memory["peak"]
        assert row["seconds"] > 0 < row["processor"]
        assert row["passes"] == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_the_facts_own_memory_is_left_out_and_the_ratio_is_to_a_thousand(scale: ModuleType) -> None:
    big = scale.BIG

    def row(facts: int, seconds: float, *memory: int) -> dict[str, object]:
        return {
            "facts": facts,
            "seconds": 2 * seconds,
            "processor": seconds,
            "memory": dict(zip(("bare", "with_facts", "peak"), memory, strict=True)),
        }

    rows = [row(10000, 30.0, 100 * big, 150 * big, 270 * big), row(1000, 2.0, 100 * big, 105 * big, 205 * big)]
    assert [scale.own_peak(one) for one in rows] == [220 * big, 200 * big]
    first, second = scale.table(rows).splitlines()[2:]
    assert "| 1,000 | 4.0 | 2.00 | 205 | 5 | 200 (1.00x) | time a fact 1.00x |" in first
    assert "| 10,000 | 60.0 | 3.00 | 270 | 50 | 220 (1.10x) | time a fact 1.50x |" in second


def test_memory_is_that_of_this_process(scale: ModuleType) -> None:
    scale.forget_peak()
    before = scale.resident("VmHWM")
    held = bytearray(64 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    assert scale.resident() - before > 60 << 20
    del held
    assert scale.resident("VmHWM") - before > 60 << 20
