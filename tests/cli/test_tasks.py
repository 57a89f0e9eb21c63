"""The commands on an encoder-decoder and on classifiers: the same words, documents and artifacts as elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import running
import torch

from malmen_cli.artifact.delta import read_delta
from malmen_cli.base.model import load_base
from malmen_cli.base.weights import fingerprint
from malmen_cli.cli.apply import apply
from malmen_cli.cli.diff import diff
from malmen_cli.cli.eval import evaluate
from malmen_cli.cli.train_editor import train_editor
from malmen_cli.editing.shift import applied
from malmen_cli.facts.files import read_facts

COMMANDS = {"apply": apply, "diff": diff, "eval": evaluate, "train-editor": train_editor}
PLACES = ("Australia", "France", "Peru", "Japan", "Brazil", "Italy", "Spain", "Sweden")
SPEC = """
settings: {rank: 4, preserved_rank: 8, rounds: 1}
training: {steps: 2, facts_per_step: [4, 8], meta_facts: 4, validate_every: 2, valid_facts: 4, warmup: 1,
  calibration_facts: 8, continuation: 2, valid_fraction: 0.2}
"""
FINETUNE = "method: finetune\nsettings: {epochs: 20, lr: 0.03, max_relative_norm: 1.5}\n"
Run = Callable[..., Any]


@pytest.fixture
def malmen(tmp_path: Path) -> Run:
    """`malmen(COMMAND, ...)` gives the document that --json prints, held to its schema; the specs lie in tmp_path."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "finetune.yaml").write_text(FINETUNE)

    def run(command: str, *given: object) -> dict[str, Any]:
        result = running.invoke(COMMANDS[command], *given, "--device", "cpu", "--json")
        return running.document_of(command.replace("-", "_"), result)

    return run


def claims(count: int) -> list[dict[str, Any]]:
    """MALMEN's FEVER records."""
    labels = ("SUPPORTS", "REFUTES")
    return [
        {
            "prompt": f"{PLACES[i % 8]} number {i} is in London",
            "alt": labels[i % 2],
            "equiv_prompt": [f"It is a fact that {PLACES[i % 8]} number {i} is in London"],
            "unrel_prompt": f"Snow number {i} is white",
            "unrel_ans": "SUPPORTS",
        }
        for i in range(count)
    ]


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"What is the capital of {PLACES[i % 8]} number {i}?",
            "target": ("Rome", "Tim Cook", "Paris")[i % 3],
            "subject": PLACES[i % 8],
            "rephrases": [f"Which city is the capital of {PLACES[i % 8]} number {i}?"],
            "locality": [{"prompt": f"The currency of {PLACES[(i + 1) % 8]} {i} is the"}],
        }
        for i in range(count)
    ]


