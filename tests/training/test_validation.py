"""ES, GS and LS by single passes: hand-made cases, and the unedited model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.replay import Runner
from malmen_cli.facts.fact import Fact
from malmen_cli.scoring.protocols import collect
from malmen_cli.scoring.report import summarise
from malmen_cli.training.facts import Example, encode_examples
from malmen_cli.training.references import References
from malmen_cli.training.validation import AtSizes, Validation, _shares, validate

Y, N = True, False


@pytest.mark.parametrize(
    ("hits", "answers", "expected"),
    [
        # answers: the last one is the end of text, which counts for the whole only
        ([[Y, Y]], True, (1.0, 1.0)),
        ([[Y, N]], True, (1.0, 0.0)),
        ([[N, Y]], True, (0.0, 0.0)),
        ([[Y, N, Y], [Y, Y]], True, (0.75, 0.5)),
        ([[Y, N, N, N], [N, N]], True, (1 / 6, 0.0)),
        # locality: the last label only stands in for what follows the text
        ([[Y, N]], False, (1.0, 1.0)),
        ([[Y, Y, N], [Y, N, N]], False, (0.75, 0.5)),
        ([[N, N, Y]], False, (0.0, 0.0)),
        ([], True, (None, None)),
        ([], False, (None, None)),
    ],
)
def test_shares(hits: Sequence[Sequence[bool]], answers: bool, expected: tuple[float, float]) -> None:
    assert _shares(hits, whole=answers) == (pytest.approx(expected) if hits else expected)


def test_a_base_that_says_nothing_is_kept_saying_nothing() -> None:
    """The probe's continuation is empty: only the stand-in label is there."""
    assert _shares([[N]], whole=False) == (1.0, 1.0)


def test_answers_without_an_end_of_text_count_all_their_tokens(tiny_base: Base) -> None:
    (ids,) = [tiny_base.tokenizer("The capital of France is")["input_ids"]]
    with torch.no_grad():
        said = int(tiny_base.model(torch.tensor([ids])).logits[0, -1].argmax())
    known = Example(Encoded((*ids, said), len(ids)), (), (), "known")
    found = validate(Runner(tiny_base), [known], [], 4, end_of_text=False)
    assert (found.es_teacher_forced, found.es_greedy) == (1.0, 1.0)


def test_score_is_the_harmonic_mean_and_zero_where_one_is() -> None:
    assert Validation(1, 1, 0.5, 0.5, 1, 1).score == pytest.approx(6 / 8)
    assert Validation(1, 1, 0.5, 0.0, 1, 1).score == 0.0
    assert str(Validation(1, 0.5, 0.25, 0, 1, 1)) == "ES 1.00/0.50  GS 0.25/0.00  LS 1.00/1.00  score 0.000"


def test_the_unedited_model_keeps_what_it_says(tiny_base: Base, make_facts: Callable[..., list[Fact]]) -> None:
    examples = encode_examples(tiny_base.task, make_facts(12), end_of_text=True)
    runner = Runner(tiny_base, 1)
    references = References(runner, 4, 5).of([probe for example in examples for probe in example.probes])
    found = validate(runner, examples, references, 5)
    assert (found.ls_teacher_forced, found.ls_greedy) == (1.0, 1.0)
    assert (found.es_greedy, found.gs_greedy) == (0.0, 0.0)


def test_another_model_does_not(tiny_base: Base, make_facts: Callable[..., list[Fact]]) -> None:
    examples = encode_examples(tiny_base.task, make_facts(12), end_of_text=True)
    runner = Runner(tiny_base)
    references = References(runner, 4, 5).of([probe for example in examples for probe in example.probes])
    weight = tiny_base.model.transformer.h[1].mlp.c_proj.weight
    kept = weight.detach().clone()
    try:
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        found = validate(runner, examples, references, 5)
    finally:
        weight.data.copy_(kept)
    assert found.ls_teacher_forced < 0.9
    assert found.ls_greedy <= found.ls_teacher_forced


@pytest.mark.slow
def test_agrees_with_eval_on_a_base_that_knows_its_answers(town) -> None:
    """The same figures as `malmen eval` gives: the base before the edit says the old answers."""
    facts = [
        Fact(f.id, f.prompt, f.locality[0].target if i % 2 else f.target, rephrases=f.rephrases, locality=f.locality)
        for i, f in enumerate(town.valid)
    ]
    facts += [Fact("known", f.locality[0].prompt, str(f.locality[0].target)) for f in town.train[:1]]
    base = town.base
    runner = Runner(base, 2)
    examples = encode_examples(base.task, facts, end_of_text=True)
    references = References(runner, 2, 16).of([probe for example in examples for probe in example.probes])
    found = validate(runner, examples, references, 16)
    answers = collect(base, facts, batch_size=16)
    report = summarise(facts, answers, answers).to_json()["after"]
    assert found.es_teacher_forced == pytest.approx(report["es"]["teacher_forced"])
    assert found.es_greedy == pytest.approx(report["es"]["greedy"])
    assert found.es_greedy >= 1 / 31
    assert found.gs_teacher_forced == pytest.approx(report["gs"]["teacher_forced"])
    assert found.gs_greedy == pytest.approx(report["gs"]["greedy"])
    assert (found.ls_teacher_forced, found.ls_greedy) == (1.0, 1.0)


def test_what_was_not_asked_is_no_part_of_the_score() -> None:
    found = Validation(1, 0.5, None, None, 1, 1)
    assert found.score == pytest.approx(4 / 5)
    assert str(found) == "ES 1.00/0.50  GS -/-  LS 1.00/1.00  score 0.800"


def test_of_two_scores_of_zero_the_better_mean_ranks_higher() -> None:
    poor, better = Validation(0.2, 0, 0, 0, 1, 1), Validation(0.9, 0.8, 0.2, 0, 1, 1)
    assert poor.score == better.score == 0.0
    assert poor.rank < better.rank


def test_the_mean_is_over_the_parts_that_have_a_share() -> None:
    one, other = Validation(1.0, 0.5, None, None, 0.2, None), Validation(0.0, 0.25, 0.75, None, 0.6, None)
    assert Validation.mean([one, other]) == Validation(0.5, 0.375, 0.75, None, pytest.approx(0.4), None)
    assert Validation.mean([one]) == one


def test_two_sizes_are_ranked_by_the_mean_of_both() -> None:
    few, many = Validation(*[0.8] * 6), Validation(*[0.4] * 6)
    assert AtSizes(many, few).rank == pytest.approx((0.6, 0.6))
    assert str(AtSizes(many, few)).endswith("score 0.400; in parts 0.800")
    nothing = Validation(0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert AtSizes(nothing, nothing).rank == pytest.approx((0.0, 0.5 / 6))
