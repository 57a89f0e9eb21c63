"""Keys and value gradients of facts on the unedited base: captured once a fact, and kept.

A training comes back to every fact, and its first pass over them always finds the base as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.families import matrix_shape
from malmen_cli.base.memory import chunked, halving
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing.capture import Rows, batch_rows, places
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.states import Kept, States
from malmen_cli.exceptions import FactNumericsError, NumericsError


class BaseRows:
    """The rows of facts on the base, each captured once, always together with the same other facts, at most
    `batch_size` at once. They are kept on the host, in as many bytes as the runner's own states and apart from these: a
    fact has more bytes of rows than of states, and loses less with them."""

    def __init__(self, runner: Runner, names: Sequence[str], tokens: str, batch_size: int) -> None:
        self._runner, self._names, self._tokens, self._batch_size = runner, list(names), tokens, batch_size
        self._stacks = runner.by_stack(names)
        self._widths = {name: matrix_shape(runner.model.get_submodule(name)) for name in names}
        self._kept = States(*runner.room, torch.device("cpu"))
        self._company: dict[Encoded, Sequence[Encoded]] = {}  # nobody's, where the rows are another rank's to capture
        self._ids: dict[Encoded, str] = {}

    def keep_company(self, edits: Sequence[Encoded], ids: Sequence[str] = ()) -> None:
        """Have the rows of these facts, of which one is called by its id when it is not finite, captured together (see
        Runner.keep_company); of several ranks, each captures the same share of all facts ever after."""
        for edit, name in zip(edits, ids, strict=False):
            self._ids.setdefault(edit, name)
        fresh = tuple(dict.fromkeys(edit for edit in edits if edit not in self._company))
        for company in chunked(fresh, self._batch_size):
            before = len(self._company)
            share = ranks.share(before + len(company))
            own = [edit for number, edit in enumerate(company, before) if number in share]
            self._company |= dict.fromkeys(company, ()) | dict.fromkeys(own, own)

    def of(self, edits: Sequence[Encoded]) -> list[Rows]:
        """What `edit_rows` gives of this rank's share, in one Rows a stack, but for the modules' outputs, which are not
        kept. The base must be unedited while this runs. Raises as `edit_rows` does."""
        self.keep_company(edits)
        own = [i for i, edit in enumerate(edits) if self._company[edit]]
        found: dict[Encoded, Kept] = {}
        for edit in dict.fromkeys(edits[i] for i in own):
            if edit not in found:
                kept = self._kept.get(edit)
                found |= self._captured(edit, edits) if kept is None else {edit: kept}
        return [self._joined(place, own, edits, found) for place in range(len(self._stacks))] if own else []

    def _captured(self, edit: Encoded, edits: Sequence[Encoded]) -> dict[Encoded, Kept]:
        """The rows of an edit's company, which are kept."""
        company = self._company[edit]
        try:
            fresh = self._capture(company)
        except FactNumericsError as error:
            culprit = company[error.number]
            if culprit in edits:
                raise FactNumericsError(error.said, list(edits).index(culprit)) from error
            named = f"fact {self._ids[culprit]}" if culprit in self._ids else "a fact of an earlier step"
            raise NumericsError(error.said.replace("{fact}", named)) from error
        self._kept.keep(fresh)
        return fresh

    def _capture(self, company: Sequence[Encoded]) -> dict[Encoded, Kept]:
        def run(part: Sequence[int]) -> dict[Encoded, Kept]:
            rows = batch_rows(self._runner, company, self._names, part, self._tokens, keep=True)
            packed = [
                self._packed(place, mine).split([self._count(company[i], place) for i in part])
                for place, mine in enumerate(rows)
            ]
            return {
                company[i]: tuple(each.cpu().clone() for each in mine)
                for i, mine in zip(part, zip(*packed, strict=True), strict=True)
            }

        fresh: dict[Encoded, Kept] = {}
        for batch in by_length([edit.length for edit in company], self._batch_size):
            for part in halving(batch, run):
                fresh |= part
        return fresh

    def _packed(self, place: int, rows: Rows) -> Tensor:
        """Keys and gradients of all modules of a stack side by side (n, *): in the base's own type, which most models
        have them in, where that loses nothing."""
        _, names = self._stacks[place]
        whole = torch.cat([tensor for name in names for tensor in (rows.keys[name], rows.gradients[name])], 1)
        if self._runner.base.dtype.itemsize >= whole.dtype.itemsize:
            return whole
        small = whole.to(self._runner.base.dtype)
        return small if small.float().equal(whole) else whole

    def _count(self, edit: Encoded, place: int) -> int:
        return len(places(edit, self._tokens, self._stacks[place][0]))

    def _joined(self, place: int, own: Sequence[int], edits: Sequence[Encoded], found: dict[Encoded, Kept]) -> Rows:
        """The rows of the edits `own`, unpacked."""
        reads, names = self._stacks[place]
        device = self._runner.base.device
        whole = torch.cat([found[edits[i]][place] for i in own]).to(device).float()
        columns = iter(whole.split(list(chain(*(self._widths[name] for name in names))), 1))
        pairs = {name: (next(columns), next(columns)) for name in names}
        spots = [(i, role) for i in own for _, role in places(edits[i], self._tokens, reads)]
        owners, roles = torch.tensor(spots, dtype=torch.long).reshape(-1, 2).T.to(device)
        keys, gradients = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
        return Rows(keys, gradients, {}, owners, roles, float("nan"))
