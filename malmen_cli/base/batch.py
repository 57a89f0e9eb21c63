"""Encoded prompts as one padded batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malmen_cli.base.families import IDS
from malmen_cli.base.prompts import Encoded


@dataclass(frozen=True)
class Batch:
    """Padded token ids with the positions whose logits are wanted.

    ids, mask: (B, T); rows, columns: (n,) the wanted positions; labels: (n,) the token each should predict;
    owners: (n,) index into the batch of the sequence each belongs to. source, source_mask: (B, S) what an encoder
    of its own reads, None where there is none.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    source: Tensor | None = None
    source_mask: Tensor | None = None

    @property
    def owners(self) -> Tensor:
        return self.rows

    @property
    def longest(self) -> int:
        """Tokens of the longest text that anything reads here."""
        return max(self.ids.shape[1], self.source.shape[1] if self.source is not None else 0)

    def mask_of(self, reads: str) -> Tensor:
        """Which tokens are real, of the sequence that a stack reads (see families.Stack)."""
        mask = self.mask if reads == IDS else self.source_mask
        assert mask is not None
        return mask


def make_batch(
    sequences: Sequence[Encoded],
    device: torch.device,
    *,
    side: str = "right",
    pad_id: int = 0,
    spots: Sequence[Sequence[int]] | None = None,
    whole: bool = False,
) -> Batch:
    """Pad sequences to one (B, T) batch; positions are those that predict answer tokens.

    spots: other positions of each sequence. What lies behind the last position predicts nothing and is left out, as an
    answer's last token, except with `whole` or where there is no position.
    """
    ends = [s.positions if spots is None else spots[i] for i, s in enumerate(sequences)]
    texts = [s.ids if whole or not end else s.ids[: end[-1] + 1] for s, end in zip(sequences, ends, strict=True)]
    ids, mask = _padded(texts, side, pad_id)
    width = ids.shape[1]
    places = [
        (row, (width - len(text) if side == "left" else 0) + p, s.ids[p + 1] if p + 1 < len(s.ids) else 0)
        for row, (s, text) in enumerate(zip(sequences, texts, strict=True))
        for p in (s.positions if spots is None else spots[row])
    ]
    rows, columns, labels = torch.tensor(places, dtype=torch.long).reshape(-1, 3).T.to(device)
    if not any(s.source for s in sequences):
        return Batch(ids.to(device), mask.to(device), rows, columns, labels)
    source, source_mask = _padded([s.source for s in sequences], side, pad_id)
    return Batch(ids.to(device), mask.to(device), rows, columns, labels, source.to(device), source_mask.to(device))


def _padded(texts: Sequence[Sequence[int]], side: str, pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad_id)
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = torch.tensor(text, dtype=torch.long)
        mask[row, start : start + len(text)] = 1
    return ids, mask
