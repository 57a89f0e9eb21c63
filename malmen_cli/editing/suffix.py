"""Running sequences with something added to one token's hidden state, again and again: MEMIT's search for targets.

In a causal model nothing that is added at a token reaches those in front of it. Behind the block in question these
never change, and all that a later token sees of them is their keys and values: these are computed once, and every
further run starts at the token itself. A model whose attention cannot be told so runs whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from malmen_cli.base.batch import Batch
from malmen_cli.base.memory import out_of_memory
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.trials import agree

_TRIALS = ((0, 12, 4), (3, 10, 1), (1, 7, 0), (2, 11, 6))  # of trial tokens: the first, behind the last, the subject


class Moved(Protocol):
    """Sequences whose `subject` token has a vector added to its hidden state behind one block.

    states: (n, width) fp32, what that block gives there by itself; logits, batch: the base's, at the answer positions.
    """

    states: Tensor
    logits: Tensor
    batch: Batch

    def run(self, rows: Sequence[int], added: Tensor) -> tuple[Tensor, Batch]:
        """Logits (n, vocabulary) at the answer positions of the sequences `rows` with `added` (rows, width)."""


class Whole:
    """`Moved` of any model: every run is one of whole sequences, from `block` on."""

    def __init__(self, runner: Runner, block: int, sequences: Sequence[Encoded]) -> None:
        self._runner, self._block, self._sequences = runner, block, sequences
        self.logits, self.batch, self.states = _first_run(runner, block, sequences)

    def run(self, rows: Sequence[int], added: Tensor) -> tuple[Tensor, Batch]:
        sequences = [self._sequences[row] for row in rows]

        def add(states: Tensor) -> Tensor:
            places = torch.arange(len(rows), device=states.device), _subjects(sequences, states.device)
            return states.index_put(places, added.to(states), accumulate=True)

        return self._runner.logits(sequences, behind=(self._block, add))


class Suffix:
    """`Moved` of a model that takes keys and values of earlier tokens: every run starts at the subject's last token."""

    def __init__(self, runner: Runner, block: int, sequences: Sequence[Encoded]) -> None:
        self._runner, self._active = runner, range(block + 1, len(runner.blocks))
        starts = [_subject(sequence) for sequence in sequences]
        self._suffixes = [
            replace(s, ids=s.ids[start:], n_prompt=s.n_prompt - start, subject=0)
            for s, start in zip(sequences, starts, strict=True)
        ]
        noted = _KeysAndValues()
        batch = runner.task.batch(sequences, runner.base.device)
        mask = _mask(batch.ids.new_zeros(len(sequences)), 0, batch.ids.shape[1], runner.base.dtype)
        seen: list[Tensor] = []
        with torch.no_grad():
            options = {"past_key_values": noted, "attention_mask": mask}
            behind = block, partial(_note, seen)
            self.logits = runner.forward(batch, range(len(runner.blocks)), None, behind=behind, options=options)
        self.batch = batch
        self._starts = torch.tensor(starts, device=batch.ids.device)
        self._front = max(starts)
        self._pairs = {i: tuple(t[:, :, : self._front].clone() for t in noted.pairs[i]) for i in self._active}
        self._hidden = _from(seen[0].to(self._starts.device), self._starts, max(s.length for s in self._suffixes))
        self.states = self._hidden[:, 0].float()

    def run(self, rows: Sequence[int], added: Tensor) -> tuple[Tensor, Batch]:
        batch = self._runner.task.batch([self._suffixes[row] for row in rows], added.device)
        here = torch.tensor(list(rows), device=added.device)
        starts, length = self._starts[here], batch.ids.shape[1]
        hidden = self._hidden[here, :length]
        hidden = torch.cat([hidden[:, :1] + added[:, None].to(hidden.dtype), hidden[:, 1:]], 1)
        options = {
            "past_key_values": _KeysAndValues(self._pairs, here, self._front),
            "attention_mask": _mask(starts, self._front, length, self._runner.base.dtype),
            "position_ids": starts[:, None] + (batch.mask.cumsum(-1) - 1).clamp(min=0),
        }
        return self._runner.forward(batch, self._active, (hidden,), options=options, narrow=True), batch


