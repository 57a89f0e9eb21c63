"""A run of several processes (torchrun, `accelerate launch`): which of them this is, read from the environment alone.

torch is not imported here. Every rank works; the first one prints and writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

SPREAD = ("apply", "train-editor", "eval")  # commands that share their work


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return _number("RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def idle(arguments: Sequence[str]) -> bool:
    """Whether there is nothing to do here: the first rank runs every other command alone."""
    return rank() > 0 and not _spread(arguments)


def together(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """The process group during the body, where there are several processes and the command shares its work."""
    if _number("WORLD_SIZE", 1) <= 1 or not _spread(arguments) or {"-h", "--help"} & set(arguments):
        return nullcontext()
    from malmen_cli.base import ranks

    return ranks.joined()


def _spread(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in SPREAD


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else usual
