"""Text sampled from the base itself at temperature 1, so that nothing has to be downloaded.

Every text starts with the tokenizer's first special token, where it has one, and a random word of its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from malmen_cli.base.model import Base, logits_at
from malmen_cli.base.prompts import Encoded
from malmen_cli.exceptions import NumericsError

TEXTS = 32  # of the base, where facts bring no locality probes
TOKENS = 24
WINDOW = 64  # tokens of each text of many: long enough for words, short enough not to run in circles
WINDOWS_AT_ONCE = 64


def sampled_texts(base: Base, count: int = TEXTS, tokens: int = TOKENS, *, seed: int = 0) -> list[Encoded]:
    """`count` texts of `tokens` tokens behind their start, drawn together; the first half of each is its prompt.

    Raises NumericsError.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = random_starts(base, count, generator)
    texts = _written_on(base, starts, len(starts[0]) + tokens, generator)
    return [Encoded(text, max(1, len(text) // 2)) for text in texts]


def sampled_windows(base: Base, tokens: int) -> list[tuple[int, ...]]:
    """`tokens` tokens in all, in texts of WINDOW tokens or of what the model reads, and a shorter last one.

    Always the same ones, whatever the seed of an edit, so that they are sampled once a base. Raises NumericsError.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(WINDOW, base.room or WINDOW, tokens)
    count = -(-tokens // length)
    starts = [start[:length] for start in random_starts(base, count, generator)]
    texts: list[tuple[int, ...]] = []
    for first in range(0, count, WINDOWS_AT_ONCE):
        texts += _written_on(base, starts[first : first + WINDOWS_AT_ONCE], length, generator)
    texts[-1] = texts[-1][: tokens - length * (count - 1)]
    return texts


def random_starts(base: Base, count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """What texts begin with, each of the same length."""
    vocabulary = base.model.get_input_embeddings().num_embeddings
    special = set(base.tokenizer.all_special_ids)
    starts: list[tuple[int, ...]] = []
    while len(starts) < count:
        token = int(torch.randint(min(vocabulary, len(base.tokenizer)), (1,), generator=generator))
        if token not in special:
            starts.append((token,) if base.tokenizer.bos_token_id is None else (base.tokenizer.bos_token_id, token))
    return starts


@torch.inference_mode()
def _written_on(
    base: Base, starts: Sequence[tuple[int, ...]], length: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Texts of one length written on to `length` tokens in one batch, with the model's own cache where it has one."""
    texts = [list(start) for start in starts]
    rows = torch.arange(len(texts), device=base.device)
    cache: Any = None
    while len(texts[0]) < length:
        ids = torch.tensor([text if cache is None else text[-1:] for text in texts], device=base.device)
        mask = torch.ones(len(texts), len(texts[0]), dtype=torch.long, device=base.device)
        past = {"past_key_values": cache} if cache is not None else {}
        with logits_at(base.model, rows, torch.full_like(rows, ids.shape[1] - 1)) as gather:
            output = base.model(input_ids=ids, attention_mask=mask, use_cache=True, **past)
            logits = gather(output.logits).float()
        cache = getattr(output, "past_key_values", None)
        if not bool(torch.isfinite(logits).all()):
            raise NumericsError("the base's logits are not finite; load it in another --dtype")
        drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0].tolist()
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)
    return [tuple(text) for text in texts]
