"""Which questions facts ask, that each is asked once, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from malmen_cli.base.model import Base
from malmen_cli.exceptions import FactsError
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.scoring.protocols import Question, asked_of, collect, compared_for, neighbours

Dictate = Callable[[Mapping[str, str]], Base]
CHAIN = {"a": "b", "b": "c", "c": "d", "d": "e", "e": "f", "f": "g", "g": "<end>"}
FACT = Fact(
    "one",
    "x a",
    "b c",
    old_target="z",
    rephrases=("y a",),
    locality=(Probe("x e", "Z"), Probe("x f", "g"), Probe("x d")),
    portability=(Probe("x b", "c"),),
)


def test_what_a_fact_asks_in_order() -> None:
    assert list(asked_of(FACT)) == [
        Question("x a", "b c"),
        Question("y a", "b c"),
        Question("x e", "Z"),
        Question("x f", "g"),
        Question("x d", None),
        Question("x b", "c"),
    ]


def test_what_is_compared_for_counterfact() -> None:
    """The old target everywhere the new one is asked, and both on the neighbourhood."""
    assert list(compared_for(FACT)) == [
        Question("x a", "z"),
        Question("y a", "z"),
        Question("x e", "b c"),
        Question("x e", "z"),
    ]


def test_without_an_old_target_nothing_is_compared() -> None:
    assert list(compared_for(Fact("two", "x a", "b", locality=(Probe("x e", "z"),)))) == []


def test_neighbours_are_the_probes_with_the_old_object() -> None:
    assert neighbours(FACT) == (Probe("x e", "Z"),)
    assert neighbours(Fact("two", "x a", "b", locality=(Probe("x e", "z"),))) == ()


def test_answers_of_a_dictated_model(dictated: Dictate) -> None:
    base = dictated(CHAIN)
    ids = base.tokenizer.convert_tokens_to_ids
    answers = collect(base, [FACT], batch_size=4)
    edit = answers.of("x a", "b c")
    assert edit.gold == edit.argmax == tuple(ids(["b", "c"]))
    # One logit of 4 among 13 zeros, twice.
    assert edit.logprobs == pytest.approx([4 - math.log(math.exp(4) + 13)] * 2, abs=1e-5)
    assert edit.logprob == pytest.approx(sum(edit.logprobs))
    assert edit.text == "b c d e f g"
    wrong = answers.of("x e", "Z")
    assert wrong.argmax == (ids("f"),)
    assert wrong.text == "f g"


def test_a_probe_without_target_has_a_next_token_and_a_text(dictated: Dictate) -> None:
    base = dictated(CHAIN)
    answer = collect(base, [FACT], batch_size=4).of("x d", None)
    assert (answer.gold, answer.logprobs) == ((), ())
    assert answer.argmax == (base.tokenizer.convert_tokens_to_ids("e"),)
    assert answer.text == "e f g"


def test_text_runs_five_tokens_past_the_answer(dictated: Dictate) -> None:
    base = dictated({"a": "a"})
    fact = Fact("one", "a", "b", locality=(Probe("x a"),))
    answers = collect(base, [fact], batch_size=4)
    assert answers.of("a", "b").text == "a a a a a a"
    assert answers.of("x a", None).text == " ".join("a" * 10)


def test_one_prompt_with_two_targets_is_written_once_to_the_longer(dictated: Dictate) -> None:
    """Each target gets the text it would have got alone. Prompts `a`, `x` and `y` go together: 8 steps, not 8 and 6."""
    base = dictated({"a": "a"})
    facts = [Fact("one", "x", "b", locality=(Probe("a", "a"),)), Fact("two", "y", "b", locality=(Probe("a", "a a a"),))]
    both = collect(base, facts, batch_size=4)
    assert len(base.model.batches) == 1 + 8
    assert (both.of("a", "a").text, both.of("a", "a a a").text) == ("a a a a a a", "a a a a a a a a")
    for fact, target in zip(facts, ("a", "a a a"), strict=True):
        assert collect(base, [fact], batch_size=4).of("a", target) == both.of("a", target)


def test_text_of_compared_questions_is_not_asked(dictated: Dictate) -> None:
    answers = collect(dictated(CHAIN), [FACT], batch_size=4)
    assert answers.of("x a", "z").text is None
    assert answers.of("x e", "z").logprobs != ()


def test_every_distinct_question_is_asked_once(dictated: Dictate) -> None:
    """Ten facts alike are one fact's work; the total counts 10 questions and 6 prompts."""
    one, ten = dictated(CHAIN), dictated(CHAIN)
    seen: list[tuple[int, int]] = []
    answers = collect(one, [FACT], batch_size=4, progress=lambda done, total: seen.append((done, total)))
    again = collect(ten, [FACT] * 10, batch_size=4)
    assert one.model.batches == ten.model.batches
    assert again == answers
    assert seen[-1] == (16, 16)
    assert len(answers.by_question) == 10


