"""A run of several processes (torchrun, `accelerate launch`): which of them this is, read from the environment alone.

torch is not imported here. Every rank works; the first one prints and writes. What only looks at something (`diff`,
`facts check`) is done by each for itself, so that none says that all is well without having looked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from typer import BadParameter

SPREAD = ("apply", "train-editor", "eval")  # commands that share their work
WRITING = (["stats"], ["facts", "convert"])  # commands with one thing to write, which one process does alone

# What a launcher tells every process; a batch system that sets some of it has started one process alone.
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return _number("RANK", 0) if _several() else 0


def idle(arguments: Sequence[str]) -> bool:
    """Whether there is nothing to do here: what is written is the first rank's."""
    return rank() > 0 and any(list(arguments[: len(command)]) == command for command in WRITING)


def together(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """The process group during the body, where there are several processes and the command shares its work."""
    if not _several() or not _spread(arguments) or {"-h", "--help"} & set(arguments):
        return nullcontext()
    if "-" in arguments:
        raise BadParameter("standard input cannot be shared by several processes; name a file of facts instead of -")
    from malmen_cli.base import ranks

    return ranks.joined()


def _several() -> bool:
    return _number("WORLD_SIZE", 1) > 1 and all(os.environ.get(name) for name in _TOLD)


def _spread(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in SPREAD


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else usual
