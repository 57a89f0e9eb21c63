"""The meta-loss: rephrases learned, and what the base said on locality probes kept.

    L = CE(rephrases under W + S) + c_loc KL(base || W + S on the probes' continuation)

Base answers are computed before any edit and once per probe: the probe is continued by the base's own greedy
text, and only the inputs of the output head are kept, a few hundred bytes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from malmen_cli.base import ranks
from malmen_cli.base.batch import Batch
from malmen_cli.base.families import matrix_shape
from malmen_cli.base.memory import chunked, halving
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing.capture import answer_counts, fact_loss, weight_gradients
from malmen_cli.editing.replay import Runner
from malmen_cli.scoring.decoder import Asker

ROWS = 32  # of logits whose divergence is taken at once


@dataclass(frozen=True)
class Reference:
    """A probe continued by the base, and the base's head inputs (tokens, width) at the continuation."""

    sequence: Encoded
    heads: Tensor


class References:
    """The base's own answers on probes, each computed once, always together with the same other probes, at most
    `batch_size` at once."""

    def __init__(self, runner: Runner, tokens: int, batch_size: int) -> None:
        self._runner, self._tokens, self._batch_size = runner, tokens, batch_size
        self._asker = Asker(runner.base, batch_size, lambda count: None)
        self._known: dict[Encoded, Reference] = {}
        self._company: dict[Encoded, Sequence[Encoded]] = {}

    def keep_company(self, probes: Sequence[Encoded]) -> None:
        """Have the base's answers on these probes computed together (see Runner.keep_company)."""
        fresh = tuple(dict.fromkeys(probe for probe in probes if probe not in self._company))
        for company in chunked(fresh, self._batch_size):
            self._company |= dict.fromkeys(company, company)

    def of(self, probes: Sequence[Encoded]) -> list[Reference]:
        """References of probes, which are questions. The base must be unedited while this runs."""
        self.keep_company(probes)
        for probe in probes:
            if probe not in self._known:
                self._compute(self._company[probe])
        return [self._known[probe] for probe in probes]

    def _compute(self, company: Sequence[Encoded]) -> None:
        behind, room = self._runner.task.behind, self._runner.base.room
        left = [self._tokens if room is None else room - len(behind) - len(probe.ids) for probe in company]
        limits = [max(0, min(self._tokens, rest)) for rest in left]
        texts = self._asker.greedy(company, [max(1, limit) for limit in limits])
        sequences = [
            probe.answered((*text[:limit], *behind)) for probe, text, limit in zip(company, texts, limits, strict=True)
        ]
        self._runner.keep_company(sequences)
        found = [heads.clone() for part in halving(sequences, self._runner.heads) for heads in part]
        for probe, sequence, heads in zip(company, sequences, found, strict=True):
            self._known[probe] = Reference(sequence, heads)


def divergence(runner: Runner, references: Sequence[Reference], logits: Tensor, batch: Batch) -> Tensor:
    """Sum over probes of the mean over positions of KL(base || edited), in nats."""
    with torch.no_grad():
        wanted = runner.logits_of(torch.cat([r.heads for r in references]))
    shares = 1 / answer_counts(batch, batch.owners.float())[batch.owners]
    found: Tensor = _Divergence.apply(logits, wanted, shares)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    """`sum_i shares_i KL(softmax(wanted_i) || softmax(logits_i))` over rows (n, vocabulary), in nats and fp32, with its
    derivative by logits, `shares_i (softmax(logits_i) - softmax(wanted_i))`.

    Both at once and a few rows at a time, which stay in the processor's cache: of a large vocabulary every pass over
    all rows costs as much as a block of a small model.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, shares: Tensor) -> Tensor:
        total = shares.new_zeros(())
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in (slice(start, start + ROWS) for start in range(0, len(logits), ROWS)):
            expected, found = (log_softmax(part[rows], -1, dtype=torch.float32) for part in (wanted, logits))
            said = expected.exp()
            total += shares[rows] @ (said * (expected - found)).sum(-1)
            if gradient is not None:
                gradient[rows] = found.exp_().sub_(said).mul_(shares[rows, None])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


@dataclass(frozen=True)
class MetaLoss:
    """Mean cross-entropy of the wordings and mean divergence on the probes, and their gradients by weight."""

    learned: float
    moved: float
    gradients: dict[str, Tensor]

    def total(self, weight: float) -> float:
        return self.learned + weight * self.moved


def meta_loss(
    runner: Runner,
    wordings: Sequence[Encoded],
    references: Sequence[Reference],
    names: Sequence[str],
    *,
    locality_weight: float,
    batch_size: int,
    gradients: bool = True,
) -> MetaLoss:
    """The meta-loss under the model's present weights; with `gradients`, dL/dW (dk, dv) fp32 per module."""
    sums: dict[str, Tensor] = {}

    def run(
        sequences: Sequence[Encoded],
        loss_of: Callable[[Sequence[int]], Callable[[Tensor, Batch], Tensor]],
        weight: float,
    ) -> float:
        loss, own = 0.0, ranks.share(len(sequences))

        def batch(indices: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
            part = [sequences[i] for i in indices]
            if gradients:
                return weight_gradients(runner, part, names, loss_of(indices))
            with torch.no_grad():
                return float(loss_of(indices)(*runner.logits(part))), {}

        for places in by_length([sequences[i].length for i in own], batch_size):
            for value, found in halving([own[place] for place in places], batch):
                loss += value
                for name, gradient in found.items():
                    sums[name] = sums[name].add_(gradient, alpha=weight) if name in sums else gradient * weight
        return loss / max(len(sequences), 1)

    learned = run(wordings, lambda indices: fact_loss, 1 / max(len(wordings), 1))
    probes = [reference.sequence for reference in references]
    moved = run(
        probes,
        lambda indices: partial(divergence, runner, [references[i] for i in indices]),
        locality_weight / max(len(references), 1),
    )
    return _of_all_ranks(runner, MetaLoss(learned, moved, sums), names if gradients else ())


def _of_all_ranks(runner: Runner, own: MetaLoss, names: Sequence[str]) -> MetaLoss:
    """The sums of what each rank found on its share."""
    if ranks.count() == 1:
        return own
    losses = torch.tensor([own.learned, own.moved], dtype=torch.float64)
    ranks.add_up(losses)
    gradients = {}
    for name in names:
        shape = matrix_shape(runner.model.get_submodule(name))
        gradients[name] = own.gradients.get(name, torch.zeros(shape, device=runner.base.device))
        ranks.add_up(gradients[name])
    learned, moved = losses.tolist()
    return MetaLoss(learned, moved, gradients)
