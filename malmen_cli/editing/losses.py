"""Losses over a vocabulary, summed in fp32, each with its derivative by the logits.

Both at once and a few rows at a time, which stay in the processor's cache: of a large vocabulary every pass over all
rows costs as much as a block of a small model, and what autograd keeps of them as much memory as several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

CACHED = 1 << 20  # bytes of one fp32 copy of the logits taken at once: what a core's own cache has
HELD = 1 << 28  # the same on an accelerator, which has nothing to gain from less


def cross_entropy(logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """`-sum_i shares_i log softmax(logits_i)[labels_i]` over rows (n, vocabulary), in nats and fp32."""
    found: Tensor = _CrossEntropy.apply(logits, labels, shares)  # type: ignore[no-untyped-call]
    return found


def divergence(wanted: Tensor, logits: Tensor, shares: Tensor) -> Tensor:
    """`sum_i shares_i KL(softmax(wanted_i) || softmax(logits_i))` over rows (n, vocabulary), in nats and fp32, with
    derivatives by `logits` alone."""
    found: Tensor = _Divergence.apply(logits, wanted, shares)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class Top:
    """The most probable tokens (n, k) of rows of logits, and their probabilities (n, k) in fp32."""

    tokens: Tensor
    said: Tensor

    def of(self, logits: Tensor) -> Tensor:
        """The sum of these tokens' logits, each by its probability: (n,) fp32."""
        found: Tensor = (logits.gather(-1, self.tokens).float() * self.said).sum(-1)
        return found


def bregman(logits: Tensor, along: Tensor, level: Tensor, top: Top, shares: Tensor) -> Tensor:
    """`sum_i shares_i max(0, A_i - top_i - level_i - along_i)` with A_i = log sum exp logits_i of rows (n, vocabulary)
    and top_i = top.of(logits_i), in nats and fp32: a divergence (training/references.py), which rounding alone makes
    negative. along, level: (n,). The derivatives, by `logits` and `along`, are those without the maximum."""
    found: Tensor = _Bregman.apply(logits, along, level, top, shares)  # type: ignore[no-untyped-call]
    return found


def log_partition(logits: Tensor) -> Tensor:
    """A_i = log sum exp logits_i of rows (n, vocabulary), (n,) fp32."""
    with torch.no_grad():
        parts = [_log_softmax(logits[rows])[1] for rows in _parts(logits)]
    return torch.cat([logits.new_zeros(0, dtype=torch.float32), *parts])


class _Loss(torch.autograd.Function):
    """`forward` leaves its derivative by the logits, the only one there is."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return _times(gradient, upstream), None, None


class _CrossEntropy(_Loss):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        total = shares.new_zeros(())
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _parts(logits):
            (found, _), label = _log_softmax(logits[rows]), labels[rows, None]
            said = found.gather(-1, label)
            total -= shares[rows] @ said[:, 0]
            if gradient is not None:
                found.exp_().scatter_(-1, label, said.expm1())  # softmax - 1 at the label
                gradient[rows] = found.mul_(shares[rows, None])
        ctx.save_for_backward(gradient)
        return total


class _Divergence(_Loss):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, shares: Tensor) -> Tensor:
        total = shares.new_zeros(())
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _parts(logits):
            (expected, _), (found, _) = (_log_softmax(part[rows]) for part in (wanted, logits))
            said = expected.exp()
            total += shares[rows] @ expected.sub_(found).mul_(said).sum(-1)
            if gradient is not None:
                gradient[rows] = found.exp_().sub_(said).mul_(shares[rows, None])
        ctx.save_for_backward(gradient)
        return total


class _Bregman(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, along: Tensor, level: Tensor, top: Top, shares: Tensor) -> Tensor:
        total = shares.new_zeros(())
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for rows in _parts(logits):
            found, now = _log_softmax(logits[rows])
            mine = Top(top.tokens[rows], top.said[rows])
            total += shares[rows] @ (now - mine.of(logits[rows]) - level[rows] - along[rows]).clamp(min=0)
            if gradient is not None:
                found.exp_().scatter_add_(-1, mine.tokens, -mine.said)
                gradient[rows] = found.mul_(shares[rows, None])
        ctx.save_for_backward(gradient, shares)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient, shares = ctx.saved_tensors
        return _times(gradient, upstream), -shares * upstream, None, None, None


def _times(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Their product; of a CPU, where asking costs nothing, without a pass over all logits for a factor of 1."""
    return gradient if upstream.device.type == "cpu" and float(upstream) == 1 else gradient * upstream


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of a few rows in fp32, and log sum exp of each. They are copied first: a softmax that reads bfloat16 takes twice
    the time of both."""
    exact = logits.float()
    found = log_softmax(exact, -1)
    return found, exact.amax(-1) - found.amax(-1)


def _parts(logits: Tensor) -> Iterator[slice]:
    size = max(1, (CACHED if logits.device.type == "cpu" else HELD) // (4 * logits.shape[-1]))
    yield from (slice(start, start + size) for start in range(0, len(logits), size))
