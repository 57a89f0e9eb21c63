"""What a module saw and what the loss asks of it: keys and value gradients, captured at leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from malmen_cli.base import ranks
from malmen_cli.base.batch import Batch
from malmen_cli.base.families import IDS, SOURCE, block_index
from malmen_cli.base.memory import halving
from malmen_cli.base.prompts import Encoded, by_length
from malmen_cli.editing import losses
from malmen_cli.editing.replay import Runner
from malmen_cli.exceptions import FactNumericsError


@dataclass(frozen=True)
class Rows:
    """Captured rows of a few facts, of modules in one stack. Module axis m in the order of `names`.

    keys: per name (n, dk) fp32; gradients: per name (n, dv) fp32; values: per name (n, dv) fp32, the module's
    output there; owners: (n,) long, index of each row's fact in the sequence given; roles: (n,) long, see ROLES.
    """

    keys: dict[str, Tensor]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]
    owners: Tensor
    roles: Tensor
    loss: float


# What a row's token is in its fact: tokens of one role have keys and gradients of one scale.
PROMPT_END, ANSWER, SUBJECT, CONTEXT = range(4)
ROLES = {"answer": 2, "subject": 3, "all": 4}  # setting `tokens` -> number of roles there are


def places(edit: Encoded, tokens: str, reads: str = IDS) -> list[tuple[int, int]]:
    """The positions of an edit that give rows, each with its role, in order of position.

    `answer`: where answer tokens are predicted (MALMEN). `subject`: the subject's last token too, where MEMIT found
    facts to be looked up. `all`: every token whose output the answer can see. The first token is left alone unless it
    is the whole prompt: as the attention sink it has one huge key whatever its word; a shift there moves every text.

    reads: what the modules' stack reads. In an encoder rows are taken where its output is read: everywhere by a
    decoder, at the first token by a classification head.
    """
    if reads == SOURCE:
        role = dict.fromkeys(range(len(edit.source)), CONTEXT) if tokens == "all" else {}
        role |= dict.fromkeys(range(edit.read), PROMPT_END)
    else:
        role = dict.fromkeys(range(1, edit.n_prompt), CONTEXT) if tokens == "all" else {}
    subject = edit.subject if edit.subject or edit.source else None  # an encoder has no sink: its first token counts
    if tokens != "answer" and subject is not None and bool(edit.source) == (reads == SOURCE):
        role[subject] = SUBJECT
    if reads == IDS:
        role |= {position: ANSWER if position >= edit.n_prompt else PROMPT_END for position in edit.positions}
    return sorted(role.items())


def row_count(edits: Sequence[Encoded], tokens: str, reads: str = IDS) -> int:
    """How many rows `edits` will give."""
    return sum(len(places(edit, tokens, reads)) for edit in edits)


@contextmanager
def watching(
    model: nn.Module, names: Sequence[str], *, gradients: bool
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Collect inputs and outputs of the named leaves, as the module sees them, during the body.

    gradients: start an autograd graph at the outputs, so that `torch.autograd.grad` can be asked for them
    without computing any weight gradient.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            if gradients and not output.requires_grad:
                output = output.detach().requires_grad_(True)
            outputs[name] = output
            return output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def edit_rows(
    runner: Runner, edits: Sequence[Encoded], names: Sequence[str], batch_size: int, tokens: str, *, keep: bool = False
) -> Iterator[Rows]:
    """Keys and value gradients of `edits` at the places that `tokens` asks for, one LM batch at a time, longest first;
    of each batch one Rows a stack that has modules among `names`. Of several ranks, each has the rows of its share of
    the edits.

    The loss of a fact is the sum over its answer tokens divided by their number, and facts are summed, so that
    the rows do not depend on how facts are batched. A batch that does not fit in memory is halved.
    Raises FactNumericsError naming the module, MemoryLimitError when one fact does not fit.
    """
    own = ranks.share(len(edits))
    for batch in by_length([edits[i].length for i in own], batch_size):
        indices = [own[place] for place in batch]
        for rows in halving(indices, lambda part: batch_rows(runner, edits, names, part, tokens, keep=keep)):
            yield from rows


def fact_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over facts of the mean cross-entropy of the fact's answer tokens, in fp32."""
    return losses.cross_entropy(logits, batch.labels, answer_shares(batch))


