"""The meta-loss by hand, its gradients by autograd, and the base's answers computed once and in fixed company."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import malmen_cli.training.objective as objective_module
from malmen_cli.base.batch import make_batch
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.shift import IN_OUT, ModuleShift, Shift, applied
from malmen_cli.exceptions import MemoryLimitError
from malmen_cli.facts.fact import Fact
from malmen_cli.training.facts import encode_examples
from malmen_cli.training.objective import References, meta_loss

MODULE = "transformer.h.1.mlp.c_proj"
MakeFacts = Callable[..., list[Fact]]


@pytest.fixture
def prompts(tiny_base: Base, make_facts: MakeFacts) -> list[Encoded]:
    return [tiny_base.task.question(fact.locality[0].prompt) for fact in make_facts(12)]


def some_shift(size: float = 0.3) -> Shift:
    dense = size * torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    return Shift({MODULE: ModuleShift(IN_OUT, dense=dense)})


# ---------------------------------------------------------------- what the base says


def test_a_reference_is_the_base_s_own_greedy_text_and_one_token_more(tiny_base: Base, prompts: list[Encoded]) -> None:
    runner = Runner(tiny_base, 1)
    for prompt, found in zip(prompts, References(runner, 3, 4).of(prompts), strict=True):
        assert found.sequence.ids[: found.sequence.n_prompt] == prompt.ids
        assert found.sequence.ids[-1] == tiny_base.tokenizer.eos_token_id
        text = found.sequence.answer[:-1]
        assert len(text) <= 3
        with torch.no_grad():
            logits = tiny_base.model(torch.tensor([found.sequence.ids])).logits[0]
        assert tuple(logits.argmax(-1)[len(prompt.ids) - 1 : -2].tolist()) == text
        assert found.heads.shape == (len(text) + 1, 32)
        torch.testing.assert_close(
            runner.logits_of(found.heads), logits[len(prompt.ids) - 1 : -1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("spare", [1, 2, 3])
def test_a_reference_stays_within_what_the_model_reads(tiny_base: Base, spare: int) -> None:
    assert tiny_base.room is not None
    probe = Encoded((5,) * (tiny_base.room - spare), tiny_base.room - spare)
    found = References(Runner(tiny_base, 1), 6, 4).of([probe])[0]
    assert len(found.sequence.ids) <= tiny_base.room
    assert len(found.heads) == len(found.sequence.ids) - len(probe.ids)


def test_each_probe_is_computed_once(tiny_base: Base, prompts: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    references = References(Runner(tiny_base, 1), 2, 4)
    asked: list[Encoded] = []
    greedy = references._asker.greedy

    def spy(company: Any, budgets: Any) -> Any:
        asked.extend(company)
        return greedy(company, budgets)

    monkeypatch.setattr(references._asker, "greedy", spy)
    references.keep_company(prompts[:6])
    first = references.of(prompts[:3])
    again = references.of([*prompts, *prompts[::-1]])
    assert sorted(asked, key=prompts.index) == prompts
    assert all(one is other for one, other in zip(first, again[:3], strict=True))


@pytest.mark.parametrize("order", list(itertools.islice(itertools.permutations(range(4)), 0, 24, 5)))
def test_what_the_base_says_does_not_depend_on_who_is_asked_first(
    tiny_base: Base, prompts: list[Encoded], order: tuple[int, ...]
) -> None:
    """Bitwise: company is fixed, so that a resumed training sees the same references."""

    def heads(sequence: tuple[int, ...]) -> dict[Encoded, torch.Tensor]:
        references = References(Runner(tiny_base, 1), 2, 16)
        for start in range(0, 12, 3):
            references.keep_company(prompts[start : start + 3])
        return {prompts[3 * i]: references.of([prompts[3 * i]])[0].heads for i in sequence}

    for prompt, expected in heads((0, 1, 2, 3)).items():
        assert torch.equal(heads(order)[prompt], expected)


@pytest.mark.parametrize(("batch_size", "room"), [(4, 99), (16, 3)])
def test_what_the_base_says_is_asked_in_batches_and_in_halves_where_memory_is_short(
    tiny_base: Base, prompts: list[Encoded], monkeypatch: pytest.MonkeyPatch, batch_size: int, room: int
) -> None:
    runner, sizes = Runner(tiny_base, 1), []
    heads = runner.heads

    def short(sequences: Any) -> Any:
        if len(sequences) > room:
            raise torch.OutOfMemoryError
        sizes.append(len(sequences))
        return heads(sequences)

    monkeypatch.setattr(runner, "heads", short)
    found = References(runner, 3, batch_size).of(prompts)
    assert max(sizes) == min(batch_size, room)
    assert sum(sizes) == len(prompts)
    for one, other in zip(found, References(Runner(tiny_base, 1), 3, 16).of(prompts), strict=True):
        assert one.sequence == other.sequence
        torch.testing.assert_close(one.heads, other.heads, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the loss


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
    monkeypatch.setattr(objective_module, "ROWS", rows)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_divergence_and_its_gradient_in_any_type(dtype: torch.dtype) -> None:
    """Against autograd in fp64 of the very logits: summed in fp32, the gradient rounded to the logits' type once."""
    generator = torch.Generator().manual_seed(0)
    wanted, logits = (3 * torch.randn(70, 50, generator=generator).to(dtype) for _ in range(2))
    shares = torch.rand(70, generator=generator)
    exact = logits.double().requires_grad_(True)
    terms = kl_div(log_softmax(exact, -1), log_softmax(wanted.double(), -1), reduction="none", log_target=True)
    total = (terms.sum(-1) * shares.double()).sum()
    (gradient,) = torch.autograd.grad(2 * total, exact)
    logits.requires_grad_(True)
    found = objective_module._Divergence.apply(logits, wanted, shares)
    (mine,) = torch.autograd.grad(2 * found, logits)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert mine.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    assert float((mine.double() - gradient).norm() / gradient.norm()) <= tolerance


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
