"""Key statistics on disk: one folder for a base, a module and a text, under the cache.

A folder holds `statistics.safetensors` (the second moment) and `statistics.json` (base, module, text, sha256). It can
always be built again: what is missing, damaged or of something else is no error, and reads as None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.manifest import canonical, read_sealed, sealed
from malmen_cli.artifact.output import SIDE_FILES_BYTES
from malmen_cli.artifact.tensors import read_tensors, tensors_bytes, write_tensors
from malmen_cli.base.locate import cache_home
from malmen_cli.exceptions import EditorError

TENSORS = "statistics.safetensors"
DESCRIPTION = "statistics.json"
_KEY = "second_moment"


def statistics_folder(fingerprint: str, module: str, source: Mapping[str, object]) -> Path:
    """Where the statistics of a module of the base with this fingerprint, over the text `source`, are kept."""
    text = hashlib.sha256(canonical(source).encode()).hexdigest()
    return cache_home() / "statistics" / fingerprint / text[:16] / module


def save_statistics(fingerprint: str, module: str, source: Mapping[str, object], moment: Tensor, tokens: int) -> Path:
    """Keep a second moment (dk, dk) fp32 taken over `tokens` tokens; its folder. Raises OutputError."""
    folder = statistics_folder(fingerprint, module, source)
    tensors = {_KEY: moment}
    with Staging(folder, force=True, need=tensors_bytes(tensors) + SIDE_FILES_BYTES) as staging:
        write_tensors(staging, TENSORS, tensors)
        content = _named(fingerprint, module, source) | {"tokens": tokens, "files": dict(staging.sha256)}
        staging.write(DESCRIPTION, sealed(content))
    return folder


def load_statistics(
    fingerprint: str, module: str, source: Mapping[str, object], width: int
) -> tuple[Tensor, int] | None:
    """A second moment (width, width) fp32 and the number of its tokens; None where there is none, or none whole."""
    folder = statistics_folder(fingerprint, module, source)
    named = _named(fingerprint, module, source)
    try:
        content = read_sealed(folder / DESCRIPTION)
        tensors = read_tensors(folder / TENSORS, content["files"][TENSORS])
        moment, tokens = tensors[_KEY], content["tokens"]
    except (EditorError, KeyError, TypeError):
        return None
    fits = {key: content.get(key) for key in named} == named and isinstance(tokens, int)
    whole = moment.shape == (width, width) and moment.dtype == torch.float32 and bool(torch.isfinite(moment).all())
    return (moment, tokens) if fits and whole else None


def _named(fingerprint: str, module: str, source: Mapping[str, object]) -> dict[str, object]:
    return {"format": "statistics", "base": {"fingerprint": fingerprint}, "module": module, "source": dict(source)}
