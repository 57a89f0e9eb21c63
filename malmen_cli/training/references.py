"""What the base says on locality probes, computed once, and how far an edited model is from it.

A probe is continued by the base's own greedy text. With logits `l(h)` linear in the head's inputs h (an output
embedding, whatever its scale or bias), A(h) = log sum exp l(h), and base inputs b,

    KL(softmax l(b) || softmax l(h)) = A(h) - A(b) - <grad A(b), h - b>,

the Bregman divergence of A (Banerjee et al., JMLR 6, 2005). So b, grad A(b) and A(b) are kept of an answer token, a few
bytes for each number of the model's width, and the base's distribution is never computed again. The most probable
tokens are an exception: their probabilities are kept, and grad A is that of all others. Half precision rounds a large
logit by much, and so A(h); what is taken off A(h) for such a token has to be rounded alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmen_cli.base.batch import Batch
from malmen_cli.base.memory import chunked, halving
from malmen_cli.base.prompts import Encoded
from malmen_cli.editing import losses
from malmen_cli.editing.capture import answer_shares
from malmen_cli.editing.replay import Runner
from malmen_cli.editing.trials import tolerance, trials
from malmen_cli.scoring.decoder import Asker

TOP = 16  # tokens whose probabilities are kept
ROWS = 64  # of logits that are held in fp32 at once
STRETCHED = 1.5  # times another answer's inputs of the head: what its linearity is tried on


@dataclass(frozen=True)
class Tangent:
    """At the head's inputs of n answer tokens: the most probable tokens; grad A without them (n, width), in the base's
    type; and A without them (n,), in fp32."""

    top: losses.Top
    slope: Tensor
    level: Tensor

    def split(self, counts: Sequence[int]) -> list[Tangent]:
        """In parts of so many answer tokens, in memory of their own."""
        parts = (each.split(list(counts)) for each in (self.top.tokens, self.top.said, self.slope, self.level))
        return [
            Tangent(losses.Top(tokens.clone(), said.clone()), slope.clone(), level.clone())
            for tokens, said, slope, level in zip(*parts, strict=True)
        ]

    @classmethod
    def joined(cls, parts: Sequence[Tangent]) -> Tangent:
        """One after another."""
        top = losses.Top(torch.cat([t.top.tokens for t in parts]), torch.cat([t.top.said for t in parts]))
        return cls(top, torch.cat([t.slope for t in parts]), torch.cat([t.level for t in parts]))

    def divergence(self, logits: Tensor, inputs: Tensor, heads: Tensor, shares: Tensor) -> Tensor:
        """`sum_i shares_i KL_i` of logits (n, vocabulary) of head inputs (n, width), where the base's were `heads`."""
        along = ((inputs.float() - heads.float()) * self.slope.float()).sum(-1)
        return losses.bregman(logits, along, self.level, self.top, shares)


@dataclass(frozen=True)
class Reference:
    """A probe continued by the base, the head's inputs (tokens, width) at the continuation, and the tangent there: None
    where logits are not linear in them."""

    sequence: Encoded
    heads: Tensor
    tangent: Tangent | None


