"""Captured rows of one group of modules, stacked, and what of them each rank has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.editing.capture import Rows
from malmen_cli.editing.editor import Group


@dataclass(frozen=True)
class Captured:
    """Stacked rows of one group: keys (m, n, dk), gradients (m, n, dv), owners (n,) index of each row's fact, and
    roles (n,) of each row's token."""

    keys: Tensor
    gradients: Tensor
    owners: Tensor
    roles: Tensor

    def of(self, rows: slice) -> Captured:
        """Some of the rows."""
        return Captured(self.keys[:, rows], self.gradients[:, rows], self.owners[rows], self.roles[rows])

    def split(self, size: int) -> Iterator[Captured]:
        """The rows, at most `size` at a time; of none, one part with none."""
        for start in range(0, max(len(self.roles), 1), size):
            yield self.of(slice(start, start + size))

    def own(self) -> Captured:
        """The rows of this rank's share of the modules."""
        own = ranks.mine()
        return Captured(self.keys[own], self.gradients[own], self.owners, self.roles)


def gather(group: Group, parts: Iterable[Rows]) -> Captured:
    """All rows of a few LM batches of all ranks, in the order of the facts whatever the batches were."""
    return of_all_ranks(stacked(group, group.own(parts)), lambda rows: ranks.collected(rows, 1))


def deal(group: Group, parts: Iterable[Rows]) -> Captured:
    """The same of this rank's share of the modules: what `joined` takes."""
    return of_all_ranks(stacked(group, group.own(parts)), ranks.dealt)


def stacked(group: Group, parts: Sequence[Rows]) -> Captured:
    """The rows of this rank's LM batches that are of the group."""
    return concatenated(
        group, [Captured(group.stack(p.keys), group.stack(p.gradients), p.owners, p.roles) for p in parts]
    )


def concatenated(group: Group, parts: Sequence[Captured]) -> Captured:
    """One after another."""
    if not parts:  # of a rank without a fact
        mean = group.network.mean
        none = mean.new_zeros(len(group.names), 0, group.dk + group.dv).split([group.dk, group.dv], -1)
        return Captured(*none, *(torch.zeros(0, dtype=torch.long, device=mean.device) for _ in range(2)))
    return Captured(
        torch.cat([part.keys for part in parts], 1),
        torch.cat([part.gradients for part in parts], 1),
        torch.cat([part.owners for part in parts]),
        torch.cat([part.roles for part in parts]),
    )


def of_all_ranks(captured: Captured, exchanged: Callable[[Tensor], Tensor]) -> Captured:
    """The rows of all ranks in the order of the facts. exchanged: what keys and gradients (m, n, *) of one rank become,
    all ranks' one after another."""
    keys, gradients = (exchanged(rows) for rows in (captured.keys, captured.gradients))
    owners, roles = ranks.collected(captured.owners), ranks.collected(captured.roles)
    order = owners.argsort(stable=True)
    return Captured(keys[:, order], gradients[:, order], owners[order], roles[order])


def in_chunks(parts: Iterable[Rows], size: int) -> Iterator[list[Rows]]:
    """LM batches collected until they hold `size` rows, so that sums are updated by tall blocks."""
    held: list[Rows] = []
    for part in parts:
        held.append(part)
        if sum(len(p.owners) for p in held) >= size:
            yield held
            held = []
    if held:
        yield held
