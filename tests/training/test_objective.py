"""The meta-loss by hand, and its gradients by autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from malmen_cli.base.batch import make_batch
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing import losses
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift, applied
from malmen_cli.exceptions import MemoryLimitError
from malmen_cli.facts.fact import Fact
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.objective import meta_loss
from malmen_cli.training.references import References

MODULE = "transformer.h.1.mlp.c_proj"
MakeFacts = Callable[..., list[Fact]]


@pytest.fixture
def prompts(tiny_base: Base, make_facts: MakeFacts) -> list[Encoded]:
    return [tiny_base.task.question(fact.locality[0].prompt) for fact in make_facts(12)]


def some_shift(size: float = 0.3) -> Shift:
    dense = size * torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    return Shift({MODULE: ModuleShift(IN_OUT, dense=dense)})


def test_the_loss_by_hand(tiny_base: Base, make_facts: MakeFacts, prompts: list[Encoded]) -> None:
    runner = Runner(tiny_base, 1)
    wordings = [w for e in encode_examples(tiny_base.task, make_facts(6), end_of_text=True) for w in e.wordings()]
    references = References(runner, 3, 4).of(prompts)
    with torch.no_grad():
        before = [runner.full_logits(make_batch([r.sequence], tiny_base.device)) for r in references]
        with applied(tiny_base.model, some_shift()):
            found = meta_loss(
                runner, wordings, references, [MODULE], locality_weight=1.0, batch_size=3, gradients=False
            )
            learned = [
                cross_entropy(runner.full_logits(batch), batch.labels)
                for batch in (make_batch([w], tiny_base.device) for w in wordings)
            ]
            after = [runner.full_logits(make_batch([r.sequence], tiny_base.device)) for r in references]
    moved = [
        kl_div(log_softmax(a, -1), log_softmax(b, -1), reduction="none", log_target=True).sum(-1).mean()
        for a, b in zip(after, before, strict=True)
    ]
    assert found.learned == pytest.approx(float(torch.stack(learned).mean()), rel=1e-4)
    assert found.moved == pytest.approx(float(torch.stack(moved).mean()), rel=1e-3)
    assert found.total(0.5) == pytest.approx(found.learned + 0.5 * found.moved)
    assert found.gradients == {}


def test_an_unedited_model_has_not_moved(tiny_base: Base, prompts: list[Encoded]) -> None:
    runner = Runner(tiny_base, 1)
    references = References(runner, 3, 4).of(prompts)
    found = meta_loss(runner, [], references, [MODULE], locality_weight=1.0, batch_size=5)
    assert found.learned == 0.0
    assert abs(found.moved) < 1e-6
    assert float(found.gradients[MODULE].abs().max()) < 1e-4


@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_gradients_are_those_of_the_weighted_loss(
    tiny_base: Base,
    make_facts: MakeFacts,
    prompts: list[Encoded],
    batch_size: int,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "CACHED", rows * 4 * tiny_base.model.config.vocab_size)
    runner = Runner(tiny_base, 1)
    wordings = [e.edit for e in encode_examples(tiny_base.task, make_facts(6), end_of_text=True)]
    references = References(runner, 3, 4).of(prompts[:5])
    weight = tiny_base.model.get_submodule(MODULE).weight
    with applied(tiny_base.model, some_shift()):
        found = meta_loss(runner, wordings, references, [MODULE], locality_weight=0.7, batch_size=batch_size)
        weight.requires_grad_(True)
        try:
            loss = torch.zeros(())
            for wording in wordings:
                batch = make_batch([wording], tiny_base.device)
                loss = loss + cross_entropy(runner.full_logits(batch), batch.labels) / len(wordings)
            for reference in references:
                wanted = log_softmax(runner.logits_of(reference.heads), -1).detach()
                said = log_softmax(runner.full_logits(make_batch([reference.sequence], tiny_base.device)), -1)
                moved = kl_div(said, wanted, reduction="none", log_target=True).sum(-1).mean()
                loss = loss + 0.7 * moved / len(references)
            (expected,) = torch.autograd.grad(loss, [weight])
        finally:
            weight.requires_grad_(False)
    assert found.total(0.7) == pytest.approx(float(loss.detach()), rel=1e-4)
    assert float((found.gradients[MODULE] - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("gradients", [True, False])
def test_batches_are_halved_where_memory_runs_out(
    tiny_base: Base,
    make_facts: MakeFacts,
    prompts: list[tuple[int, ...]],
    gradients: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """T26 for the meta-loss: room for three sequences gives what room for all gives; none is said."""
    runner, room = Runner(tiny_base), 99
    references = References(runner, 2, 4).of(prompts)
    wordings = [e.rephrases[0] for e in encode_examples(tiny_base.task, make_facts(9), end_of_text=True)]
    options: dict[str, Any] = {"locality_weight": 2.0, "batch_size": 8, "gradients": gradients}
    logits = runner.logits

    def short(sequences: Any, **given: Any) -> Any:
        if len(sequences) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(sequences, **given)

    monkeypatch.setattr(runner, "logits", short)
    with applied(tiny_base.model, some_shift()):
        wanted = meta_loss(runner, wordings, references, [MODULE], **options)
        room = 3
        found = meta_loss(runner, wordings, references, [MODULE], **options)
        room = 0
        with pytest.raises(MemoryLimitError):
            meta_loss(runner, wordings, references, [MODULE], **options)
    assert found.learned == pytest.approx(wanted.learned, rel=1e-5)
    assert found.moved == pytest.approx(wanted.moved, rel=1e-5)
    assert set(found.gradients) == ({MODULE} if gradients else set())
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(gradient, wanted.gradients[name], rtol=1e-4, atol=1e-6)
