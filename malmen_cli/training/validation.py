"""ES, GS and LS of an edit during training, all by single forward passes over kept prefix states.

Greedy figures are read off the same pass: greedy text equals the answer exactly when every answer token and
the end of text behind it is the argmax given the gold prefix, and equals the base's own text exactly when every
token of that text is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Protocol, TypeVar

import torch

from malmen_cli.base import ranks
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing.replay import Runner
from malmen_cli.scoring.metrics import harmonic_mean
from malmen_cli.training.facts import Example
from malmen_cli.training.references import Reference

Share = float | None


@dataclass(frozen=True)
class Validation:
    """Shares in 0..1 of one edit of the validation facts, None where nothing was asked; `score` is their
    harmonic mean."""

    es_teacher_forced: float | None
    es_greedy: float | None
    gs_teacher_forced: float | None
    gs_greedy: float | None
    ls_teacher_forced: float | None
    ls_greedy: float | None

    @classmethod
    def mean(cls, parts: Sequence[Validation]) -> Validation:
        """The mean of every share over the parts in which there is one."""

        def over(name: str) -> Share:
            there = [share for part in parts if (share := getattr(part, name)) is not None]
            return sum(there) / len(there) if there else None

        return cls(**{field.name: over(field.name) for field in fields(cls)})

    @property
    def score(self) -> float:
        return harmonic_mean(list(asdict(self).values())) or 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """What the better of two is told by: the score, and the plain mean where that is 0 for both."""
        there = [share for share in asdict(self).values() if share is not None]
        return self.score, sum(there) / max(len(there), 1)

    def __str__(self) -> str:
        shares = [f"{share:.2f}" if share is not None else "-" for share in asdict(self).values()]
        pairs = zip(("ES", "GS", "LS"), shares[::2], shares[1::2], strict=True)
        return "  ".join(f"{name} {forced}/{greedy}" for name, forced, greedy in pairs) + f"  score {self.score:.3f}"


@dataclass(frozen=True)
class AtSizes:
    """The same editor on the validation facts all at once, and on parts of them."""

    whole: Validation
    parts: Validation

    @property
    def rank(self) -> tuple[float, float]:
        """The mean of both ranks."""
        score, mean = ((a + b) / 2 for a, b in zip(self.whole.rank, self.parts.rank, strict=True))
        return score, mean

    def __str__(self) -> str:
        return f"{self.whole}; in parts {self.parts.score:.3f}"


def validate(
    runner: Runner,
    examples: Sequence[Example],
    references: Sequence[Reference],
    batch_size: int,
    *,
    end_of_text: bool = True,
) -> Validation:
    """Scores of the model as it stands.

    references: the base's answers on the examples' probes. end_of_text: whether the examples' targets end with it.
    """
    es = _hits(runner, [e.edit for e in examples], batch_size)
    gs = _hits(runner, [r for e in examples for r in e.rephrases], batch_size)
    said = [runner.logits_of(r.heads).argmax(-1) for r in references]
    ls = _hits(runner, [r.sequence for r in references], batch_size, said)
    answers = {"whole": True, "last": not end_of_text}
    # The last label of a reference is what stands behind the base's text, where anything does.
    kept = {"whole": False, "last": not runner.task.behind}
    return Validation(*_shares(es, **answers), *_shares(gs, **answers), *_shares(ls, **kept))


class Ranked(Protocol):
    """What the better of two is told by."""

    @property
    def rank(self) -> tuple[float, float]: ...


R = TypeVar("R", bound=Ranked)


def climb(judge: Callable[[int], R], most: int) -> tuple[int, R]:
    """The first top of what is ranked by whole numbers of at most `most`: from 0 upwards, or else downwards, as long as
    each is better than the one before; and its validation."""
    best, top = 0, judge(0)
    for direction in (1, -1):
        while abs(best) < most:
            found = judge(best + direction)
            if found.rank <= top.rank:
                break
            best, top = best + direction, found
        if best:
            break
    return best, top


def _hits(
    runner: Runner, sequences: Sequence[Encoded], batch_size: int, expected: Sequence[torch.Tensor] | None = None
) -> list[list[bool]]:
    """Per sequence, whether each answer token (or the `expected` one) is the argmax given those before it."""
    return ranks.spread(range(len(sequences)), lambda own: _own_hits(runner, sequences, own, batch_size, expected))


def _own_hits(
    runner: Runner,
    sequences: Sequence[Encoded],
    own: Sequence[int],
    batch_size: int,
    expected: Sequence[torch.Tensor] | None,
) -> list[list[bool]]:
    hits: dict[int, list[bool]] = {i: [] for i in own}
    for places in by_length([sequences[i].length for i in own], batch_size):
        indices = [own[place] for place in places]
        with torch.no_grad():
            logits, batch = runner.logits([sequences[i] for i in indices])
        labels = batch.labels if expected is None else torch.cat([expected[i] for i in indices])
        for row, hit in zip(batch.owners.tolist(), (logits.argmax(-1) == labels).tolist(), strict=True):
            hits[indices[row]].append(hit)
    return list(hits.values())


def _shares(hits: Sequence[Sequence[bool]], *, whole: bool, last: bool = False) -> tuple[Share, Share]:
    """Mean share of a sequence's own tokens hit, and share of sequences hit whole; None where there is none.

    last: whether the last label is such a token, rather than the end of text or a stand-in for what follows. whole:
    whether it counts for the sequence as a whole.
    """
    if not hits:
        return None, None
    own = [hit if last else hit[:-1] for hit in hits]
    shares = [sum(hit) / len(hit) for hit in own if hit]
    complete = [all(hit) for hit in (hits if whole else own)]
    return (sum(shares) / len(shares) if shares else 1.0), sum(complete) / len(complete)
