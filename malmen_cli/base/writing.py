"""A model writing on, a token at a time, with its own cache where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base.model import Base, logits_at
from malmen_cli.base.prompts import Encoded


class Writer:
    """Writes on `questions` of one shape together: nothing is padded, so that no neighbour can change a token."""

    def __init__(self, base: Base, questions: Sequence[Encoded]) -> None:
        self._model, self._task = base.model, base.task
        self.ids = torch.tensor([question.ids for question in questions], device=base.device)  # (n, T), growing
        source = [question.source for question in questions]
        self._source = torch.tensor(source, device=base.device) if source[0] else None
        self._memory: Tensor | None = None  # what the encoder gave
        self._cache: Any = None

    def logits(self) -> Tensor:
        """fp32 logits (n, tokens) of what comes next."""
        fed = self.ids if self._cache is None else self.ids[:, -1:]
        rows = torch.arange(len(fed), device=fed.device)
        last = torch.full_like(rows, fed.shape[1] - 1)
        with torch.inference_mode(), logits_at(self._model, rows, last) as gather:
            given = self._task.step(fed, self.ids.shape[1], self._source, self._memory, self._cache)
            output = self._model(**given)
            logits = gather(self._task.logits(output)).float()
        self._cache = getattr(output, "past_key_values", None)
        self._memory = getattr(output, "encoder_last_hidden_state", None)
        return logits

    def write(self, tokens: Tensor) -> None:
        """The next token of each text: (n,)."""
        self.ids = torch.cat([self.ids, tokens[:, None].to(self.ids)], dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        """Leave all but some of the texts."""
        places = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        self.ids = self.ids[places]
        self._source = None if self._source is None else self._source[places]
        self._memory = None if self._memory is None else self._memory[places]
        if len(rows):
            self._cache = _select(self._cache, places)


def _select(cache: Any, rows: Tensor) -> Any:
    """`cache` with only `rows` of its batch. None for a cache that cannot: the text so far is then read again."""
    if not hasattr(cache, "reorder_cache"):
        return None
    with torch.inference_mode():
        # Beam search's reordering: unlike batch_select_indices, every layer type implements it.
        cache.reorder_cache(rows)
    return cache
