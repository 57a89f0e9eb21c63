"""The three forms of an edit on disk, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malmen_cli.artifact.adapter import write_adapter
from malmen_cli.artifact.card import model_card
from malmen_cli.artifact.delta import write_delta
from malmen_cli.artifact.manifest import MANIFEST, read_sealed
from malmen_cli.artifact.merged import Sharing, write_merged
from malmen_cli.base.model import Base
from malmen_cli.editing.shift import Shift


def write_edit(
    out: Path,
    base: Base,
    shift: Shift,
    manifest: Mapping[str, Any],
    *,
    format: str,
    force: bool,
    share: Sharing = "none",
) -> dict[str, Any]:
    """Write `shift` as merged, delta or adapter, with its model card; `malmen.json` as it was written. share: see
    write_merged. Raises OutputError."""
    card = model_card(format, {**manifest, "modules": dict.fromkeys(shift.modules)})
    if format == "merged":
        write_merged(out, base.folder, shift, manifest, card=card, force=force, share=share)
    elif format == "delta":
        write_delta(out, shift, manifest, card=card, force=force)
    else:
        write_adapter(out, shift, manifest, base_name=base.name, card=card, force=force)
    return read_sealed(out / MANIFEST)
