"""What the base says on locality probes, computed once, and how far an edited model is from it.

A probe is continued by the base's own greedy text. With logits `l(h)` linear in the head's inputs h (an output
embedding, whatever its scale or bias), A(h) = log sum exp l(h), and base inputs b,

    KL(softmax l(b) || softmax l(h)) = A(h) - A(b) - <grad A(b), h - b>,

the Bregman divergence of A (Banerjee et al., JMLR 6, 2005). So b, grad A(b) and A(b) are kept of an answer token, a few
bytes for each number of the model's width, and the base's distribution is never computed again.
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
from malmen_cli.editing.trials import tolerance
from malmen_cli.scoring.decoder import Asker

STRETCHED = 1.5  # times another answer's inputs of the head: what its linearity is tried on


@dataclass(frozen=True)
class Tangent:
    """grad A (n, width), in the base's type, and A (n,), in fp32, at the head's inputs of n answer tokens."""

    slope: Tensor
    level: Tensor


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
            self._linear = _linear(self._runner, whole)
        tangents: Sequence[Tangent | None] = [None] * len(counts)
        if self._linear:
            found = _tangent(self._runner, whole)
            pairs = zip(found.slope.split(counts), found.level.split(counts), strict=True)
            tangents = [Tangent(slope.clone(), level.clone()) for slope, level in pairs]
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
    along = _along(inputs[-1].to(heads.device), heads, torch.cat([t.slope for t in tangents]))
    return losses.bregman(logits, along, torch.cat([t.level for t in tangents]), shares)


def _along(inputs: Tensor, heads: Tensor, slope: Tensor) -> Tensor:
    """<slope, inputs - heads> of each row, (n,) fp32."""
    return ((inputs.float() - heads.float()) * slope.float()).sum(-1)


def _tangent(runner: Runner, heads: Tensor) -> Tangent:
    with torch.enable_grad():
        inputs = heads.detach().requires_grad_(True)
        logits = runner.logits_of(inputs)
        said = logits.detach().float().softmax(-1).to(logits.dtype)
        (slope,) = torch.autograd.grad(logits, inputs, said)
    return Tangent(slope, losses.log_partition(logits.detach()))


def _linear(runner: Runner, heads: Tensor) -> bool:
    """Whether both forms of the divergence agree on other inputs of the head, as they do unless something bends its
    logits (Gemma 2 caps them)."""
    if runner.model.get_output_embeddings() is None:  # a classifier's few logits, which are kept themselves
        return False
    others, tangent, shares = STRETCHED * heads.roll(1, 0), _tangent(runner, heads), heads.new_ones(len(heads)).float()
    with torch.no_grad():
        logits = runner.logits_of(others)
        exact = losses.divergence(runner.logits_of(heads), logits, shares)
        found = losses.bregman(logits, _along(others, heads, tangent.slope), tangent.level, shares)
    rounding = len(heads) * torch.finfo(runner.base.dtype).eps * tangent.level.abs().max()
    return bool((found - exact).abs() <= tolerance(runner.base.dtype) * exact + rounding)
