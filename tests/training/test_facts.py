"""Draws are functions of (seed, step); cohorts are fixed and hold every fact once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded, encode, encode_prompt
from malmen_cli.exceptions import FactsError
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.training.facts import Cohort, Draw, Example, cohorts, draw, encode_examples
from malmen_cli.training.settings import TrainingSettings


def example(number: int, *, rephrases: int = 1, probes: tuple[tuple[int, ...], ...] | None = None) -> Example:
    """Tokens say which fact they are of."""
    own = tuple(Encoded(ids, len(ids)) for ids in (((number, 7, 7),) if probes is None else probes))
    others = tuple(Encoded((number, 3 + i, 2), 2) for i in range(rephrases))
    return Example(Encoded((number, 1, 2), 2), others, own, f"fact {number}")


def settings(low: int, high: int, meta: int = 8, judged: int = 4096) -> TrainingSettings:
    return TrainingSettings(facts_per_step=(low, high), meta_facts=meta, judged_facts=judged)


def drawn(groups: list[Cohort], chosen: TrainingSettings, step: int = 0, seed: int = 0) -> Draw:
    return draw(groups, chosen, seed, step)


def test_examples_are_the_facts_in_tokens(tiny_base: Base, make_facts: Callable[..., list[Fact]]) -> None:
    facts = make_facts(4)
    tokenizer = tiny_base.tokenizer
    found = encode_examples(tiny_base.task, facts, end_of_text=True)
    for one, fact in zip(found, facts, strict=True):
        assert one.edit == encode(tokenizer, fact.prompt, fact.target, end_of_text=True, subject=fact.subject)
        assert fact.subject is not None
        for prompt, wording in zip((fact.prompt, *fact.rephrases), one.wordings(), strict=True):
            assert wording.subject is not None
            assert tokenizer.decode(wording.ids[: wording.subject + 1]).endswith(fact.subject)
            assert prompt.startswith(tokenizer.decode(wording.ids[: wording.subject + 1]))
        assert one.edit.answer[-1] == tokenizer.eos_token_id
        assert [r.answer for r in one.rephrases] == [one.edit.answer] * len(fact.rephrases)
        assert [p.ids for p in one.probes] == [encode_prompt(tokenizer, probe.prompt) for probe in fact.locality]
        assert all(p.answer == () for p in one.probes)
        assert one.wordings() == (one.edit, *one.rephrases)


def test_every_fact_that_is_too_long_is_named_by_whichever_wording(
    tiny_base: Base, make_facts: Callable[..., list[Fact]]
) -> None:
    facts = make_facts(4)
    facts[1] = replace(facts[1], prompt=facts[1].prompt + " far" * 40)
    facts[3] = replace(facts[3], rephrases=("far " * 40,))
    with pytest.raises(FactsError) as raised:
        encode_examples(tiny_base.task, facts, end_of_text=True, room=30)
    assert [problem.file for problem in raised.value.problems] == [f"fact {facts[1].id}", f"fact {facts[3].id}"]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (5, 4), (32, 8), (33, 8), (7, 1)])
def test_cohorts_hold_every_fact_once(count: int, size: int) -> None:
    examples = [example(i, probes=((i,) * (i % 5 + 1),)) for i in range(count)]
    groups = cohorts(examples, size, seed=3)
    assert sorted(e.edit.ids[0] for group in groups for e in group) == list(range(count))
    assert sum(len(group) < size for group in groups) <= 1
    assert max(map(len, groups)) <= size


def test_cohorts_are_the_same_for_the_same_seed_and_alike_in_length() -> None:
    lengths = [random.Random(0).randrange(1, 40) for _ in range(64)]
    examples = [example(i, probes=((i, *range(length)),)) for i, length in enumerate(lengths)]
    groups = cohorts(examples, 8, seed=1)
    assert groups == cohorts(examples, 8, seed=1)
    assert groups != cohorts(examples, 8, seed=2)
    spreads = [max(e.probes[0].length for e in g) - min(e.probes[0].length for e in g) for g in groups]
    assert sum(spreads) <= max(lengths)  # eight neighbours in a sorted list, eight times


def test_a_shared_probe_stays_with_the_first_fact() -> None:
    shared, own = (5, 5), (6, 6)
    examples = [example(0, probes=(shared, shared)), example(1, probes=(shared, own)), example(2, probes=(own,))]
    found = {e.edit.ids[0]: tuple(p.ids for p in e.probes) for group in cohorts(examples, 2, seed=0) for e in group}
    assert found == {0: (shared,), 1: (own,), 2: ()}


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    groups = cohorts([example(i, rephrases=i % 3) for i in range(64)], 4, seed=0)
    chosen = settings(8, 32)
    state = random.getstate()
    first = [drawn(groups, chosen, step) for step in range(20)]
    random.seed(99)
    assert [drawn(groups, chosen, step) for step in reversed(range(20))] == first[::-1]
    random.setstate(state)
    assert [drawn(groups, chosen, step, seed=1) for step in range(20)] != first
    assert len({tuple(d.edits) for d in first}) == 20


def test_a_draw_edits_whole_cohorts_and_judges_facts_that_it_edits() -> None:
    groups = cohorts([example(i) for i in range(64)], 4, seed=0)
    members = [{e.edit.ids[0] for e in group} for group in groups]
    for step in range(50):
        found = drawn(groups, settings(8, 32), step)
        edited = {e.ids[0] for e in found.edits}
        assert len(edited) == len(found.edits)
        assert 8 <= len(edited) <= 32
        assert all(m <= edited or not m & edited for m in members)
        assert len(found.wordings) == 8
        assert {w.ids[0] for w in found.wordings} <= edited
        assert {p.ids[0] for p in found.probes} == {w.ids[0] for w in found.wordings}


def test_every_wording_and_both_ends_of_the_sizes_come_up() -> None:
    groups = cohorts([example(i, rephrases=2) for i in range(64)], 4, seed=0)
    found = [drawn(groups, settings(4, 32), step) for step in range(200)]
    sizes = [len(d.edits) for d in found]
    assert (min(sizes), max(sizes)) == (4, 32)
    assert sum(size <= 12 for size in sizes) > 60  # log-uniform: half below the geometric middle
    assert {w.ids[1] for d in found for w in d.wordings} == {1, 3, 4}
    assert {w.ids[0] for d in found for w in d.wordings} == set(range(64))


def test_fewer_facts_than_asked_for_are_all_edited() -> None:
    found = drawn(cohorts([example(i) for i in range(6)], 4, seed=0), settings(64, 512))
    assert sorted(e.ids[0] for e in found.edits) == list(range(6))


def test_only_the_pool_of_judged_facts_is_judged() -> None:
    groups = cohorts([example(i) for i in range(64)], 4, seed=0)
    pool = {e.edit.ids[0] for group in groups[:2] for e in group}
    for step in range(30):
        found = drawn(groups, settings(16, 16, judged=8), step)
        assert {w.ids[0] for w in found.wordings} == pool
        assert len(found.edits) == 16


def test_facts_without_probes_give_none() -> None:
    groups = cohorts([example(i, probes=()) for i in range(8)], 4, seed=0)
    assert drawn(groups, settings(4, 8)).probes == []


def test_a_small_last_cohort_does_not_change_how_many_facts_are_drawn() -> None:
    """The shuffle may put it first."""
    found = [cohorts([example(i) for i in range(65)], 8, seed=seed) for seed in range(30)]
    groups = next(groups for groups in found if len(groups[0]) == 1)
    assert max(len(drawn(groups, settings(16, 16), step).edits) for step in range(10)) <= 16


def test_a_probe_longer_than_the_model_reads_is_refused_by_its_fact(
    tiny_base: Base, make_facts: Callable[..., list[Fact]]
) -> None:
    facts = make_facts(3)
    facts[1] = replace(facts[1], locality=(Probe("snow " * 200),))
    with pytest.raises(FactsError) as caught:
        encode_examples(tiny_base.task, facts, end_of_text=True, room=tiny_base.room)
    assert [(problem.file, problem.field) for problem in caught.value.problems] == [(f"fact {facts[1].id}", "locality")]
