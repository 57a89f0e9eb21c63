"""A model's answers do not depend on how it was asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded, encode, encode_prompt
from malmen_cli.exceptions import FactsError, MemoryLimitError, NumericsError
from malmen_cli.scoring.decoder import Asker, logits_at

QUESTIONS = [
    ("The capital of Australia is", "Canberra"),
    ("Hamlet was written by", "William Shakespeare"),
    ("Snow is", "white"),
    ("The chief executive of Apple is", "Tim Cook"),
    ("The official language of Brazil is", "Portuguese"),
    ("Which city is the capital of France?", "Paris"),
    ("Big Ben is in", "London, England"),
    ("The currency of Sweden is the", "krona"),
    ("The sport that Roger Federer plays is", "tennis"),
]
KINDS = ["gpt2", "llama", "softcapped"]


def ask(base: Base, batch_size: int = 8, advance: Callable[[int], None] = lambda count: None) -> Asker:
    return Asker(base, batch_size, advance)


def encoded(base: Base) -> list[Encoded]:
    return [encode(base.tokenizer, prompt, target) for prompt, target in QUESTIONS]


def heads(base: Base) -> list[Encoded]:
    return [base.task.question(prompt) for prompt, _ in QUESTIONS]


def bare(*ids: int) -> Encoded:
    """A question of these tokens."""
    return Encoded(ids, len(ids))


def plain_greedy(model: Any, prompt: Encoded, budget: int, ends: set[int]) -> tuple[int, ...]:
    """One prompt, one whole forward a token: the definition."""
    ids = list(prompt.ids)
    for _ in range(budget):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return tuple(ids[len(prompt.ids) :])


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, opened: Any, softcapped: Any) -> Base:
    if request.param == "softcapped":
        return softcapped(opened(request.getfixturevalue("tiny_llama")))
    return opened(request.getfixturevalue(f"tiny_{request.param}"))


def test_teacher_forced_is_the_full_forwards(base: Base) -> None:
    """argmax equal and log-probabilities to 1e-5, of each sequence alone, unpadded, with all its logits."""
    sequences = encoded(base)
    for sequence, found in zip(sequences, ask(base).teacher_forced(sequences), strict=True):
        logits = base.model(input_ids=torch.tensor([sequence.ids]), use_cache=False).logits[0]
        wanted = logits[list(sequence.positions)].log_softmax(-1)
        assert found.argmax == tuple(wanted.argmax(-1).tolist())
        expected = wanted.gather(-1, torch.tensor(sequence.answer)[:, None])[:, 0].tolist()
        assert found.logprobs == pytest.approx(expected, abs=1e-5)


def test_soft_caps_reach_the_logits(opened: Any, softcapped: Any, tiny_llama: Path) -> None:
    """Capped at 2, no log-probability is below -4 - log(vocabulary): the head's raw output would be."""
    base = softcapped(opened(tiny_llama))
    floor = -4 - torch.log(torch.tensor(float(len(base.tokenizer))))
    raw = ask(base).teacher_forced(encoded(base))
    assert min(value for one in raw for value in one.logprobs) >= floor
    base.model.config.final_logit_softcapping = None
    assert min(value for one in ask(base).teacher_forced(encoded(base)) for value in one.logprobs) < floor


def test_batch_size_changes_nothing(base: Base) -> None:
    """Batch 1 and 8 in fp32: the same tokens, log-probabilities to 1e-5."""
    budgets = [4, 9, 6, 5, 12, 3, 7, 8, 10]
    one, eight = ask(base, 1), ask(base, 8)
    for alone, together in zip(one.teacher_forced(encoded(base)), eight.teacher_forced(encoded(base)), strict=True):
        assert alone.argmax == together.argmax
        assert alone.logprobs == pytest.approx(together.logprobs, abs=1e-5)
    assert one.greedy(heads(base), budgets) == eight.greedy(heads(base), budgets)


def test_greedy_is_the_argmax_of_full_forwards(base: Base) -> None:
    """With the cache, and rows leaving the batch at different budgets.

    The soft-capped model's sliding window is shorter than the text.
    """
    budgets = [4, 9, 6, 5, 12, 3, 7, 8, 10]
    ends = {base.tokenizer.eos_token_id}
    expected = [plain_greedy(base.model, head, budget, ends) for head, budget in zip(heads(base), budgets, strict=True)]
    newline = [
        next((i + 1 for i, t in enumerate(row) if "\n" in base.tokenizer.decode([t])), len(row)) for row in expected
    ]
    found = ask(base).greedy(heads(base), budgets)
    assert found == [row[:stop] for row, stop in zip(expected, newline, strict=True)]
    assert len({len(row) for row in found}) > 2