def test_progress_only_grows(dictated: Dictate) -> None:
    seen: list[int] = []
    collect(dictated(CHAIN), [FACT], batch_size=1, progress=lambda done, _: seen.append(done))
    assert seen == list(range(1, 17))


def test_without_greedy_nothing_is_written(dictated: Dictate) -> None:
    base = dictated(CHAIN)
    totals: set[int] = set()
    answers = collect(base, [FACT], batch_size=100, greedy=False, progress=lambda _, total: totals.add(total))
    assert len(base.model.batches) == 1
    assert {answer.text for answer in answers.by_question.values()} == {None}
    assert (answers.greedy, totals) == (False, {10})
    assert answers.of("x a", "b c").argmax == collect(base, [FACT], batch_size=4).of("x a", "b c").argmax


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batch_size_changes_no_answer(
    family: str, request: pytest.FixtureRequest, opened: Any, fact_records: list[dict[str, Any]]
) -> None:
    base = opened(request.getfixturevalue(f"tiny_{family}"))
    facts = [fact_of(record) for record in fact_records]
    one, eight = collect(base, facts, batch_size=1), collect(base, facts, batch_size=8)
    assert one.by_question.keys() == eight.by_question.keys()
    for question, answer in one.by_question.items():
        other = eight.by_question[question]
        assert (answer.gold, answer.argmax, answer.text) == (other.gold, other.argmax, other.text)
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_no_facts_no_answers(dictated: Dictate) -> None:
    base = dictated(CHAIN)
    assert collect(base, [], batch_size=4).by_question == {}
    assert base.model.batches == []


def test_a_probe_without_tokens_is_refused(dictated: Dictate) -> None:
    with pytest.raises(FactsError, match="has no tokens"):
        collect(dictated(CHAIN), [Fact("one", "a", "b", locality=(Probe("  "),))], batch_size=4)


def test_a_tiny_checkpoint_end_to_end(opened: Any, tiny_gpt2: Path, fact_records: list[dict[str, Any]]) -> None:
    """Every question of the facts has an answer whose gold tokens spell its target."""
    base = opened(tiny_gpt2)
    facts = [fact_of(record) for record in fact_records]
    answers = collect(base, facts, batch_size=8)
    for fact in facts:
        for question in asked_of(fact):
            answer = answers.by_question[question]
            assert base.tokenizer.decode(answer.gold).strip() == (question.target or "")
            assert len(answer.argmax) == max(1, len(answer.gold))
            assert answer.text is not None
            assert "\n" not in answer.text


def fact_of(record: dict[str, Any]) -> Fact:
    probes = {name: tuple(Probe(**probe) for probe in record.get(name, ())) for name in ("locality", "portability")}
    lists = {name: tuple(record.get(name, ())) for name in ("rephrases", "tags")}
    return Fact(**(record | probes | lists))
