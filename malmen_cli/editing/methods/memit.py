"""MEMIT: find what the hidden state at each subject should become, and spread the way there over a few blocks.

Meng et al., ICLR 2023 (arXiv 2210.07229, algorithm 1). ROME and AlphaEdit are the same with another constraint on what
a block takes up (see constraints.py); ROME's takes one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.families import (
    CAUSAL,
    block_index,
    block_list,
    chosen_modules,
    default_modules,
    kind_of,
    matrix_shape,
)
from malmen_cli.base.memory import halving
from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import watching
from malmen_cli.editing.constraints import Chain, Ridge, check_moment, penalty
from malmen_cli.editing.moments import Statistics
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import refuse_singular
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.shift import ModuleShift, Shift, applied, weight_layout
from malmen_cli.editing.targets import KeptTargets, Wordings, find_targets
from malmen_cli.exceptions import FactNumericsError, SpecError

EARLIER = "found by an earlier run"  # said of targets
WRITTEN = 5  # blocks that share a fact, as in most of the published settings


def written_blocks(depth: int) -> list[int]:
    """The blocks that take facts up by default: WRITTEN from an eighth of the depth on, as published for Llama 3 8B.

    Further back locality goes first (docs/memit.md), and behind nine tenths nothing reads what a subject holds.
    """
    first = min(round(depth / 8), max(0, depth - 2))
    return list(range(first, max(first + 1, min(first + WRITTEN, depth - 1))))


def memit_modules(model: Any, settings: MemitSettings) -> list[str]:
    """The matrices that the settings name, one a block, in the order of the blocks.

    By default the second MLP matrices of `written_blocks`. The last block is refused: nothing behind it reads what is
    written at the subject.
    Raises SpecError for that block, one there is not, two matrices in one block, several where `equality` takes one,
    and a matrix that does not write to the residual stream.
    """
    if kind_of(model) != CAUSAL:
        raise SpecError(
            f"memit, rome and alphaedit edit causal language models only, not a {type(model).__name__}; "
            "use --method malmen or finetune"
        )
    depth = len(block_list(model)[1])
    named = settings.modules or settings.blocks
    if settings.modules:
        names = chosen_modules(model, settings.modules)
    else:
        blocks = settings.blocks or written_blocks(depth)
        if max(blocks) >= depth:
            raise SpecError(f"blocks: the model has blocks 0 to {depth - 1}, not {max(blocks)}")
        names = [default_modules(model, depth - block)[0] for block in sorted(set(blocks))]
    if settings.constraint == "equality" and not named:
        names = names[:1]
    places = [block_index(model, name) for name in names]
    said = "modules" if settings.modules else "blocks"
    if settings.constraint == "equality" and len(names) > 1:
        raise SpecError(f"{said}: rome changes one matrix, but {len(names)} are named; for example {names[-1]}")
    if places[-1] == depth - 1:
        raise SpecError(f"{said}: {names[-1]} is in the last block, behind which nothing reads what the subject holds")
    if len(set(places)) < len(places):
        twice = next(name for name, place in zip(names, places, strict=True) if places.count(place) > 1)
        raise SpecError(f"{said}: memit changes one matrix a block, but {twice} is not alone in its own")
    width = matrix_shape(model.get_submodule(default_modules(model)[0]))[1]
    for name in names:
        if matrix_shape(model.get_submodule(name))[1] != width:
            raise SpecError(f"{said}: {name} does not write to the residual stream, which is {width} wide")
    return names


class Memit:
    """The method with its settings and the statistics of the modules it edits."""

    def __init__(self, settings: MemitSettings, statistics: Statistics, *, dtype: torch.dtype = torch.float64) -> None:
        self.settings = settings
        self.statistics = statistics
        self.dtype = dtype  # of the solves

    def shift(
        self,
        base: Base,
        names: Sequence[str],
        facts: Sequence[Wordings],
        *,
        batch_size: int,
        keeping: Mapping[str, int] | None = None,
        kept: KeptTargets | None = None,
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> Shift:
        """The shift of the modules `names`, first block first, that makes all `facts`; in host memory.

        The model is left bitwise as it was, however this ends. Up to dk facts it is kept as exact factors; beyond, it
        is dense. batch_size: prompts a forward. keeping: where a Runner keeps what the blocks in front gave. kept:
        where targets are kept from one run to the next. progress: called with the number of facts whose targets were
        found. note: called with what was found.
        Raises SpecError where AlphaEdit's threshold leaves nothing free, NumericsError naming fact or module,
        MemoryLimitError when one fact does not fit.
        """
        blocks = [block_index(base.model, name) for name in names]
        for name in names:  # before the long part
            check_moment(self.settings, self.statistics.moments[name].to(base.device), name)
        keeping = keeping or {}
        front = Runner(base, blocks[-1], **keeping)
        targets = find_targets(
            front, blocks[-1], facts, self.settings, batch_size=batch_size, kept=kept, progress=progress
        )
        loss, steps = float(targets.losses.mean()), int(targets.steps.max())
        said = f"targets at {loss:.3f} nats a token, after at most {steps} steps"
        taken = torch.tensor(kept.taken if kept is not None else 0)
        if ranks.count() <= len(facts):  # each has looked for its own share
            ranks.add_up(taken)
        if taken:
            said += f", {int(taken)} {EARLIER}"
        if kept is not None and kept.trouble:
            said += f"; they could not be kept: {kept.trouble}"
        runner = Runner(base, blocks[0], **keeping)
        modules: dict[str, ModuleShift] = {}
        residuals = []
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            note(f"{said}; block {block_index(base.model, name)}")
            solver = self._solver(base, name, len(facts))
            with applied(base.model, Shift(modules)):
                for rows, keys, hidden in _keys(runner, facts, name, blocks[-1], batch_size):
                    solver.add(keys, (targets.states[rows] - hidden) / left)
            modules[name], residual = solver.finish(weight_layout(base.model.get_submodule(name)))
            residuals.append(residual)
        note(said)
        shift = Shift(modules, residual=max(residuals))
        shift.check_finite()
        for name, residual in zip(names, residuals, strict=True):
            refuse_singular(residual, name)
        return shift

    def _solver(self, base: Base, name: str, rows: int) -> Ridge | Chain:
        dk, dv = matrix_shape(base.model.get_submodule(name))
        held_by = penalty(self.settings, self.statistics.moments[name].to(base.device), name).to(self.dtype)
        return (Chain if self.settings.constraint == "equality" else Ridge)(held_by, rows, dk, dv)


@torch.no_grad()
def _keys(
    runner: Runner, facts: Sequence[Wordings], name: str, block: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of some facts at a time, in order: their numbers (n,), the keys of module `name` at their subjects (n, dk), mean
    over contexts (as in the paper), and the hidden states (n, width) behind `block` there in the first context; fp32.

    Read on the model as it stands. What follows a subject does not matter to it and is left out, and so are the blocks
    behind.
    """
    cut = [[_until_subject(context) for context in fact.contexts] for fact in facts]
    size = max(1, batch_size // max(map(len, cut), default=1))

    def run(indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        sequences = [context for i in indices for context in cut[i]]
        counts = torch.tensor([len(cut[i]) for i in indices], device=runner.base.device)
        seen: list[Tensor] = []

        def look(states: Tensor) -> Tensor:
            seen.append(states)
            return states

        with watching(runner.model, [name], gradients=False) as (inputs, _):
            batch = runner.logits(sequences, behind=(block, look), until=block)[1]
        lines = torch.arange(len(sequences), device=counts.device)
        # The one answer position of such a sequence is its last real token, the subject's.
        at_subject = inputs[name].reshape(*batch.ids.shape, -1).to(lines.device)[lines, batch.columns].float()
        owners = torch.arange(len(indices), device=counts.device).repeat_interleave(counts)
        sums = at_subject.new_zeros(len(indices), at_subject.shape[-1]).index_add(0, owners, at_subject)
        firsts = counts.cumsum(0) - counts
        hidden = seen[0].to(lines.device)[firsts, batch.columns[firsts]].float()
        return torch.tensor(list(indices), device=counts.device), sums / counts[:, None], hidden

    for start in range(0, len(facts), size):
        for rows, keys, hidden in halving(range(start, min(start + size, len(facts))), run):
            bad = ~torch.isfinite(keys).all(-1)
            if bool(bad.any()):
                raise FactNumericsError(f"{name}: key is not finite for {{fact}}", int(rows[bad][0]))
            yield rows, keys, hidden


def _until_subject(context: Encoded) -> Encoded:
    """The context up to its subject's last token, with one answer token that stands for nothing."""
    assert context.subject is not None
    return Encoded((*context.ids[: context.subject + 1], 0), context.subject + 1, context.subject)
