"""What can be refused before the work starts: where an output may not go, and whether it will fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from malmen_cli.artifact.disk import check_free, existing_ancestor
from malmen_cli.artifact.placing import refuse_existing
from malmen_cli.base.locate import cache_home
from malmen_cli.base.weights import read_index
from malmen_cli.exceptions import OutputError

SIDE_FILES_BYTES = 1 << 20  # manifest, card and headers: an upper bound for small runs
FP32_BYTES = 4


def check_output(out: Path, *, base_folder: Path | None, force: bool) -> None:
    """Raise OutputError for every output that can be refused before any work; touches nothing.

    Refused: the base or a folder in or around it, the caches the base may come from, a file, a symbolic link, a
    non-empty folder (with force: one that malmen did not write), a place that cannot be written.
    """
    out = Path(os.path.abspath(out))
    if not out.name:
        raise OutputError(f"{out}: the root folder cannot be an output; name a folder in it")
    refuse_existing(out, force=force)
    real = out.resolve()
    if base_folder is not None:
        _refuse_overlap(out, real, base_folder, "the base checkpoint's folder")
    for cache in _hub_caches():
        _refuse_overlap(out, real, cache, "the Hugging Face cache")
    _refuse_overlap(out, real, cache_home() / "bases", "malmen's cache of bases")
    _refuse_unwritable(out)


def plan_bytes(
    format: str,
    *,
    base_folder: Path | None = None,
    shapes: Sequence[tuple[int, int]] = (),
    rank: int | None = None,
    max_rank: int = 512,
    linked: Iterable[Path] = (),
) -> int:
    """Bytes an output will need, before the shift exists (`--dry-run`).

    format: merged, delta or adapter. shapes: (dk, dv) of every edited module. rank: rows a low-rank shift will have;
    None, or more than dk, is dense. linked: files of the base that a merged output has by hard links.
    """
    if format == "merged":
        assert base_folder is not None
        files = {entry.file for entry in read_index(base_folder).values()}
        copied = sum(file.stat().st_size for file in files.difference(linked))
        return copied + SIDE_FILES_BYTES + _side_files(base_folder)
    total = 0
    for dk, dv in shapes:
        kept = rank if rank is not None and rank <= dk else None
        if format == "adapter":
            kept = min(max_rank, dk, dv, *([kept] if kept is not None else []))
        total += (dk * dv if kept is None else kept * (dk + dv)) * FP32_BYTES
    return total + SIDE_FILES_BYTES


def check_disk(out: Path, need: int) -> None:
    """Raise OutputError when fewer than `need` bytes are free where `out` will be."""
    check_free(Path(os.path.abspath(out)), need)


def _side_files(folder: Path) -> int:
    return sum(
        file.stat().st_size
        for file in folder.iterdir()
        if file.suffix in (".json", ".txt", ".model") and file.is_file()
    )


def _hub_caches() -> list[Path]:
    """Every folder the Hugging Face cache may be, by its environment variables in their order of precedence."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = [os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")]
    return [Path(folder).expanduser() for folder in (*named, os.path.join(home, "hub")) if folder]


def _refuse_overlap(out: Path, real: Path, folder: Path, what: str) -> None:
    folder = folder.resolve()
    if real == folder or folder in real.parents:
        raise OutputError(f"{out}: inside {what} ({folder}); name a folder elsewhere")
    if real in folder.parents and out.exists():
        raise OutputError(f"{out}: contains {what} ({folder}); name another folder")


def _refuse_unwritable(out: Path) -> None:
    parent = existing_ancestor(out.parent)
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file, not a folder; name a folder elsewhere")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: {parent} is not writable; name a folder elsewhere, or change its permissions")
