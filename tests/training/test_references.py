"""The base's answers on probes: computed once, in fixed company; and how far others are from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import malmen_cli.training.references as references_module
from malmen_cli.base.batch import Batch
from malmen_cli.base.model import Base, load_base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing import losses
from malmen_cli.editing.replay import Runner
from malmen_cli.facts.fact import Fact
from malmen_cli.training.references import Reference, References, Tangent, divergence

MakeFacts = Callable[..., list[Fact]]


@pytest.fixture
def prompts(tiny_base: Base, make_facts: MakeFacts) -> list[Encoded]:
    return [tiny_base.task.question(fact.locality[0].prompt) for fact in make_facts(12)]


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
    monkeypatch.setattr(references_module, "_linear", lambda runner: True)  # which asks too
    found = References(runner, 3, batch_size).of(prompts)
    assert max(sizes) == min(batch_size, room)
    assert sum(sizes) == len(prompts)
    for one, other in zip(found, References(Runner(tiny_base, 1), 3, 16).of(prompts), strict=True):
        assert one.sequence == other.sequence
        torch.testing.assert_close(one.heads, other.heads, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- how far others are


def tried_on(base: Base, prompts: list[Encoded]) -> tuple[Runner, list[Reference], Batch, torch.Tensor]:
    """References, their batch, and inputs of the head that are not the base's, with a graph."""
    runner = Runner(base)
    references = References(runner, 3, 4).of(prompts)
    heads = torch.cat([r.heads for r in references])
    noise = torch.randn(heads.shape, generator=torch.Generator().manual_seed(1))
    inputs = (heads + 0.5 * heads.std() * noise).requires_grad_(True)
    return runner, references, base.task.batch([r.sequence for r in references], base.device), inputs


def plainly(runner: Runner, references: list[Reference], inputs: torch.Tensor) -> torch.Tensor:
    """The sum over probes of the mean of KL(base || inputs), by both distributions in fp64."""
    said = runner.logits_of(inputs).double().log_softmax(-1)
    wanted = runner.logits_of(torch.cat([r.heads for r in references])).detach().double().log_softmax(-1)
    terms = kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
    return torch.stack([part.mean() for part in terms.split([len(r.heads) for r in references])]).sum()


def check(base: Base, prompts: list[Encoded], *, linear: bool) -> None:
    """Value and gradient by the head's inputs."""
    runner, references, batch, inputs = tried_on(base, prompts)
    assert all((r.tangent is not None) is linear for r in references)
    found = divergence(runner, references, [inputs], runner.logits_of(inputs), batch)
    wanted = plainly(runner, references, inputs)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
    mine, theirs = (torch.autograd.grad(loss, inputs)[0] for loss in (found, wanted))
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-3


@pytest.mark.parametrize("head", ["tied", "own", "scaled", "with a bias"])
def test_of_a_linear_head_the_base_s_distribution_is_not_needed(
    tiny_model_factory: Callable[..., Any], make_facts: MakeFacts, head: str
) -> None:
    family = {"tied": "gpt2", "with a bias": "gptj"}.get(head, "llama")
    base = load_base(str(tiny_model_factory(family, seed=4, initializer_range=0.3)), device="cpu")
    if head == "with a bias":
        base.model.get_output_embeddings().bias.data.normal_(generator=torch.Generator().manual_seed(2))
    if head == "scaled":  # as Granite's and Cohere's are
        base.model.get_output_embeddings().register_forward_hook(lambda module, given, logits: 5 * logits)
    check(base, [base.task.question(fact.locality[0].prompt) for fact in make_facts(9)], linear=True)


def test_of_a_head_that_bends_its_logits_it_is(
    tiny_base: Base, softcapped: Callable[[Base], Base], make_facts: MakeFacts
) -> None:
    base = softcapped(tiny_base)
    check(base, [base.task.question(fact.locality[0].prompt) for fact in make_facts(9)], linear=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [2.0, 16.0], ids=["unsure", "sure"])
def test_half_precision_keeps_the_divergence_of_tokens_that_the_base_is_sure_of(
    tiny_model_factory: Callable[..., Any], make_facts: MakeFacts, dtype: torch.dtype, scale: float
) -> None:
    """To what the plain form makes of the same logits: their rounding, which is large where one logit is, cancels."""
    base = load_base(str(tiny_model_factory("llama", seed=4)), device="cpu", dtype=str(dtype)[6:])
    base.model.get_output_embeddings().weight.data.mul_(scale)
    runner, references, _, inputs = tried_on(base, [base.task.question(f.prompt) for f in make_facts(9)])
    heads = torch.cat([r.heads for r in references])
    inputs = (heads + 0.02 * (inputs.detach() - heads)).requires_grad_(True)
    with torch.no_grad():
        exact = base.model.get_output_embeddings().weight.double()
        said, wanted = ((each.double() @ exact.T).log_softmax(-1) for each in (inputs, heads))
        gradient = (said.exp() - wanted.exp()) @ exact
        terms = kl_div(said, wanted, reduction="none", log_target=True).sum(-1)
    ones = torch.ones(len(heads))
    tangent = Tangent.joined([r.tangent for r in references if r.tangent is not None])
    logits = runner.logits_of(inputs)
    found = tangent.divergence(logits, inputs, heads, ones)
    plain = losses.divergence(runner.logits_of(heads).detach(), logits, ones)
    pulled = [torch.autograd.grad(loss, inputs, retain_graph=True)[0].double() - gradient for loss in (found, plain)]
    off = [abs(float(loss.detach()) - float(terms.sum())) for loss in (found, plain)]
    assert off[0] <= off[1] + len(heads) * torch.finfo(dtype).eps / 8
    assert float(pulled[0].norm()) <= 1.05 * float(pulled[1].norm())
