"""Putting what was built at `.malmen-<name>-<random>` in its place, and cleaning what killed runs left there."""

from __future__ import annotations

import re
import secrets
import shutil
from pathlib import Path

from malmen_cli.artifact import disk
from malmen_cli.exceptions import OutputError

LOCK = ".lock"  # inside a temporary folder, held for as long as its process lives
# A folder with one of these was written by us and may be replaced. Others too may call a file targets.json: all but the
# first must be sealed.
MARKS = ("malmen.json", "editor.json", "statistics.json", "targets.json")
_MARK_BYTES = 1 << 26  # what base/sealed.py takes; more is no mark of ours
_SEAL = re.compile(rb'\n  "seal": "[0-9a-f]{64}"[,\n]')


def beside(out: Path) -> Path:
    """A new name for what is being built, beside its place."""
    return out.with_name(f".malmen-{out.name}-{secrets.token_hex(4)}")


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise OutputError unless `out` is absent, an empty folder, or (with force) a folder malmen wrote."""
    if out.is_symlink():
        raise OutputError(f"{out}: a symbolic link; name the folder it points to, or another one")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: a file is in the way; name a folder that does not exist yet")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / MARKS[0]).is_file() and not any(_sealed(out / mark) for mark in MARKS[1:]):
        raise OutputError(f"{out}: not empty and not written by malmen; name another folder, or delete it yourself")
    if not force:
        raise OutputError(f"{out}: already there; use --force to replace it, or name another folder")


def _sealed(file: Path) -> bool:
    """Whether an ordinary file has a line such as the seal of base/sealed.py, whatever it says and seals."""
    try:
        return file.is_file() and file.stat().st_size <= _MARK_BYTES and bool(_SEAL.search(file.read_bytes()))
    except OSError:
        return False


def refuse_existing_file(out: Path, *, force: bool) -> None:
    """Raise OutputError unless `out` is absent or (with force) an ordinary file. A rename would replace a device."""
    if out.exists() and not out.is_file():
        raise OutputError(f"{out}: not an ordinary file; name another")
    if out.exists() and not force:
        raise OutputError(f"{out}: already there; use --force to replace it, or name another file")


def place(folder: Path, out: Path) -> None:
    """Put `folder` at `out`; an old `out` ends up at `folder`'s name."""
    if not out.exists() or not any(out.iterdir()):
        disk.rename(folder, out)
    elif not disk.exchange(folder, out):
        _rename_twice(folder, out)


def _rename_twice(folder: Path, out: Path) -> None:
    """Without an exchange the output is absent for a moment; `clean` puts it back if we are killed in it."""
    aside = folder.with_name(folder.name + ".old")
    try:
        disk.rename(out, aside)
        disk.rename(folder, out)
    except BaseException:
        if aside.exists() and not out.exists():  # an interrupt may arrive just after either rename was done
            disk.rename(aside, out)
        raise
    disk.rename(aside, folder)


def clean(out: Path) -> None:
    """Put back an old output that a killed run had moved aside, then remove what killed runs left.

    Raises OutputError when another living process is writing the same folder.
    """
    left = _left(out)
    if any(path.is_dir() and disk.is_held(path / LOCK) for path in left):
        raise OutputError(f"{out}: another malmen process is writing it; wait for it, or name another folder")
    for path in left:
        if path.name.endswith(".old") and not out.exists():
            disk.rename(path, out)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def clean_files(out: Path) -> None:
    """Remove what killed runs left of the single file `out`; that of living ones stays theirs."""
    for path in _left(out):
        if path.is_file() and not disk.is_held(path):
            path.unlink(missing_ok=True)


def _left(out: Path) -> list[Path]:
    pattern = re.compile(rf"\.malmen-{re.escape(out.name)}-[0-9a-f]{{8}}(\.old)?")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink())
