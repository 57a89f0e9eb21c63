"""What a loaded model is tried out on before a shorter way through it is taken, and when both ways agree."""

from __future__ import annotations

import torch
from torch import Tensor

from malmen_cli.base.model import Base
from malmen_cli.base.prompts import Encoded


def trials(base: Base) -> list[list[Encoded]]:
    """Two sequences of unequal length, and two of the same lengths and other tokens."""
    vocabulary = base.model.get_input_embeddings().num_embeddings
    tokens = [(7 * i + 3) % min(vocabulary, 1000) for i in range(9)]
    return [[base.task.trial(each), base.task.trial(each[2:7])] for each in (tokens, tokens[::-1])]


def tolerance(dtype: torch.dtype) -> float:
    """The largest difference that a model's rounding makes, relative to the largest value."""
    return 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-3


def agree(full: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are those of the full forward, up to the rounding of a model in `dtype`."""
    apart = (full.float() - other.float()).abs().max()
    return bool(apart <= tolerance(dtype) * full.float().abs().max().clamp(min=1e-6))
