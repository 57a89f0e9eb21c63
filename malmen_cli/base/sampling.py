"""Text sampled from the base itself at temperature 1, so that nothing has to be downloaded.

What it starts from is the task's: with the tokenizer's first special token, where it has one, and a random word of its
vocabulary; or, where an encoder reads the prompt, with a prompt of a few such words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.writing import Writer
from malmen_cli.exceptions import NumericsError

TEXTS = 32  # of the base, where facts bring no locality probes
TOKENS = 24
WINDOW = 64  # tokens of each text of many: long enough for words, short enough not to run in circles
WINDOWS_AT_ONCE = 64


def sampled_answers(base: Base, count: int, tokens: int, *, seed: int = 0) -> list[Encoded]:
    """`count` texts of at most `tokens` tokens behind their start, which is the prompt of each; drawn together.

    Raises NumericsError.
    """
    generator = torch.Generator().manual_seed(seed)
    return _written_on(base, random_starts(base, count, generator), tokens, generator)


def sampled_texts(base: Base, count: int = TEXTS, tokens: int = TOKENS, *, seed: int = 0) -> list[Encoded]:
    """`sampled_answers`, the first half of each text its prompt where prompt and answer are one text."""
    texts = sampled_answers(base, count, tokens, seed=seed)
    return [text if text.source else replace(text, n_prompt=max(1, len(text.ids) // 2)) for text in texts]


def own_probes(base: Base, seed: int) -> list[Encoded]:
    """Prompts of the base's own text, the locality probes of facts that bring none."""
    return [text.answered(()) for text in sampled_texts(base, seed=seed)]


def sampled_windows(base: Base, tokens: int) -> list[tuple[int, ...]]:
    """`tokens` tokens in all, in texts of WINDOW tokens or of what the model reads, and a shorter last one.

    Always the same ones, whatever the seed of an edit, so that they are sampled once a base. Raises NumericsError.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(WINDOW, base.room or WINDOW, tokens)
    count = -(-tokens // length)
    starts = [replace(start, ids=start.ids[:length]) for start in random_starts(base, count, generator)]
    texts: list[tuple[int, ...]] = []
    for first in range(0, count, WINDOWS_AT_ONCE):
        part = starts[first : first + WINDOWS_AT_ONCE]
        texts += [text.ids for text in _written_on(base, part, length - len(part[0].ids), generator)]
    texts[-1] = texts[-1][: tokens - length * (count - 1)]
    return texts


def random_starts(base: Base, count: int, generator: torch.Generator) -> list[Encoded]:
    """What texts begin with, each of the same length."""
    vocabulary = base.model.get_input_embeddings().num_embeddings
    special = set(base.tokenizer.all_special_ids)
    size = base.task.opening_words
    words: list[int] = []
    while len(words) < count * size:
        token = int(torch.randint(min(vocabulary, len(base.tokenizer)), (1,), generator=generator))
        if token not in special:
            words.append(token)
    return [base.task.opening(words[start : start + size]) for start in range(0, len(words), size)]


def _written_on(base: Base, starts: Sequence[Encoded], tokens: int, generator: torch.Generator) -> list[Encoded]:
    """Texts of one length written on by `tokens` tokens, or as many as an answer has, in one batch."""
    writer = Writer(base, starts)
    for _ in range(min(tokens, base.task.longest_answer or tokens)):
        logits = writer.logits()
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError("the base's logits are not finite; load it in another --dtype")
        writer.write(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0])
    return [replace(start, ids=tuple(text)) for start, text in zip(starts, writer.ids.tolist(), strict=True)]
