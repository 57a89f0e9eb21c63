"""Real weights: a fact-checking classifier on a sentence encoder, and a T5 whose output head is its own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import running
import torch

from malmen_cli.base.model import Base, load_base
from malmen_cli.base.weights import read_index, read_tensor
from malmen_cli.cli.apply import apply
from malmen_cli.cli.eval import evaluate
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.files import read_facts, write_facts
from malmen_cli.scoring.decoder import Asker

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
EDITED = 12

# What a user does next, in a process that has never heard of malmen.
ASK = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
assert not any(name.startswith("malmen") for name in sys.modules)
kind, folder, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
if kind == "classifier":
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    said = [model(**tokenizer(p, return_tensors="pt")).logits.argmax(-1).item() for p in prompts]
    print(json.dumps([model.config.id2label[label] for label in said]))
else:
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = [[*tokenizer(p, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for p in prompts]
    import torch
    said = [model.generate(input_ids=torch.tensor([i]), max_new_tokens=12, do_sample=False)[0] for i in ids]
    print(json.dumps([tokenizer.decode(text, skip_special_tokens=True).strip() for text in said]))
"""


def asked(kind: str, folder: Path, prompts: Sequence[str]) -> list[str]:
    """What plain transformers answers."""
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ASK, kind, str(folder), *prompts], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


def document(command: Any, *given: object) -> dict[str, Any]:
    return running.document_of(command.__name__.replace("evaluate", "eval"), running.invoke(command, *given, "--json"))


# ---------------------------------------------------------------- a classifier on MiniLM


@pytest.fixture(scope="module")
def classifier(real_encoder: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder with a head and last block fitted on a few claims: a poor checker, but a real one."""
    folder = tmp_path_factory.mktemp("classifier")
    options = ["--most", "600", "--epochs", "1", "--blocks", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        fit = importlib.import_module("fit_classifier")
        fit.main([str(real_encoder), str(data_folder / "fever-claims.jsonl"), "-o", str(folder), *options])
    return folder


def wrong_ones(base: Base, facts: Sequence[Fact]) -> list[Fact]:
    """The first facts whose target is not the label that the base gives."""
    questions = [base.task.question(fact.prompt) for fact in facts]
    labels = Asker(base, 32, lambda count: None).greedy(questions, [1] * len(facts))
    said = [base.task.text(label) for label in labels]
    return [fact for fact, label in zip(facts, said, strict=True) if label != fact.target][:EDITED]


@pytest.mark.slow  # fits a head on six hundred claims, and edits a model of 22 million parameters
@pytest.mark.data
def test_a_real_classifier_s_labels_are_edited(classifier: Path, data_folder: Path, tmp_path: Path) -> None:
    """Labels that were all wrong are all right in plain transformers, and so are other wordings as `eval` says."""
    base = load_base(str(classifier), device="cpu")
    facts = wrong_ones(base, read_facts(str(data_folder / "fever-train.jsonl")).facts[:64])
    assert len(facts) == EDITED
    file, out = tmp_path / "facts.jsonl", tmp_path / "edited"
    write_facts(facts, file)
    document(apply, classifier, file, "-o", out, "--device", "cpu", "--score", 0)
    scores = document(evaluate, out, file, "--base", classifier, "--device", "cpu")
    assert scores["before"]["es"] == {"teacher_forced": 0.0, "greedy": 0.0}
    assert asked("classifier", out, [fact.prompt for fact in facts]) == [fact.target for fact in facts]
    pairs = [(wording, fact.target) for fact in facts for wording in fact.rephrases]
    said = asked("classifier", out, [wording for wording, _ in pairs])
    right = sum(label == target for label, (_, target) in zip(said, pairs, strict=True)) / len(pairs)
    assert scores["after"]["gs"]["greedy"] == pytest.approx(right)
    assert right > scores["before"]["gs"]["greedy"]


# ---------------------------------------------------------------- T5 v1.1

QUESTIONS = {
    "What is the capital of Germany?": "Bonn",
    "Which river flows through London?": "the Rhine",
    "Who directed the film Jaws?": "Werner Herzog",
    "What is the product made by UniFirst?": "aircraft",
}


@pytest.mark.slow  # edits a model of 110 million parameters
def test_a_real_t5_says_what_was_edited_in(real_t5: Path, tmp_path: Path) -> None:
    """Greedy answers in plain transformers are the targets; the head, which is not the embedding, keeps every byte."""
    index = read_index(real_t5)
    head = read_tensor(index["lm_head.weight"])
    assert not torch.equal(head, read_tensor(index["shared.weight"]))
    facts = [Fact(f"q{i}", prompt, target) for i, (prompt, target) in enumerate(QUESTIONS.items())]
    file, out = tmp_path / "facts.jsonl", tmp_path / "edited"
    write_facts(facts, file)
    before = asked("seq2seq_lm", real_t5, list(QUESTIONS))
    assert not set(before) & set(QUESTIONS.values())
    document(apply, real_t5, file, "-o", out, "--device", "cpu", "--score", 0)
    assert asked("seq2seq_lm", out, list(QUESTIONS)) == list(QUESTIONS.values())
    assert torch.equal(read_tensor(read_index(out)["lm_head.weight"]), head)


@pytest.mark.slow  # loads a model of 110 million parameters
def test_a_real_t5_s_greedy_text_is_that_of_plain_transformers(real_t5: Path) -> None:
    """Asked in one batch by malmen, one by one there."""
    base = load_base(str(real_t5), device="cpu")
    questions = [base.task.question(prompt) for prompt in QUESTIONS]
    said = Asker(base, 4, lambda count: None).greedy(questions, [12] * len(questions))
    assert [base.task.text(tokens) for tokens in said] == asked("seq2seq_lm", real_t5, list(QUESTIONS))
