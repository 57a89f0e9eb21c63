"""Every error a user can cause, one class for each documented exit code.

A leaf below all rooms, so that `cli/errors.py` can map them without importing torch. A message is one
line that says what, where and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class MalmenError(Exception):
    """Base class of the errors below; never raised itself."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a facts or spec file, printed as `file:line:field: message (hint)`."""

    file: str
    line: int | None
    field: str | None
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line, self.field) if part is not None)
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class FactsError(MalmenError):
    """A facts or spec file that cannot be used (exit 3). Carries up to 20 problems and the full count."""

    def __init__(self, problems: Sequence[Problem], total: int | None = None) -> None:
        self.problems = list(problems)
        self.total = len(self.problems) if total is None else total
        super().__init__("\n".join(str(problem) for problem in self.problems))


class SpecError(MalmenError):
    """A spec whose settings are unknown, of the wrong type or out of range (exit 3)."""


class CheckpointError(MalmenError):
    """A base checkpoint that is missing, unsafe, broken or unsupported (exit 4)."""


class EditorError(MalmenError):
    """An editor or delta that is missing, broken or made for another base (exit 4)."""


class NumericsError(MalmenError):
    """NaN, Inf or a singular system; names the module, and the fact where one is to blame (exit 5)."""


class FactNumericsError(NumericsError):
    """NaN or Inf on one fact, by its number; `said` has `{fact}` where the fact is named. See `naming`."""

    def __init__(self, said: str, number: int) -> None:
        self.said, self.number = said, number
        super().__init__(said.replace("{fact}", f"fact {number} (counting from 0)"))


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """During the body, facts are told by number to code that works on tokens; a NumericsError leaves it with an id."""
    try:
        yield
    except FactNumericsError as error:
        raise NumericsError(error.said.replace("{fact}", f"fact {ids[error.number]}")) from error


class OutputError(MalmenError):
    """An output that cannot be written, or must not be overwritten (exit 6)."""


class RankError(MalmenError):
    """Another process of a run of several died (exit 70); its own message says why."""


class MemoryLimitError(MalmenError):
    """Out of memory even at one fact a batch (exit 7)."""