class References:
    """The base's own answers on probes, each computed once, always together with the same other probes, at most
    `batch_size` at once."""

    def __init__(self, runner: Runner, tokens: int, batch_size: int) -> None:
        self._runner, self._tokens, self._batch_size = runner, tokens, batch_size
        self._asker = Asker(runner.base, batch_size, lambda count: None)
        self._known: dict[Encoded, Reference] = {}
        self._company: dict[Encoded, Sequence[Encoded]] = {}
        self._linear: bool | None = None  # not known before the first answer

    def keep_company(self, probes: Sequence[Encoded]) -> None:
        """Have the base's answers on these probes computed together (see Runner.keep_company)."""
        fresh = tuple(dict.fromkeys(probe for probe in probes if probe not in self._company))
        for company in chunked(fresh, self._batch_size):
            self._company |= dict.fromkeys(company, company)

    def of(self, probes: Sequence[Encoded]) -> list[Reference]:
        """References of probes, which are questions. The base must be unedited while this runs."""
        self.keep_company(probes)
        for probe in probes:
            if probe not in self._known:
                self._compute(self._company[probe])
        return [self._known[probe] for probe in probes]

    def _compute(self, company: Sequence[Encoded]) -> None:
        behind, room = self._runner.task.behind, self._runner.base.room
        left = [self._tokens if room is None else room - len(behind) - len(probe.ids) for probe in company]
        limits = [max(0, min(self._tokens, rest)) for rest in left]
        texts = self._asker.greedy(company, [max(1, limit) for limit in limits])
        sequences = [
            probe.answered((*text[:limit], *behind)) for probe, text, limit in zip(company, texts, limits, strict=True)
        ]
        self._runner.keep_company(sequences)
        found = [reference for part in halving(sequences, self._answers) for reference in part]
        self._known |= dict(zip(company, found, strict=True))

    def _answers(self, sequences: Sequence[Encoded]) -> list[Reference]:
        """The references of probes with the base's text behind them."""
        heads = self._runner.heads(sequences)
        counts, whole = [len(mine) for mine in heads], torch.cat(heads)
        if self._linear is None:
            self._linear = _linear(self._runner)
        tangents: Sequence[Tangent | None] = [None] * len(counts)
        if self._linear:
            tangents = _tangent(self._runner, whole).split(counts)
        return [Reference(s, h.clone(), t) for s, h, t in zip(sequences, heads, tangents, strict=True)]


def divergence(
    runner: Runner, references: Sequence[Reference], inputs: Sequence[Tensor], logits: Tensor, batch: Batch
) -> Tensor:
    """Sum over probes of the mean over positions of KL(base || edited), in nats; `inputs` ends with what the head read
    (see Runner.head_inputs)."""
    shares, heads = answer_shares(batch), torch.cat([r.heads for r in references])
    tangents = [r.tangent for r in references if r.tangent is not None]
    if len(tangents) < len(references):
        with torch.no_grad():
            wanted = runner.logits_of(heads)
        return losses.divergence(wanted, logits, shares)
    return Tangent.joined(tangents).divergence(logits, inputs[-1].to(heads.device), heads, shares)


def _tangent(runner: Runner, heads: Tensor) -> Tangent:
    """At the head's inputs (n, width)."""
    parts = []
    for part in heads.split(ROWS):
        with torch.enable_grad():
            inputs = part.detach().requires_grad_(True)
            logits = runner.logits_of(inputs)
        said = logits.detach().float().softmax(-1)
        most = said.topk(min(TOP, said.shape[-1]), -1)
        top, rest = losses.Top(most.indices, most.values), said.scatter(-1, most.indices, 0.0)
        (slope,) = torch.autograd.grad(logits, inputs, rest.to(logits.dtype))
        parts.append(Tangent(top, slope, losses.log_partition(logits.detach()) - top.of(logits.detach())))
    return Tangent.joined(parts)


@torch.no_grad()
def _linear(runner: Runner) -> bool:
    """Whether both forms of the divergence agree on what the head reads of trial sequences, as they do unless something
    bends its logits (Gemma 2 caps them)."""
    if runner.model.get_output_embeddings() is None:  # a classifier's few logits, which are kept themselves
        return False
    heads = torch.cat(runner.heads(trials(runner.base)[0]))
    others, shares = STRETCHED * heads.roll(1, 0), torch.ones(len(heads), device=heads.device)
    logits, tangent = runner.logits_of(others), _tangent(runner, heads)
    exact = losses.divergence(runner.logits_of(heads), logits, shares)
    rounding = 10 * len(heads) * torch.finfo(torch.float32).eps * tangent.level.abs().max()
    apart = (tangent.divergence(logits, others, heads, shares) - exact).abs()
    return bool(apart <= tolerance(runner.base.dtype) * exact + rounding)
