"""What a module's keys look like over ordinary text: `C = E[k k']`, which MEMIT, ROME and AlphaEdit keep in place.

MEMIT (arXiv 2210.07229, section 4.2) estimates C from 100,000 samples of Wikipedia. It is a sum over tokens, so it is
streamed: memory grows with the width of the keys alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.families import matrix_shape
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import all_keys
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import NumericsError


@dataclass(frozen=True)
class Statistics:
    """Second moments of keys by module, (dk, dk) fp32 in host memory, and the text they were taken over."""

    moments: Mapping[str, Tensor]
    tokens: int
    source: Mapping[str, object] = field(default_factory=dict)


def second_moments(
    runner: Runner,
    sequences: Sequence[Encoded],
    names: Sequence[str],
    batch_size: int,
    progress: Callable[[int], None] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """`E[k k']` over every token of `sequences`, per module (dk, dk) `dtype` in host memory; summed in fp64. Of several
    ranks, each reads its share of them.

    progress: called with the number of tokens of every batch. Raises NumericsError naming a module whose keys are not
    finite, MemoryLimitError when one sequence does not fit.
    """
    device = runner.base.device
    sums = {}
    for name in names:
        width = matrix_shape(runner.model.get_submodule(name))[0]
        sums[name] = torch.zeros(width, width, dtype=torch.float64, device=device)
    counts = {name: torch.zeros((), dtype=torch.long, device=device) for name in names}
    for keys in all_keys(runner, [sequences[i] for i in ranks.share(len(sequences))], names, batch_size):
        for name in names:  # products of a batch in fp32: a batch is short, the sum over batches is not
            sums[name] += keys[name].mT @ keys[name]
            counts[name] += len(keys[name])  # an encoder's tokens are not its decoder's
        if progress is not None:
            progress(ranks.count() * len(keys[names[0]]))
    ranks.add_up(*counts.values(), *sums.values())
    for name, total in sums.items():
        if not bool(torch.isfinite(total.sum())):
            raise NumericsError(f"{name}: its keys are not finite; load the base in another --dtype")
    return {name: (total / counts[name].clamp(min=1)).to(dtype).cpu() for name, total in sums.items()}
