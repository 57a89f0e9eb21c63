"""Whether a checkpoint that malmen wrote is still what it wrote: every file by the sha256 in its malmen.json."""

from __future__ import annotations

import hashlib
from pathlib import Path

from malmen_cli.base.cache import cached_digest
from malmen_cli.base.sealed import MANIFEST, SEAL, peek, read_sealed
from malmen_cli.base.weights import is_plain
from malmen_cli.exceptions import CheckpointError

CARD = "README.md"  # a person may write in it


def check_written(folder: Path) -> None:
    """Raise CheckpointError for the first file of a merged checkpoint that is not the one written.

    What is no longer there is not missed here, and what was added does not count. Raises EditorError for a damaged
    malmen.json.
    """
    if not (folder / MANIFEST).is_file() or not _claims(folder / MANIFEST):
        return
    content = read_sealed(folder / MANIFEST)
    files = content.get("files")
    if content.get("format") != "merged" or not isinstance(files, dict):
        return
    for name, digest in sorted(files.items()):
        # A manifest may come from a stranger: what it names outside the folder is not even opened.
        if name == CARD or not all(map(is_plain, name.split("/"))) or not (folder / name).is_file():
            continue
        if _sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name}: damaged: its sha256 is not the one in {MANIFEST}; copy the folder again, "
                f"or remove {MANIFEST} if you changed the file yourself"
            )


def _claims(manifest: Path) -> bool:
    """Whether it says what malmen wrote; where that cannot be told, it is damaged."""
    content = peek(manifest)
    return content is None or bool({"files", SEAL} & content.keys())


def _sha256(file: Path) -> str:
    def compute() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    try:
        return cached_digest([file], compute)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
