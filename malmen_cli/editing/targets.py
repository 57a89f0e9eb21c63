"""What the hidden state at a fact's subject should become, so that the model says the fact: MEMIT's `z = h + delta`.

MEMIT (Meng et al., arXiv 2210.07229, section 4.3 and algorithm 1). The loss is that of ROME (arXiv 2202.05262,
equation 4) with the decay of both papers' code, of the squared norm. The problems of different facts are independent,
so a chunk of facts is one batch: the blocks in front run once, every fact has its own stopping test, and one that is
done leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from malmen_cli.base import ranks
from malmen_cli.base.memory import halving
from malmen_cli.base.prompts import Encoded, by_length, encode, encode_prompt, subject_end
from malmen_cli.editing.capture import fact_losses
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.settings import MemitSettings
from malmen_cli.editing.suffix import Moved, way_to_run
from malmen_cli.exceptions import FactNumericsError, FactsError, Problem

ESSENCE = "{} is a"  # what the subject is must not change while the fact does; the papers' prompt


@dataclass(frozen=True)
class Wordings:
    """A fact as the target is looked for: the edit behind every prefix, and what the subject is.

    contexts: `subject` is set in each; the first is the one whose hidden state the edit starts from. essence: a prompt
    with one answer token that stands for nothing, so that logits are taken at its end.
    """

    contexts: tuple[Encoded, ...]
    essence: Encoded

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        return (*self.contexts, self.essence)


def wordings_of(
    tokenizer: Any,
    prompt: str,
    target: str,
    subject: str | None,
    prefixes: Sequence[str] = (),
    *,
    end_of_text: bool = False,
    room: int | None = None,
) -> Wordings:
    """A fact's wordings. A prefix that leaves no room is left out.

    So is every wording that begins with the subject's last token, where there are others: the first token of a text is
    its attention sink, with one huge key whatever its word. Raises FactsError for a fact that cannot be encoded, has no
    subject, or whose prompt does not name it.
    """
    edit = encode(tokenizer, prompt, target, end_of_text=end_of_text, room=room, subject=subject)
    if subject is None or not subject.strip():
        hint = 'add "subject": the words of the prompt that name what the fact is about'
        raise FactsError([Problem("facts", None, "subject", "missing; the fact is edited at its last token", hint)])
    essence = ESSENCE.format(subject.strip())
    ids = encode_prompt(tokenizer, essence)
    end = subject_end(tokenizer, essence, subject, ids)
    if edit.subject is None or end is None:
        hint = "write it as the prompt does"
        raise FactsError([Problem("facts", None, "subject", f"{subject!r} is not in the prompt", hint)])
    behind_prefixes = [
        encode(tokenizer, f"{prefix}. {prompt}", target, end_of_text=end_of_text, subject=subject)
        for prefix in prefixes
    ]
    fitting = [e for e in behind_prefixes if e.subject is not None and (room is None or len(e.ids) <= room)]
    inside = [context for context in (edit, *fitting) if context.subject]
    return Wordings(tuple(inside or (edit, *fitting)), Encoded((*ids, 0), len(ids), end))


@dataclass(frozen=True)
class Targets:
    """For n facts: the hidden states (n, width) that are wanted, and how far they are from the base's, both fp32.

    steps: (n,) long, steps of Adam taken; losses: (n,) the last loss on the fact, in nats a token.
    """

    states: Tensor
    deltas: Tensor
    steps: Tensor
    losses: Tensor


class KeptTargets(Protocol):
    """Where the targets of whole chunks outlive the process: a chunk found there is one that was found before.

    taken: of how many facts they were there. trouble: why the last ones could not be kept, if they could not.
    """

    taken: int
    trouble: str | None

    def load(self, facts: Sequence[Wordings]) -> Targets | None:
        """What `save` was given for the same facts in the same order; None where it never was."""

    def save(self, facts: Sequence[Wordings], found: Targets) -> None:
        """Keep the targets of a chunk, if that can be done."""


def find_targets(
    runner: Runner,
    block: int,
    facts: Sequence[Wordings],
    settings: MemitSettings,
    *,
    batch_size: int,
    kept: KeptTargets | None = None,
    progress: Callable[[int], None] | None = None,
) -> Targets:
    """The targets of `facts` behind `block`, in their order; on the device of the model.

    runner: from `block` on (or earlier), so that what is in front runs once a chunk. batch_size: prompts a forward with
    gradients; a chunk is as many facts as have that many contexts. A chunk that does not fit in memory is halved.
    kept: chunks found earlier are taken from there; only whole ones, so that it changes the time taken and no bit of
    the result. Of several ranks, each looks for its share of the targets.
    Raises FactNumericsError, MemoryLimitError when one fact does not fit.
    """
    # Fewer facts than ranks are not worth sharing: then every rank looks for all of them.
    several = 1 < ranks.count() <= len(facts)
    own = ranks.share(len(facts)) if several else range(len(facts))
    longest = [max(len(s.ids) - (s.subject or 0) for s in facts[i].sequences) for i in own]  # of what runs again
    size = max(1, batch_size // max((len(fact.contexts) for fact in facts), default=1))
    parts: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    # Told by a chunk's own tokens, so that no bit of it depends on other chunks; and only where one is run.
    way = cache(partial(way_to_run, runner, block))

    def run(indices: Sequence[int]) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        chunk = [facts[i] for i in indices]
        found = kept.load(chunk) if kept is not None else None
        if found is None:
            tokens = max(len(sequence.ids) for fact in chunk for sequence in fact.sequences)
            found = _chunk(runner, block, chunk, indices, settings, way(tokens))
            if kept is not None and (several or ranks.first()):
                kept.save(chunk, found)
        if progress is not None:
            progress(len(indices) * ranks.count() if several else len(indices))
        device = runner.base.device
        columns = (found.states.to(device), found.deltas.to(device), found.steps, found.losses.to(device))
        return list(zip(indices, *columns, strict=True))

    for places in by_length(longest, size):
        for part in halving([own[place] for place in places], run):
            parts += part
    columns = [torch.stack(list(column)) for column in list(zip(*parts, strict=True))[1:]]
    numbers = torch.tensor([part[0] for part in parts])
    if several:
        numbers, columns = ranks.collected(numbers), [ranks.collected(column) for column in columns]
    order = numbers.argsort()
    return Targets(*(column[order.to(column.device)] for column in columns))


def _chunk(
    runner: Runner,
    block: int,
    facts: Sequence[Wordings],
    numbers: Sequence[int],
    settings: MemitSettings,
    run: Callable[[Runner, int, Sequence[Encoded]], Moved],
) -> Targets:
    """The targets of one chunk. Adam works entry by entry, so its facts know nothing of each other; nor does the chunk
    of other chunks, whose wordings ("X is a") it may share and whose rounding it would take over."""
    runner.forget()
    rows = _Rows.of(facts)
    moved = run(runner, block, rows.sequences)
    hidden = moved.states[[contexts[0] for contexts in rows.contexts]]
    behind = torch.isin(moved.batch.owners, torch.tensor(rows.essences, device=hidden.device))
    base_says = log_softmax(moved.logits[behind].float(), -1)
    norms = hidden.norm(dim=-1)
    deltas = [torch.zeros_like(row, requires_grad=True) for row in hidden]
    adam = torch.optim.Adam(deltas, lr=settings.lr)  # one without a gradient is not touched: that fact is done
    steps = torch.zeros(len(facts), dtype=torch.long)
    losses = torch.zeros(len(facts), device=hidden.device)
    active = list(range(len(facts)))
    while active:
        with torch.enable_grad():
            added = torch.stack([deltas[i] for i in active])
            learned, essence = _losses(moved, rows, active, added)
            changed = kl_div(essence, base_says[active], reduction="none", log_target=True).sum(-1)
            far = (added / norms[active, None]).square().sum(-1)
            total = learned + settings.kl_factor * changed + settings.decay * far
        losses[active] = learned.detach()
        for i, loss in zip(active, total.tolist(), strict=True):
            if not loss < float("inf"):
                raise FactNumericsError("the target of {fact} is not finite; try a smaller lr", numbers[i])
        open_still = [loss >= settings.stop_loss for loss in learned.tolist()]
        going = [place for place, i in enumerate(active) if open_still[place] and int(steps[i]) < settings.steps]
        active = [active[place] for place in going]
        if not active:
            break
        found = torch.autograd.grad(total[going].sum(), [deltas[i] for i in active])
        adam.zero_grad()
        for i, gradient in zip(active, found, strict=True):
            deltas[i].grad = gradient
        adam.step()
        steps[active] += 1
        _clamp([deltas[i] for i in active], norms[active] * settings.clamp)
    change = torch.stack([delta.detach() for delta in deltas])
    return Targets(hidden + change, change, steps, losses)


@dataclass(frozen=True)
class _Rows:
    """The wordings of a chunk as one batch, fact after fact: every fact's contexts, then its essence.

    contexts: of each fact, where its contexts are; essences: of each fact, where its essence is.
    """

    sequences: list[Encoded]
    contexts: list[range]
    essences: list[int]

    @classmethod
    def of(cls, facts: Sequence[Wordings]) -> _Rows:
        ends = list(accumulate(len(fact.sequences) for fact in facts))
        contexts = [range(end - len(fact.sequences), end - 1) for end, fact in zip(ends, facts, strict=True)]
        return cls([s for fact in facts for s in fact.sequences], contexts, [end - 1 for end in ends])


def _losses(moved: Moved, rows: _Rows, active: Sequence[int], deltas: Tensor) -> tuple[Tensor, Tensor]:
    """With `deltas` (n, width) added at the subjects of the facts `active`: the loss on every one (n,), and the
    log-probabilities (n, vocabulary) behind its essence.

    The loss is the mean over contexts of the mean over answer tokens, so that no wording counts for its length.
    """
    counts = [len(rows.contexts[i]) for i in active]
    facts_of = torch.arange(len(active)).repeat_interleave(torch.tensor(counts)).to(deltas.device)
    # Apart from the essences, which are short: what is run together is padded to one length.
    logits, batch = moved.run([row for i in active for row in rows.contexts[i]], deltas[facts_of])
    shares = 1 / torch.tensor(counts, device=deltas.device)[facts_of]
    learned = torch.zeros(len(active), device=deltas.device)
    learned = learned.index_add(0, facts_of, fact_losses(logits, batch) * shares)
    essence, _ = moved.run([rows.essences[i] for i in active], deltas)
    return learned, log_softmax(essence.float(), -1)


@torch.no_grad()
def _clamp(deltas: Sequence[Tensor], bounds: Tensor) -> None:
    """Scale every delta back to the nearest one of the norm allowed, where it is longer."""
    scales = (bounds / torch.stack(list(deltas)).norm(dim=-1)).tolist()
    for delta, scale in zip(deltas, scales, strict=True):
        if scale < 1:
            delta *= scale
