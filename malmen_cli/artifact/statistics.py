"""Key statistics on disk: one folder for a base, a module and a text, under the cache.

A folder holds `statistics.safetensors` (the second moment) and `statistics.json` (base, module, text, sha256).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from malmen_cli.artifact.kept import keep, kept, source_digest
from malmen_cli.base.locate import cache_home

_KEY = "second_moment"


def statistics_folder(fingerprint: str, module: str, source: Mapping[str, object]) -> Path:
    """Where the statistics of a module of the base with this fingerprint, over the text `source`, are kept."""
    return cache_home() / "statistics" / fingerprint / source_digest(source) / module


def save_statistics(fingerprint: str, module: str, source: Mapping[str, object], moment: Tensor, tokens: int) -> Path:
    """Keep a second moment (dk, dk) fp32 taken over `tokens` tokens; its folder. Raises OutputError."""
    content = _named(fingerprint, module, source) | {"tokens": tokens}
    return keep(statistics_folder(fingerprint, module, source), {_KEY: moment}, content)


def load_statistics(
    fingerprint: str, module: str, source: Mapping[str, object], width: int
) -> tuple[Tensor, int] | None:
    """A second moment (width, width) fp32 and the number of its tokens; None where there is none, or none whole."""
    found = kept(statistics_folder(fingerprint, module, source), _named(fingerprint, module, source))
    if found is None:
        return None
    moment, tokens = found[0].get(_KEY), found[1].get("tokens")
    if moment is None or not isinstance(tokens, int):
        return None
    whole = moment.shape == (width, width) and moment.dtype == torch.float32 and bool(torch.isfinite(moment).all())
    return (moment, tokens) if whole else None


def _named(fingerprint: str, module: str, source: Mapping[str, object]) -> dict[str, object]:
    return {"format": "statistics", "base": {"fingerprint": fingerprint}, "module": module, "source": dict(source)}
