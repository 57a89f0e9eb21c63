"""Targets: what every fact's hidden state should become, found for a chunk of facts at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import malmen_cli.editing.targets as targets_module
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import encode
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.suffix import Suffix, Whole
from malmen_cli.editing.targets import Wordings, find_targets, wordings_of
from malmen_cli.exceptions import FactsError, MemoryLimitError

Load = Callable[..., Base]
SETTINGS = MemitSettings(steps=12, lr=0.1, clamp=2.0)
PREFIXES = ("Snow is white", "Paris and Rome")
FACTS = [
    ("The capital of Australia is", "Rome", "Australia"),
    ("In Sweden the currency of Sweden is the", "one hundred degrees", "Sweden"),
    ("The chief executive of Apple is", "Bill Gates", "Apple"),
    ("The founder of Microsoft, as everybody here knows, is", "Tim Cook", "Microsoft"),
    ("Hamlet was written by", "no", "Hamlet"),
]


def wordings(base: Base, prefixes: tuple[str, ...] = PREFIXES, count: int = 5) -> list[Wordings]:
    return [wordings_of(base.tokenizer, *fact, prefixes, end_of_text=True, room=base.room) for fact in FACTS[:count]]


def plain(base: Base, block: int, fact: Wordings, settings: MemitSettings) -> tuple[Tensor, int]:
    """One fact by itself: whole forwards, a prompt at a time, autograd, and Adam written out."""
    layers = base.model.transformer.h if hasattr(base.model, "transformer") else base.model.model.layers

    def logits(ids: tuple[int, ...], place: int, delta: Tensor) -> tuple[Tensor, Tensor]:
        seen = []

        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            seen.append(states[0, place].detach())
            moved = states.clone()
            moved[0, place] = moved[0, place] + delta
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = layers[block].register_forward_hook(hook)
        try:
            return base.model(torch.tensor([ids])).logits[0], seen[0]
        finally:
            handle.remove()

    essence = fact.essence.ids[:-1]
    zero = torch.zeros(base.model.get_input_embeddings().embedding_dim)
    with torch.no_grad():
        said = log_softmax(logits(essence, fact.essence.subject, zero)[0][-1], -1)
        hidden = logits(fact.contexts[0].ids, fact.contexts[0].subject, zero)[1]
    delta, mean, square = zero.clone(), zero.clone(), zero.clone()
    for step in range(1, settings.steps + 1):
        delta = delta.detach().requires_grad_(True)
        learned = torch.stack(
            [
                cross_entropy(logits(c.ids, c.subject, delta)[0][c.n_prompt - 1 : -1], torch.tensor(c.answer))
                for c in fact.contexts
            ]
        ).mean()
        now = log_softmax(logits(essence, fact.essence.subject, delta)[0][-1], -1)
        changed = kl_div(now, said, reduction="sum", log_target=True)
        loss = learned + settings.kl_factor * changed + settings.decay * delta.square().sum() / hidden.square().sum()
        if learned < settings.stop_loss:
            return delta.detach(), step - 1
        (gradient,) = torch.autograd.grad(loss, delta)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        rate = settings.lr / (1 - 0.9**step)
        delta = delta.detach() - rate * mean / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        delta = delta * min(1.0, float(settings.clamp * hidden.norm() / delta.norm()))
    return delta, settings.steps


def some_stop(base: Base, facts: list[Wordings]) -> float:
    """A loss that some of the facts reach in eight steps and others do not."""
    return float(find_targets(Runner(base, 1), 1, facts, replace(SETTINGS, steps=7), batch_size=64).losses.median())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_targets_are_those_of_a_plain_reimplementation(load: Load, family: str) -> None:
    """Tolerance: fp32 sums in another order, through a dozen steps of Adam."""
    base = load(family, layers=4)
    facts = wordings(base, count=3)
    found = find_targets(Runner(base, 1), 1, facts, SETTINGS, batch_size=64)
    for row, fact in enumerate(facts):
        delta, steps = plain(base, 1, fact, SETTINGS)
        torch.testing.assert_close(found.deltas[row], delta, rtol=1e-4, atol=1e-4)
        assert int(found.steps[row]) == steps
    assert found.deltas.norm(dim=-1).min() > 0.5


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_chunk_gives_what_one_by_one_gives(load: Load, batch_size: int) -> None:
    base = load("gpt2", layers=4)
    facts = wordings(base)
    settings = replace(SETTINGS, steps=25, stop_loss=some_stop(base, facts))
    together = find_targets(Runner(base, 1), 1, facts, settings, batch_size=64)
    alone = find_targets(Runner(base, 1), 1, facts, settings, batch_size=batch_size)
    torch.testing.assert_close(together.deltas, alone.deltas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.states, alone.states, rtol=1e-4, atol=1e-4)
    assert torch.equal(together.steps, alone.steps)
    assert len(set(together.steps.tolist())) > 1  # they do not stop together


def test_a_fact_that_is_done_stops_changing_and_leaves_the_batch(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gpt2", layers=4)
    facts = wordings(base)
    settings = replace(SETTINGS, steps=8, stop_loss=some_stop(base, facts))
    sizes: list[int] = []
    true = targets_module._losses

    def counted(run, rows, active, deltas):
        sizes.append(len(active))
        return true(run, rows, active, deltas)

    monkeypatch.setattr(targets_module, "_losses", counted)
    short = find_targets(Runner(base, 1), 1, facts, settings, batch_size=64)
    sizes.clear()
    long = find_targets(Runner(base, 1), 1, facts, replace(settings, steps=30), batch_size=64)
    done = short.losses < settings.stop_loss
    assert 0 < int(done.sum()) < 5
    assert torch.equal(short.deltas[done], long.deltas[done])
    assert (short.deltas[~done] != long.deltas[~done]).any(-1).all()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] == 5


@pytest.mark.parametrize("kind", [Suffix, Whole])
def test_the_blocks_in_front_run_once_for_a_chunk(load: Load, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind them there are two runs a step, of the contexts and of what the subject is; none but the first where the
    states behind the block in question are all that is needed of it."""
    monkeypatch.setattr(targets_module, "way_to_run", lambda runner, block, longest: kind)
    base = load("llama", layers=4)
    runs: dict[int, int] = {0: 0, 2: 0, 3: 0}
    runner = Runner(base, 2)

    def counted(block: int):
        def hook(*_):
            runs[block] += 1

        return hook

    handles = [base.model.model.layers[i].mlp.down_proj.register_forward_hook(counted(i)) for i in runs]
    found = find_targets(runner, 2, wordings(base), SETTINGS, batch_size=64)
    for handle in handles:
        handle.remove()
    steps = int(found.steps.max())
    assert steps == SETTINGS.steps
    again = 2 * (steps + 1)
    assert runs == {0: 1, 2: 1 + (again if kind is Whole else 0), 3: 1 + again}


