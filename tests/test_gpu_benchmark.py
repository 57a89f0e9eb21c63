"""benchmarks/gpu.py on the CPU at a tiny shape: the same code that runs on a card, and the figures it derives."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def test_everything_in_one_call(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.jsonl"
    sizes = ["--count", "16", "--step-facts", "8", "--batch-size", "8"]
    gpu.main(["--shape", "tiny", "--device", "cpu", *sizes, "-o", str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["plain forward", "apply", "training pass"]
    forward, apply, training = rows
    assert 0 < forward["flop"] < apply["flop"] < training["flop"]
    for row in rows:
        assert row["facts"] == 16
        assert row["flop_per_second"] == pytest.approx(row["flop"] / row["seconds"])
        assert row["share_of_peak"] is None
        assert row["agreement"] <= gpu.AGREE
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("CPU and cpu: shifts differ by")
    assert len(printed) == 3 + len(rows)


def test_shapes_are_those_of_the_published_models(gpu: ModuleType) -> None:
    """Parameters as published: 6.05 and 8.03 billion; counted without allocating them."""
    for shape, billions in (("gpt-j-6b", 6.05), ("llama-8b", 8.03)):
        base = gpu.random_base(shape, torch.device("meta"), torch.bfloat16)
        parameters = list(base.model.parameters())
        assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx(billions, abs=0.01)
        embedded = base.model.get_input_embeddings().weight.numel()
        assert gpu.forward_flop(base, 3) == 6 * (sum(p.numel() for p in parameters) - embedded)


def test_share_of_the_peak(gpu: ModuleType) -> None:
    measured = gpu.Measured("apply", 2.0, 989e12, 10, 5)
    assert measured.record(989e12)["share_of_peak"] == 0.5
    assert measured.record(None)["share_of_peak"] is None
