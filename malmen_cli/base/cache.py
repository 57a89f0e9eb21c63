"""What malmen may forget: its cache folder, and digests of large files kept there.

Nothing here is needed for a right answer. A cache that cannot be read or written, or holds nonsense,
costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from malmen_cli.artifact.atomic import write_file
from malmen_cli.exceptions import OutputError

HEX_DIGEST = re.compile(r"[0-9a-f]{64}")

# A file changed within one tick of the file system's clock keeps its mtime, so a digest of a file this
# young may go stale unseen; git's "racily clean" entries have the same cause. 2 s is FAT's tick.
RACY_SECONDS = 2.0


def cache_home() -> Path:
    """`$MALMEN_HOME`, else `$XDG_CACHE_HOME/malmen`, else `~/.cache/malmen`; it may not exist yet."""
    if own := os.environ.get("MALMEN_HOME"):
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return root / "malmen"


def cached_digest(files: Iterable[Path], compute: Callable[[], str]) -> str:
    """`compute()`, remembered for as long as none of `files` changes path, size, times or inode."""
    watched = sorted({file.resolve() for file in files})
    key, youngest = _stamp(watched)
    text = remembered("fingerprints", key)
    if HEX_DIGEST.fullmatch(text):
        return text
    digest = compute()
    if time.time() - youngest > RACY_SECONDS and _stamp(watched)[0] == key:
        remember("fingerprints", key, digest)
    return digest


@contextlib.contextmanager
def still_remembered(files: Iterable[Path]) -> Iterator[None]:
    """What is remembered of `files` is so after the body too, which may change how many links there are to each, and
    with it the time of its last change, but not its content."""
    watched = sorted({file.resolve() for file in files})
    before, digest = _content(watched), remembered("fingerprints", _stamp(watched)[0])
    yield
    if HEX_DIGEST.fullmatch(digest) and _content(watched) == before:
        remember("fingerprints", _stamp(watched)[0], digest)


def _content(files: Iterable[Path]) -> list[tuple[int, int, int]]:
    """What a file that is written to does not keep."""
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in (file.stat() for file in files)]


def remembered(kind: str, key: str) -> str:
    """What the cache's folder `kind` has under `key`, which may be anything; empty where it has nothing."""
    try:
        return (cache_home() / kind / key).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def remember(kind: str, key: str, text: str) -> None:
    """Put ASCII `text` there. A read-only or full cache is no error."""
    with contextlib.suppress(OutputError):
        write_file(cache_home() / kind / key, text.encode("ascii"))


def _stamp(files: Iterable[Path]) -> tuple[str, float]:
    """The key of these files as they are now, and when the youngest was modified (seconds since 1970)."""
    digest, youngest = hashlib.sha256(), 0.0
    for file in files:
        stat = file.stat()
        digest.update(
            f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}\0".encode(
                errors="surrogateescape"
            )
        )
        youngest = max(youngest, stat.st_mtime)
    return digest.hexdigest(), youngest
