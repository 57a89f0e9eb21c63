"""Ordinary text, as windows of tokens: from a text file, or from the `text` column of a `datasets` data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from malmen_cli.base.prompts import encode_prompt
from malmen_cli.facts.dataset_reader import is_hub_name, read_arrow, read_dataset_folder, read_hub, read_parquet
from malmen_cli.facts.problems import Item, ProblemLog

COLUMN = "text"
WINDOW = 256  # tokens read at once, or what the model reads, where that is less
PIECE = 4000  # characters of a file that are tokenised at once, up to the end of their line


def read_texts(source: str) -> Iterator[str]:
    """The texts of a file (UTF-8, in pieces of whole lines), a parquet or arrow file, a `datasets` folder, or a data
    set's name on the hub (`hf:NAME`, `hf:NAME:SPLIT`, `owner/name`).

    Raises FactsError naming the source, and the row that has no `text`.
    """
    log, path = ProblemLog(source), Path(source)
    ending = path.suffix.lower()
    if path.is_dir():
        yield from _column(read_dataset_folder(path, log), log)
    elif not path.exists() and is_hub_name(source):
        yield from _column(read_hub(source, log), log)
    elif path.exists() and ending in (".parquet", ".arrow"):
        yield from _column((read_parquet if ending == ".parquet" else read_arrow)([path], log), log)
    else:
        yield from _pieces(path, log)


def windows(tokenizer: Any, texts: Iterable[str], tokens: int, room: int | None = None) -> list[tuple[int, ...]]:
    """The first `tokens` tokens of `texts`, cut into windows; no window holds parts of two texts."""
    size = WINDOW if room is None else min(WINDOW, room)
    found: list[tuple[int, ...]] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        ids = encode_prompt(tokenizer, text)[:left] if text.strip() else ()
        found += [ids[start : start + size] for start in range(0, len(ids), size)]
        left -= len(ids)
    return found


def _column(rows: Iterable[Item], log: ProblemLog) -> Iterator[str]:
    for item in rows:
        text = item.data.get(COLUMN) if isinstance(item.data, dict) else None
        if not isinstance(text, str):
            log.fail(item.line, COLUMN, "missing, or not a text", f"name a data set with a column {COLUMN!r}")
        yield text


def _pieces(path: Path, log: ProblemLog) -> Iterator[str]:
    """The file in pieces: a tokenizer takes long over a whole book."""
    held: list[str] = []
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for line in stream:
                held.append(line)
                if sum(map(len, held)) >= PIECE:
                    yield "".join(held)
                    held = []
    except FileNotFoundError:
        log.fail(None, None, "no such file")
    except UnicodeDecodeError:
        log.fail(None, None, "not UTF-8", "save the file as UTF-8")
    except (OSError, ValueError) as error:
        log.fail(None, None, f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if held:
        yield "".join(held)
