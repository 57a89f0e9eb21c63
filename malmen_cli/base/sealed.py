"""malmen.json and editor.json: canonical JSON that carries its own sha256.

Canonical means sorted keys, two spaces, one newline at the end, so that the same content has the same bytes; the seal
means that a damaged or hand-edited file is refused instead of half believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from malmen_cli.base.header import load_json, shown
from malmen_cli.exceptions import EditorError, NumericsError, OutputError

SCHEMA = 1
MANIFEST = "malmen.json"
SEAL = "seal"
MAX_BYTES = 1 << 26  # parsed, it takes a hundred times as much; the largest seen is 0.1 MB


def canonical(content: Mapping[str, object]) -> str:
    """`content` as canonical JSON text. Raises NumericsError for NaN and Inf, which JSON does not have."""
    try:
        return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise NumericsError("a figure for the manifest is NaN or Inf; the shift cannot be trusted") from None


def sealed(content: Mapping[str, object]) -> bytes:
    """The bytes of a manifest: `content`, the schema version, and the sha256 over both.

    Raises OutputError for more than `read_sealed` takes: nothing is written that could not be read.
    """
    body = {key: value for key, value in content.items() if key != SEAL} | {"schema": SCHEMA}
    text = canonical(body | {SEAL: _digest(body)}).encode()
    if len(text) > MAX_BYTES:
        raise OutputError(f"the manifest would take {len(text):,} bytes, more than {MAX_BYTES:,}; use shorter fact ids")
    return text


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` wrote, without the seal. Raises EditorError when missing, damaged or of a newer schema."""
    if not path.is_file():
        raise EditorError(f"{path}: not found; this is not a folder written by malmen")
    if path.stat().st_size > MAX_BYTES:
        raise EditorError(f"{path}: too large to be a manifest; write the folder again")
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        if not isinstance(content, dict) or canonical(content) != text:
            raise ValueError
        seal = content.pop(SEAL)
        intact = seal == _digest(content)
    except (ValueError, KeyError, RecursionError, NumericsError):
        intact = False
    if not intact:
        raise EditorError(f"{path}: damaged or edited by hand (its checksum does not match); write the folder again")
    if content.get("schema") != SCHEMA:
        schema = shown(content.get("schema"))[1:-1]
        raise EditorError(f"{path}: schema {schema} is not {SCHEMA}; it was written by another version of malmen")
    return dict(content)


def peek(path: Path) -> dict[str, Any] | None:
    """The object in a manifest whose seal nobody has looked at, to tell what is there; None where it holds none."""
    try:
        content = load_json(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _digest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical(body).encode()).hexdigest()
