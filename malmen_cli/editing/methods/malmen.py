"""MALMEN: value shifts from a hyper-network, joined into one shift per module by a ridge problem.

Tan, Zhang and Fu, ICLR 2024 (arXiv 2311.04661). `aggregation: sum` is MEND (Mitchell et al., ICLR 2022): the
same network with `S = -lr sum_j k~_j g~_j'`. The preserved-key term is MEMIT's guard inside MALMEN's ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from malmen_cli.base import ranks
from malmen_cli.base.memory import trim_heap
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.capture import edit_rows, row_count
from malmen_cli.editing.editor import Editor, Group
from malmen_cli.editing.hypernetwork import EVERY
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.ridge import NormalEquations, Solution, refuse_singular, solve, solve_dual
from malmen_cli.editing.shift import ModuleShift, Shift
from malmen_cli.editing.stacked import Captured, concatenated, in_chunks, of_all_ranks, stacked

HELD = 1 << 27  # bytes that the network's graph may take while the LM runs, rather than be made again behind it
CHUNK = 512  # rows that go through the hyper-network at once: enough for tall products, little to hold


class Malmen:
    """The method with one editor. Nothing depends on LM batch size, chunk size or the order of facts."""

    def __init__(
        self, editor: Editor, *, chunk: int = CHUNK, dtype: torch.dtype = torch.float64, damped: bool = False
    ) -> None:
        self.editor = editor
        self.chunk = chunk
        self.damped = damped  # what is learned pushes less: in passes that no training has
        self.dtype = dtype  # of sums and solves; one edit is solved once, so exactness is worth more than its time

    def shift(
        self,
        runner: Runner,
        edits: Sequence[Encoded],
        fact_ids: Sequence[str],
        *,
        batch_size: int,
        keep: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Shift:
        """The one parameter shift that makes all `edits` at once, streamed over LM batches; in host memory.

        Up to dk rows the factors are exact and kept; beyond, only sums over rows are, so that memory does not
        grow with the number of facts. keep: whether prefix states are worth keeping for another pass. progress: called
        with the number of facts done in each batch.
        """
        tokens = self.editor.settings.tokens
        groups = self.editor.groups
        collectors = [_collector(self, group, row_count(edits, tokens, group.reads)) for group in groups]
        rows_of = edit_rows(runner, edits, self.editor.names, batch_size, tokens, keep=keep)
        for chunk in in_chunks(rows_of, self.chunk):
            for collector in collectors:
                if mine := collector.group.own(chunk):
                    collector.add(stacked(collector.group, mine))
            if progress is not None:
                facts = sum(int(part.owners.unique().numel()) for part in groups[-1].own(chunk))
                progress(ranks.count() * facts)
            chunk.clear()  # its rows are in the sums; the next chunk fills while this name still holds the list
            trim_heap()
        modules: dict[str, ModuleShift] = {}
        orders: set[tuple[int, ...]] = set()
        residuals = []
        for collector in collectors:
            solved, order, residual = collector.finish(self.editor.layouts)
            modules |= solved
            orders |= {tuple(order.tolist())} if len(order) else set()
            residuals.append(residual)
        # Rows of an encoder are not those of its decoder: then no one list says whose each is.
        row_facts = tuple(fact_ids[i] for i in orders.pop()) if len(orders) == 1 else ()
        shift = Shift({name: modules[name] for name in self.editor.names}, row_facts, max(residuals))
        for collector, residual in zip(collectors, residuals, strict=True):
            refuse_singular(residual, *collector.group.names)
        shift.check_finite()
        return shift

    @torch.no_grad()
    def value_shifts(self, group: Group, captured: Captured, modules: slice = EVERY) -> Tensor:
        """V (m, n, dv) of captured rows of the group's `modules`, `chunk` rows at a time."""
        parts = captured.split(self.chunk)
        shifts_of = partial(group.network.value_shifts, modules=modules, damped=self.damped)
        return torch.cat([shifts_of(part.keys, part.gradients, part.roles) for part in parts], 1)

    def held_values(self, group: Group, captured: Captured, modules: slice) -> Tensor:
        """The same in one go, with their graph."""
        with torch.enable_grad():
            given = captured.keys, captured.gradients, captured.roles, modules
            return group.network.value_shifts(*given, damped=self.damped)

    @torch.no_grad()
    def outer_factors(self, group: Group, captured: Captured, modules: slice = EVERY) -> tuple[Tensor, Tensor]:
        """MEND's factors: left (m, dk, n) pseudo-keys, right (m, n, dv) scaled pseudo-gradients."""
        parts = captured.split(self.chunk)
        pairs = [group.network.features(part.keys, part.gradients, part.roles, modules) for part in parts]
        right = -group.network.steps(captured.roles, modules) * torch.cat([g for _, g in pairs], 1)
        return torch.cat([k for k, _ in pairs], 1).mT, right

    def joined(self, captured: Sequence[Captured], *, learning: bool = False) -> tuple[Shift, list[Solution | None]]:
        """The dense shift of captured rows, one Captured a group, and what `pull_back` needs of each solve. Of several
        ranks, each gives the rows of its own modules, and all have the shift. learning: whether `pull_back` will be
        called, so that the network's graph is worth keeping where it is small."""
        modules: dict[str, ModuleShift] = {}
        solutions: list[Solution | None] = []
        own = ranks.mine()
        for group, rows in zip(self.editor.groups, captured, strict=True):
            if self.editor.settings.aggregation == "sum":
                left, right = self.outer_factors(group, rows, own)
                matrices = left @ right
                solutions.append(None)
            else:
                held = learning and _graph_bytes(group, rows) <= HELD
                values = (self.held_values if held else self.value_shifts)(group, rows, own)
                solution = solve(rows.keys, values.detach(), group.penalty(len(rows.roles)).part(own))
                matrices = solution.matrix().float()
                solutions.append(replace(solution, values=values) if held else solution)
            matrices, layouts = ranks.assembled(matrices, len(group.names)), self.editor.layouts
            modules |= {name: ModuleShift(layouts[name], dense=matrices[i]) for i, name in enumerate(group.names)}
        return Shift(modules), solutions

    def pull_back(self, group: Group, captured: Captured, gradient: Tensor, solution: Solution | None) -> None:
        """Add to the group's parameter gradients, given dL/dS (m, dk, dv) of all its modules; captured and solution are
        of this rank's. The LM is not in the graph.

        Ridge: `<dL/dV, V(theta)>` with dL/dV from the solve, and the closed forms for log lambda and log mu.
        Sum (MEND): `<dL/dS, S(theta)>` directly.
        """
        network, gradient = group.network, gradient[ranks.mine()]
        if solution is not None:
            by_value, by_lambda, by_mu = solution.pull_back(captured.keys, gradient)
            _accumulate(network.log_lambda, ranks.assembled(by_lambda, len(group.names)))
            _accumulate(network.log_mu, ranks.assembled(by_mu, len(group.names)))
            losses = self._of_values(group, captured, by_value.to(captured.keys.dtype), solution.values)
        else:
            losses = self._of_a_sum(group, captured, gradient)
        sums = [torch.zeros_like(parameter) for parameter in network.parameters()]
        for loss in losses:
            found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
            for total, more in zip(sums, found, strict=True):
                if more is not None:
                    total += more
        ranks.add_up(*sums)
        for parameter, total in zip(network.parameters(), sums, strict=True):
            _accumulate(parameter, total)

    def _of_values(self, group: Group, captured: Captured, by_value: Tensor, held: Tensor | None) -> Iterator[Tensor]:
        """`<dL/dV, V>` with its graph, a chunk of rows at a time; of values that hold theirs, at once."""
        if held is not None:
            with torch.enable_grad():
                loss = (by_value * held).sum()
            yield loss
            return
        done = 0
        for part in captured.split(self.chunk):
            values = self.held_values(group, part, ranks.mine())
            with torch.enable_grad():
                loss = (by_value[:, done : done + len(part.roles)] * values).sum()
            yield loss
            done += len(part.roles)

    def _of_a_sum(self, group: Group, captured: Captured, gradient: Tensor) -> Iterator[Tensor]:
        """`<dL/dS, S>` of MEND's sum with its graph, a chunk of rows at a time."""
        network, own = group.network, ranks.mine()
        for part in captured.split(self.chunk):
            with torch.enable_grad():
                pseudo_keys, pseudo_gradients = network.features(part.keys, part.gradients, part.roles, own)
                loss = -((pseudo_keys @ gradient) * pseudo_gradients * network.steps(part.roles, own)).sum()
            yield loss


