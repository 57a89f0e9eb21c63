"""The meta-loss: rephrases learned, and what the base said on locality probes kept.

    L = CE(rephrases under W + S) + c_loc KL(base || W + S on the probes' continuation)

What the base says is computed before any edit and once a probe (references.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.batch import Batch
from malmen_cli.base.families import matrix_shape
from malmen_cli.base.memory import halving
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing.capture import fact_loss, weight_gradients
from malmen_cli.editing.replay import Runner
from malmen_cli.training.references import Reference, divergence


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
        loss_of: Callable[[Sequence[int], Sequence[Tensor]], Callable[[Tensor, Batch], Tensor]],
        weight: float,
    ) -> float:
        loss, own = 0.0, ranks.share(len(sequences))

        def batch(indices: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
            part = [sequences[i] for i in indices]
            with runner.head_inputs() as seen:  # of this batch alone: they hold on to its graph
                if gradients:
                    return weight_gradients(runner, part, names, loss_of(indices, seen))
                with torch.no_grad():
                    return float(loss_of(indices, seen)(*runner.logits(part))), {}

        for places in by_length([sequences[i].length for i in own], batch_size):
            for value, found in halving([own[place] for place in places], batch):
                loss += value
                for name, gradient in found.items():
                    sums[name] = sums[name].add_(gradient, alpha=weight) if name in sums else gradient * weight
        return loss / max(len(sequences), 1)

    learned = run(wordings, lambda indices, seen: fact_loss, 1 / max(len(wordings), 1))
    probes = [reference.sequence for reference in references]
    moved = run(
        probes,
        lambda indices, seen: partial(divergence, runner, [references[i] for i in indices], seen),
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
