"""The one output sink: prose, tables and progress on stderr, data on stdout.

Everything passes through `Stream`, which masks secrets. Nothing here imports rich before a table or a bar
is drawn.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from malmen_cli.cli.processes import rank

MASK = "***"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
_SHORTEST_SECRET = 8  # a shorter value is a placeholder, and masking it would mangle ordinary words
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
PIPE_CLOSED = 141  # what a shell reports for a process ended by SIGPIPE (128 + 13)
PLAIN_WIDTH = 120
_SPARSE_SECONDS = 30.0
_SPARSE_SHARE = 0.1


def redact(text: str) -> str:
    """`text` with Hugging Face tokens, passwords in URLs and the values of HF_TOKEN and its aliases masked."""
    for name in _SECRETS:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, MASK)
    return _TOKEN.sub(lambda match: f"hf_{MASK}" if match[0].startswith("hf_") else MASK, text)


class Stream:
    """A text stream that masks secrets, cannot fail on an encoding, and ends the program when its pipe is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.terminal = stream.isatty() and os.environ.get("TERM") != "dumb"

    def write(self, text: str) -> int:
        text = redact(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            # Python flushes the stream again at exit and would complain: give that a place to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise typer.Exit(PIPE_CLOSED) from None
        return len(text)

    def prose(self, text: str) -> None:
        """Whole lines for a person: control characters in them come from somebody's data and are dropped."""
        self.write(_CONTROL.sub("", text) + "\n")

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self.terminal

    def fileno(self) -> int:
        return self._stream.fileno()


class Progress:
    """What `Console.progress` yields. This one shows nothing."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""

    def update(self, text: str) -> None:
        """Show `text` (a loss, a rate) beside the count."""

    def report(self, done: int, total: int) -> None:
        """Set both figures at once; the shape of callback that long functions take."""


class _Sparse(Progress):
    """Off a terminal: a line for every tenth of the way, or every half minute."""

    def __init__(self, stream: Stream, description: str, total: int | None) -> None:
        self._stream, self._description, self._total = stream, description, total
        self._done, self._text = 0, ""
        self._shown_done, self._shown_at = 0, time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        self._show_if_due()

    def update(self, text: str) -> None:
        self._text = text

    def report(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        self._show_if_due()

    def _show_if_due(self) -> None:
        gained = self._done - self._shown_done
        finished = self._total is not None and self._done >= self._total
        far = self._total is not None and gained >= _SPARSE_SHARE * self._total
        if gained and (finished or far or time.monotonic() - self._shown_at >= _SPARSE_SECONDS):
            self._shown_done, self._shown_at = self._done, time.monotonic()
            count = f"{self._done}/{self._total}" if self._total is not None else f"{self._done}"
            self._stream.prose(f"{self._description}: {count}" + (f"  {self._text}" if self._text else ""))


class _Bar(Progress):
    """On a terminal: a rich bar."""

    def __init__(self, bars: Any, description: str, total: int | None) -> None:
        self._bars = bars
        self._task = bars.add_task(description, total=total, text="")

    def advance(self, steps: int = 1) -> None:
        self._bars.advance(self._task, steps)

    def update(self, text: str) -> None:
        self._bars.update(self._task, text=text)

    def report(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)


class Console:
    """The face's only way to print.

    quiet: nothing on stderr but errors. verbose: debug notes too. json: `document` prints, `data` does not.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        verbose: bool = False,
        json: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self._rank = rank()  # of several processes the first one speaks for all; the others only say why they stop
        self.quiet, self.verbose, self.json = quiet or self._rank > 0, verbose, json and self._rank == 0
        self._out = Stream(stdout or sys.stdout)
        self._err = Stream(stderr or sys.stderr)

    def note(self, text: str) -> None:
        """Prose on stderr."""
        if not self.quiet:
            self._err.prose(text)

    def debug(self, text: str) -> None:
        """Prose on stderr that only -v asks for."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Something the user should know although the work goes on."""
        self.note(f"malmen: warning: {text}")

    def error(self, text: str) -> None:
        """Why the program stops; shown even under -q."""
        self._err.prose(f"rank {self._rank}: {text}" if self._rank else text)

    def table(self, renderable: Any) -> None:
        """A rich table (or anything rich prints) on stderr."""
        if self.quiet:
            return
        rich = self._rich()
        with rich.capture() as drawn:
            rich.print(renderable)
        self._err.write(drawn.get() if self._err.terminal else _CONTROL.sub("", drawn.get()))

    @contextmanager
    def progress(self, description: str, total: int | None = None) -> Iterator[Progress]:
        """A bar on a terminal, sparse lines elsewhere, nothing under -q. total: None where nobody knows."""
        if self.quiet:
            yield Progress()
        elif self._err.terminal:
            with self._bars() as bars:
                yield _Bar(bars, description, total)
        else:
            yield _Sparse(self._err, description, total)

    def document(self, document: object) -> None:
        """With --json: the one JSON document on stdout. NaN is not JSON and raises ValueError."""
        if self.json:
            self._out.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def data(self, line: str) -> None:
        """A line on stdout; with --json the document is all there is."""
        if not self.json and not self._rank:
            self._out.prose(line) if self._out.terminal else self._out.write(line + "\n")

    def _rich(self) -> Any:
        from rich.console import Console as RichConsole

        terminal = self._err.terminal
        return RichConsole(
            file=self._err,  # type: ignore[arg-type]  # rich asks for IO[str]; it uses write, flush, isatty, fileno
            force_terminal=terminal,
            color_system="auto" if terminal and not os.environ.get("NO_COLOR") else None,
            width=None if terminal else PLAIN_WIDTH,
            highlight=False,
        )

    def _bars(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return RichProgress(*columns, TextColumn("{task.fields[text]}"), console=self._rich(), transient=True)