@pytest.mark.parametrize("prefixes", [(), PREFIXES])
def test_from_the_subject_on_or_whole_the_targets_are_the_same(
    load: Load, prefixes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("llama", layers=4)
    facts = wordings(base, prefixes)
    stop = 1.01 * some_stop(base, facts)  # not the very loss of one of them, where rounding would decide
    settings = replace(SETTINGS, steps=25, stop_loss=stop)
    found = []
    for kind in (Suffix, Whole):
        monkeypatch.setattr(targets_module, "way_to_run", lambda runner, block, longest, kind=kind: kind)
        found.append(find_targets(Runner(base, 1), 1, facts, settings, batch_size=64))
    for mine, theirs in zip(*((t.deltas, t.states, t.losses) for t in found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0].steps, found[1].steps)


def test_how_a_chunk_is_run_is_told_by_its_own_tokens(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by those of other chunks: targets that are kept would else have other bits than those found anew."""
    asked: list[int] = []

    def way(runner: Runner, block: int, longest: int) -> type:
        asked.append(longest)
        return Suffix

    monkeypatch.setattr(targets_module, "way_to_run", way)
    base = load("llama", layers=4)
    facts = wordings(base, ())
    find_targets(Runner(base, 1), 1, facts, replace(SETTINGS, steps=1), batch_size=1)
    assert sorted(asked) == sorted({max(len(s.ids) for s in fact.sequences) for fact in facts})
    assert len(asked) > 1


@pytest.mark.parametrize("clamp", [0.05, 0.5])
def test_the_clamp_holds(load: Load, clamp: float) -> None:
    base = load("llama", layers=4)
    found = find_targets(Runner(base, 1), 1, wordings(base), replace(SETTINGS, clamp=clamp, lr=1.0), batch_size=64)
    shares = found.deltas.norm(dim=-1) / (found.states - found.deltas).norm(dim=-1)
    assert shares.max() <= clamp * (1 + 1e-5)  # fp32
    assert shares.max() > 0.99 * clamp


def test_the_decay_and_the_divergence_hold_a_target_back(load: Load) -> None:
    base = load("gpt2", layers=4)
    facts = wordings(base)
    free = replace(SETTINGS, steps=25, decay=0.0, kl_factor=0.0)
    free, held, kept = (
        find_targets(Runner(base, 1), 1, facts, settings, batch_size=64)
        for settings in (free, replace(free, decay=20.0), replace(free, kl_factor=5.0))
    )
    assert held.deltas.norm() < 0.8 * free.deltas.norm()
    assert free.losses.mean() < held.losses.mean()
    assert free.losses.mean() < kept.losses.mean()


def test_memory_that_runs_out_halves_the_chunk(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gpt2", layers=4)
    facts, true = wordings(base), targets_module._losses
    wanted = find_targets(Runner(base, 1), 1, facts, SETTINGS, batch_size=64)

    def tight(room: int):
        def losses(run, rows, active, deltas):
            if len(active) > room:
                raise MemoryError
            return true(run, rows, active, deltas)

        return losses

    counted: list[int] = []
    monkeypatch.setattr(targets_module, "_losses", tight(2))
    found = find_targets(Runner(base, 1), 1, facts, SETTINGS, batch_size=64, progress=counted.append)
    torch.testing.assert_close(found.deltas, wanted.deltas, rtol=1e-4, atol=1e-4)
    assert sum(counted) == 5
    monkeypatch.setattr(targets_module, "_losses", tight(0))
    with pytest.raises(MemoryLimitError):
        find_targets(Runner(base, 1), 1, facts, SETTINGS, batch_size=64)


# ---------------------------------------------------------------- wordings


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_fact_behind_every_prefix(load: Load, family: str) -> None:
    base = load(family)
    (found,) = wordings(base, count=1)
    texts = [base.tokenizer.decode(c.ids[: c.n_prompt], skip_special_tokens=True).strip() for c in found.contexts]
    prompt, target, subject = FACTS[0]
    assert texts == [prompt, *(f"{prefix}. {prompt}" for prefix in PREFIXES)]
    assert {context.answer for context in found.contexts} == {
        encode(base.tokenizer, prompt, target, end_of_text=True).answer
    }
    for sequence in found.sequences:
        assert base.tokenizer.decode(sequence.ids[: sequence.subject + 1]).endswith(subject)
    assert base.tokenizer.decode(found.essence.ids[:-1], skip_special_tokens=True).strip() == "Australia is a"


def test_the_first_token_of_a_text_is_edited_only_where_it_must_be(load: Load) -> None:
    base = load("gpt2")
    fact = ("The band is", "Rome", "The")
    assert encode(base.tokenizer, fact[0], fact[1], subject=fact[2]).subject == 0
    behind = wordings_of(base.tokenizer, *fact, PREFIXES)
    assert len(behind.contexts) == 2
    assert all(context.subject for context in behind.contexts)
    assert [context.subject for context in wordings_of(base.tokenizer, *fact).contexts] == [0]


def test_a_prefix_that_leaves_no_room_is_left_out(load: Load) -> None:
    base = load("gpt2")
    found = wordings_of(base.tokenizer, *FACTS[0], ("a b c " * 60, "Snow"), room=base.room)
    assert len(found.contexts) == 2


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        (None, 'facts:subject: missing; .* (add "subject": the words of the prompt'),
        (" ", 'facts:subject: missing; .* (add "subject"'),
        ("Austria", "facts:subject: 'Austria' is not in the prompt (write it as the prompt does)"),
    ],
)
def test_a_fact_without_its_subject_is_refused(load: Load, subject: str | None, said: str) -> None:
    with pytest.raises(FactsError, match=said.replace("(", r"\(").replace(")", r"\)")):
        wordings_of(load("gpt2").tokenizer, "The capital of Australia is", "Rome", subject)
