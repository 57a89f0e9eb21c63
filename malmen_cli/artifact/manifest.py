"""What every folder of ours says of itself, and whether it was made for the base at hand. The form: base/sealed.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malmen_cli.base.header import shown
from malmen_cli.base.sealed import MANIFEST, SCHEMA, SEAL, canonical, peek, read_sealed, sealed
from malmen_cli.exceptions import EditorError

__all__ = ["MANIFEST", "SCHEMA", "SEAL", "base_fingerprint", "canonical", "check_base", "peek", "read_sealed", "sealed"]


def base_fingerprint(content: Mapping[str, Any]) -> str | None:
    """The fingerprint of the base a manifest or an editor's description names, if it names one."""
    base = content.get("base")
    found = base.get("fingerprint") if isinstance(base, Mapping) else content.get("fingerprint")
    return found if isinstance(found, str) else None


def check_base(folder: Path, content: Mapping[str, Any], fingerprint: str | None) -> None:
    """Raise EditorError when `folder` was made for another base than the one with `fingerprint`."""
    made_for = base_fingerprint(content)
    if fingerprint is not None and made_for != fingerprint:
        base = content.get("base")
        name = base.get("name") if isinstance(base, Mapping) else None
        raise EditorError(
            f"{folder}: made for another base ({shown(name or 'unnamed')[1:-1]}, fingerprint {str(made_for)[:12]}) "
            f"than the one given (fingerprint {fingerprint[:12]}); give that base, or make it anew for this one"
        )
