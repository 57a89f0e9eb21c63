"""Running a model for scoring: logits only at answer positions, greedy text with a cache. What is fed and read is its
task's business (base/tasks.py).

Greedy batches hold prompts of one length, so nothing is padded: no mask, no position offset and no
batch neighbour can change an answer, and the checkpoint's generation_config is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from malmen_cli.base.memory import halving
from malmen_cli.base.model import Base, logits_at
from malmen_cli.base.prompts import Encoded, by_length, check_room
from malmen_cli.base.writing import Writer
from malmen_cli.exceptions import NumericsError


@dataclass(frozen=True, slots=True)
class Forced:
    """What the model says at the answer positions, given the gold prefix.

    argmax: its own token at each answer position (without an answer: the one token after the prompt).
    logprobs: natural log-probability of each answer token; empty without an answer.
    """

    argmax: tuple[int, ...]
    logprobs: tuple[float, ...]


class Asker:
    """One loaded model, asked teacher-forced or greedily.

    `advance(n)` is called whenever n more sequences are done.
    """

    def __init__(self, base: Base, batch_size: int, advance: Callable[[int], None]) -> None:
        self._base = base
        self._task = base.task
        self._batch_size = batch_size
        self._advance = advance
        self._ends = base.task.ends
        self._newlines: dict[int, bool] = {}
        self._room = base.room

    def teacher_forced(self, sequences: Sequence[Encoded]) -> list[Forced]:
        """One forward of every sequence, right-padded in batches of like length.

        Raises NumericsError where the logits are not finite, MemoryLimitError when one sequence is too much.
        """
        for sequence in sequences:
            check_room(max(len(sequence.ids), len(sequence.source)), self._room)
        found: dict[int, Forced] = {}
        for batch in by_length([sequence.length for sequence in sequences], self._batch_size):
            parts = halving(batch, lambda part: self._force([sequences[i] for i in part]))
            results = [result for part in parts for result in part]
            found.update(zip(batch, results, strict=True))
            self._advance(len(batch))
        return [found[i] for i in range(len(sequences))]

    def greedy(self, questions: Sequence[Encoded], budgets: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens after each prompt: up to its budget, an end of text (left out) or a newline (kept)."""
        found: dict[int, tuple[int, ...]] = {}
        order = sorted(range(len(questions)), key=lambda i: (_lengths(questions[i]), -budgets[i], i))
        for _, group in groupby(order, key=lambda i: _lengths(questions[i])):
            rows = list(group)
            first = questions[rows[0]]
            check_room(max(len(first.ids) + 1, len(first.source)), self._room)
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                parts = halving(batch, lambda part: self._continue(questions, budgets, part))
                results = [result for part in parts for result in part]
                found.update(zip(batch, results, strict=True))
                self._advance(len(batch))
        return [found[i] for i in range(len(questions))]

    def _force(self, sequences: Sequence[Encoded]) -> list[Forced]:
        # The last answer token predicts nothing we need: the batch ends at the last of these.
        spots = [tuple(sequence.positions) or (len(sequence.ids) - 1,) for sequence in sequences]
        batch = self._task.batch(sequences, self._base.device, spots=spots)
        model = self._base.model
        with torch.inference_mode(), logits_at(model, batch.rows, batch.columns) as gather:
            logits = gather(self._task.logits(model(**self._task.inputs(batch)))).float()
        return self._read(sequences, spots, logits)

    def _read(self, sequences: Sequence[Encoded], spots: Sequence[Sequence[int]], logits: Tensor) -> list[Forced]:
        """Logits (n, vocabulary) of all answer positions, in order, to one Forced a sequence."""
        gold = torch.zeros(len(logits), dtype=torch.long)
        start = 0
        for sequence, positions in zip(sequences, spots, strict=True):
            if sequence.answer:
                gold[start : start + len(positions)] = torch.tensor(sequence.answer)
            start += len(positions)
        normaliser = torch.logsumexp(logits, dim=-1)
        picked = (logits.gather(-1, gold.to(logits.device)[:, None])[:, 0] - normaliser).tolist()
        argmax, finite = logits.argmax(dim=-1).tolist(), torch.isfinite(normaliser).tolist()
        results, start = [], 0
        for sequence, positions in zip(sequences, spots, strict=True):
            stop = start + len(positions)
            if not all(finite[start:stop]):
                self._not_finite(sequence)
            results.append(Forced(tuple(argmax[start:stop]), tuple(picked[start:stop]) if sequence.answer else ()))
            start = stop
        return results

    def _continue(
        self, questions: Sequence[Encoded], budgets: Sequence[int], rows: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Greedy decoding of prompts of one length; finished rows leave the batch and its cache."""
        written: dict[int, list[int]] = {row: [] for row in rows}
        alive, writer = list(rows), Writer(self._base, [questions[row] for row in rows])
        while alive:
            logits = writer.logits()
            broken = (~torch.isfinite(logits.amax(dim=-1))).nonzero()
            if len(broken):
                self._not_finite(questions[alive[int(broken[0])]])
            chosen = logits.argmax(dim=-1)
            stay = [
                place
                for place, (row, token) in enumerate(zip(alive, chosen.tolist(), strict=True))
                if self._goes_on(written[row], token, self._budget(len(questions[row].ids), budgets[row]))
            ]
            writer.write(chosen)
            if len(stay) < len(alive):
                alive = [alive[place] for place in stay]
                writer.keep(stay)
        return [tuple(written[row]) for row in rows]

    def _goes_on(self, tokens: list[int], token: int, budget: int) -> bool:
        """Append `token` unless it ends the text; whether the row needs another one."""
        if token in self._ends:
            return False
        tokens.append(token)
        if token not in self._newlines:
            self._newlines[token] = self._task.breaks(token)
        return not self._newlines[token] and len(tokens) < budget

    def _budget(self, prompt: int, budget: int) -> int:
        budget = min(budget, self._task.longest_answer or budget)
        return budget if self._room is None else min(budget, self._room - prompt)

    def _not_finite(self, sequence: Encoded) -> None:
        prompt = sequence.source or sequence.ids[: sequence.n_prompt]
        text = self._base.tokenizer.decode(list(prompt), skip_special_tokens=True)
        raise NumericsError(f"the model's logits after {text!r} are not finite; load it in another --dtype")


def _lengths(question: Encoded) -> tuple[int, int]:
    """By which questions are put together: longest first."""
    return -len(question.source), -len(question.ids)
