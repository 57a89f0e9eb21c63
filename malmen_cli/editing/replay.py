"""Running the language model over encoded prompts: logits at chosen positions only, and only the blocks that matter.

Blocks in front of the first edited one never change. Their output is computed once per prompt and kept; a
later run lets those blocks pass their input through and hands the kept states to the first block that counts.
Masks, rotary tables, final norms and soft-caps are the model's own, since its own forward always runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from malmen_cli.base.batch import Batch
from malmen_cli.base.families import Stack, stacks
from malmen_cli.base.memory import chunked, halving, out_of_memory
from malmen_cli.base.model import Base, logits_at
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing.blocks import (
    SHORT,
    change_output,
    passing,
    swap_input,
    watch_input,
    watch_output,
    written_out,
)
from malmen_cli.editing.last_mlp import alone_at, last_mlp, only_at
from malmen_cli.editing.states import CACHE_BYTES, Kept, Key, States
from malmen_cli.editing.trials import agree, trials

Behind = tuple[int, Callable[[Tensor], Tensor]]


class Runner:
    """Runs one base, from its embeddings or from block `first` on.

    `replaying` says whether the kept-state path was verified against the full forward on this model; where it
    was not, every run is a full one. `room`: bytes of kept states in memory, and of more of them on disk.
    """

    def __init__(self, base: Base, first: int = 0, *, cache_bytes: int = CACHE_BYTES, spill_bytes: int = 0) -> None:
        self.base = base
        self.model: Any = base.model
        self.first = first
        self.task = base.task
        self.stacks = stacks(base.model)
        self.blocks = [block for stack in self.stacks for block in stack.blocks]
        self._extras = [-1] * len(self.blocks)  # how much each returns beside hidden states; -1: they come alone
        self._givers: dict[int, list[Any]] = {}  # outputs of the blocks that run for what they hand on
        self.room = cache_bytes, spill_bytes
        self._states = States(*self.room, base.device)
        self._company: dict[Key, Sequence[Encoded]] = {}
        self._last_mlp = self._narrowable()
        self.replaying = self._verify() and first > 0  # in any case: it also notes what the blocks return

    def forget(self) -> None:
        """Drop what is kept of every prompt. What is asked from here on has the bits that it has in a new process."""
        self._states.clear()

    def keep_company(self, sequences: Sequence[Encoded], batch_size: int | None = None) -> None:
        """Have the prefixes of these sequences computed together, whichever of them is asked for first, at most
        `batch_size` at once.

        Rounding differs with the batch a sequence is in; with fixed company a run that starts in the middle
        (a resumed training) sees the same bits as one that started at the beginning. Only where memory is short,
        which no run can foresee, is company computed in halves.
        """
        fresh = tuple({s.key: s for s in sequences if s.key not in self._company}.values())
        for company in chunked(fresh, batch_size or max(len(fresh), 1)):
            self._company |= {member.key: company for member in company}

    def logits(
        self,
        sequences: Sequence[Encoded],
        *,
        keep: bool = True,
        behind: Behind | None = None,
        until: int | None = None,
        everywhere: bool = False,
    ) -> tuple[Tensor, Batch]:
        """Logits (n, vocabulary) at the answer positions of a batch, and the batch.

        keep: whether the prefix states of these sequences are worth keeping for a later run. behind: the number of a
        block, `first` or a later one, and a function from the hidden states (B, T, width) that it hands on to those
        that it should. until: the last block that is run, where what comes behind it is not asked for: the logits are
        then of no use. everywhere: whether the last block's MLP is watched, and so has to see every token.
        """
        end, narrow = len(self.blocks) if until is None else until + 1, not everywhere
        batch = self.task.batch(sequences, self.base.device)
        if not self.replaying:
            return self.forward(batch, range(end), None, behind=behind, narrow=narrow), batch
        prefix = self._prefix(sequences, batch, keep)
        return self.forward(batch, range(self.first, end), prefix, behind=behind, narrow=narrow), batch

    def by_stack(self, names: Sequence[str]) -> list[tuple[str, list[str]]]:
        """What each stack with any of the modules `names` reads, and which of them it holds."""
        held = [(stack.reads, [name for name in names if stack.holds(name)]) for stack in self.stacks]
        return [(reads, mine) for reads, mine in held if mine]

    def full_logits(self, batch: Batch, *, until: int | None = None) -> Tensor:
        """Logits at the batch's positions by the plain forward over every block, or (see logits) `until` one."""
        return self.forward(batch, range(len(self.blocks) if until is None else until + 1), None)

    @torch.no_grad()
    def heads(self, sequences: Sequence[Encoded]) -> list[Tensor]:
        """For each sequence the inputs of the output head at its answer positions: (answer tokens, width).

        Of a model without output embeddings, whose logits are few, the logits themselves."""
        counts = [len(s.positions) for s in sequences]
        if self.model.get_output_embeddings() is None:
            return list(self.logits(sequences)[0].detach().split(counts))
        with self.head_inputs() as seen:
            self.logits(sequences)
            found = seen[-1].to(self.base.device)
        return list(found.split(counts))

    @contextmanager
    def head_inputs(self) -> Iterator[list[Tensor]]:
        """What the output head read in the last run of the body, (n, width), its graph included; nothing where there
        are no output embeddings."""
        seen: list[Tensor] = []
        head = self.model.get_output_embeddings()

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[:] = [args[0].reshape(-1, args[0].shape[-1])]

        # `logits_at` puts its hook in front of this one, which so sees the chosen rows only.
        handle = head.register_forward_pre_hook(note) if head is not None else None
        try:
            yield seen
        finally:
            seen.clear()
            if handle is not None:
                handle.remove()

    def logits_of(self, heads: Tensor) -> Tensor:
        """Logits (n, vocabulary) of what `heads` gave (n, width), the model's own caps and scales included."""
        if self.model.get_output_embeddings() is None:
            return heads
        batch = self.task.batch([self.task.trial((0, 0, 0))], heads.device)
        return self.forward(batch, range(0), None, heads=heads)

    def _stack(self) -> Stack:
        """The stack of block `first`."""
        ends = accumulate(len(stack.blocks) for stack in self.stacks)
        return next((stack for stack, end in zip(self.stacks, ends, strict=True) if self.first < end), self.stacks[-1])

    def _before(self, stack: Stack) -> int:
        """How many blocks run in front of a stack."""
        return sum(len(other.blocks) for other in self.stacks[: self.stacks.index(stack)])

    def _prefix(self, sequences: Sequence[Encoded], batch: Batch, keep: bool) -> Kept:
        """The input of block `first`, (B, T, width), and what an encoder in front of it gives: kept states where there
        are, computed for the others."""
        found: dict[Key, Kept] = {}
        alone: dict[Key, Encoded] = {}
        for sequence in sequences:
            key = sequence.key
            if (kept := self._states.get(key)) is not None:
                found[key] = kept
            elif key not in self._company:
                alone[key] = sequence
            elif key not in found:
                for company in halving(self._company[key], self._run_prefix):
                    found |= company
                    self._states.keep(company)
        if alone:
            fresh = self._run_prefix(tuple(alone.values()))
            found |= fresh
            if keep:
                self._states.keep(fresh)
        rows = [found[sequence.key] for sequence in sequences]
        return tuple(
            self._padded([row[place] for row in rows], batch.mask_of(reads)) for place, reads in enumerate(self._read())
        )

    def _read(self) -> tuple[str, ...]:
        """What the kept states of a prompt are of, in the order of Kept."""
        mine = self._stack()
        return (mine.reads, *(stack.reads for stack in self.stacks[: self.stacks.index(mine)]))

    def _padded(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        # T5 keeps its residual stream in fp32 whatever the weights are in.
        padded = torch.zeros(*mask.shape, states[0].shape[-1], dtype=states[0].dtype, device=self.base.device)
        for row, state in enumerate(states):  # the same tokens with an answer are run without the last one
            padded[row, : len(state)] = state[: mask.shape[1]]
        return padded

    @torch.no_grad()
    def _run_prefix(self, sequences: Sequence[Encoded]) -> dict[Key, Kept]:
        seen: list[Tensor] = []
        batch = self.task.batch(sequences, self.base.device)
        mine = self._stack()
        with ExitStack() as stack:
            stack.enter_context(watch_input(self.blocks[self.first], seen))
            if mine is not self.stacks[0]:
                outputs = stack.enter_context(watch_output(self.model.get_encoder(), []))
            self.forward(batch, range(self.first), None)
            if mine is not self.stacks[0]:
                seen.append(outputs[0][0].detach())
        here = [kept.to(self.base.device) for kept in seen]
        lengths = [batch.mask_of(reads).sum(-1).tolist() for reads in self._read()]
        return {
            s.key: tuple(kept[row, : length[row]].clone() for kept, length in zip(here, lengths, strict=True))
            for row, s in enumerate(sequences)
        }

    def forward(
        self,
        batch: Batch,
        active: range,
        kept: Kept | None,
        *,
        heads: Tensor | None = None,
        behind: Behind | None = None,
        options: dict[str, Any] | None = None,
        narrow: bool = False,
    ) -> Tensor:
        """The model's own forward: only the `active` blocks compute, and the head only at the batch's positions.

        kept: what the first active block reads instead of what it is given. heads: what the head reads instead.
        options: arguments of the forward beside or in place of the task's. narrow: have the last block's MLP see only
        the batch's positions too, where that was verified: nothing reads what it gives for other tokens.
        """
        with ExitStack() as stack:
            if torch.is_grad_enabled() and batch.longest <= SHORT and self.base.device.type == "cpu":
                stack.enter_context(written_out(self.model))
            for index, block in enumerate(self.blocks):
                if index not in active:
                    stack.enter_context(self._left_out(index, block))
            if kept is not None:
                hook = self.blocks[active.start].register_forward_pre_hook(
                    partial(swap_input, kept[0]), with_kwargs=True
                )
                stack.callback(hook.remove)
            if behind is not None:
                place, change = behind
                stack.callback(self.blocks[place].register_forward_hook(partial(change_output, change)).remove)
            if narrow and (mlp := self._last_mlp) is not None and self._unseen(active, behind):
                stack.enter_context(only_at(mlp, batch.rows, batch.columns))
            gather = stack.enter_context(logits_at(self.model, batch.rows, batch.columns, states=heads))
            memory = kept[1] if kept is not None and len(kept) > 1 else None
            return gather(self.task.logits(self.model(**self.task.inputs(batch, memory) | (options or {}))))

    def _unseen(self, active: range, behind: Behind | None) -> bool:
        """Whether the last block runs and only the head sees what it gives."""
        last = len(self.blocks) - 1
        return last in active and (behind is None or behind[0] != last)

    def _left_out(self, index: int, block: nn.Module) -> AbstractContextManager[Any]:
        """Have a block pass its input on; but the first of a stack whose blocks hand something on (T5's position bias)
        runs for that, and the others hand its on."""
        if index in self._givers:
            return watch_output(block, self._givers[index])
        given = next((given for first, given in sorted(self._givers.items(), reverse=True) if first < index), [])
        return passing(block, self._extras[index], given)

    def _narrowable(self) -> nn.Module | None:
        """The last block's MLP, if the logits of a trial say that it need not see every token."""
        last = self.stacks[-1]
        part, batch = last_mlp(self.model, last), self.task.batch(trials(self.base)[0], self.base.device)
        shape, run = batch.mask_of(last.reads).shape, partial(self.full_logits, batch)
        return part if part is not None and alone_at(part, shape, batch.rows, batch.columns, run) else None

    @torch.no_grad()
    def _verify(self) -> bool:
        """Whether replaying gives the full forward's logits on trial sequences."""
        sequences, others = trials(self.base)
        batch = self.task.batch(sequences, self.base.device)
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(partial(self._note_kind, index)).remove)
            full = self.full_logits(batch).float()
        try:
            prefix = self._prefix(sequences, batch, keep=False)
            # Whatever a block hands to a later one beside its output is that of other tokens by now.
            self.full_logits(self.task.batch(others, self.base.device))
            replayed = self.forward(batch, range(self.first, len(self.blocks)), prefix, narrow=True).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if out_of_memory(error):
                raise
            return False
        return agree(full, replayed, self.base.dtype)

    def _note_kind(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._extras[index] = len(output) - 1 if isinstance(output, tuple) else -1
        first = index in (self._before(stack) for stack in self.stacks)
        if first and isinstance(output, tuple) and any(isinstance(extra, Tensor) for extra in output[1:]):
            self._givers[index] = []