def way_to_run(runner: Runner, block: int, longest: int) -> Callable[[Runner, int, Sequence[Encoded]], Moved]:
    """`Suffix` for a model that it gives the logits of whole sequences on, tried out on a few of up to `longest`
    tokens; else `Whole`, as for one that sees no further back than a window that these are longer than."""
    if block + 1 >= len(runner.blocks):
        return Whole
    vocabulary = min(runner.model.get_input_embeddings().num_embeddings, 1000)
    tokens = [(7 * i + 3) % vocabulary for i in range(max(12, longest))]
    spans = (*_TRIALS, (0, longest, longest // 2)) if longest > 12 else _TRIALS
    trials = [replace(runner.task.trial(tokens[a:b]), n_prompt=b - a - 2, subject=s) for a, b, s in spans]
    whole, rows = Whole(runner, block, trials), range(len(trials))
    with torch.no_grad():
        added = whole.states.flip(0)  # of the size that states have
        wanted = [whole.logits, whole.run(rows, torch.zeros_like(added))[0], whole.run(rows, added)[0]]
        try:
            suffix = Suffix(runner, block, trials)
            found = [suffix.logits, suffix.run(rows, torch.zeros_like(added))[0], suffix.run(rows, added)[0]]
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if out_of_memory(error):
                raise
            return Whole
    same = (a.shape == b.shape and agree(a, b, runner.base.dtype) for a, b in zip(wanted, found, strict=True))
    return Suffix if all(same) else Whole


class _KeysAndValues(DynamicCache):  # type: ignore[misc]
    """Notes the keys and values of every block; or puts the `rows` of those noted in front of theirs.

    A block that none were noted of runs for what else it hands on (see Runner): nobody looks at its output.
    """

    def __init__(
        self, front: dict[int, tuple[Tensor, ...]] | None = None, rows: Tensor | None = None, tokens: int = 0
    ) -> None:
        super().__init__()
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        self._before, self._rows, self._tokens = front, rows, tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._before is None:
            self.pairs[layer_idx] = key_states.detach(), value_states.detach()
            return key_states, value_states
        if layer_idx not in self._before:
            keys, values = (t.new_zeros(*t.shape[:2], self._tokens, t.shape[3]) for t in (key_states, value_states))
        else:
            assert self._rows is not None
            keys, values = (kept[self._rows.to(kept.device)] for kept in self._before[layer_idx])
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._tokens


def _first_run(runner: Runner, block: int, sequences: Sequence[Encoded]) -> tuple[Tensor, Batch, Tensor]:
    """The base's logits, their batch, and what `block` gives at the subjects."""
    seen: list[Tensor] = []
    with torch.no_grad():
        logits, batch = runner.logits(sequences, behind=(block, partial(_note, seen)))
    states = seen[0].to(batch.ids.device)
    rows = torch.arange(len(sequences), device=states.device)
    return logits, batch, states[rows, _subjects(sequences, states.device)].float()


def _note(seen: list[Tensor], states: Tensor) -> Tensor:
    seen.append(states)
    return states


def _mask(starts: Tensor, front: int, length: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, length, front + length), what is added to attention: a token sees the `starts` (B,) first ones in front,
    and itself and those before it."""
    before = torch.arange(front, device=starts.device) < starts[:, None]
    own = torch.ones(length, length, dtype=torch.bool, device=starts.device).tril()
    seen = torch.cat([before[:, None].expand(-1, length, -1), own.expand(len(starts), -1, -1)], -1)
    unseen = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=starts.device).masked_fill(~seen, unseen)[:, None]


def _from(states: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, length, width) from (B, T, width): each row from its start on; what lies behind its end is never read."""
    places = (starts[:, None] + torch.arange(length, device=states.device)).clamp(max=states.shape[1] - 1)
    return states[torch.arange(len(states), device=states.device)[:, None], places]


def _subject(sequence: Encoded) -> int:
    assert sequence.subject is not None
    return sequence.subject


def _subjects(sequences: Sequence[Encoded], device: torch.device) -> Tensor:
    return torch.tensor([_subject(sequence) for sequence in sequences], device=device)
