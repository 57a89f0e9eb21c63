"""Tensors under the cache that can always be computed again: a folder with them and a sealed description.

What is missing, damaged or of something else is no error, and reads as None.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from malmen_cli.artifact.atomic import Staging
from malmen_cli.artifact.manifest import canonical, read_sealed, sealed
from malmen_cli.artifact.output import SIDE_FILES_BYTES
from malmen_cli.artifact.tensors import read_tensors, tensors_bytes, write_tensors
from malmen_cli.exceptions import EditorError


def source_digest(source: Mapping[str, object]) -> str:
    """The part of a folder's name that stands for what the tensors were made from."""
    return hashlib.sha256(canonical(source).encode()).hexdigest()[:16]


def keep(folder: Path, tensors: Mapping[str, Tensor], content: Mapping[str, object]) -> Path:
    """Write tensors and what they are; the folder. content: its `format` names the files. Raises OutputError."""
    named = str(content["format"])
    with Staging(folder, force=True, need=tensors_bytes(tensors) + SIDE_FILES_BYTES) as staging:
        write_tensors(staging, f"{named}.safetensors", tensors)
        staging.write(f"{named}.json", sealed(dict(content) | {"files": dict(staging.sha256)}))
    return folder


def kept(folder: Path, content: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """The tensors and their whole description, where it says everything that `content` says."""
    file = f"{content['format']}.safetensors"
    try:
        found = read_sealed(folder / f"{content['format']}.json")
        tensors = read_tensors(folder / file, found["files"][file])
    except (EditorError, KeyError, TypeError, OSError):
        return None
    return (tensors, found) if {key: found.get(key) for key in content} == dict(content) else None