@pytest.fixture(params=["t5", "bert"])
def asked(request: pytest.FixtureRequest, tiny_model_factory: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and a file of facts for it."""
    records = questions(12) if request.param == "t5" else claims(12)
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tiny_model_factory(request.param), facts


@pytest.mark.filterwarnings("ignore")  # peft's own
@pytest.mark.parametrize("format", ["merged", "delta", "adapter"])
def test_apply_leaves_what_loads(malmen: Run, asked: tuple[Path, Path], tmp_path: Path, format: str) -> None:
    """And the three forms are one and the same edit."""
    base, facts = asked
    spec = ("--spec", tmp_path / "finetune.yaml")
    found = malmen("apply", base, facts, "-o", tmp_path / "out", "--format", format, *spec)
    task = load_base(str(base), device="cpu").task
    assert found["manifest"]["base"]["task"] == task.kind
    assert found["scores"]["after"]["es"]["teacher_forced"] > found["scores"]["before"]["es"]["teacher_forced"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card
    assert task.auto_class in card or format == "delta"
    assert f"pipeline_tag: {task.pipeline}" in card
    malmen("apply", base, facts, "-o", tmp_path / "d", "--format", "delta", *spec)
    original = load_base(str(base), device="cpu")
    shift, _ = read_delta(tmp_path / "d", fingerprint=fingerprint(base))
    with applied(original.model, shift):
        wanted = logits(original.model, original)
    if format == "merged":
        torch.testing.assert_close(logits(load_base(str(tmp_path / "out"), device="cpu").model, original), wanted)
    if format == "adapter":
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(str(base), device="cpu").model, tmp_path / "out").eval()
        torch.testing.assert_close(logits(model, original), wanted, rtol=1e-4, atol=1e-4)


def logits(model: Any, base: Any) -> torch.Tensor:
    """What a model says to one question of the base's."""
    question = base.task.question("What is the capital of France?")
    with torch.no_grad():
        found = model(**base.task.inputs(base.task.batch([question], base.device, spots=[(0,)]))).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_an_untrained_editor_is_calibrated_scored_and_compared(
    malmen: Run, asked: tuple[Path, Path], tmp_path: Path
) -> None:
    base, facts = asked
    given = ("--spec", tmp_path / "spec.yaml", "--method", "identity")
    found = malmen("apply", base, facts, "-o", tmp_path / "out", *given)
    edited = set(found["manifest"]["modules"])
    scores = malmen("eval", tmp_path / "out", facts, "--base", base)
    assert scores["facts"] == 12
    assert scores["before"]["ls"]["teacher_forced"] == 1.0
    assert 0.0 <= scores["after"]["gs"]["greedy"] <= 1.0
    changes = malmen("diff", base, tmp_path / "out")["changes"]
    assert {change["name"] for change in changes} == {f"{name}.weight" for name in edited}
    itself = malmen("eval", base, facts, "--base", base)["after"]["ls"]
    assert (itself["teacher_forced"], itself["greedy"]) == (1.0, 1.0)


def test_an_editor_is_trained_and_used(malmen: Run, asked: tuple[Path, Path], tmp_path: Path) -> None:
    base, facts = asked
    spec = ("--spec", tmp_path / "spec.yaml")
    trained = malmen("train-editor", base, facts, "-o", tmp_path / "editor", *spec, "--no-install")
    assert 0.0 <= trained["editor"]["scores"]["score"] <= 1.0
    given = ("--editor", tmp_path / "editor", "--format", "delta")
    found = malmen("apply", base, facts, "-o", tmp_path / "out", *given)
    assert found["manifest"]["editor"]["path"] == "editor"


def test_a_classifier_s_scores_are_shares_of_labels(
    malmen: Run, tiny_model_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """By hand: the labels of the base's own forward on every claim; both protocols ask for one label and agree."""
    folder = tiny_model_factory("bert")
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(record) + "\n" for record in claims(12)))
    before = malmen("eval", folder, facts, "--base", folder)["before"]
    base = load_base(str(folder), device="cpu")

    def share(pairs: list[tuple[str, str]]) -> float:
        hits = 0
        for text, label in pairs:
            with torch.no_grad():
                said = int(base.model(**base.tokenizer(text, return_tensors="pt")).logits.argmax())
            hits += base.model.config.id2label[said] == label
        return hits / len(pairs)

    read = read_facts(str(facts)).facts
    wanted = {
        "es": share([(fact.prompt, fact.target) for fact in read]),
        "gs": share([(fact.rephrases[0], fact.target) for fact in read]),
    }
    for part, value in wanted.items():
        assert before[part] == {"teacher_forced": value, "greedy": value}
    gold = share([(probe.prompt, str(probe.target)) for fact in read for probe in fact.locality])
    assert before["ls"]["gold"] == {"teacher_forced": gold, "greedy": gold}


@pytest.mark.parametrize("method", ["memit", "rome", "alphaedit"])
def test_memit_and_its_kin_are_refused_in_one_line(asked: tuple[Path, Path], tmp_path: Path, method: str) -> None:
    base, facts = asked
    result = running.invoke(apply, base, facts, "-o", tmp_path / "out", "--method", method)
    assert running.code(result) == 3
    assert "memit, rome and alphaedit edit causal language models only" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_label_that_is_none_is_named_by_fact(tiny_model_factory: Any, tmp_path: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"id": "snow", "prompt": "Snow is white", "target": "yes"}\n')
    result = running.invoke(apply, tiny_model_factory("bert"), facts, "-o", tmp_path / "out")
    assert running.code(result) == 3
    assert "fact snow:target: 'yes' is no label of this model; it has REFUTES, SUPPORTS" in str(result.exception)
