"""T17: what each version wrote is kept, as one of every kind, and still loads. 91 KB for 0.1.0.

`base` is a GPT-2 of two blocks, 16 wide, in bfloat16, with a tokenizer of single bytes; all beside it was written by
`malmen apply`, `train-editor` and `stats` of that version, for `facts.jsonl`. A new version adds a folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from malmen_cli.artifact.delta import read_delta
from malmen_cli.artifact.merged import merge_plan, merged_weight
from malmen_cli.artifact.statistics import load_statistics
from malmen_cli.base.model import load_base
from malmen_cli.base.weights import fingerprint, read_index, read_tensor
from malmen_cli.cli.errors import main
from malmen_cli.edit import find_ready
from malmen_cli.editing.shift import applied
from malmen_cli.editing.spec import Spec

DATA = Path(__file__).parent / "data"
VERSIONS = sorted(folder.name for folder in DATA.iterdir() if folder.name[0].isdigit())
MOST_BYTES = 200_000


@pytest.fixture(params=VERSIONS)
def kept(request: pytest.FixtureRequest) -> Path:
    return DATA / request.param


def test_they_are_small(kept: Path) -> None:
    assert sum(file.stat().st_size for file in kept.rglob("*") if file.is_file()) <= MOST_BYTES


def test_base_and_delta_are_the_merged_checkpoint(kept: Path) -> None:
    shift, manifest = read_delta(kept / "delta", fingerprint=fingerprint(kept / "base"))
    base, merged = read_index(kept / "base"), read_index(kept / "merged")
    plan = {tensor: module for module, tensor in merge_plan(kept / "base", shift).items()}
    assert manifest["method"]["name"] == "identity"
    assert len(plan) == 1
    for name, entry in base.items():
        weight = read_tensor(entry)
        if name in plan:
            weight = merged_weight(plan[name], weight, shift.modules[plan[name]])[0]
        assert torch.equal(weight, read_tensor(merged[name]))


def test_the_merged_checkpoint_loads_and_scores(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(kept / "base")
    assert main(["eval", str(kept / "merged"), str(kept / "facts.jsonl"), "--base", base, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["ls"]["teacher_forced"] is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_the_adapter_is_the_delta(kept: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[5, 17, 33, 2]])
    base = load_base(str(kept / "base"), device="cpu", dtype="float32")
    shift, _ = read_delta(kept / "delta", fingerprint=base.fingerprint)
    with torch.no_grad():
        with applied(base.model, shift):
            expected = base.model(input_ids=ids).logits
        found = peft.PeftModel.from_pretrained(base.model, kept / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_editor_edits(kept: Path, tmp_path: Path) -> None:
    ready = find_ready(load_base(str(kept / "base"), device="cpu"), Spec(), kept / "editor")
    assert ready is not None
    assert ready.method == "malmen"
    given = ["apply", str(kept / "base"), str(kept / "facts.jsonl"), "--editor", str(kept / "editor"), "-q"]
    assert main([*given, "-o", str(tmp_path / "out"), "--score", "0"]) == 0


def test_the_statistics_are_found(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALMEN_HOME", str(tmp_path))
    shutil.copytree(kept / "statistics", tmp_path / "statistics")
    (description,) = kept.rglob("statistics.json")
    said = json.loads(description.read_text(encoding="utf-8"))
    found = load_statistics(said["base"]["fingerprint"], said["module"], said["source"], 32)
    assert said["base"]["fingerprint"] == fingerprint(kept / "base")
    assert found is not None
    assert (found[0].shape, found[1]) == ((32, 32), said["tokens"])
