"""Facts to tokens: the prompt as the model will see it alone, the target as it would continue it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from malmen_cli.exceptions import FactsError, Problem
from malmen_cli.facts.fact import Fact
from malmen_cli.facts.problems import ProblemLog

# Scripts written without spaces: a target is joined to such a prompt directly.
_UNSPACED = (("\u0e00", "\u0eff"), ("\u2e80", "\ua4cf"), ("\uf900", "\ufaff"), ("\uff00", "\uffef"))
_ANCHOR = "A"
_one: dict[int, int] = {}  # each token id as one object: the prompts of 100,000 facts then take a third of the memory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its target in one sequence: `ids[:n_prompt]` is the prompt, the rest the answer.

    Answer token t is predicted at position t - 1, so `positions` runs from the last prompt token to the
    second-last answer token. `subject` is the index of the subject's last token in the prompt, where it is known.

    Where an encoder of its own reads the prompt, `source` holds it: then `ids[:n_prompt]` only starts the answer,
    `subject` is an index in `source`, and the outputs of its first `read` tokens are all that the answer can see.
    """

    ids: tuple[int, ...]
    n_prompt: int
    subject: int | None = None
    source: tuple[int, ...] = ()
    read: int = 0

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.source) + len(self.ids)

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the model sees of it: equal keys have equal states and logits, at every token that both are run with."""
        return self.source, self.ids

    def answered(self, answer: Sequence[int]) -> Encoded:
        """The same prompt with another answer."""
        return replace(self, ids=(*self.ids[: self.n_prompt], *answer))

    @property
    def answer(self) -> tuple[int, ...]:
        return self.ids[self.n_prompt :]

    @property
    def positions(self) -> range:
        return range(self.n_prompt - 1, len(self.ids) - 1)


def join(prompt: str, target: str) -> tuple[str, str]:
    """The prompt without trailing space, and the target with the separator it needs in front."""
    stripped = prompt.rstrip()
    if not stripped or target[:1].isspace() or _unspaced(stripped[-1]) or _unspaced(target[:1]):
        return stripped or prompt, target
    return stripped, " " + target


def encode_prompt(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """Token ids of a prompt alone, special tokens in front included, none behind."""
    ids = list(tokenizer(prompt.rstrip() or prompt)["input_ids"])
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) and len(ids) > 1:
        ids.pop()
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    return tuple(ids)


def encode(
    tokenizer: Any,
    prompt: str,
    target: str,
    *,
    end_of_text: bool = False,
    room: int | None = None,
    subject: str | None = None,
) -> Encoded:
    """Tokenise `prompt` and `target` so that the ids continue exactly what the prompt alone gives.

    end_of_text: append the tokenizer's end-of-text token to the answer, so that greedy answers stop.
    room: the most tokens the model reads. subject: what the fact is about, looked for in the prompt. Raises FactsError
    when the prompt or the target has no tokens, or both together too many.
    """
    text, tail = join(prompt, target)
    head = encode_prompt(tokenizer, text)
    answer = _continuation(tokenizer, text, tail, head) if target.strip() else ()
    if not head or not answer:
        what = "prompt" if not head else "target"
        raise FactsError(
            [Problem("facts", None, what, f"{(prompt if not head else target)!r} has no tokens for this tokenizer")]
        )
    if end_of_text and tokenizer.eos_token_id is not None:
        answer = (*answer, tokenizer.eos_token_id)
    check_room(len(head) + len(answer), room)
    place = subject_end(tokenizer, text, subject, head) if subject else None
    return Encoded(tuple(_one.setdefault(token, token) for token in (*head, *answer)), len(head), place)


def subject_end(tokenizer: Any, prompt: str, subject: str, ids: tuple[int, ...]) -> int | None:
    """Index in `ids`, the prompt's tokens, of the token that ends the subject's last mention; None where there is none.

    Letter case does not matter, as a subject may open a sentence. A mention inside a word counts if there is no other.
    """
    end = _mention_end(_lowered(prompt), _lowered(subject.strip()))
    if end is None:
        return None
    if getattr(tokenizer, "is_fast", False):
        spans = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
        # The last: the tokens of one character's bytes all have that character's span.
        return max((i for i, (begin, stop) in enumerate(spans) if begin < end <= stop), default=None)
    head = encode_prompt(tokenizer, prompt[:end])
    common = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    # Where the prompt departs from the shorter text, its token there runs on past the subject's end.
    return min(common, len(head) - 1, len(ids) - 1) if head else None


def encode_each(facts: Sequence[Fact], encoded: Callable[[Fact], T]) -> list[T]:
    """`encoded` of every fact. Raises FactsError naming every fact that it refuses, as many as a facts file would."""
    log, found = ProblemLog("facts"), []
    for fact in facts:
        try:
            found.append(encoded(fact))
        except FactsError as error:
            log.file = f"fact {fact.id}"
            for problem in error.problems:
                log.add(problem.line, problem.field, problem.message, problem.hint)
    log.raise_if_any()
    return found


def check_room(length: int, room: int | None, field: str = "prompt") -> None:
    """Raise FactsError for a prompt whose `length` in tokens, its answer included, the model cannot read."""
    if room is not None and length > room:
        message = f"{length} tokens with its answer, but the model reads at most {room}"
        raise FactsError([Problem("facts", None, field, message, "shorten it")])


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in as few batches of at most `batch_size` as there can be, of one size but for one, longest first,
    neighbours in length together.

    Longest first, so that memory runs out on the first batch or never. Of one size, since a few that are left over
    would take as long as many.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = -(-len(order) // batch_size)
    for batch in range(batches):
        yield order[batch * len(order) // batches : (batch + 1) * len(order) // batches]


def _continuation(tokenizer: Any, text: str, tail: str, head: tuple[int, ...]) -> tuple[int, ...]:
    """Ids of `tail` after `text`; where the tokenizer merges across the boundary, those it has after a plain letter."""
    for before, ids in ((text, head), (_ANCHOR, encode_prompt(tokenizer, _ANCHOR))):
        whole = encode_prompt(tokenizer, before + tail)
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
    return tuple(tokenizer(tail, add_special_tokens=False)["input_ids"])


def _mention_end(prompt: str, subject: str) -> int | None:
    """Where the last mention of the subject as words of its own ends, else the last of any, else None."""
    if not subject or subject not in prompt:
        return None
    whole = rf"(?<!\w)(?={re.escape(subject)}(?!\w))"  # looked ahead for, since mentions may overlap
    starts = [match.start() for match in re.finditer(whole, prompt)] or [prompt.rfind(subject)]
    return starts[-1] + len(subject)


def _lowered(text: str) -> str:
    """Lower case with every character in its place; the few that would become two stay as they are."""
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


def _unspaced(character: str) -> bool:
    return any(low <= character <= high for low, high in _UNSPACED)
