"""Facts that contradict each other although their prompts are spelt differently."""

from __future__ import annotations

from malmen_cli.facts.contradictions import contradictions
from malmen_cli.facts.fact import Fact


def fact(name: str, prompt: str, target: str, subject: str | None = None, *rephrases: str) -> Fact:
    return Fact(id=name, prompt=prompt, target=target, subject=subject, rephrases=rephrases)


def pairs(*facts: Fact) -> list[tuple[str, str]]:
    return [(one.id, other.id) for one, other in contradictions(facts)]


def test_capitals_white_space_and_punctuation_are_no_difference() -> None:
    first = fact("a", "The capital of Australia is", "Canberra", "Australia")
    assert pairs(first, fact("b", "the  capital of AUSTRALIA is:", "Sydney", "australia")) == [("a", "b")]
    assert pairs(first, fact("b", "the capital of australia is ", "canberra.", "Australia")) == []


def test_a_rephrase_is_the_same_relation() -> None:
    first = fact("a", "The capital of Australia is", "Canberra", "Australia", "Australia's capital is")
    assert pairs(first, fact("b", "Australia's capital is", "Sydney", "Australia")) == [("a", "b")]
    assert pairs(fact("b", "Australia's capital is", "Sydney"), first) == []  # one names its subject, one does not
    other = fact("c", "Canberra is in", "Oz", "Canberra", "Australia's capital is")
    assert pairs(fact("b", "Canberra is inside", "Japan", "Canberra", "canberra is in"), other) == [("b", "c")]


def test_another_subject_or_relation_is_another_fact() -> None:
    first = fact("a", "The capital of Australia is", "Canberra", "Australia")
    assert pairs(first, fact("b", "The capital of Austria is", "Vienna", "Austria")) == []
    assert pairs(first, fact("b", "The language of Australia is", "English", "Australia")) == []


def test_every_later_one_is_paired_with_the_first() -> None:
    facts = [fact(str(i), "x y" + "!" * i, target) for i, target in enumerate(("one", "two", "one", "three"))]
    assert pairs(*facts) == [("0", "1"), ("0", "3")]


def test_letters_of_every_script_count() -> None:
    assert pairs(fact("a", "日本の首都は", "東京"), fact("b", "中国の首都は", "北京")) == []
    assert pairs(fact("a", "日本の首都は", "東京"), fact("b", "日本の首都は、", "大阪")) == [("a", "b")]


def test_symbols_are_part_of_a_name() -> None:
    for one, other in (("C++", "C#"), ("C++", "C")):
        assert (
            pairs(fact("a", f"{one} was created by", "x", one), fact("b", f"{other} was created by", "y", other)) == []
        )
    assert pairs(fact("a", "5 - 3 =", "2"), fact("b", "5 + 3 =", "8")) == []
    assert pairs(fact("a", "Qt is written in", "C++"), fact("b", "Qt is written in:", "C#")) == [("a", "b")]


def test_one_wording_may_agree_and_another_contradict() -> None:
    facts = [fact("a", "A is", "x"), fact("b", "B is", "y"), fact("c", "A is!", "x", None, "B is!")]
    assert pairs(*facts) == [("b", "c")]
