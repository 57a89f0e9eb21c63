"""Targets on disk: one folder for a base, a chunk of facts and the settings that their targets depend on.

A folder holds `targets.safetensors` (`states`, `deltas`, `steps`, `losses`) and `targets.json`, which has no word of
the facts themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from malmen_cli.artifact.kept import keep, kept, source_digest
from malmen_cli.base.locate import cache_home
from malmen_cli.editing.targets import Targets

_TYPES = {"states": torch.float32, "deltas": torch.float32, "steps": torch.int64, "losses": torch.float32}


def targets_folder(fingerprint: str, source: Mapping[str, object]) -> Path:
    """Where the targets made from `source` on the base with this fingerprint are kept."""
    return cache_home() / "targets" / fingerprint / source_digest(source)


def save_targets(fingerprint: str, source: Mapping[str, object], targets: Targets) -> Path:
    """Keep the targets of one chunk; their folder. Raises OutputError."""
    tensors = {name: getattr(targets, name).cpu() for name in _TYPES}
    return keep(targets_folder(fingerprint, source), tensors, _named(fingerprint, source))


def load_targets(fingerprint: str, source: Mapping[str, object], count: int, width: int) -> Targets | None:
    """The targets of a chunk of `count` facts, in host memory; None where there are none, or none whole."""
    found = kept(targets_folder(fingerprint, source), _named(fingerprint, source))
    tensors = found[0] if found is not None else {}
    shapes = {"states": (count, width), "deltas": (count, width), "steps": (count,), "losses": (count,)}
    for name, dtype in _TYPES.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shapes[name]:
            return None
        if not bool(torch.isfinite(tensor).all()):
            return None
    return Targets(**tensors)


def _named(fingerprint: str, source: Mapping[str, object]) -> dict[str, object]:
    return {"format": "targets", "base": {"fingerprint": fingerprint}, "source": dict(source)}