def fact_losses(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of each fact's answer tokens, (B,) fp32."""
    found = cross_entropy(logits.float(), batch.labels, reduction="none") * answer_shares(batch)
    return found.new_zeros(len(batch.ids)).index_add(0, batch.owners, found)


def losses_of(runner: Runner, edits: Sequence[Encoded], batch_size: int) -> list[float]:
    """Nats a target token of each of `edits`, on the model as it stands. A batch that does not fit is halved."""
    found = [0.0] * len(edits)

    def run(part: Sequence[int]) -> tuple[Sequence[int], list[float]]:
        return part, fact_losses(*runner.logits([edits[i] for i in part])).tolist()

    with torch.no_grad():
        for indices in by_length([edit.length for edit in edits], batch_size):
            for part, each in halving(indices, run):
                for i, loss in zip(part, each, strict=True):
                    found[i] = loss
    return found


def answer_shares(batch: Batch) -> Tensor:
    """Of each answer position, one over how many its sequence has: (n,) fp32, without asking the device how many."""
    ones = torch.ones(len(batch.owners), device=batch.owners.device)
    return 1 / ones.new_zeros(len(batch.ids)).index_add_(0, batch.owners, ones)[batch.owners]


def batch_rows(
    runner: Runner, edits: Sequence[Encoded], names: Sequence[str], indices: Sequence[int], tokens: str, *, keep: bool
) -> list[Rows]:
    """The rows of one LM batch, the edits `indices`: one Rows a stack (see edit_rows)."""
    with torch.enable_grad(), watching(runner.model, names, gradients=True) as (inputs, outputs):
        logits, batch = runner.logits([edits[i] for i in indices], keep=keep, everywhere=True)
        loss = fact_loss(logits, batch)
        found = torch.autograd.grad(loss, [outputs[name] for name in names])
    gradients = dict(zip(names, found, strict=True))
    stacked = []
    for reads, mine in runner.by_stack(names):
        chosen = [(i, row, *place) for row, i in enumerate(indices) for place in places(edits[i], tokens, reads)]
        owners, lines, columns, roles = torch.tensor(chosen, dtype=torch.long).reshape(-1, 4).T.to(batch.rows.device)
        spots = lines * batch.mask_of(reads).shape[1] + columns
        device = runner.base.device  # a module may lie on another
        keys, pulls, values = (
            {name: _rows_of(tensors[name].detach(), spots).float().to(device) for name in mine}
            for tensors in (inputs, gradients, outputs)
        )
        rows = Rows(keys, pulls, values, owners, roles, float(loss.detach()))
        _check_finite(rows)
        stacked.append(rows)
    return stacked


def _rows_of(tensor: Tensor, spots: Tensor) -> Tensor:
    return tensor.flatten(0, -2)[spots.to(tensor.device)]


def _check_finite(rows: Rows) -> None:
    finite = [torch.isfinite(tensor).all() for tensor in (*rows.keys.values(), *rows.gradients.values())]
    if bool(torch.stack(finite).all()):  # one question to the device
        return
    for kind, tensors in (("key", rows.keys), ("value gradient", rows.gradients)):
        for name, tensor in tensors.items():
            bad = ~torch.isfinite(tensor).all(-1)
            if bool(bad.any()):
                raise FactNumericsError(f"{name}: {kind} is not finite for {{fact}}", int(rows.owners[bad][0]))


def all_keys(
    runner: Runner, sequences: Sequence[Encoded], names: Sequence[str], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Per LM batch and module, the keys (n, dk) at every real token of `sequences`; padding gives none. Blocks behind
    the last of the modules are not run."""
    last = max((block_index(runner.model, name) for name in names), default=None)

    def run(indices: Sequence[int]) -> dict[str, Tensor]:
        with torch.no_grad(), watching(runner.model, names, gradients=False) as (inputs, _):
            batch = runner.task.batch([sequences[i] for i in indices], runner.base.device, whole=True)
            runner.full_logits(batch, until=last)
        found: dict[str, Tensor] = {}
        for reads, mine in runner.by_stack(names):
            real = batch.mask_of(reads).bool().flatten().nonzero()[:, 0]
            found |= {name: _rows_of(inputs[name], real).float().to(runner.base.device) for name in mine}
        return found

    for indices in by_length([s.length for s in sequences], batch_size):
        yield from halving(indices, run)


def weight_gradients(
    runner: Runner,
    sequences: Sequence[Encoded],
    names: Sequence[str],
    loss_of: Callable[[Tensor, Batch], Tensor],
    *,
    keep: bool = True,
) -> tuple[float, dict[str, Tensor]]:
    """Loss of one LM batch and its gradient by each module's weight in row convention, (dk, dv) fp32.

    Computed as inputs' x output gradients over every token, summed in fp32; what bfloat16 gives is rounded to it once.
    """
    with torch.enable_grad():
        with watching(runner.model, names, gradients=True) as (inputs, outputs):
            logits, batch = runner.logits(sequences, keep=keep)
        loss = loss_of(logits, batch)  # may run the model for its head, and T5's first blocks then run too
        gradients = torch.autograd.grad(loss, [outputs[name] for name in names])
    found = {}
    for name, gradient in zip(names, gradients, strict=True):
        # float16 has no room for them: gradients of a mean are among its smallest numbers.
        dtype = torch.bfloat16 if gradient.dtype == torch.bfloat16 else torch.float32
        keys, pulls = (t.reshape(-1, t.shape[-1]).to(dtype) for t in (inputs[name], gradient))
        found[name] = (keys.mT @ pulls).float().to(runner.base.device)
    return float(loss.detach()), found
