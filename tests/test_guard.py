"""Edits that would destroy the model are refused, and the facts to blame are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from malmen_cli.base.model import Base, load_base
from malmen_cli.cli.errors import main
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift, applied
from malmen_cli.exceptions import NumericsError
from malmen_cli.facts.fact import Fact
from malmen_cli.guard import MAX_RELATIVE_NORM, largest, refuse_destructive, residuals

MODULES = [f"transformer.h.{block}.mlp.c_proj" for block in (0, 1)]
FACTS = [
    Fact("au", "The capital of Australia is", "Rome", subject="Australia"),
    Fact("jp", "The capital of Japan is", "Paris", subject="Japan"),
    Fact("au-2", "the capital of Australia is", "Madrid", subject="Australia"),
    Fact("it", "The currency of Japan is the", "krona", subject="Japan"),
]


@pytest.fixture(scope="module")
def base(tiny_gpt2: Path) -> Base:
    return load_base(str(tiny_gpt2), device="cpu")


def shift_of(base: Base, size: float) -> Shift:
    """Of `size` times the second module's weight, half of that in the first."""
    modules = {}
    for name, share in zip(MODULES, (0.5, 1.0), strict=True):
        weight = base.model.get_submodule(name).weight.detach()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        modules[name] = ModuleShift(IN_OUT, dense=noise * (size * share * weight.norm() / noise.norm()))
    return Shift(modules)


def refuse(base: Base, size: float, *, force: bool = False, facts: list[Fact] = FACTS) -> list[str]:
    warned: list[str] = []
    refuse_destructive(base, shift_of(base, size), facts, batch_size=2, force=force, warn=warned.append)
    return warned


def test_the_largest_relative_norm(base: Base) -> None:
    name, size = largest(base, shift_of(base, 0.7))
    assert (name, size) == (MODULES[1], pytest.approx(0.7, rel=1e-5))


@pytest.mark.parametrize("size", [0.46, 0.55, 1.0, 4.5, 0.99 * MAX_RELATIVE_NORM])
def test_honest_edits_pass_in_silence(base: Base, size: float) -> None:
    """The figures of benchmarks/RESULTS.md, and what 7,499 facts may take."""
    assert refuse(base, size) == []


def test_a_destructive_edit_names_module_contradiction_and_residuals(base: Base) -> None:
    with pytest.raises(NumericsError) as caught:
        refuse(base, 15.0)
    said = str(caught.value)
    assert said.startswith(f"{MODULES[1]}: the shift is 15.0 times the weight's own norm (above 10)")
    assert "contradict each other: au and au-2;" in said
    left = residuals(base, shift_of(base, 15.0), FACTS, batch_size=3)
    worst = sorted(zip(left, FACTS, strict=True), key=lambda pair: -pair[0])[:3]
    assert "largest residuals: " + ", ".join(f"{fact.id} ({nats:.1f} nats)" for nats, fact in worst) in said
    assert "--force" in said
    assert "\n" not in said


def test_without_a_contradiction_none_is_claimed(base: Base) -> None:
    with pytest.raises(NumericsError, match=r"destroys the model: largest residuals: ") as caught:
        refuse(base, 15.0, facts=FACTS[:2])
    assert "contradict" not in str(caught.value)


def test_force_only_warns(base: Base) -> None:
    (warning,) = refuse(base, 15.0, force=True)
    assert "--force was given" in warning


def test_residuals_are_those_of_the_edited_model_whatever_the_batch(base: Base) -> None:
    shift = shift_of(base, 0.5)
    with torch.no_grad(), applied(base.model, shift):
        expected = []
        for fact in FACTS:
            prompt = base.tokenizer(fact.prompt)["input_ids"]
            whole = base.tokenizer(f"{fact.prompt} {fact.target}")["input_ids"]
            logits = base.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            expected.append(-sum(float(logits[i - 1, whole[i]]) for i in places) / len(places))
    for batch_size in (1, 4):
        assert residuals(base, shift, FACTS, batch_size) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("force", [False, True])
def test_apply_refuses_with_exit_5_and_leaves_nothing(
    tiny_gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    """Fine-tuning at an absurd rate."""
    facts = [{"id": f.id, "prompt": f.prompt, "target": f.target, "subject": f.subject} for f in FACTS]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (tmp_path / "spec.yaml").write_text("method: finetune\nsettings: {epochs: 3, lr: 50.0, stop_loss: 0}\n")
    given = ["apply", str(tiny_gpt2), str(tmp_path / "facts.jsonl"), "--spec", str(tmp_path / "spec.yaml")]
    out = tmp_path / "out"
    assert main([*given, "-o", str(out), "--score", "0", *(["--force"] if force else ["-q"])]) == (0 if force else 5)
    assert out.exists() == force
    said = capsys.readouterr().err
    assert ("malmen: warning: " if force else "malmen: error: ") + MODULES[1] in said or MODULES[0] in said
    assert "destroys the model" in said
