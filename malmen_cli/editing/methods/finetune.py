"""Fine-tuning of one matrix, all facts in mini-batches, epoch after epoch: the strong, cheap baseline.

LocFT-BF (Yang et al., "Fine-tuning Done Right in Model Editing", arXiv 2509.22072). What older fine-tuning baselines
lacked is here: every fact is seen again each epoch instead of once until it is learned, only one matrix moves, and
the answer ends with an end-of-text token. The loss is the one that all methods here share.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.families import chosen_modules, matrix_shape, second_matrix, stacks
from malmen_cli.base.memory import halving
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing.capture import fact_loss, losses_of, weight_gradients
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import FinetuneSettings
from malmen_cli.editing.shift import ModuleShift, Shift, applied, weight_layout
from malmen_cli.exceptions import FactNumericsError, NumericsError, SpecError

# The block tuned by default, as a share of the depth. The paper's own runs take block 22 of Llama 3's 32 and 23 of
# Mistral's 32; on smollm2-135m's validation facts block 25 of 30 scored .18, block 20 .08 (docs/editor-recipe.md).
DEPTH = (5, 6)


def tuned_module(model: Any, settings: FinetuneSettings) -> str:
    """The one matrix that the settings name. Raises SpecError where they name several, or a block there is not."""
    if settings.modules:
        names = chosen_modules(model, settings.modules)
        if len(names) > 1:
            raise SpecError(f"modules: finetune changes one matrix, but {len(names)} match; for example {names[-1]}")
        return names[0]
    stack = stacks(model)[-1]  # the one that answers
    depth = len(stack.blocks)
    block = depth * DEPTH[0] // DEPTH[1] if settings.block is None else settings.block
    if block >= depth:
        raise SpecError(f"block: the model has blocks 0 to {depth - 1}, not {block}")
    return second_matrix(model, stack, block)


class Finetune:
    """The method with its settings; `seed` shuffles the facts into mini-batches, whatever order they come in."""

    def __init__(self, settings: FinetuneSettings, *, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed

    def shift(
        self,
        runner: Runner,
        module: str,
        edits: Sequence[Encoded],
        *,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Shift:
        """The dense shift of `module` that fine-tuning on all `edits` gives, fp32, in host memory.

        The model is left bitwise as it was, however this ends. runner: from the module's block on, so that what is
        below runs once a fact. batch_size: facts a forward; those of a mini-batch are added up. progress: called with
        the number of facts of each mini-batch. note: called with the epoch and its loss.
        Raises NumericsError when loss or gradient are not finite, MemoryLimitError when one fact does not fit.
        """
        leaf = runner.model.get_submodule(module)
        layout, shape = weight_layout(leaf), matrix_shape(leaf)
        device = runner.base.device
        matrix = torch.zeros(shape, dtype=torch.float32, device=device, requires_grad=True)  # S, all that is tuned
        adam = torch.optim.AdamW([matrix], lr=self.settings.lr, weight_decay=self.settings.weight_decay)
        bound = self._bound(leaf.weight)
        facts = sorted(edits, key=lambda edit: edit.key)
        for epoch in range(1, self.settings.epochs + 1):
            total = 0.0
            for batch in self._batches(facts, epoch):
                # Rounded from fp32 afresh for every step: in bf16 most steps of Adam alone would round to nothing.
                with applied(runner.model, Shift({module: ModuleShift(layout, dense=matrix.detach())})):
                    loss, matrix.grad = _gradient(runner, module, batch, batch_size)
                    if not bool(torch.isfinite(matrix.grad.sum() + loss)):  # NaN and Inf survive summing
                        raise _not_finite(runner, module, batch, edits, epoch)
                adam.step()
                _shrink(matrix, bound)
                total += loss * len(batch)
                if progress is not None:
                    progress(len(batch))
            mean = total / len(facts)
            note(f"epoch {epoch} of {self.settings.epochs}, loss {mean:.3f} nats a token")
            if mean < self.settings.stop_loss:
                break
        shift = Shift({module: ModuleShift(layout, dense=matrix.detach().cpu().contiguous())})
        shift.check_finite()
        return shift

    def _batches(self, facts: Sequence[Encoded], epoch: int) -> list[list[Encoded]]:
        """Mini-batches of all facts, shuffled by (seed, epoch); in each the facts keep their order."""
        order = list(range(len(facts)))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        size = self.settings.batch_facts
        return [[facts[i] for i in sorted(order[start : start + size])] for start in range(0, len(order), size)]

    def _bound(self, weight: Tensor) -> float | None:
        share = self.settings.max_relative_norm
        return None if share is None else share * float(weight.detach().float().norm())


def _gradient(runner: Runner, module: str, batch: Sequence[Encoded], batch_size: int) -> tuple[float, Tensor]:
    """Mean over a mini-batch's facts of the loss, and its gradient (dk, dv) fp32, `batch_size` facts a forward. Of
    several ranks, each runs its share of the facts."""
    own = ranks.share(len(batch))

    def run(indices: Sequence[int]) -> tuple[float, Tensor]:
        loss, found = weight_gradients(runner, [batch[own[i]] for i in indices], [module], fact_loss)
        return loss, found[module]

    leaf = runner.model.get_submodule(module)
    gradient = torch.zeros(matrix_shape(leaf), device=runner.base.device)
    total = torch.zeros((), dtype=torch.float64)
    for indices in by_length([batch[i].length for i in own], batch_size):
        for loss, found in halving(indices, run):
            total += loss
            gradient += found
    ranks.add_up(total, gradient)
    return float(total) / len(batch), gradient.div_(len(batch))


def _not_finite(
    runner: Runner, module: str, batch: Sequence[Encoded], edits: Sequence[Encoded], epoch: int
) -> NumericsError:
    """What to say of a mini-batch, with the first of its facts to blame, unless all are alike."""
    said = f"{module}: loss or gradient is not finite in epoch {epoch}"
    finite = [math.isfinite(loss) for loss in losses_of(runner, batch, 1)]
    if any(finite) and not all(finite):
        return FactNumericsError(f"{said}, for {{fact}}", edits.index(batch[finite.index(False)]))
    return NumericsError(f"{said}; try a smaller lr")


@torch.no_grad()
def _shrink(matrix: Tensor, bound: float | None) -> None:
    """Scale the shift back to the nearest one whose norm is `bound`, where it is longer."""
    if bound is not None:
        matrix *= min(1.0, bound / max(float(matrix.norm()), torch.finfo(torch.float32).tiny))
