"""Running the language model over encoded prompts: logits at chosen positions only, and only the blocks that matter.

Blocks in front of the first edited one never change. Their output is computed once per prompt and kept; a
later run lets those blocks pass their input through and hands the kept states to the first block that counts.
Masks, rotary tables, final norms and soft-caps are the model's own, since its own forward always runs.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from malmen_cli.base.families import block_list
from malmen_cli.base.model import Base, logits_at
from malmen_cli.base.prompts import Encoded
from malmen_cli.base.spill import Spill

CACHE_BYTES = 2 << 30  # kept block inputs, beyond which the least recently used are spilled, or dropped and recomputed
EDIT_CACHE_BYTES = 64 << 20  # of an edit on the CPU: each pass asks for a state once, which disk gives soon enough
SPILL_BYTES = 64 << 30  # on disk, where spilling is asked for
# Largest logit difference to a full forward, relative to the largest logit (2e-2 in half precision).
REPLAY_TOLERANCE = 1e-3


def edit_cache(base: Base) -> int:
    """Bytes of block inputs that an edit keeps in memory unless told otherwise."""
    return EDIT_CACHE_BYTES if base.device.type == "cpu" else CACHE_BYTES


Behind = tuple[int, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Batch:
    """Padded token ids with the positions whose logits are wanted.

    ids, mask: (B, T); rows, columns: (n,) the wanted positions; labels: (n,) the token each should predict;
    owners: (n,) index into the batch of the sequence each belongs to.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor

    @property
    def owners(self) -> Tensor:
        return self.rows


def make_batch(sequences: Sequence[Encoded], device: torch.device, *, side: str = "right", pad_id: int = 0) -> Batch:
    """Pad sequences to one (B, T) batch; positions are those that predict answer tokens."""
    width = max(len(s.ids) for s in sequences)
    offsets = [width - len(s.ids) if side == "left" else 0 for s in sequences]
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, (sequence, start) in enumerate(zip(sequences, offsets, strict=True)):
        ids[row, start : start + len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, start : start + len(sequence.ids)] = 1
    places = [
        (row, start + p, s.ids[p + 1])
        for row, (s, start) in enumerate(zip(sequences, offsets, strict=True))
        for p in s.positions
    ]
    rows, columns, labels = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T.to(device)
    return Batch(ids.to(device), mask.to(device), rows, columns, labels)


