"""Asking a model everything a set of facts asks, under both protocols.

`teacher_forced`: the model's own token at every answer position, given the gold prefix.
`greedy`: what it writes after the prompt alone, up to a stop.

Every distinct question is run once. How a model is run is `decoder.py`'s business, how it is asked its task's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from malmen_cli.base import ranks
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.facts.fact import Fact, Probe
from malmen_cli.scoring.decoder import Asker, Forced
from malmen_cli.scoring.metrics import normalise

GREEDY_MARGIN = 5  # tokens greedy text may run past the answer's length
UNANSWERED_LENGTH = 5  # tokens assumed of an answer where a probe has no target


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the answer looked for; None asks only what the model itself says."""

    prompt: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer to one Question.

    gold: ids of the target's tokens. argmax: the model's own token at each of their positions, given the
    gold prefix (without a target: the one token after the prompt). logprobs: natural log-probability of each
    gold token. text: greedy text, None where greedy was not asked for.
    """

    gold: tuple[int, ...]
    argmax: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str | None = None

    @property
    def logprob(self) -> float:
        """Log-probability of the whole target."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class Answers:
    """Everything one model answered. `greedy` is False when only teacher_forced was run."""

    by_question: Mapping[Question, Answer]
    greedy: bool

    def of(self, prompt: str, target: str | None) -> Answer:
        return self.by_question[Question(prompt, target)]


def collect(
    base: Base,
    facts: Sequence[Fact],
    *,
    batch_size: int,
    greedy: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Put every question of `facts` to the model: each distinct one once, in batches of at most `batch_size`.

    progress: called with (done, total) sequences. Raises FactsError for a prompt that has no tokens or does
    not fit the model, NumericsError for logits that are not finite, MemoryLimitError.
    """
    asked = list(dict.fromkeys(question for fact in facts for question in asked_of(fact)))
    compared = list(dict.fromkeys(question for fact in facts for question in compared_for(fact)))
    questions = list(dict.fromkeys([*asked, *compared]))
    encoded = [_encode(base, question) for question in questions]
    prompts = list(dict.fromkeys(question.prompt for question in asked)) if greedy else []
    counter = _Counter(len(questions) + len(prompts), progress)
    asker = Asker(base, batch_size, counter.advance)
    forced = [
        Forced(tuple(argmax), tuple(logprobs))
        for argmax, logprobs in ranks.spread(
            encoded, lambda own: [(one.argmax, one.logprobs) for one in asker.teacher_forced(own)]
        )
    ]
    texts: dict[Question, str] = {}
    if greedy:
        limits = {question: _limit(item) for question, item in zip(questions, encoded, strict=True)}
        budgets = dict.fromkeys(prompts, 0)
        for question in asked:  # a prompt with several targets is run once, to the longest
            budgets[question.prompt] = max(budgets[question.prompt], limits[question])
        heads = [base.task.question(prompt) for prompt in prompts]
        limited = list(zip(heads, (budgets[prompt] for prompt in prompts), strict=True))
        texts_of = ranks.spread(limited, lambda own: asker.greedy([h for h, _ in own], [b for _, b in own]))
        written = dict(zip(prompts, texts_of, strict=True))
        texts = {question: base.task.text(written[question.prompt][: limits[question]]) for question in asked}
    return Answers(
        {
            question: Answer(item.answer, result.argmax, result.logprobs, texts.get(question))
            for question, item, result in zip(questions, encoded, forced, strict=True)
        },
        greedy,
    )


def asked_of(fact: Fact) -> Iterable[Question]:
    """The questions scored under both protocols: edit, rephrases, locality, portability."""
    yield Question(fact.prompt, fact.target)
    yield from (Question(rephrase, fact.target) for rephrase in fact.rephrases)
    yield from (Question(probe.prompt, probe.target) for probe in (*fact.locality, *fact.portability))


def compared_for(fact: Fact) -> Iterable[Question]:
    """The further questions whose log-probability CounterFact's figures need."""
    if fact.old_target is None:
        return
    yield from (Question(prompt, fact.old_target) for prompt in (fact.prompt, *fact.rephrases))
    for probe in neighbours(fact):
        yield Question(probe.prompt, fact.target)
        yield Question(probe.prompt, fact.old_target)


def neighbours(fact: Fact) -> tuple[Probe, ...]:
    """CounterFact's neighbourhood: the locality probes whose answer is the fact's old target."""
    old = fact.old_target
    if old is None:
        return ()
    return tuple(
        probe for probe in fact.locality if probe.target is not None and normalise(probe.target) == normalise(old)
    )


def _encode(base: Base, question: Question) -> Encoded:
    if question.target is not None:
        return base.task.encode(question.prompt, question.target)
    return base.task.question(question.prompt)


def _limit(encoded: Encoded) -> int:
    """Most tokens of greedy text compared with this answer."""
    return (len(encoded.answer) or UNANSWERED_LENGTH) + GREEDY_MARGIN


class _Counter:
    """Sequences done out of all, told to `progress`."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