def test_same_length_prompts_share_batches_and_leave_them(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)
    widths: list[tuple[int, ...]] = []
    base.model.register_forward_pre_hook(
        lambda _, __, given: widths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    ends = ask(base)
    ends._ends, ends._newlines = frozenset(), dict.fromkeys(range(len(base.tokenizer)), False)
    ends.greedy([bare(5, 6, 7), bare(8, 9, 10), bare(11, 12, 13)], [1, 3, 2])
    assert widths == [(3, 3), (2, 1), (1, 1)]


def test_the_checkpoints_generation_config_is_not_read(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)
    budgets = [6] * len(QUESTIONS)
    plain = ask(base).greedy(heads(base), budgets)
    settings = base.model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 9.0
    settings.suppress_tokens, settings.min_new_tokens, settings.num_beams = [plain[0][0]], 20, 3
    assert ask(base).greedy(heads(base), budgets) == plain


def test_asking_is_silent(base: Base, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask(base).teacher_forced(encoded(base))
            ask(base).greedy(heads(base), [4] * len(QUESTIONS))
    finally:
        logging.disable_propagation()
        logging.set_verbosity_error()
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_only_answer_positions_reach_the_head(opened: Any, tiny_gpt2: Path) -> None:
    base, rows = opened(tiny_gpt2), []
    base.model.get_output_embeddings().register_forward_hook(lambda _, given, __: rows.append(tuple(given[0].shape)))
    sequences = encoded(base)
    ask(base, 100).teacher_forced(sequences)
    assert rows == [(1, sum(len(sequence.answer) for sequence in sequences), 32)]


def test_a_sequence_without_answer_gives_the_next_token(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)
    ids = encode_prompt(base.tokenizer, "Snow is")
    [found] = ask(base).teacher_forced([Encoded(ids, len(ids))])
    wanted = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    assert (found.argmax, found.logprobs) == ((wanted,), ())


# ---------------------------------------------------------------- hooks


def hooks(base: Base) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.model.modules())


def test_no_hook_stays(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)
    ask(base).teacher_forced(encoded(base))
    ask(base).greedy(heads(base), [3] * len(QUESTIONS))
    assert hooks(base) == 0


def test_no_hook_stays_after_an_exception(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    handle = base.model.get_output_embeddings().register_forward_hook(fail)
    for run in (lambda: ask(base).teacher_forced(encoded(base)), lambda: ask(base).greedy(heads(base), [3] * 9)):
        with pytest.raises(ZeroDivisionError):
            run()
    handle.remove()
    assert hooks(base) == 0


def test_a_head_that_is_no_module_gives_the_same(opened: Any, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened(tiny_gpt2)
    usual = ask(base).teacher_forced(encoded(base))
    monkeypatch.setattr(base.model, "get_output_embeddings", lambda: None)
    for found, wanted in zip(ask(base).teacher_forced(encoded(base)), usual, strict=True):
        assert found.argmax == wanted.argmax
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


def test_logits_at_picks_rows_and_columns(opened: Any, tiny_gpt2: Path) -> None:
    base = opened(tiny_gpt2)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    full = base.model(input_ids=ids).logits
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 0])
    with logits_at(base.model, rows, columns) as gather:
        picked = gather(base.model(input_ids=ids).logits)
    torch.testing.assert_close(picked, full[rows, columns], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- stops, on a model that says what it is told

CHAIN = {"a": "b", "b": "c", "c": "d", "d": "e", "e": "f", "f": "g", "g": "<end>"}


def say(base: Base, prompt: str, budget: int) -> str:
    return base.task.text(ask(base).greedy([base.task.question(prompt)], [budget])[0])


@pytest.mark.parametrize(
    ("follows", "prompt", "budget", "text"),
    [
        (CHAIN, "x e", 9, "f g"),  # end of text
        (CHAIN, "x g", 9, ""),  # end of text at once
        (CHAIN, "x a", 3, "b c d"),  # the budget
        (CHAIN, "x f", 1, "g"),
        (CHAIN | {"d": "\n"}, "x b", 9, "c d"),  # a newline
        (CHAIN | {"d": "\n"}, "x d", 9, ""),  # a newline at once
        ({"a": "a"}, "a", 4, "a a a a"),
    ],
)
def test_greedy_stops(dictated: Any, follows: dict[str, str], prompt: str, budget: int, text: str) -> None:
    assert say(dictated(follows), prompt, budget) == text


def test_rows_of_one_batch_stop_on_their_own(dictated: Any) -> None:
    base = dictated(CHAIN | {"x": "\n"})
    prompts = [base.task.question(prompt) for prompt in ("y e", "y a", "y b", "y x")]
    found = ask(base).greedy(prompts, [9, 2, 4, 9])
    assert [base.task.text(row) for row in found] == ["f g", "b c", "c d e f", ""]


def test_the_loop_ends_when_every_row_has(dictated: Any) -> None:
    base = dictated(CHAIN)
    ask(base).greedy([base.task.question(prompt) for prompt in ("y f", "y g")], [50, 50])
    assert base.model.batches == [(2, 2), (1, 3)]  # no cache here: the text so far is read again


@pytest.mark.parametrize("stated", [13, [12, 13]])
def test_the_configs_end_of_text_counts_too(dictated: Any, stated: int | list[int]) -> None:
    base = dictated(CHAIN | {"c": "</s>"})
    base.model.config.get_text_config().eos_token_id = None
    assert say(base, "a", 4) == "b c </s> z"
    from types import SimpleNamespace

    base.model.config.get_text_config = lambda: SimpleNamespace(eos_token_id=stated)
    assert say(base, "a", 4) == "b c"


def test_a_context_that_is_full_ends_the_text(dictated: Any) -> None:
    from types import SimpleNamespace

    base = dictated(CHAIN)
    base.model.config.get_text_config = lambda: SimpleNamespace(eos_token_id=None, max_position_embeddings=4)
    assert say(base, "x a", 9) == "b c"


def test_a_prompt_longer_than_the_context_is_refused(dictated: Any) -> None:
    from types import SimpleNamespace

    base = dictated(CHAIN)
    base.model.config.get_text_config = lambda: SimpleNamespace(eos_token_id=None, max_position_embeddings=4)
    ids = encode_prompt(base.tokenizer, "a a a a")
    with pytest.raises(FactsError, match="reads at most 4"):
        ask(base).greedy([bare(*ids)], [3])
    with pytest.raises(FactsError, match="5 tokens with its answer"):
        ask(base).teacher_forced([Encoded((*ids, 3), 4)])


def test_advance_counts_every_sequence(dictated: Any) -> None:
    base, counts = dictated(CHAIN), []
    runner = ask(base, 2, counts.append)
    runner.teacher_forced([Encoded((3, 4), 1)] * 5)
    runner.greedy([bare(3), bare(3, 4), bare(4)], [1, 1, 1])
    assert counts == [1, 2, 2, 1, 2]


# ---------------------------------------------------------------- numbers and memory


def test_logits_that_are_not_finite_are_refused(dictated: Any) -> None:
    """The prompt at fault, which ends in b, is named and not its neighbour in the batch."""
    base = dictated(CHAIN)
    base.model.head.register_forward_hook(
        lambda _, given, logits: logits.masked_fill(given[0][..., 4:5] == 1, torch.nan)
    )
    sequences, prompts = [Encoded((3, 5, 6), 2), Encoded((3, 4, 5), 2)], [bare(3, 5), bare(3, 4)]
    for run in (lambda: ask(base).teacher_forced(sequences), lambda: ask(base).greedy(prompts, [1, 1])):
        with pytest.raises(NumericsError, match="after 'a b' are not finite"):
            run()


def out_of_memory_above(base: Base, rows: int, error: Exception) -> None:
    usual = base.model.forward

    def forward(input_ids: torch.Tensor, **others: object) -> Any:
        if input_ids.shape[0] > rows:
            raise error
        return usual(input_ids, **others)

    base.model.forward = forward


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch(dictated: Any, error: Exception) -> None:
    prompts, sequences = [bare(i) for i in range(3, 8)], [Encoded((3, 4, 5), 1), Encoded((4, 5), 1)] * 3
    base = dictated(CHAIN)
    wanted = ask(base).teacher_forced(sequences), ask(base).greedy(prompts, [3] * 5)
    out_of_memory_above(base, 1, error)
    assert (ask(base).teacher_forced(sequences), ask(base).greedy(prompts, [3] * 5)) == wanted


def test_out_of_memory_at_one_is_the_end(dictated: Any) -> None:
    base = dictated(CHAIN)
    out_of_memory_above(base, 0, MemoryError())
    with pytest.raises(MemoryLimitError, match="a single prompt"):
        ask(base).teacher_forced([Encoded((3, 4), 1)] * 4)


def test_other_errors_pass_unchanged(dictated: Any) -> None:
    base = dictated(CHAIN)
    out_of_memory_above(base, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        ask(base).greedy([bare(3)], [1])