class Runner:
    """Runs one base, from its embeddings or from block `first` on.

    `replaying` says whether the kept-state path was verified against the full forward on this model; where it
    was not, every run is a full one.
    """

    def __init__(self, base: Base, first: int = 0, *, cache_bytes: int = CACHE_BYTES, spill_bytes: int = 0) -> None:
        self.base = base
        self.model: Any = base.model
        self.first = first
        self.blocks = block_list(base.model)[1]
        self._takes_positions = "position_ids" in inspect.signature(base.model.forward).parameters
        self._tuples = [False] * len(self.blocks)
        self._states: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._company: dict[tuple[int, ...], tuple[Encoded, ...]] = {}
        self._free = cache_bytes
        self._spill = Spill(spill_bytes)
        self.replaying = self._verify() and first > 0  # in any case: it also notes what the blocks return

    def keep_company(self, sequences: Sequence[Encoded]) -> None:
        """Have the prefixes of these sequences computed together, whichever of them is asked for first.

        Rounding differs with the batch a sequence is in; with fixed company a run that starts in the middle
        (a resumed training) sees the same bits as one that started at the beginning.
        """
        company = tuple({s.ids: s for s in sequences if s.ids not in self._company}.values())
        self._company |= {member.ids: company for member in company}

    def logits(
        self, sequences: Sequence[Encoded], *, keep: bool = True, behind: Behind | None = None
    ) -> tuple[Tensor, Batch]:
        """Logits (n, vocabulary) at the answer positions of a batch, and the batch.

        keep: whether the prefix states of these sequences are worth keeping for a later run. behind: the number of a
        block, `first` or a later one, and a function from the hidden states (B, T, width) that it hands on to those
        that it should.
        """
        batch = make_batch(sequences, self.base.device)
        if not self.replaying:
            return self._forward(batch, range(len(self.blocks)), None, behind=behind), batch
        prefix = self._prefix(sequences, batch, keep)
        return self._forward(batch, range(self.first, len(self.blocks)), prefix, behind=behind), batch

    def full_logits(self, batch: Batch) -> Tensor:
        """Logits at the batch's positions by the model's plain forward over every block."""
        return self._forward(batch, range(len(self.blocks)), None)

    @torch.no_grad()
    def heads(self, sequences: Sequence[Encoded]) -> list[Tensor]:
        """For each sequence the inputs of the output head at its answer positions: (answer tokens, width)."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0].detach())

        # `logits_at` puts its hook in front of this one, which so sees the chosen rows only.
        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            self.logits(sequences)
        finally:
            handle.remove()
        states = kept[-1].reshape(-1, kept[-1].shape[-1])
        return list(states.split([len(s.positions) for s in sequences]))

    def logits_of(self, heads: Tensor) -> Tensor:
        """Logits (n, vocabulary) of kept head inputs (n, width), the model's own caps and scales included."""
        places = torch.zeros(1, dtype=torch.long, device=heads.device)
        batch = Batch(places[None], places[None] + 1, places, places, places)
        return self._forward(batch, range(0), None, heads=heads)

    def _prefix(self, sequences: Sequence[Encoded], batch: Batch, keep: bool) -> Tensor:
        """The input of block `first`, (B, T, width): kept states where there are, computed for the others."""
        found: dict[tuple[int, ...], Tensor] = {}
        alone: dict[tuple[int, ...], Encoded] = {}
        for sequence in sequences:
            if sequence.ids in self._states:
                self._states.move_to_end(sequence.ids)
                found[sequence.ids] = self._states[sequence.ids]
            elif (spilled := self._spill.get(sequence.ids, self.base.device)) is not None:
                found[sequence.ids] = spilled  # stays on disk: in a pass over all facts each is asked for once
            elif sequence.ids not in self._company:
                alone[sequence.ids] = sequence
            elif sequence.ids not in found:
                company = self._run_prefix(self._company[sequence.ids])
                found |= company
                self._remember(company)
        if alone:
            fresh = self._run_prefix(tuple(alone.values()))
            found |= fresh
            if keep:
                self._remember(fresh)
        width = next(iter(found.values())).shape[-1]
        padded = torch.zeros(*batch.ids.shape, width, dtype=self.base.dtype, device=self.base.device)
        for row, sequence in enumerate(sequences):
            padded[row, : len(sequence.ids)] = found[sequence.ids]
        return padded

    @torch.no_grad()
    def _run_prefix(self, sequences: Sequence[Encoded]) -> dict[tuple[int, ...], Tensor]:
        seen: list[Tensor] = []
        with _watch_input(self.blocks[self.first], seen):
            self._forward(make_batch(sequences, self.base.device), range(self.first), None)
        return {s.ids: seen[0][row, : len(s.ids)].clone() for row, s in enumerate(sequences)}

    def _remember(self, states: dict[tuple[int, ...], Tensor]) -> None:
        for ids, state in states.items():
            self._free -= state.nbytes - (self._states[ids].nbytes if ids in self._states else 0)
            self._states[ids] = state
        gone: dict[tuple[int, ...], Tensor] = {}
        while self._free < 0 and len(self._states) > 1:
            ids, state = self._states.popitem(last=False)
            gone[ids] = state
            self._free += state.nbytes
        self._spill.add(gone)

    def _forward(
        self,
        batch: Batch,
        active: range,
        states: Tensor | None,
        *,
        heads: Tensor | None = None,
        behind: Behind | None = None,
    ) -> Tensor:
        """The model's own forward: only the `active` blocks compute, and the head only at the batch's positions."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                if index not in active:
                    stack.enter_context(_passing(block, self._tuples[index]))
            if states is not None:
                hook = self.blocks[active.start].register_forward_pre_hook(
                    partial(_swap_input, states), with_kwargs=True
                )
                stack.callback(hook.remove)
            if behind is not None:
                place, change = behind
                stack.callback(self.blocks[place].register_forward_hook(partial(_change_output, change)).remove)
            gather = stack.enter_context(logits_at(self.model, batch.rows, batch.columns, states=heads))
            options: dict[str, Any] = {"use_cache": False, "attention_mask": batch.mask}
            if self._takes_positions:
                options["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0)
            return gather(self.model(batch.ids, **options).logits)

    @torch.no_grad()
    def _verify(self) -> bool:
        """Whether replaying gives the full forward's logits on two sequences of unequal length."""
        vocabulary = self.model.get_input_embeddings().num_embeddings
        tokens = [(7 * i + 3) % min(vocabulary, 1000) for i in range(9)]
        sequences, others = ([Encoded(tuple(t), 2), Encoded(tuple(t[2:7]), 2)] for t in (tokens, tokens[::-1]))
        batch = make_batch(sequences, self.base.device)
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(partial(self._note_kind, index)).remove)
            full = self.full_logits(batch).float()
        try:
            prefix = self._prefix(sequences, batch, keep=False)
            # Whatever a block hands to a later one beside its output is that of other tokens by now.
            self.full_logits(make_batch(others, self.base.device))
            replayed = self._forward(batch, range(self.first, len(self.blocks)), prefix).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return False
        tolerance = REPLAY_TOLERANCE if self.base.dtype == torch.float32 else 2e-2
        return bool((full - replayed).abs().max() <= tolerance * full.abs().max().clamp(min=1e-6))

    def _note_kind(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        self._tuples[index] = isinstance(output, tuple)


def _swap_input(states: Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (states, *args[1:]), kwargs
    return args, kwargs | {"hidden_states": states}


def _change_output(change: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


@contextmanager
def _passing(block: nn.Module, as_tuple: bool) -> Iterator[None]:
    """Let a block return its input unchanged, in the form its own forward uses."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, None) if as_tuple else states

    own = vars(block).get("forward")  # set by whoever wrapped this block before us
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


@contextmanager
def _watch_input(block: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