def _graph_bytes(group: Group, captured: Captured) -> int:
    """What the graph of these rows' values keeps: about five tensors a block of the network, and two more."""
    return (5 * len(group.network.down) + 2) * 4 * (captured.keys.numel() + captured.gradients.numel())


def _accumulate(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


class _LowRank:
    """Keeps every row (at most dk of them) and gives exact factors."""

    def __init__(self, method: Malmen, group: Group) -> None:
        self.method, self.group = method, group
        self.parts: list[Captured] = []

    def add(self, captured: Captured) -> None:
        self.parts.append(captured)

    def finish(self, layouts: dict[str, str]) -> tuple[dict[str, ModuleShift], Tensor, float]:
        captured, own = of_all_ranks(concatenated(self.group, self.parts), ranks.dealt), ranks.mine()
        residual = 0.0
        if self.method.editor.settings.aggregation == "sum":
            left, right = self.method.outer_factors(self.group, captured, own)
        else:
            values = self.method.value_shifts(self.group, captured, own)
            dtype = self.method.dtype
            penalty = self.group.penalty(len(captured.roles), dtype).part(own)
            solution = solve_dual(captured.keys.to(dtype), values.to(dtype), penalty)
            assert solution.left is not None and solution.right is not None
            left, right, residual = solution.left, solution.right, ranks.worst(solution.residual)
        left, right = (ranks.assembled(part.float(), len(self.group.names)).cpu() for part in (left, right))
        shifts = {
            name: ModuleShift(layouts[name], left=left[i].contiguous(), right=right[i].contiguous())
            for i, name in enumerate(self.group.names)
        }
        return shifts, captured.owners.cpu(), residual


class _Streamed:
    """Keeps only the normal equations' sums over rows."""

    def __init__(self, method: Malmen, group: Group, rows: int) -> None:
        self.method, self.group = method, group
        self.equations = NormalEquations(group.penalty(rows, method.dtype), group.dk, group.dv)

    def add(self, captured: Captured) -> None:
        self.equations.add(captured.keys, self.method.value_shifts(self.group, captured))

    def finish(self, layouts: dict[str, str]) -> tuple[dict[str, ModuleShift], Tensor, float]:
        self.equations.add_up()
        solution = self.equations.part(ranks.mine()).solve()
        matrices = ranks.assembled(solution.matrix().float(), len(self.group.names))
        return _dense(self.group, layouts, matrices), torch.zeros(0, dtype=torch.long), ranks.worst(solution.residual)


class _Summed:
    """Keeps only the sum of MEND's outer products."""

    def __init__(self, method: Malmen, group: Group) -> None:
        self.method, self.group = method, group
        like = group.network.mean
        self.sum = torch.zeros(len(group.names), group.dk, group.dv, dtype=method.dtype, device=like.device)

    def add(self, captured: Captured) -> None:
        left, right = self.method.outer_factors(self.group, captured)
        self.sum += left.to(self.sum.dtype) @ right.to(self.sum.dtype)

    def finish(self, layouts: dict[str, str]) -> tuple[dict[str, ModuleShift], Tensor, float]:
        ranks.add_up(self.sum)
        return _dense(self.group, layouts, self.sum), torch.zeros(0, dtype=torch.long), 0.0


def _dense(group: Group, layouts: dict[str, str], matrices: Tensor) -> dict[str, ModuleShift]:
    return {
        name: ModuleShift(layouts[name], dense=matrices[i].float().cpu().contiguous())
        for i, name in enumerate(group.names)
    }


def _collector(method: Malmen, group: Group, rows: int) -> _LowRank | _Streamed | _Summed:
    if rows <= group.dk:
        return _LowRank(method, group)
    return _Summed(method, group) if method.editor.settings.aggregation == "sum" else _Streamed(method, group, rows)
