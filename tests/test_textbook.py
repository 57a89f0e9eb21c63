"""benchmarks/textbook.py, which shares no code with editing/, gives the same shifts and the same meta-gradients."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from malmen_cli.base.families import block_index
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import encode
from malmen_cli.edit import Ready, make_shift
from malmen_cli.editing.editor import Editor
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MalmenSettings
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.training.facts import draw, encode_examples
from malmen_cli.training.history import Progress
from malmen_cli.training.loop import Trainer
from malmen_cli.training.settings import TrainingSettings

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PLACES = ("Australia", "France", "the land of snow", "Peru", "Japan and Sweden", "Brazil", "Italy", "Bill Gates")
ANSWERS = ("Rome", "Tim Cook", "one hundred degrees", "Paris", "no", "krona")
SAME_SHIFT = 1e-4  # the figure, relative; fp32 captures differ by the order of sums alone
TRAINING = {"steps": 9, "facts_per_step": (8,), "meta_facts": 8, "validate_every": 100, "valid_facts": 4, "warmup": 0}
TRAINING |= {"calibration_facts": 8, "continuation": 3, "preserved_prompts": 40, "locality_weight": 2.0}


@pytest.fixture
def textbook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("textbook")


def make_facts(count: int) -> list[Fact]:
    facts = []
    for i in range(count):
        place = f"{PLACES[i % 8]} number {i}"
        probe = Probe(f"The currency of {PLACES[(i + 1) % 8]} {i} is the")
        prompt, rephrase = f"The capital of {place} is", f"{place} has the capital"
        facts.append(Fact(f"f{i}", prompt, ANSWERS[i % 6], subject=place, rephrases=(rephrase,), locality=(probe,)))
    return facts


def make_trainer(base: Base, facts: list[Fact], settings: MalmenSettings) -> Trainer:
    """Prepared, its network no longer the identity."""
    editor = Editor.fresh(base.model, settings)
    runner = Runner(base, min(block_index(base.model, name) for name in editor.names))
    examples = encode_examples(base.task, facts, end_of_text=True)
    trainer = Trainer(runner, editor, examples, examples[:4], TrainingSettings(**TRAINING), batch_size=5)
    trainer.prepare()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in editor.groups:
            for name in ("up", "bias", "shift", "scale"):
                parameter = getattr(group.network, name)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return trainer


def by_the_book(textbook: ModuleType, trainer: Trainer, folder: Path) -> Any:
    editor = trainer.editor
    groups = [list(group.names) for group in editor.groups]
    tokens = editor.settings.tokens
    return textbook.Textbook(trainer.runner.model, groups, editor.state(), folder, tokens=tokens, batch_size=3)


@pytest.mark.parametrize("tokens", ["answer", "subject"])
@pytest.mark.parametrize(("family", "mlp"), [("gpt2", 64), ("llama", 64), ("gpt2", 8)], ids=["gpt2", "llama", "primal"])
def test_the_same_shift(
    textbook: ModuleType, tiny_model_factory: Callable, tmp_path: Path, family: str, mlp: int, tokens: str
) -> None:
    base = load_base(str(tiny_model_factory(family, layers=4, mlp=mlp)), device="cpu")
    pattern = ("*.[23].mlp.[cd]*_proj",)
    settings = MalmenSettings(modules=pattern, rank=4, rounds=1, tokens=tokens, preserved_rank=8)
    facts = make_facts(16)
    trainer = make_trainer(base, facts, settings)
    mine = make_shift(base, Ready(trainer.editor, "malmen"), facts, batch_size=4)
    edits = [encode(base.tokenizer, f.prompt, f.target, end_of_text=True, subject=f.subject) for f in facts]
    theirs = by_the_book(textbook, trainer, tmp_path).shift(edits)
    assert set(mine.modules) == set(theirs)
    for name, module in mine.modules.items():
        assert float((module.matrix() - theirs[name]).norm()) <= SAME_SHIFT * float(theirs[name].norm())
        assert float(theirs[name].norm()) > 0


def test_the_same_training_step(textbook: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    """Loss, and the gradient of every parameter of the hyper-network, through the solve."""
    base = load_base(str(tiny_llama), device="cpu")
    settings = MalmenSettings(modules=("*.[1].mlp.down_proj",), rank=4, rounds=1, preserved_rank=8)
    trainer = make_trainer(base, make_facts(16), settings)
    book = by_the_book(textbook, trainer, tmp_path)
    drawn = draw(trainer.cohorts, trainer.settings, trainer.seed, 0)
    probes = [reference.sequence for reference in trainer.references.of(drawn.probes)]
    learned, moved = book.step(drawn.edits, drawn.wordings, probes, trainer.settings.locality_weight)

    class Enough(Exception):
        pass

    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        raise Enough

    with pytest.raises(Enough):
        trainer.run(stop, lambda: None)
    assert learned == pytest.approx(seen[0].learned, rel=1e-5)
    assert moved == pytest.approx(seen[0].moved, rel=1e-4)
    compared = 0
    for network, group in zip(book.networks, trainer.editor.groups, strict=True):
        for name in textbook.LEARNED:
            mine, theirs = getattr(group.network, name).grad, network.tensors[name].grad
            assert float((mine - theirs).norm()) <= 1e-3 * float(theirs.norm()), name
            compared += float(theirs.norm()) > 0
    assert compared == len(textbook.LEARNED)


def test_the_model_is_left_as_it_was(textbook: ModuleType, tiny_gpt2: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_gpt2), device="cpu")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    trainer = make_trainer(base, make_facts(8), MalmenSettings(last_blocks=1, rank=4, rounds=1, preserved_rank=8))
    drawn = draw(trainer.cohorts, trainer.settings, trainer.seed, 0)
    book = by_the_book(textbook, trainer, tmp_path)
    optimizer = torch.optim.Adam(book.parameters(), lr=1e-3)
    book.step(drawn.edits, drawn.wordings, drawn.wordings, 1.0, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())
